"""Gradients: straight-through for the quantised product, and those of the formula elsewhere."""

import pytest
import torch
from torch import Tensor

from bitnet_ops import ops


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
