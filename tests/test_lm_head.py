"""The certified head: exactly what all logits would give, whatever the table, and bounds that hold."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from text_models import tiny_model
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitNet, ops, reference
from bitnet_ops.decoder.config import BitNetConfig
from bitnet_ops.decoder.head import ScreenedHead
from bitnet_ops.generation.sampling import Sampler, SamplingConfig, top_k
from bitnet_ops.layers.linear import BitLinearQAT


def assert_certified(
    x: Tensor, weight: Tensor, k: int, temperature: float = 1.0, noise: Tensor | None = None
) -> Tensor:
    """The screened result is that of all logits, bit for bit. Returns how many rows were needed."""
    screen = ops.screen_lm_head(weight)
    logits, ids, rescored = ops.lm_head_top_k(x, weight, k, *screen, temperature, noise)
    expected_logits, expected_ids = reference.top_k(ops.lm_head(x, weight), k, temperature, noise)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(logits.nan_to_num(7e37), expected_logits.nan_to_num(7e37))
    whole_logits, whole_ids, whole = ops.lm_head_top_k(x, weight, k, None, None, temperature, noise)
    assert torch.equal(whole_ids, expected_ids)
    assert torch.equal(whole_logits.nan_to_num(7e37), expected_logits.nan_to_num(7e37))
    assert (whole == weight.shape[0]).all()
    return rescored


# ---- the same result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1000, 5003])
def test_random_tables(isa: str, dtype: torch.dtype, vocabulary: int) -> None:
    for in_features, k in itertools.product((1, 15, 64, 200), (1, 5, 50)):
        weight = torch.randn(vocabulary, in_features).to(dtype)
        for rows in (1, 2, 5):
            rescored = assert_certified(torch.randn(rows, in_features), weight, k)
            if vocabulary == 5003 and in_features == 200:
                assert (rescored < vocabulary // 4).all(), "the screen should rule something out"


def test_every_isa_needs_the_same_rows() -> None:
    weight, x = torch.randn(3000, 130).bfloat16(), torch.randn(3, 130)
    outcomes = []
    for name in bitnet_ops.supported_isas():
        with bitnet_ops.use_isa(name):
            copied = ops.screen_lm_head(weight)
            outcomes.append((*copied, *ops.lm_head_top_k(x, weight, 9, *copied)))
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads(threads: None, count: int) -> None:
    weight, x = torch.randn(40_000, 64).bfloat16(), torch.randn(2, 64)
    expected = ops.lm_head_top_k(x, weight, 20)[:2]
    torch.set_num_threads(count)
    given = ops.lm_head_top_k(x, weight, 20, *ops.screen_lm_head(weight))
    assert all(torch.equal(a, b) for a, b in zip(given[:2], expected, strict=True))
    assert (given[2] < 4000).all()


@pytest.mark.parametrize("batch", [7, 16, 17, 40])
def test_a_row_does_not_depend_on_the_batch(batch: int) -> None:
    weight, x = torch.randn(2000, 96).bfloat16(), torch.randn(batch, 96)
    screen = ops.screen_lm_head(weight)
    together = ops.lm_head_top_k(x, weight, 3, *screen)
    for row in range(batch):
        alone = ops.lm_head_top_k(x[row], weight, 3, *screen)
        assert torch.equal(together[0][row], alone[0])
        assert torch.equal(together[1][row], alone[1])


def equal_rows() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 80).expand(500, -1).contiguous(), torch.randn(1, 80)


def few_distinct_rows() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 80)[torch.randint(4, (700,))], torch.randn(2, 80)


def zeros() -> tuple[Tensor, Tensor]:
    weight = torch.randn(600, 80)
    weight[::2] = 0.0
    weight[5] = -0.0
    return weight, torch.cat((torch.randn(1, 80), torch.zeros(1, 80)))


def all_zeros() -> tuple[Tensor, Tensor]:
    return torch.zeros(300, 80), torch.randn(1, 80)


def last_bit() -> tuple[Tensor, Tensor]:
    """Rows that are one bit of one element apart: the screen sees no difference between them."""
    weight = torch.randn(1, 80).bfloat16().expand(400, -1).clone()
    bits = weight.view(torch.int16)
    bits[torch.arange(400), torch.randint(80, (400,))] += torch.randint(-1, 2, (400,), dtype=torch.int16)
    return weight, torch.randn(3, 80)


def huge_norms() -> tuple[Tensor, Tensor]:
    """Sums that leave float32 for some rows, and products that do."""
    weight = torch.randn(500, 80)
    weight[7] *= 1e36
    weight[11] *= 1e30
    weight[300] = 3e38
    return weight, torch.cat((torch.randn(1, 80), torch.randn(1, 80) * 1e10, torch.randn(1, 80) * 1e37))


def tiny_norms() -> tuple[Tensor, Tensor]:
    weight = torch.randn(500, 80)
    weight[:200] *= 1e-30
    weight[200:400] *= 1e-38
    weight[400:450] *= 1e-44
    return weight, torch.cat((torch.randn(1, 80), torch.randn(1, 80) * 1e-20, torch.randn(1, 80) * 1e-43))


def all_tiny() -> tuple[Tensor, Tensor]:
    return torch.randn(500, 80) * 1e-40, torch.randn(2, 80) * 1e-3


def halves() -> tuple[Tensor, Tensor]:
    """Every element lies between two codes, and the token points where the copy is wrong: at the bound."""
    steps = torch.randint(-100, 100, (500, 80)).float() + 0.5
    steps[:, 0] = 127.0
    signs = torch.where(torch.rand(500, 1) < 0.5, -1.0, 1.0)
    error = steps - steps.round()
    return steps * signs * 0.01, torch.cat((error[:3], -error[3:6], torch.sign(error[6:8])))


def one_large_element() -> tuple[Tensor, Tensor]:
    """The scale of a row is that of its largest element, which leaves the others almost nothing."""
    weight = torch.randn(800, 80)
    weight[torch.arange(800), torch.randint(80, (800,))] = 1000.0
    x = torch.randn(2, 80)
    x[1, 3] = 1e4
    return weight, x


ADVERSARIES: list[Callable[[], tuple[Tensor, Tensor]]] = [
    equal_rows, few_distinct_rows, zeros, all_zeros, last_bit, huge_norms, tiny_norms, all_tiny, halves,
    one_large_element,
]  # fmt: skip


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_adversarial_tables(isa: str, adversary: Callable[[], tuple[Tensor, Tensor]]) -> None:
    weight, x = adversary()
    for k in (1, 2, 30):
        for noise in (None, ops.gumbel_noise(torch.arange(x.shape[0]), weight.shape[0])):
            assert_certified(x, weight, k, 0.7, noise)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_rows_and_tokens(isa: str, bad: float) -> None:
    weight, x = torch.randn(600, 70), torch.randn(3, 70)
    broken = weight.clone()
    broken[33, 5] = broken[599, 69] = bad
    broken_x = x.clone()
    broken_x[1, 3] = bad
    for k in (1, 40):
        assert_certified(x, broken, k)
        assert_certified(broken_x, weight, k)
        assert_certified(broken_x, broken, k)


@pytest.mark.parametrize("k", [99, 100, 101, 10_000])
def test_k_up_to_the_vocabulary(k: int) -> None:
    weight, x = torch.randn(100, 30), torch.randn(2, 30)
    assert_certified(x, weight, k)
    assert ops.lm_head_top_k(x, weight, k)[1].shape == (2, min(k, 100))


@pytest.mark.parametrize("shape", [(0,), (), (2, 3), (3, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    weight = torch.randn(50, 20)
    logits, ids, rescored = ops.lm_head_top_k(torch.randn(*shape, 20), weight, 4, *ops.screen_lm_head(weight))
    assert logits.shape == ids.shape == (*shape, 4)
    assert rescored.shape == shape


def test_empty_tables() -> None:
    for weight in (torch.zeros(0, 20), torch.zeros(30, 0)):
        assert_certified(torch.zeros(2, weight.shape[1]), weight, 3)


def test_inputs_need_not_be_contiguous_and_stay_as_they_are() -> None:
    weight, x = torch.randn(60, 300).T, torch.randn(40, 2).bfloat16().T
    x = torch.cat((x, x[:, :20]), dim=1)[:, :60]
    before = weight.clone(), x.clone()
    assert_certified(x, weight, 3)
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])


def test_where_the_screen_cannot_pay_it_stops() -> None:
    # A bound that rules nothing out: after a look or two the rest is computed, and all of it counts.
    weight, x = torch.randn(4000, 64), torch.randn(1, 64)
    codes, bounds = ops.screen_lm_head(weight)
    bounds[2] = math.inf
    logits, ids, rescored = ops.lm_head_top_k(x, weight, 3, codes, bounds)
    assert rescored == 4000
    expected = reference.top_k(ops.lm_head(x, weight), 3)
    assert torch.equal(logits, expected[0])
    assert torch.equal(ids, expected[1])


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_batch_on_several_threads_goes_on_screening(threads: None, count: int) -> None:
    # Early on many rows are the k best so far; that must not be taken for a screen that cannot pay.
    torch.set_num_threads(count)
    weight, x = torch.randn(20_000, 256).bfloat16(), torch.randn(6, 256)
    rescored = ops.lm_head_top_k(x, weight, 50, *ops.screen_lm_head(weight))[2]
    assert (rescored < 1000).all()


# ---- the bounds ---------------------------------------------------------------------------------------


def unpacked(codes: Tensor, bounds: Tensor, vocabulary: int, in_features: int) -> Tensor:
    """What the copy stands for, Q of screen.h, in float64 (where it is exact)."""
    groups = -(-in_features // 64)
    factor_bytes = -(-16 * groups // 64) * 64
    factor = codes[:, : 16 * groups].unflatten(1, (groups, 16)).transpose(1, 2)  # [tile, row, group]
    lines = codes[:, factor_bytes:].unflatten(1, (groups, 4, 3, 16, 4))  # [tile, group, block, line, row, j]
    high = lines >> 6
    last = high[:, :, :, 0] | high[:, :, :, 1] << 2 | high[:, :, :, 2] << 4
    code = torch.cat((lines & 63, last.unsqueeze(3)), dim=3).permute(0, 4, 1, 2, 3, 5).flatten(3)
    q = (code.double() - 32) * factor.unsqueeze(3)
    return (q.flatten(2).flatten(0, 1) * bounds[0].double()[:, None])[:vocabulary, :in_features]


@pytest.mark.parametrize("adversary", [*ADVERSARIES, lambda: (torch.randn(999, 333), torch.randn(1, 333))])
def test_the_copy_equals_the_reference_and_its_bounds_hold(
    isa: str, adversary: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    weight, _ = adversary()
    rows = slice(weight.shape[0])
    codes, bounds = ops.screen_lm_head(weight)
    expected_codes, expected_bounds = reference.screen_lm_head(weight)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(bounds[0], expected_bounds[0])
    real = unpacked(codes, bounds, *weight.shape)
    residual = (weight.double() - real).norm(dim=1)
    gamma = (2 * -(-weight.shape[1] // 64) + 7) * 2.0**-24 + 2.0**-22
    assert (bounds[1, rows].double() >= real.norm(dim=1) + residual).all()
    assert (bounds[1, rows].double() >= weight.double().norm(dim=1)).all()
    assert (bounds[2, rows].double() >= residual + gamma * weight.double().norm(dim=1) + 2.0**-100).all()
    # But not by much: 2^-12 for the sums, 2^-20 for the rest, and 2^-50 steps of the copy. Beyond 2^60, and
    # for rows of elements below 2^-100 (by their largest element), they are no estimates.
    usual = (weight.abs().amax(dim=1) >= 2.0**-100) & (expected_bounds[1, rows] < 2.0**59)
    slack = 1 + 2.0**-11
    limit = expected_bounds[1:, rows][:, usual] * slack + bounds[0, rows][usual] * 2.0**-49
    assert (bounds[1:, rows][:, usual] <= limit).all()


def bound_of(x: Tensor, codes: Tensor, bounds: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What screen.h says, in float64: approximate logits [B, V], and how far they may be off."""
    q, token_scale = reference.quantize_activations(x, 16)
    _, norm, residual = bounds[:, : weight.shape[0]].double()
    token = q.double() * token_scale.double()[:, None]
    approximate = token @ unpacked(codes, bounds, *weight.shape).T
    error = (x.double() - token).norm(dim=1)[:, None]
    return approximate, residual * (x.double().norm(dim=1)[:, None] + error) + norm * error + 2.0**-100


@pytest.mark.parametrize("in_features", [1, 63, 64, 65, 1000, 2560])
def test_logits_lie_within_the_bound(isa: str, in_features: int) -> None:
    worst = 0.0
    for _ in range(3):
        weight, x = torch.randn(200, in_features).bfloat16(), torch.randn(4, in_features)
        codes, bounds = ops.screen_lm_head(weight)
        approximate, bound = bound_of(x, codes, bounds, weight)
        off = (ops.lm_head(x, weight).double() - approximate).abs()
        assert (off <= bound * (1 + 2.0**-20)).all()
        worst = max(worst, float((off / bound).max()))
    assert worst > 0.02, "a bound far from every truth would prove little"


def test_the_bound_is_reached() -> None:
    """A token along what the copy loses of a row is off by almost the whole bound: it cannot be smaller."""
    weight = torch.randn(64, 2560).bfloat16()
    codes, bounds = ops.screen_lm_head(weight)
    x = (weight.double() - unpacked(codes, bounds, *weight.shape)).float()
    approximate, bound = bound_of(x, codes, bounds, weight)
    off = (ops.lm_head(x, weight).double() - approximate).abs()
    assert (off <= bound).all()
    assert (off / bound).diagonal().min() > 0.95


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_rounding_of_the_logits_is_within_gamma(adversary: Callable[[], tuple[Tensor, Tensor]]) -> None:
    weight, x = adversary()
    truth = x.double() @ weight.double().T
    n = -(-weight.shape[1] // 64) + 6
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    norms = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    logits = ops.lm_head(x, weight).double()
    sure = norms < 2.0**120
    off = (logits - truth).abs() - (gamma * norms + 2.0**-100 * (1 + norms))
    assert (off[sure] <= 0).all()


# ---- Gumbel noise -------------------------------------------------------------------------------------


def test_noise_equals_the_reference() -> None:
    seeds = torch.tensor([[0, 1, 2**63 - 1], [-1, 12345, -(2**63)]])
    given, expected = ops.gumbel_noise(seeds, 3000), reference.gumbel_noise(seeds, 3000)
    assert given.shape == (2, 3, 3000)
    assert given.dtype == torch.float32
    # Noise that can win is precise to a few roundings of its parts, of which none exceeds 28 = 40 ln 2.
    likely = expected > 0
    assert ((given - expected)[likely].abs() <= 28 * 4 * 2.0**-24).all()
    # For the rest 1 - u is rounded to 2^-25, and u >= 2^-24 counts: e^-g = -ln u is off by 1 / 2 at most,
    # of 1 to 17. In 18000 numbers u stays above 2^-16, where that is 2^-9.
    assert ((given - expected).abs() <= 2.0**-9).all()


def test_noise_is_the_same_for_every_thread_count_and_batch(threads: None) -> None:
    expected = ops.gumbel_noise(torch.tensor([5, 6]), 50_000)
    torch.set_num_threads(3)
    assert torch.equal(ops.gumbel_noise(torch.tensor(6), 50_000), expected[1])
    assert torch.equal(ops.gumbel_noise(torch.tensor([6]), 100), expected[1:, :100])


def test_noise_is_gumbel_distributed() -> None:
    noise = ops.gumbel_noise(torch.arange(100), 10_000).flatten().double()
    quantiles = torch.exp(-torch.exp(-noise)).sort().values
    grid = torch.arange(1, 1_000_001, dtype=torch.float64) / 1e6
    # Dvoretzky, Kiefer, Wolfowitz (Massart 1990): exceeding t has probability at most 2 exp(-2 n t^2), 3e-8.
    assert (quantiles - grid).abs().max() < 3e-3
    assert noise.isfinite().all()


def test_gumbel_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
    sampler = Sampler(SamplingConfig(do_sample=True, top_k=0, temperature=1.5), 1, seed=2)
    draws = 20_000
    counts = torch.bincount(torch.cat([sampler(logits) for _ in range(draws)]), minlength=5).double()
    expected = draws * (logits.double() / 1.5).softmax(-1)[0]
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    degrees, t = 4, 14  # as in test_sampling.py: one in a million
    assert chi_square < degrees + 2 * math.sqrt(degrees * t) + 2 * t


# ---- sampling and generating --------------------------------------------------------------------------

SETTINGS = [
    SamplingConfig(),
    SamplingConfig(do_sample=True),
    SamplingConfig(do_sample=True, top_k=1),
    SamplingConfig(do_sample=True, top_k=7, top_p=0.8, temperature=0.6),
    SamplingConfig(do_sample=True, top_k=20, min_p=0.1, temperature=1.7),
    SamplingConfig(do_sample=True, top_k=0, temperature=0.9),
    SamplingConfig(do_sample=True, top_k=10**6, temperature=1.2),
]


def test_top_k_prefers_smaller_ids() -> None:
    for _ in range(20):
        logits = torch.randint(5, (3, 40)).float()
        for k in (1, 3, 39):
            expected = reference.top_k(logits, k)
            assert all(torch.equal(a, b) for a, b in zip(top_k(logits, k), expected, strict=True))


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("ties", [False, True])
def test_sampler_chooses_the_same_tokens(config: SamplingConfig, ties: bool) -> None:
    weight = torch.randn(300, 40).bfloat16()
    if ties:
        weight = weight[torch.randint(6, (300,))]
    head = ScreenedHead(weight)
    of_all, of_few = Sampler(config, 3, seed=4), Sampler(config, 3, seed=4)
    assert of_few.best_are_enough(300)
    for _ in range(30):
        hidden = torch.randn(3, 40)
        assert torch.equal(of_few.from_head(head, hidden), of_all(ops.lm_head(hidden, weight)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("config", SETTINGS)
def test_bad_scores_are_refused_alike(config: SamplingConfig, bad: float) -> None:
    weight, hidden = torch.randn(300, 40), torch.randn(3, 40)
    hidden[2, 5] = bad
    messages = set()
    for choose in (
        lambda sampler: sampler(ops.lm_head(hidden, weight)),
        lambda sampler: sampler.from_head(ScreenedHead(weight), hidden),
    ):
        with pytest.raises(FloatingPointError, match="in row 2") as error:
            choose(Sampler(config, 3, seed=0))
        messages.add(str(error.value))
    assert len(messages) == 1


def test_what_needs_all_logits() -> None:
    penalised = Sampler(SamplingConfig(repetition_penalty=1.2), 1)
    penalised.observe(torch.tensor([[1]]), 100)
    assert not penalised.best_are_enough(100)
    for config in (
        SamplingConfig(do_sample=True, top_k=0, top_p=0.9),
        SamplingConfig(do_sample=True, top_k=0, min_p=0.1),
    ):
        assert not Sampler(config, 1).best_are_enough(100)


@pytest.fixture
def model() -> BitNet:
    model = tiny_model(eos=None)
    model.certified_head = True
    return model


ARGUMENTS = [
    {},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 3, "top_k": 5, "top_p": 0.7, "temperature": 0.8},
    {"do_sample": True, "seed": 3, "top_k": 0},
    {"do_sample": True, "seed": 3, "top_k": 0, "top_p": 0.9},
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_generate_writes_the_same_text(isa: str, model: BitNet, arguments: dict[str, object]) -> None:
    batch = model.encode([[5, 80, 200, 7, 7, 301], [9], [300, 4, 17]])
    certified = model.generate(**batch, max_new_tokens=12, **arguments)
    head = model._screened_head
    without_top_k = "top_p" in arguments and arguments["top_k"] == 0
    needs_all = without_top_k or "repetition_penalty" in arguments
    assert (head is None) == needs_all
    if head is not None:
        assert head.rescored is not None
        assert head.rescored.shape == (3,)
    model.certified_head = False
    assert torch.equal(model.generate(**batch, max_new_tokens=12, **arguments), certified)


def test_streams_and_untied_heads() -> None:
    config = BitNetConfig(
        vocab_size=700, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = BitNet(config).eval()
    texts = []
    for certified in (True, False):
        model.certified_head = certified
        texts.append([int(t) for t in model.stream_tokens(torch.tensor([[1, 2]]), max_new_tokens=20)])
    assert texts[0] == texts[1]
    assert model._screened_head is not None
    assert model._screened_head.weight is model.lm_head.weight


def test_the_copy_follows_the_weights(model: BitNet) -> None:
    prompt = torch.tensor([[5, 80, 200]])
    model.generate(prompt, max_new_tokens=2)
    first = model._screened_head
    model.generate(prompt, max_new_tokens=2)
    assert model._screened_head is first, "made once"
    with torch.no_grad():
        model.head_weight.mul_(-1)
    changed = model.generate(prompt, max_new_tokens=8)
    assert model._screened_head is not first
    model.certified_head = False
    assert torch.equal(model.generate(prompt, max_new_tokens=8), changed)
    model.certified_head = True
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(prompt, max_new_tokens=8), changed)
    assert twin._screened_head is not None
    assert twin._screened_head.weight is twin.head_weight


def test_outputs_can_be_trained_on(model: BitNet) -> None:
    ids = model.generate(torch.tensor([[5, 80]]), max_new_tokens=2)
    trainee = torch.nn.Embedding(model.config.vocab_size, 4)
    trainee(ids).sum().backward()  # refused for tensors from inference mode
    tokens = next(model.stream_tokens(torch.tensor([[5, 80]]), max_new_tokens=2))
    assert not tokens.is_inference()


def test_small_heads_and_training_mode_do_without() -> None:
    model = tiny_model(eos=None)
    assert model.certified_head is BitNet.certified_head is None
    assert model.screened_head() is None, "small heads are computed whole"
    model.certified_head = True
    assert model.screened_head() is not None
    trained = BitNet(model.config, BitLinearQAT).train()
    trained.certified_head = True
    assert trained.screened_head() is None


def test_broken_weights_give_an_error_not_text(model: BitNet) -> None:
    with torch.no_grad():
        model.head_weight[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits: expected finite scores"):
        model.generate(torch.tensor([[1]]))
