"""torch.compile: whole graphs, no compilation per token, and eager's bits.

Bits, because all that the compiler could sum in another order (norms, products, attention, head) is a call
into an operator, and what it fuses (rotation, squared ReLU, residual sums) rounds element by element.
Without gradients, as here if nothing else is said, a decoder over a cache is a single operator.
"""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from text_models import tiny_model
from torch import Tensor, nn

from bitnet_ops import BitNet
from bitnet_ops.decoder.cache import CACHE_DTYPES, KVCache
from bitnet_ops.layers.linear import BitLinear, BitLinearQAT

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


def prefill_and_decode(
    forward: Forward,
    ids: Tensor,
    steps: int,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Scores of a prompt, and of the tokens of a greedy continuation one by one."""
    cache = KVCache(MODEL.config, ids.shape[0], ids.shape[1] + steps, dtype=dtype)
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


@pytest.mark.slow
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


LAYOUTS = [("tile16",), ("tile16_base3", "row", "column")]
FAST = [
    (LAYOUTS[0], torch.float32, False),
    (LAYOUTS[0], torch.bfloat16, False),
    (LAYOUTS[1], torch.int8, True),
]
"""Each dtype and each layout, with and without gradients. All combinations take half a minute."""


@pytest.mark.parametrize(
    ("layouts", "dtype", "gradients"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in product(LAYOUTS, CACHE_DTYPES, (False, True))
    ],
    ids=str,
)
def test_every_cache_and_layout(dtype: torch.dtype, layouts: tuple[str, ...], gradients: bool) -> None:
    """AOTAutograd decides here what is copied and what is changed in place; code is generated above."""
    torch.set_grad_enabled(gradients)
    model = tiny_model(eos=None, layers=1).requires_grad_(False)
    projections = [module for module in model.modules() if isinstance(module, BitLinear)]
    for projection, layout in zip(projections, cycle(layouts)):
        projection.repack(layout)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    ids = random_ids(2, 9, seed=9)
    ours = prefill_and_decode(forward, ids, 3, dtype=dtype)
    assert all(map(torch.equal, ours, prefill_and_decode(model, ids, 3, dtype=dtype)))


def operators(model: BitNet) -> list[object]:
    """What the graph of a prompt calls."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Forward:
        graphs.append(graph)
        return graph.forward

    forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    forward(random_ids(1, 5, seed=5), cache=KVCache(model.config, 1, 64))
    return [node.target for node in graphs[0].graph.nodes]


def test_a_decoder_over_a_cache_is_one_operator() -> None:
    called = operators(MODEL)
    assert called.count(torch.ops.bitnet_ops.opaque_decoder.default) == 1
    assert torch.ops.bitnet_ops.decoder_layers.default not in called


def test_with_gradients_the_layers_are_one_operator() -> None:
    model = tiny_model(eos=None).requires_grad_(False)
    with torch.enable_grad():
        called = operators(model)
    assert called.count(torch.ops.bitnet_ops.decoder_layers.default) == 1
    assert torch.ops.bitnet_ops.opaque_decoder.default not in called


def test_layers_of_another_kind_are_compiled() -> None:
    model = BitNet(MODEL.config, BitLinearQAT).eval()
    assert torch.ops.bitnet_ops.opaque_decoder.default not in operators(model)


def negate_up(model: BitNet) -> None:
    up = model.model.layers[1].mlp.up_proj
    up.packed_weight = BitLinear.from_ternary(up.unpack().neg(), 1.0).packed_weight


def another_layer_type(model: BitNet) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_proj = nn.Sequential(mlp.gate_proj, nn.Tanh())


def one_layer_less(model: BitNet) -> None:
    del model.model.layers[1]


def a_hook(model: BitNet) -> None:
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize(
    ("change", "gradients"),
    # Of hooks, torch.compile by itself sees only those that were there when it compiled.
    [
        *product((negate_up, another_layer_type, one_layer_less), (False,)),
        (negate_up, True),
        *(
            pytest.param(change, True, marks=pytest.mark.slow)
            for change in (another_layer_type, one_layer_less)
        ),
        (a_hook, False),
    ],
)
def test_a_change_of_the_layers_is_seen(change: Callable[[BitNet], None], gradients: bool) -> None:
    model = tiny_model(eos=None).requires_grad_(False)
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    ids = random_ids(1, 7, seed=7)
    with torch.set_grad_enabled(gradients):
        before = prefill_and_decode(forward, ids, 1)
        change(model)
        ours = prefill_and_decode(forward, ids, 1)
        assert all(map(torch.equal, ours, prefill_and_decode(model, ids, 1)))
    assert not torch.equal(ours[0], before[0])


def test_no_layers_are_left() -> None:
    model = tiny_model(eos=None)
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    ids = random_ids(1, 7, seed=7)
    prefill_and_decode(forward, ids, 1)
    del model.model.layers[:]
    ours = prefill_and_decode(forward, ids, 1)
    assert all(map(torch.equal, ours, prefill_and_decode(model, ids, 1)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_compiled_from_one_piece_of_code_are_not_mixed_up(copied: Callable[[BitNet], BitNet]) -> None:
    model = tiny_model(eos=None)
    twin = copied(model)
    negate_up(twin)
    ids = random_ids(1, 7, seed=7)
    for each in (model, twin, model):
        forward = torch.compile(each.forward, fullgraph=True, backend="eager")
        ours = prefill_and_decode(forward, ids, 1)
        assert all(map(torch.equal, ours, prefill_and_decode(each, ids, 1)))


def test_a_token_beyond_the_vocabulary() -> None:
    forward = torch.compile(MODEL.forward, fullgraph=True)
    with pytest.raises(RuntimeError, match=f"expected ids from 0 to {MODEL.config.vocab_size - 1}"):
        forward(torch.tensor([[MODEL.config.vocab_size]]), cache=KVCache(MODEL.config, 1, 64))


def test_a_model_that_is_no_longer_there() -> None:
    model = tiny_model(eos=None)
    number = model.model._number
    cache = KVCache(model.config, 1, 64)
    given = (
        random_ids(1, 3, seed=3),
        number,
        cache.cos,
        cache.sin,
        torch.tensor([0]),
        cache.keys,
        cache.values,
    )
    torch.ops.bitnet_ops.opaque_decoder(*given)
    del model
    gc.collect()
    with pytest.raises(
        RuntimeError, match=f"expected the number of a model in this process, got {number}: the"
    ):
        torch.ops.bitnet_ops.opaque_decoder(*given)


def train(steps: int, compiled: bool) -> list[float]:
    """Losses of a few optimiser steps on the same text."""
    torch.manual_seed(0)
    model = BitNet(MODEL.config, BitLinearQAT).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))

    def loss_of(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    update = optimizer.step
    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        update = torch.compile(update, backend="eager")
    losses = []
    for step in range(steps):
        # The optimiser is compiled for making its state, and once more for all steps that find it made.
        with no_compilation() if compiled and step > 1 else nullcontext():
            loss = loss_of(random_ids(2, 8, seed=0))
            loss.backward()
            update()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def gradients(dtype: torch.dtype, compiled: bool) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    layer = BitLinearQAT(70, 33)
    x = torch.randn(9, 70, dtype=dtype, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x) if compiled else layer(x)
    y.backward(torch.randn_like(y))
    return y.detach(), [t.grad for t in (x, layer.weight, layer.bias) if t.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_bit_linear_qat(dtype: torch.dtype) -> None:
    """The product is a sum of integers, so it has eager's bits if the quantised values have.

    The scale of the weights is a mean, which the compiler may sum in another order: at most 2310 terms, so
    a relative error of 2310 * 2^-24 on each side. It multiplies what comes out, and could turn a rounding
    of a weight only at an exact tie, which these weights do not have. Gradients are products of 33, 70 and 9
    terms whose order is free as well.
    """
    with torch.enable_grad():
        y, grads = gradients(dtype, compiled=True)
        expected, expected_grads = gradients(dtype, compiled=False)
    assert len(grads) == len(expected_grads) == 3
    scale_error = 2 * 2310 * 2.0**-24
    for ours, theirs, terms in zip([y, *grads], [expected, *expected_grads], [1, 33, 9, 9], strict=True):
        rounding = torch.finfo(ours.dtype).eps  # once to the dtype
        bound = scale_error + 2 * terms * 2.0**-24 + rounding
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max() * terms**0.5


# What is compiled again is decided before the back end sees it, so these tests do without one.


@pytest.mark.slow
def test_training_steps() -> None:
    """One program for all steps, eager's bits until gradients are summed in another order, and it learns.

    `test_bit_linear_qat` compares gradients.
    """
    with torch.enable_grad():
        losses = train(5, compiled=True)
        expected = train(1, compiled=False)
    assert losses[0] == expected[0]
    assert losses == sorted(losses, reverse=True)


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
            scores = forward(token, cache=cache)
    cache.length -= 1
    assert torch.equal(scores, MODEL(token, cache=cache))


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
