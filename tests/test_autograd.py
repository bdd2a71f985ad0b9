"""Gradients: straight-through for the quantised product, and those of the formula elsewhere."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from text_models import tiny_model
from torch import Tensor

from bitnet_ops import BitNet, KVCache, ops, packing, reference


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn(y.shape).to(y.dtype))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (0, 2)])
def test_ternary_linear_is_straight_through(shape: tuple[int, ...]) -> None:
    w = torch.randint(-1, 2, (18, 35), dtype=torch.int8)
    weight_scale = torch.rand(18) + 0.5
    x = torch.randn(*shape, 35, requires_grad=True)
    bias = torch.randn(18, requires_grad=True)
    y = ops.ternary_linear(x, ops.pack_ternary(w), weight_scale, bias, 18)
    given = gradients(y, [x, bias])
    # The same product without rounding, differentiated by PyTorch. Its factors are exact in float32
    # (ternary weights times one scale), so only the order of the sum of 18 terms may differ.
    weight = w.float() * weight_scale.unsqueeze(1)
    expected = gradients(torch.nn.functional.linear(x, weight, bias), [x, bias])
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=18 * 2.0**-23, atol=18 * 2.0**-23)


def test_ternary_linear_gives_no_gradient_to_weights() -> None:
    packed = ops.pack_ternary(torch.ones(16, 16, dtype=torch.int8))
    weight_scale = torch.ones(16, requires_grad=True)
    x = torch.randn(2, 16, requires_grad=True)
    y = ops.ternary_linear(x, packed, weight_scale, None, 16)
    (gradient,) = torch.autograd.grad(y.sum(), [weight_scale], allow_unused=True)
    assert gradient is None


OPTIONS = [
    *[(layout, bits, 0) for layout, bits in product(packing.LAYOUTS, (8, 16))],
    *[("tile16", bits, group_size) for bits, group_size in product((8, 16), (64, 256))],
]


class StraightThrough(torch.autograd.Function):
    """Forward the float64 product that rounding is taken for, backward what the operator gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, w: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.arguments = arguments
        return torch.nn.functional.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        packed, scale, *options = ctx.arguments
        with torch.enable_grad():
            x, bias = (leaf.detach().float().requires_grad_() for leaf in ctx.saved_tensors)
            y = ops.ternary_linear(x, packed, scale, bias, *options)
        grad_x, grad_bias = torch.autograd.grad(y, [x, bias], grad_y.float())
        return grad_x.double(), grad_bias.double(), None, None


@pytest.mark.parametrize(("layout", "bits", "group_size"), OPTIONS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_gradcheck(layout: str, bits: int, group_size: int, shape: tuple[int, ...]) -> None:
    """Differences of the straight-through product, which is linear in x, are its gradient."""
    out_features, in_features = 5, 70 if group_size < 256 else 260
    ternary = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    groups = -(-in_features // group_size) if group_size else 1
    scale = torch.rand(groups, out_features) + 0.5
    by_input = scale.repeat_interleave(group_size or in_features, dim=0)[:in_features]
    w = ternary.double() * by_input.T.double()
    packed = ops.pack_ternary(ternary, layout)
    options = (out_features, layout, bits, group_size)
    arguments = (packed, packing.pack_scales(scale) if group_size else scale[0], *options)
    x = torch.randn(*shape, in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out_features, dtype=torch.float64, requires_grad=True)
    # Each entry of the Jacobian is one product of a scale below 1.5, rounded once to float32, and zeros. The
    # differences, over a step of 1, are of sums below 2^10 in float64.
    assert torch.autograd.gradcheck(
        StraightThrough.apply, (x, bias, w, arguments), eps=1.0, atol=1.5 * 2.0**-24 + 2.0**-42, rtol=0.0
    )


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_opcheck_of_the_gradient(layout: str) -> None:
    packed = ops.pack_ternary(torch.randint(-1, 2, (18, 35), dtype=torch.int8), layout)
    x, bias = torch.randn(3, 35, requires_grad=True), torch.randn(18, requires_grad=True)
    arguments = (x, packed, torch.rand(18), bias, 18, layout)
    torch.library.opcheck(torch.ops.bitnet_ops.ternary_linear.default, arguments)


def test_gradients_of_slices_and_expanded_ones() -> None:
    packed = ops.pack_ternary(torch.randint(-1, 2, (18, 35), dtype=torch.int8))
    scale = torch.rand(18)

    def run(x: Tensor) -> Tensor:
        return ops.ternary_linear(x, packed, scale, None, 18)

    base = torch.randn(4, 70, 3, requires_grad=True)
    x = base[::2, ::2].transpose(1, 2)
    assert not x.is_contiguous()
    expanded = torch.ones(()).expand(2, 3, 18)  # the gradient that sum() hands back
    (given,) = torch.autograd.grad(run(x), base, expanded)
    plain = x.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(run(plain), plain, expanded.contiguous())
    assert torch.equal(given[::2, ::2].transpose(1, 2), expected)
    assert given[1::2].count_nonzero() == given[:, 1::2].count_nonzero() == 0


def test_rows_that_are_not_wanted_give_no_gradient() -> None:
    w = torch.randint(-1, 2, (18, 35), dtype=torch.int8)
    active = torch.rand(2, 18) < 0.4
    x = torch.randn(2, 35, requires_grad=True)
    y = ops.ternary_linear(x, ops.pack_ternary(w, "row"), torch.ones(18), None, 18, "row", active=active)
    (given,) = torch.autograd.grad(y.sum(), x)
    # Sums of at most 18 integers: exact.
    assert torch.equal(given, active.float() @ w.float())


def double_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def test_rms_norm() -> None:
    x, weight = torch.randn(2, 3, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    given = gradients(ops.rms_norm(x, weight, 1e-5), [x, weight])
    wide = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = gradients(double_rms_norm(*wide).float(), wide)
    # Sums of 40 terms of order one in float32: 40 roundoffs, with a factor 4 for the products.
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=4 * 40 * 2.0**-24, atol=4 * 40 * 2.0**-24)


def test_lm_head() -> None:
    x, weight = torch.randn(2, 3, 40, requires_grad=True), torch.randn(25, 40, requires_grad=True)
    given = gradients(ops.lm_head(x, weight), [x, weight])
    expected = gradients(torch.nn.functional.linear(x, weight), [x, weight])
    # Sums of at most 25 products of order one.
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * 25 * 2.0**-24, atol=4 * 25 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_take_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    x = torch.randn(3, 32).to(dtype).requires_grad_()
    weight = torch.randn(32).to(dtype).requires_grad_()
    table = torch.randn(20, 32).to(dtype).requires_grad_()
    packed = ops.pack_ternary(torch.randint(-1, 2, (8, 32), dtype=torch.int8))
    for gradient in (
        *gradients(ops.rms_norm(x, weight, 1e-5), [x, weight]),
        *gradients(ops.lm_head(x, table), [x, table]),
        *gradients(ops.ternary_linear(x, packed, torch.ones(8), None, 8), [x]),
    ):
        assert gradient.dtype == dtype


def test_only_needed_gradients_are_computed() -> None:
    x, weight = torch.randn(3, 32), torch.randn(32, requires_grad=True)
    ops.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None
    table = torch.randn(9, 32, requires_grad=True)
    ops.lm_head(x, table).sum().backward()
    assert table.grad is not None


def test_a_chain_of_operators_trains() -> None:
    packed = ops.pack_ternary(torch.randint(-1, 2, (24, 32), dtype=torch.int8))
    norm = torch.ones(32, requires_grad=True)
    table = torch.randn(10, 24, requires_grad=True)
    x, target = torch.randn(6, 32), torch.arange(6)
    losses = []
    optimizer = torch.optim.Adam([norm, table], lr=0.05)
    for _ in range(20):
        hidden = ops.ternary_linear(ops.rms_norm(x, norm, 1e-5), packed, torch.ones(24) / 5, None, 24)
        loss = torch.nn.functional.cross_entropy(ops.lm_head(hidden, table), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ---- operators without gradients ----------------------------------------------------------------------


def forward_only() -> dict[str, Callable[[Tensor], Any]]:
    """Every operator that has no gradient, as a function of an input of shape [1, 2, 64]."""
    packed, scale = ops.pack_ternary(torch.randint(-1, 2, (64, 64), dtype=torch.int8)), torch.ones(64)
    cos, sin = reference.rotary_embedding(torch.arange(64), 64, 10000.0)
    start = torch.tensor([0])
    keys, values = torch.zeros(1, 1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    return {
        "quantize_activations": lambda x: ops.quantize_activations(x),
        "lm_head_top_k": lambda x: ops.lm_head_top_k(x, torch.randn(9, 64), 2),
        "cached_attention": lambda x: ops.cached_attention(x, x, x, cos, sin, start, keys, values),
        "decoder_layers": lambda x: ops.decoder_layers(
            x,
            [packed, scale] * 7,
            [64, 0, 0, 0, *[0] * 8, *[0, 64, 64, 0, 8, 0, 0] * 7],  # no norms, no biases
            [0.0, 1.0],
            cos[None],
            sin[None],
            start,
            keys[None],
            values[None],
        ),
    }


@pytest.mark.parametrize("operator", forward_only())
def test_operators_without_a_gradient_say_so(operator: str) -> None:
    run = forward_only()[operator]
    x = torch.randn(1, 2, 64)

    def tensors(y: Any) -> list[Tensor]:
        return [y] if isinstance(y, Tensor) else list(y)

    torch.manual_seed(1)
    expected = tensors(run(x))
    torch.manual_seed(1)
    given = tensors(run(x.requires_grad_()))
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == one.is_floating_point()
        if one.is_floating_point():
            with pytest.raises(RuntimeError, match=f"bitnet_ops::{operator} has no gradient"):
                one.sum().backward()
    with torch.no_grad():
        assert not any(y.requires_grad for y in tensors(run(x)))


# ---- the whole model -----------------------------------------------------------------------------------


def prompted(model: BitNet, prompt: Tensor, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """Scores of a text behind a soft prompt [P, hidden_size], which takes the place of P embeddings."""

    def put_first(module: Any, arguments: Any, embeddings: Tensor) -> Tensor:
        return torch.cat((prompt.expand(len(embeddings), -1, -1), embeddings[:, len(prompt) :]), dim=1)

    handle = model.model.embed_tokens.register_forward_hook(put_first)
    try:
        return model(torch.nn.functional.pad(ids, (len(prompt), 0)), cache=cache)
    finally:
        handle.remove()


@pytest.mark.parametrize("training", [False, True])
def test_the_whole_model_hands_gradients_to_its_input(training: bool) -> None:
    model = tiny_model(eos=None).requires_grad_(False).train(training)
    ids = torch.randint(model.config.vocab_size, (2, 9))
    prompt = torch.randn(3, model.config.hidden_size, requires_grad=True)
    scores = prompted(model, prompt, ids)
    for token in (0, 1, 2, 11):
        (gradient,) = torch.autograd.grad(scores[:, token].sum(), prompt, retain_graph=True)
        assert gradient.isfinite().all()
        # Causal: a token sees itself and what is before it.
        assert gradient.count_nonzero(dim=1).bool().tolist() == [position <= token for position in range(3)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prompt_tuning_in_eval_mode() -> None:
    model = tiny_model(eos=None).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(model.config.vocab_size, (2, 6))
    prompt = torch.randn(4, model.config.hidden_size).mul_(0.02).requires_grad_()
    optimizer = torch.optim.Adam([prompt], lr=0.05)
    losses = []
    for _ in range(40):
        scores = prompted(model, prompt, ids)[:, 3:-1]
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_norms_of_a_packed_model_train_in_eval_mode() -> None:
    model = tiny_model(eos=None).requires_grad_(False)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    for norm in norms:  # one at a time: each makes another layer step aside
        norm.requires_grad_()
        (gradient,) = torch.autograd.grad(model(torch.tensor([[1, 2, 3]])).square().sum(), norm)
        assert gradient.isfinite().all()
        assert gradient.any()
        norm.requires_grad_(False)


def test_gradients_do_not_pass_a_cache_silently() -> None:
    model = tiny_model(eos=None).requires_grad_(False)
    prompt = torch.randn(2, model.config.hidden_size, requires_grad=True)
    ids = torch.tensor([[1, 2, 3]])
    cache = KVCache(model.config, 1, 16)
    scores = prompted(model, prompt, ids, cache)
    with pytest.raises(RuntimeError, match=r"cached_attention has no gradient.*without a cache"):
        scores.sum().backward()
    # The cache itself stays plain memory, of the same values as without gradients.
    assert not any(tensor.requires_grad for tensor in (*cache.keys, *cache.values))
    plain = KVCache(model.config, 1, 16)
    with torch.no_grad():
        assert torch.equal(prompted(model, prompt, ids, plain), scores)
    assert torch.equal(model(ids, cache=cache), model(ids, cache=plain))
