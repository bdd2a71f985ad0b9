"""Quantised activations, and their products with packed ternary weights."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops import add_op_namespace_prefix
from ._packing import unpack_ternary
from ._registry import OPS, batch_rows, check_device, fake_kernel, use_on_accelerators, without_gradient


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Rounds activations to integers, absmax per row of the last axis (arXiv:2402.17764, section 2).

    ``s = 127 / max(|x|)`` (32639 with 16 bits), ``q = round_half_to_even(x * s)``, ``x_scale = 1 / s``;
    ``x`` is about ``q * x_scale``. Float32 arithmetic whatever the dtype of ``x``. A row that holds a NaN
    or an infinity gets ``q = 0`` and ``x_scale = NaN``.

    Args:
        x: float32, bfloat16 or float16 [..., K], K at most 2^18.
        bits: 8 or 16.

    Returns:
        ``(q, x_scale)``: int8 or int16 [..., K] and float32 [...].

    Raises:
        RuntimeError: if ``x`` is no such tensor, or for other bits.

    Example:
        >>> quantize_activations(torch.tensor([[0.5, -1.0, 0.25]]))
        (tensor([[  64, -127,   32]], dtype=torch.int8), tensor([0.0079]))
    """
    result: tuple[Tensor, Tensor] = without_gradient(OPS.quantize_activations.default, x, bits)
    return result


@fake_kernel("quantize_activations")
def _(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    dtype = torch.int16 if bits == 16 else torch.int8
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


batch_rows("quantize_activations")


use_on_accelerators("quantize_activations", reference.quantize_activations)


def ternary_matmul(q: Tensor, packed: Tensor, out_features: int, layout: str = "tile16") -> Tensor:
    """Exact integer product ``acc[m, n] = sum_k q[m, k] * w[n, k]``.

    Args:
        q: int8 [M, K], on the CPU; K at most 2^18, so that int32 cannot overflow.
        packed: uint8, from ``pack_ternary(w, layout)``.
        out_features: N.
        layout: as in ``pack_ternary``.

    Returns:
        int32 [M, N].

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.

    Example:
        >>> w = torch.tensor([[-1, 0, 1], [1, 1, 1]], dtype=torch.int8)
        >>> ternary_matmul(torch.tensor([[2, 3, 4]], dtype=torch.int8), pack_ternary(w), 2)
        tensor([[2, 9]], dtype=torch.int32)
    """
    result: Tensor = OPS.ternary_matmul.default(q, packed, out_features, layout)
    return result


@fake_kernel("ternary_matmul")
def _(q: Tensor, packed: Tensor, out_features: int, layout: str = "tile16") -> Tensor:
    check_device("ternary_matmul", q, packed=packed)
    return q.new_empty((q.shape[0], out_features), dtype=torch.int32)


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: str = "tile16",
    activation_bits: int = 8,
    group_size: int = 0,
    active: Tensor | None = None,
) -> Tensor:
    """BitLinear: quantised activations times packed ternary weights (arXiv:2402.17764).

    ``y = acc * (x_scale * weight_scale) + bias`` with ``q, x_scale = quantize_activations(x)`` and
    ``acc = ternary_matmul(q, packed)``, rounded once to the dtype of ``x``. A row of ``x`` that holds a
    NaN or an infinity gives a row of NaN. Every layout gives the same bits.

    Up to four rows of ``x`` (two with 16-bit activations), layout "row" reads only rows of the matrix that
    are ``active`` for one of them, and layout "column" only columns whose quantised activation is not 0.

    Gradients are straight-through: with respect to ``x``, rounding counts as the identity, so
    ``grad_x = grad_y @ (w * weight_scale)``; ``bias`` gets the sum of ``grad_y``; packed weights and
    their scale get none.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU; K at most 2^18, with layout "column" 2^16.
        packed: uint8, from ``pack_ternary(w, layout)``.
        weight_scale: float32 [N], the multiplier that turns ternary weights back into real ones; with
            ``group_size`` float32 or float16 [ceil(K / group_size), N], see ``reference.ternary_linear``.
        bias: float32 [N] or None.
        out_features: N.
        layout: as in ``pack_ternary``.
        activation_bits: 8 or 16; 16 for models that were not trained with 8-bit activations.
        group_size: 0, or how many inputs share a scale: 64, 128 or 256, with layout "tile16".
        active: bool [..., N] or None, with layout "row": the results that are wanted; the others are 0.

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        RuntimeError: if dtypes, shapes or options do not fit together.

    Example:
        >>> w = torch.tensor([[-1, 0, 1]], dtype=torch.int8)
        >>> ternary_linear(torch.tensor([1.0, 2.0, 4.0]), pack_ternary(w), torch.ones(1), None, 1)
        tensor([2.9921])
    """
    result: Tensor = OPS.ternary_linear.default(
        x, packed, weight_scale, bias, out_features, layout, activation_bits, group_size, active
    )
    return result


@fake_kernel("ternary_linear")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: str = "tile16",
    activation_bits: int = 8,
    group_size: int = 0,
    active: Tensor | None = None,
) -> Tensor:
    check_device("ternary_linear", x, packed=packed, weight_scale=weight_scale, bias=bias, active=active)
    return x.new_empty((*x.shape[:-1], out_features))


def _ternary_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, weight_scale, _, ctx.out_features, ctx.layout, _, ctx.group_size, active = inputs
    ctx.save_for_backward(packed, weight_scale, active)
    ctx.in_features = x.shape[-1]
    ctx.x_dtype = x.dtype


def _ternary_linear_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    packed, weight_scale, active = ctx.saved_tensors
    needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
    grad_y = grad_y.float()
    if active is not None:
        grad_y = torch.where(active, grad_y, 0.0)
    grad_x = grad_bias = None
    if needs_x:
        w = unpack_ternary(packed, ctx.out_features, ctx.in_features, ctx.layout).float()
        weight_scale = weight_scale.float()
        if ctx.group_size == 0:
            grad_x = (grad_y * weight_scale) @ w
        else:
            scale = weight_scale.repeat_interleave(ctx.group_size, dim=0)[: ctx.in_features]
            grad_x = grad_y @ (w * scale.T)
        grad_x = grad_x.to(ctx.x_dtype)
    if needs_bias:
        grad_bias = grad_y.reshape(-1, ctx.out_features).sum(0)
    return grad_x, None, None, grad_bias, None, None, None, None, None


torch.library.register_autograd(
    add_op_namespace_prefix("ternary_linear"), _ternary_linear_backward, setup_context=_ternary_linear_setup
)


batch_rows("ternary_linear", 8)  # active
