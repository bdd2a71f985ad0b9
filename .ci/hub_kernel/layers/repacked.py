"""Products with weights as transformers stores them, which are packed once and kept.

A layer of a hub kernel has no state, and the layer that adopts it keeps its own weights. So the packed copy,
2 bits a weight or less, stands here beside them. It belongs to the memory of the weights: when that is gone,
the next layer that is packed drops it. It is made anew after a tensor was written to, as PyTorch counts it:
in place under ``torch.no_grad`` or by ``load_state_dict``, not through ``tensor.data``. Who has no memory for
both replaces the layers (`bitnet_ops.accelerate`) or loads them packed (`bitnet_ops.register_transformers`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._ops import add_op_namespace_prefix
from ..integrations.transformers_weights import KINDS, ternary_weights
from ..locks import Lock
from ..ops._registry import OPS, check_device, fake_kernel
from .linear import BitLinear, best_layout
from .memory import HugePages

NAME, BACKWARD = "repacked_linear", "repacked_linear_backward"

for operator, first in ((NAME, "x"), (BACKWARD, "grad_y")):
    torch.library.define(
        add_op_namespace_prefix(operator),
        f"(Tensor {first}, Tensor weight, Tensor? weight_scale, Tensor? bias, str kind, int out_features) "
        "-> Tensor",
        tags=torch.Tag.pt2_compliant_tag,
    )


def repacked_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    out_features: int,
) -> Tensor:
    """A ternary linear layer, from the tensors of one of transformers'.

    The gradient with respect to ``x`` is straight-through, as in `ternary_linear`; the others get none.

    Args:
        x: float32, bfloat16 or float16 [..., in_features], on the CPU.
        weight: as `transformers_weights` draws it.
        weight_scale: [1]; None with "online".
        bias: [out_features] or None.
        kind: "offline", "online" or "bitlinear".
        out_features: of the layer.

    Returns:
        [..., out_features] in the dtype of ``x``.

    Raises:
        RuntimeError: shapes do not fit together, or the weights are not ternary.
    """
    tensors = (None if tensor is None else tensor.detach() for tensor in (weight, weight_scale, bias))
    y: Tensor = getattr(OPS, NAME).default(x, *tensors, kind, out_features)
    return y


class _Kept(NamedTuple):
    state: tuple[Any, ...]
    layer: BitLinear


# By the memory of the weights and where in it they begin: tensors come here as they are, detached or as an
# input of a compiled program, which are different objects.
_kept: dict[tuple[StorageWeakRef, int], _Kept] = {}
_lock = Lock()
_memory = HugePages()


@torch.library.impl(add_op_namespace_prefix(NAME), "CPU")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    out_features: int,
) -> Tensor:
    return _layer(weight, weight_scale, bias, kind, out_features)(x)


@torch.library.impl(add_op_namespace_prefix(BACKWARD), "CPU")
def _(
    grad_y: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    out_features: int,
) -> Tensor:
    layer = _layer(weight, weight_scale, bias, kind, out_features)
    return ((grad_y.float() * layer.weight_scale) @ layer.unpack().float()).to(grad_y.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.kind, ctx.out_features = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = getattr(OPS, BACKWARD).default(grad_y, *ctx.saved_tensors, ctx.kind, ctx.out_features)
    return grad_x, None, None, None, None, None


torch.library.register_autograd(add_op_namespace_prefix(NAME), _backward, setup_context=_setup)


def _layer(
    weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, kind: str, out_features: int
) -> BitLinear:
    """The packed copy, made where there is none of these tensors as they are."""
    key = _place(weight)
    state = (kind, out_features, *(_state(tensor) for tensor in (weight, weight_scale, bias)))
    kept = _kept.get(key)
    if kept is None or kept.state != state:
        with _lock:
            kept = _kept.get(key)  # another thread may have made it meanwhile
            if kept is None or kept.state != state:
                kept = _Kept(state, _packed(weight, weight_scale, bias, kind, out_features))
                for old in [old for old in _kept if old[0].expired()]:
                    del _kept[old]
                _kept[key] = kept
    return kept.layer


def _place(tensor: Tensor) -> tuple[StorageWeakRef, int]:
    return StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset()


def _state(tensor: Tensor | None) -> Any:
    """Equal for a tensor that is what it was."""
    if tensor is None:
        return None
    # Tensors made under inference_mode are not counted, and are not for writing to outside of it.
    version = 0 if tensor.is_inference() else tensor._version
    return *_place(tensor), tensor.dtype, tensor.shape, tensor.stride(), version


def _packed(
    weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, kind: str, out_features: int
) -> BitLinear:
    def error(expected: str, got: str) -> RuntimeError:
        return RuntimeError(f"bitnet_ops::{NAME}: expected {expected}, got {got}")

    if kind not in KINDS:
        raise error(f"kind one of {', '.join(map(repr, KINDS))}", repr(kind))
    if weight.dim() != 2:
        raise error("weights of 2 dimensions", str(weight.dim()))
    shape = (out_features, weight.shape[1])
    weights = ternary_weights(kind, shape, weight, weight_scale, bias, error)
    layer = BitLinear.from_ternary(*weights, layout=best_layout())
    layer.packed_weight = _memory.copy(layer.packed_weight)
    return layer


@fake_kernel(NAME)
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    out_features: int,
) -> Tensor:
    check_device(NAME, x, weight=weight, weight_scale=weight_scale, bias=bias)
    return x.new_empty((*x.shape[:-1], out_features))


@fake_kernel(BACKWARD)
def _(
    grad_y: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    out_features: int,
) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1]))
