"""BitLinear: the ternary linear layer, packed for inference or with float weights for training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import packing, reference
from ..isa import isa
from .matrix import TernaryMatrix


class BitLinear(TernaryMatrix):
    """A linear layer with packed ternary weights: ``y = x_int8 @ w.T * (x_scale * weight_scale) + bias``.

    Inference only; it takes 1.6 to 2 bits a weight and runs on the CPU kernels. Activations are quantised
    per token inside (see `bitnet_ops.reference.ternary_linear` for the exact formula). A fresh
    layer holds zero weights: fill it with `from_linear`, `from_ternary` or ``load_state_dict``.

    Every layout gives the same results; a ``state_dict`` always holds ``tile16`` and scales as `scales` gives
    them, so that it loads into a layer of any layout on any machine.

    Attributes:
        packed_weight: uint8, the weights in `layout`, drawn in `bitnet_ops.packing`.
        weight_scale: float32 [out_features]; with groups float32 or float16, in the order of
            `bitnet_ops.packing.pack_scales`: [ceil(out_features / 16), ceil(in_features / group_size), 16].
            Keeps its dtype when the module is cast.
        bias: float32 [out_features] or None. Stays float32 likewise.
        layout: "tile16", "tile16_base3", "row" or "column"; `repack` changes it.
        activation_bits: 8 or 16. May be changed at any time.
        group_size: inputs that share a scale, or 0 for one scale a row.

    Example:
        >>> layer = BitLinear.from_linear(nn.Linear(2560, 6912, bias=False))
        >>> layer(torch.randn(4, 2560)).shape
        torch.Size([4, 6912])
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, layout: str = "tile16", activation_bits: int = 8) -> BitLinear:
        """Quantises the float weights of a linear layer (absmean, see `reference.quantize_weight`).

        Args:
            linear: stays as it is; its bias, if any, is copied to float32.
            layout: how the weights are stored.
            activation_bits: 8 or 16.

        Returns:
            A layer in the mode of ``linear``, training or not.

        Raises:
            ValueError: the weight is spread over processes (a DTensor), or an option is unknown.
        """
        refuse_a_part(linear)
        w, scale = reference.quantize_weight(linear.weight.detach())
        layer = cls.from_ternary(w, scale, linear.bias, layout=layout, activation_bits=activation_bits)
        return layer.train(linear.training)

    @property
    def qweight(self) -> Tensor:
        """``packed_weight``, under the name by which peft finds the device of a quantised layer."""
        return self.packed_weight

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``x``."""
        return self.product(x)


class NormedLinear(nn.Module):
    """A projection with a norm of its own in front of it: ``linear(norm(x))``."""

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


class BitLinearQAT(nn.Linear):
    """An nn.Linear that trains ternary weights: quantisation-aware, with the straight-through estimator.

    The forward pass quantises the float weights (absmean) and the activations (absmax, int8) and gives
    what `BitLinear.from_linear` of this layer gives: both sides of the product are small integers, so in
    float32 the sum is exact for any order up to 2^24 / 128 = 131072 inputs. The backward pass treats both
    quantisers as the identity, i.e. uses the quantised values in the chain rule of a plain linear layer.

    Plain PyTorch, on any device. Under ``torch.autocast`` the products run in the autocast dtype; the
    quantised operands are exact in bfloat16 too, the result is rounded once more.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BitLinearQAT:
        """Trains on from a float layer: the new layer holds the same parameters, not copies.

        Args:
            linear: with a weight [out_features, in_features] and a bias or none; any float dtype and device.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)  # nn.Linear's would fill a weight with random numbers that nobody wants
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``x``."""
        y: Tensor = _StraightThroughLinear.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else (y.float() + self.bias).to(y.dtype)


class _StraightThroughLinear(torch.autograd.Function):
    """The product of `reference.ternary_linear` with the gradient of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        device = x.device.type
        ctx.compute_dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        )
        q, x_scale = reference.quantize_activations(x)
        w, weight_scale = reference.quantize_weight(weight)
        ctx.save_for_backward(q, x_scale, w, weight_scale)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        with torch.autocast(device, enabled=False):
            acc = F.linear(q.to(ctx.compute_dtype), w.to(ctx.compute_dtype))
            return (acc.float() * (x_scale.unsqueeze(-1) * weight_scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        q, x_scale, w, weight_scale = ctx.saved_tensors
        dtype = ctx.compute_dtype
        grad_x = grad_weight = None
        with torch.autocast(grad_y.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = ((grad_y.to(dtype) @ w.to(dtype)).float() * weight_scale).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                rows = (grad_y.float() * x_scale.unsqueeze(-1)).reshape(-1, w.shape[0]).to(dtype)
                grad_weight = (rows.T @ q.reshape(-1, w.shape[1]).to(dtype)).to(ctx.weight_dtype)
        return grad_x, grad_weight


def refuse_a_part(linear: nn.Linear) -> None:
    """Raises ValueError where other processes hold parts of the weight."""
    if hasattr(linear.weight, "full_tensor"):  # a DTensor; its class takes a second to import
        raise ValueError(
            "linear.weight: expected all of it in this process, got a DTensor; with full_state_dict=True "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict gathers a model"
        )


def native_layouts() -> tuple[str, ...]:
    """The layouts that this machine multiplies as they are; the others need a ``tile16`` copy each time."""
    # Base 3 takes looking up 128 bytes at once.
    base3 = isa() in ("amx_int8", "avx512_vbmi")
    return tuple(layout for layout in packing.LAYOUTS if layout != "tile16_base3" or base3)


def best_layout() -> str:
    """The layout that reads a whole matrix fastest on this machine: measured, see bench/LOG.md.

    "tile16_base3" moves a fifth fewer bytes and is decoded as fast as memory delivers where the CPU has
    AVX-512 VBMI; elsewhere "tile16".
    """
    return "tile16_base3" if "tile16_base3" in native_layouts() else "tile16"
