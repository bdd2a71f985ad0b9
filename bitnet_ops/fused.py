"""The steps of a decoder layer, several in one operator where that is possible.

It is when the projections are packed 8-bit `BitLinear` layers on the CPU, nobody asks for gradients and no
hook waits for what a layer gives; otherwise each function is the composition in its docstring, of the same
values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .linear import BitLinear


def norm_linears(norm: nn.Module, projections: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """``[projection(norm(x)) for projection in projections]``."""
    if _fusible(norm, projections, x) and len({projection.layout for projection in projections}) == 1:
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
    if _fusible(norm, [projection], x) and x.dtype == residual.dtype:
        return ops.norm_linear_add(
            x,
            norm.weight,
            norm.eps,
            projection.packed_weight,
            projection.weight_scale,
            projection.layout,
            residual,
        )
    return residual + dropout(projection(norm(x)))


def norm_squared_relu_glu(norm: nn.Module, gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """``relu(gate(n))^2 * up(n)`` with ``n = norm(x)``."""
    if _fusible(norm, [gate, up], x):
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
    return F.relu(gate(n)).square() * up(n)


def _fusible(norm: nn.Module, projections: Sequence[nn.Module], x: Tensor) -> bool:
    weight = getattr(norm, "weight", None)
    if norm.training or not x.is_cpu or weight is None or weight.dtype != torch.float32:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if _hooked(norm):
        return False
    return all(
        type(projection) is BitLinear
        and projection.bias is None
        and projection.activation_bits == 8
        and projection.group_size == 0
        and not _hooked(projection)
        for projection in projections
    )


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
