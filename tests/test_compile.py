"""torch.compile: whole graphs, no compilation per token, and eager's bits.

Bits, because all that the compiler could sum in another order (norms, products, attention, head) is a call
into an operator, and what it fuses (rotation, squared ReLU, residual sums) rounds element by element.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from text_models import tiny_model
from torch import Tensor, nn

from bitnet_ops.kv_cache import KVCache
from bitnet_ops.linear import BitLinear

Forward = Callable[..., Tensor]

MODEL = tiny_model(eos=None)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def no_compilation() -> torch.compiler.set_stance:
    """Fails where anything inside has to be compiled again."""
    return torch.compiler.set_stance("fail_on_recompile")


def random_ids(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(MODEL.config.vocab_size, (rows, length), generator=generator)


def prefill_and_decode(forward: Forward, ids: Tensor, steps: int, mask: Tensor | None = None) -> list[Tensor]:
    """Scores of a prompt, and of the tokens of a greedy continuation one by one."""
    cache = KVCache(MODEL.config, ids.shape[0], ids.shape[1] + steps)
    scores = [forward(ids, attention_mask=mask, cache=cache)]
    for _ in range(steps):
        scores.append(forward(scores[-1][:, -1:].argmax(-1), cache=cache))
    assert type(cache.length) is int
    assert cache.length == ids.shape[1] + steps
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_bit_linear(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = BitLinear.from_linear(nn.Linear(70, 33, bias=bias))
    compiled = torch.compile(layer, fullgraph=True)
    inputs = [torch.randn(tokens, 70, dtype=dtype) for tokens in (1, 5, 9, 4, 1, 17)]
    for x in inputs[:3]:  # one token, one number of tokens, any number of tokens
        assert torch.equal(compiled(x), layer(x))
    with no_compilation():
        for x in inputs:
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("padded", [False, True])
def test_prefill_and_decode_give_the_bits_of_eager(padded: bool) -> None:
    # One layer, and sizes that are variables from the start, because every program takes seconds to compile.
    model = tiny_model(eos=None, layers=1)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True)
    for length in (9, 14):
        ids, mask = random_ids(3, length, seed=length), None
        if padded:
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
            mask[2, :2] = 0
        ours = prefill_and_decode(forward, ids, 4, mask)
        assert all(map(torch.equal, ours, prefill_and_decode(model, ids, 4, mask)))


# What is compiled again is decided before the back end sees it, so these tests do without one.


def test_prompts_of_any_length_and_all_their_tokens() -> None:
    forward = torch.compile(MODEL.forward, fullgraph=True, backend="eager")
    for length in (9, 14):  # the second length makes it a variable
        prefill_and_decode(forward, random_ids(1, length, seed=length), 3)
        forward(random_ids(1, length, seed=length))
    with no_compilation():
        for length in (5, 14, 30):
            ids = random_ids(1, length, seed=length)
            assert all(
                map(torch.equal, prefill_and_decode(forward, ids, 25), prefill_and_decode(MODEL, ids, 25))
            )
            assert torch.equal(forward(ids), MODEL(ids))


def test_no_compilation_per_token_after_one_prompt() -> None:
    """The second decoded token already runs code that serves all that follow."""
    forward = torch.compile(MODEL.forward, fullgraph=True, backend="eager")
    cache = KVCache(MODEL.config, 1, 64)
    forward(random_ids(1, 10, seed=1), cache=cache)
    token = random_ids(1, 1, seed=2)
    forward(token, cache=cache)
    forward(token, cache=cache)
    with no_compilation():
        for _ in range(40):
            forward(token, cache=cache)


def test_padded_batches() -> None:
    forward = torch.compile(MODEL.forward, fullgraph=True, backend="eager")
    for length in (8, 13, 21):
        ids = random_ids(3, length, seed=length)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        if length < 21:
            prefill_and_decode(forward, ids, 3, mask)
        else:
            with no_compilation():
                ours = prefill_and_decode(forward, ids, 20, mask)
            assert all(map(torch.equal, ours, prefill_and_decode(MODEL, ids, 20, mask)))


def test_generate_uses_a_compiled_model() -> None:
    model = tiny_model(eos=None)
    expected = model.generate(random_ids(1, 6, seed=6), max_new_tokens=20)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Forward:
        graphs.append(graph)
        return graph.forward

    model.compile(fullgraph=True, backend=backend)
    model.generate(random_ids(1, 5, seed=5), max_new_tokens=3)
    model.generate(random_ids(1, 7, seed=7), max_new_tokens=3)
    with no_compilation():
        assert torch.equal(model.generate(random_ids(1, 6, seed=6), max_new_tokens=20), expected)
    assert graphs


def test_a_recompilation_would_be_noticed() -> None:
    """The test of the tests: a model that takes its length as a constant fails in `no_compilation`."""

    def forward(ids: Tensor, cache: KVCache) -> Tensor:
        return ids + int(str(cache.length))  # goes through a text, so every length is a program of its own

    compiled = torch.compile(forward)
    cache = KVCache(MODEL.config, 1, 8)
    compiled(torch.zeros(1, 1), cache)
    cache.length = 5
    with pytest.raises(RuntimeError, match="recompil"), no_compilation():
        compiled(torch.zeros(1, 1), cache)
