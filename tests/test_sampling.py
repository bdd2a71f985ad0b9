"""The filters against transformers' processors, and the draw against the probabilities."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bitnet_ops.generation.sampling import (
    NUCLEUS,
    Sampler,
    SamplingConfig,
    candidates,
    draw,
    penalize_repetition,
    top_k,
)

VOCAB = 97


def random_logits(seed: int, rows: int = 4, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def distribution(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Our probabilities, in the order of the vocabulary."""
    probabilities, ids = candidates(logits, config)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities if ids is None else torch.zeros_like(logits.double()).scatter(1, ids, probabilities)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        *itertools.product(
            (0.3, 1.0, 1.7), (0, 1, 5, VOCAB - 1, VOCAB, 1000), (0.0, 0.4, 0.95, 1.0), (None, 0.05, 1.0)
        )
    ],
)
def test_filters_equal_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float | None
) -> None:
    config = SamplingConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    chain.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        chain.append(MinPLogitsWarper(min_p))
    for seed in range(5):
        logits = random_logits(seed)
        # In float64, so that both sides place the edges of top-p alike.
        expected = chain(torch.zeros(4, 1, dtype=torch.int64), logits.double()).softmax(-1)
        ours = distribution(logits, config)
        assert torch.equal(ours > 0, expected > 0)
        # Two orders of summing up to 97 float64 terms: 97 roundings of 2^-53 on either side.
        torch.testing.assert_close(ours, expected, rtol=2 * VOCAB * 2.0**-53, atol=0)


@pytest.mark.parametrize("penalty", [0.5, 1.1, 3.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(1)
    ids = torch.randint(VOCAB, (4, 20), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(4, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_padding_is_no_repetition() -> None:
    # Row 0 is padded with token 7, which row 1 has really seen.
    logits = torch.tensor([[0.0] * 7 + [1.0, 0.9], [0.0] * 7 + [1.0, 0.9]])
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0), 2)
    sampler.observe(torch.tensor([[7, 3], [7, 3]]), 9, torch.tensor([[0, 1], [1, 1]]))
    assert sampler(logits).tolist() == [7, 8]
    # By now row 0 has written token 7 itself.
    assert sampler(logits)[0] == 8


def test_penalty_acts_before_the_filters() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    sampler = Sampler(SamplingConfig(do_sample=True, top_k=1, repetition_penalty=10.0), 1, seed=0)
    sampler.observe(torch.tensor([[0]]), 3)
    assert [int(sampler(logits)) for _ in range(3)] == [1, 2, 0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_distribution(weights: list[int], uniform: float) -> None:
    column = int(
        draw(torch.tensor([weights], dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64))
    )
    # Integers add exactly; the one rounding is that of the product.
    point = min(uniform * sum(weights), math.nextafter(sum(weights), 0))
    assert sum(weights[:column]) <= point < sum(weights[: column + 1])
    assert weights[column] > 0


def test_draw_at_the_ends() -> None:
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.0]] * 2, dtype=torch.float64)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weights, ends).tolist() == [1, 2]


def test_samples_follow_the_probabilities() -> None:
    config = SamplingConfig(do_sample=True, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02)
    logits = random_logits(3, rows=1)
    expected = distribution(logits, config)[0]
    rows, steps = 200, 100  # rows are independent streams, as the next test shows
    draws = rows * steps
    sampler, logits = Sampler(config, rows, seed=5), logits.expand(rows, -1)
    counts = torch.bincount(torch.cat([sampler(logits) for _ in range(steps)]), minlength=VOCAB).double()
    kept = expected > 0
    assert kept.sum() > 5
    assert not counts[~kept].any()
    chi_square = float(((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum())
    # Laurent and Massart (2000): a chi-square variable of d degrees of freedom exceeds d + 2 sqrt(d t) + 2 t
    # with probability at most exp(-t); t = 14 is one in a million.
    degrees, t = int(kept.sum()) - 1, 14
    assert chi_square < degrees + 2 * math.sqrt(degrees * t) + 2 * t


def test_rows_draw_independently_of_the_batch() -> None:
    logits = random_logits(4, rows=1)
    config = SamplingConfig(do_sample=True, top_k=0)
    one, three = Sampler(config, 1, seed=9), Sampler(config, 3, seed=9)
    alone = [int(one(logits)) for _ in range(40)]
    together = torch.stack([three(logits.expand(3, -1)) for _ in range(40)])
    assert together[:, 0].tolist() == alone
    # Three streams, not one three times.
    assert not torch.equal(together[:, 0], together[:, 1])
    assert not torch.equal(together[:, 1], together[:, 2])


def test_seed_and_global_generator() -> None:
    logits = random_logits(5, rows=2)

    def draws(seed: int | None) -> list[list[int]]:
        sampler = Sampler(SamplingConfig(do_sample=True, top_k=0), 2, seed)
        return [sampler(logits).tolist() for _ in range(20)]

    assert draws(1) == draws(1) != draws(2)
    torch.manual_seed(7)
    first, second = draws(None), draws(None)
    torch.manual_seed(7)
    assert draws(None) == first != second
    torch.manual_seed(7)
    state = torch.get_rng_state()
    draws(1)
    assert torch.equal(torch.get_rng_state(), state), "a seed of its own leaves the global generator alone"


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingConfig(), 1)(torch.tensor([[1.0, 2.0, 2.0]])).tolist() == [1]


def test_top_k_keeps_k_of_equals() -> None:
    probabilities, _ = candidates(torch.zeros(1, 10), SamplingConfig(do_sample=True, top_k=3))
    torch.testing.assert_close(probabilities, torch.full((1, 3), 1 / 3, dtype=torch.float64))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.data())
def test_top_k_puts_equals_in_the_order_of_the_vocabulary(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values) - 1))
    logits = torch.tensor([values, values[::-1]], dtype=torch.float32)
    best, ids = logits.sort(dim=-1, descending=True, stable=True)
    ours = top_k(logits, k)
    assert torch.equal(ours[0], best[:, :k])
    assert torch.equal(ours[1], ids[:, :k])


@pytest.mark.parametrize("min_p", [None, 0.01])
def test_top_p_of_many_tokens_is_that_of_all_in_order(min_p: float | None) -> None:
    """Rows whose best tokens are enough, and rows that need more of them, alone and beside each other."""
    config = SamplingConfig(do_sample=True, top_k=0, top_p=0.9, min_p=min_p)
    logits = torch.randn(4, 3 * NUCLEUS, generator=torch.Generator().manual_seed(8)).round(decimals=1)
    logits *= torch.tensor([[4.0], [0.5], [2.0], [8.0]])
    counts = (distribution(logits, config) > 0).sum(-1)
    if min_p is None:
        assert counts.max() > NUCLEUS > counts.min()
    together = distribution(logits, config)
    for row in range(4):
        probabilities, ids = candidates(logits[row : row + 1], config)
        assert ids is not None
        alone = torch.zeros_like(together[:1]).scatter(1, ids, probabilities / probabilities.sum())
        assert torch.equal(alone > 0, together[row : row + 1] > 0)
        scores, order = logits[row].double().sort(descending=True, stable=True)
        expected = scores.softmax(-1)
        kept = (expected.cumsum(-1) - expected < 0.9) & (expected >= (min_p or 0) * expected[0])
        # 3072 float64 terms, summed in two orders.
        torch.testing.assert_close(
            alone[0, order[kept]], expected[kept] / expected[kept].sum(), rtol=2 * 3072 * 2.0**-53, atol=0
        )
        assert not alone[0, order[~kept]].any()


def test_minus_infinity_is_never_chosen() -> None:
    logits = torch.full((1, 6), -math.inf)
    logits[0, 4] = 0.0
    for config in (SamplingConfig(), SamplingConfig(do_sample=True), SamplingConfig(do_sample=True, top_k=0)):
        assert Sampler(config, 1, seed=0)(logits).tolist() == [4]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_scores_are_refused(do_sample: bool, bad: float) -> None:
    logits = random_logits(6)
    logits[2, 5] = bad
    with pytest.raises(FloatingPointError, match=r"logits: expected finite .* in row 2"):
        Sampler(SamplingConfig(do_sample=do_sample), 4, seed=0)(logits)
    with pytest.raises(FloatingPointError, match="-inf in row 0"):
        Sampler(SamplingConfig(do_sample=do_sample), 1, seed=0)(torch.full((1, 3), -math.inf))


def test_inputs_are_unchanged() -> None:
    logits = random_logits(7)
    before = logits.clone()
    sampler = Sampler(SamplingConfig(do_sample=True, top_p=0.5, repetition_penalty=1.5), 4, seed=0)
    ids = torch.zeros(4, 3, dtype=torch.int64)
    sampler.observe(ids, VOCAB)
    sampler(logits)
    assert torch.equal(logits, before)
    assert not ids.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", None),
    ],
)
def test_wrong_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        SamplingConfig(**{name: value})  # type: ignore[arg-type]


def test_wrong_do_sample_is_named() -> None:
    with pytest.raises(TypeError, match=r"^do_sample: expected True or False, got 'yes'"):
        SamplingConfig(do_sample="yes")  # type: ignore[arg-type]
