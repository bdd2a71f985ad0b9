"""The elementwise half of a gated linear unit."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops import add_op_namespace_prefix
from ._registry import OPS, batch_rows, check_device, fake_kernel, use_on_accelerators


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The elementwise half of a gated linear unit (arXiv:2002.05202): ``y = activation(gate) * up``.

    In float32 arithmetic, rounded once to the dtype of ``gate``. So in float16 the square of ``relu2``
    cannot overflow before ``up`` makes it small again, as it does from a gate of 256 on where each step is
    rounded.

    - ``"relu2"``: ``relu(gate)^2`` (arXiv:2109.08668). Where the gate is closed, at most 0, the result is +0
      whatever ``up`` holds there.
    - ``"silu"``: ``gate * sigmoid(gate)`` (arXiv:1702.03118).
    - ``"gelu_tanh"``: ``0.5 * gate * (1 + tanh(u))`` with ``u = sqrt(2 / pi) * (gate + 0.044715 * gate^3)``
      (arXiv:1606.08415), computed as ``gate * sigmoid(2 u)``, which is the same and loses nothing where the
      result is small.

    Gradients are those of ``reference.glu``.

    Args:
        gate: float32, bfloat16 or float16 [..., N].
        up: same dtype and shape.
        activation: ``"relu2"``, ``"silu"`` or ``"gelu_tanh"``.

    Returns:
        Shape and dtype of ``gate``.

    Raises:
        RuntimeError: if dtypes or shapes differ, or the activation is another.

    Example:
        >>> glu(torch.tensor([-1.0, 3.0]), torch.tensor([5.0, 2.0]), "relu2")
        tensor([ 0., 18.])
    """
    result: Tensor = OPS.glu.default(gate, up, activation)
    return result


@fake_kernel("glu")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check_device("glu", gate, up=up)
    return gate.new_empty(gate.shape)


def _glu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _glu_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        gate, up = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        y = reference.glu(gate, up, ctx.activation)
        gradients = torch.autograd.grad(y, (gate, up), grad_y)
    return *gradients, None


torch.library.register_autograd(add_op_namespace_prefix("glu"), _glu_backward, setup_context=_glu_setup)


use_on_accelerators("glu", reference.glu)


batch_rows("glu", 1)
