"""The steps of a decoder layer, several in one operator where that is possible.

It is when the projections are packed 8-bit `BitLinear` layers on the CPU, nobody asks for gradients and no
hook waits for what a layer gives; otherwise each function is the composition in its docstring, of the same
values.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layers.linear import BitLinear
from ..layers.norm import RMSNorm


def norm_linears(norm: nn.Module, projections: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """``[projection(norm(x)) for projection in projections]``."""
    if (
        _runs_fused(norm, x)
        and _are_fusible(projections)
        and len({projection.layout for projection in projections}) == 1
    ):
        return ops.norm_linears(
            x,
            norm.weight,
            norm.eps,
            [projection.packed_weight for projection in projections],
            [projection.weight_scale for projection in projections],
            [projection.out_features for projection in projections],
            projections[0].layout,
        )
    n = norm(x)
    return [projection(n) for projection in projections]


def norm_linear_add(
    norm: nn.Module, projection: nn.Module, x: Tensor, residual: Tensor, dropout: nn.Module
) -> Tensor:
    """``residual + dropout(projection(norm(x)))``."""
    if _runs_fused(norm, x, residual) and is_fusible(projection) and x.dtype == residual.dtype:
        return ops.norm_linear_add(
            x,
            norm.weight,
            norm.eps,
            projection.packed_weight,
            projection.weight_scale,
            projection.layout,
            residual,
        )
    y: Tensor = residual + dropout(projection(norm(x)))
    return y


def norm_squared_relu_glu(norm: nn.Module, gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """``relu(gate(n))^2 * up(n)`` with ``n = norm(x)``."""
    if _runs_fused(norm, x) and is_fusible(gate) and is_fusible(up):
        return ops.norm_squared_relu_glu(
            x,
            norm.weight,
            norm.eps,
            gate.packed_weight,
            gate.weight_scale,
            gate.layout,
            up.packed_weight,
            up.weight_scale,
            up.layout,
        )
    n = norm(x)
    y: Tensor = F.relu(gate(n)).square() * up(n)
    return y


def is_fusible_norm(norm: nn.Module) -> TypeGuard[RMSNorm]:
    """Whether operators can do what the norm does, and nobody watches it."""
    return (
        type(norm) is RMSNorm
        and not norm.training
        and norm.weight.dtype == torch.float32
        and norm.weight.device.type == "cpu"
        and not is_observed(norm)
    )


def is_fusible(projection: nn.Module) -> TypeGuard[BitLinear]:
    """Whether operators can do what the projection does, and nobody watches it."""
    return (
        type(projection) is BitLinear
        and projection.bias is None
        and projection.activation_bits == 8
        and projection.group_size == 0
        and projection.packed_weight.device.type == "cpu"
        and not is_observed(projection)
    )


def _are_fusible(projections: Sequence[nn.Module]) -> TypeGuard[Sequence[BitLinear]]:
    return all(map(is_fusible, projections))


def _runs_fused(norm: nn.Module, *inputs: Tensor) -> TypeGuard[RMSNorm]:
    """Whether an operator may begin with this norm: it gives no gradients."""
    if not all(x.is_cpu for x in inputs) or not is_fusible_norm(norm):
        return False
    return not (
        torch.is_grad_enabled() and (norm.weight.requires_grad or any(x.requires_grad for x in inputs))
    )


def is_observed(module: nn.Module) -> bool:
    """Whether hooks, or a method put in the place of forward, see what the module gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__
