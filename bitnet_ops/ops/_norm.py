"""The root mean square norm."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops import add_op_namespace_prefix
from ._registry import OPS, batch_rows, check_device, fake_kernel, use_on_accelerators


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis (arXiv:1910.07467), rounded once to the dtype of ``x``.

    ``y = x / sqrt(mean(x^2) + eps) * weight``, in float32 arithmetic.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: float32, bfloat16 or float16 [K].
        eps: added to the mean square, at least 0.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together, or ``eps`` is negative or NaN.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0)
        tensor([0.8485, 1.1314])
    """
    result: Tensor = OPS.rms_norm.default(x, weight, eps)
    return result


@fake_kernel("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_device("rms_norm", x, weight=weight)
    return x.new_empty(x.shape)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    # With r = 1 / sqrt(mean(x^2) + eps) and u = grad_y * weight:
    # grad_x = r * u - x * r^3 * mean(u * x),  grad_weight = sum over rows of grad_y * x * r.
    x, weight = ctx.saved_tensors
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + ctx.eps)
    normalised = wide * inverse_rms
    grad_y = grad_y.float()
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        u = grad_y * weight.float()
        grad_x = (inverse_rms * (u - normalised * (u * normalised).mean(dim=-1, keepdim=True))).to(x.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = (grad_y * normalised).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x, grad_weight, None


torch.library.register_autograd(
    add_op_namespace_prefix("rms_norm"), _rms_norm_backward, setup_context=_rms_norm_setup
)


batch_rows("rms_norm")


use_on_accelerators("rms_norm", reference.rms_norm)
