"""BitLinear: the ternary linear layer, packed for inference or with float weights for training."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, packing, reference
from ..isa import isa


class Holder(Protocol):
    """Holds weights of layers to run them faster."""

    def drop(self) -> None:
        """Lets go of them."""


_holders: WeakKeyDictionary[nn.Module, WeakSet[Holder]] = WeakKeyDictionary()


def on_replacement(layer: BitLinear, holder: Holder) -> None:
    """Has ``holder.drop()`` called when the layer stores its weights anew: they would be there twice."""
    _holders.setdefault(layer, WeakSet()).add(holder)


class BitLinear(nn.Module):
    """A linear layer with packed ternary weights: ``y = x_int8 @ w.T * (x_scale * weight_scale) + bias``.

    Inference only; it takes 1.6 to 2 bits a weight and runs on the CPU kernels. Activations are quantised
    per token inside (see `bitnet_ops.reference.ternary_linear` for the exact formula). A fresh
    layer holds zero weights: fill it with `from_linear`, `from_ternary` or ``load_state_dict``.

    Every layout gives the same results; a ``state_dict`` always holds ``tile16``, so that it loads into a
    layer of any layout on any machine.

    Attributes:
        packed_weight: uint8, the weights in `layout`, drawn in `bitnet_ops.packing`.
        weight_scale: float32 [out_features]; with groups float32 or float16
            [ceil(in_features / group_size), out_features]. Keeps its dtype when the module is cast.
        bias: float32 [out_features] or None. Stays float32 likewise.
        layout: "tile16", "tile16_base3", "row" or "column"; `repack` changes it.
        activation_bits: 8 or 16. May be changed at any time.
        group_size: inputs that share a scale, or 0 for one scale a row.

    Example:
        >>> layer = BitLinear.from_linear(nn.Linear(2560, 6912, bias=False))
        >>> layer(torch.randn(4, 2560)).shape
        torch.Size([4, 6912])
    """

    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        layout: str = "tile16",
        activation_bits: int = 8,
        group_size: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a layer of zero weights.

        Args:
            in_features: K, size of the last axis of the input.
            out_features: N, size of the last axis of the output.
            bias: whether a bias is added.
            layout: how the weights are stored.
            activation_bits: 8, or 16 for a model that was not trained with 8-bit activations.
            group_size: 0, or 64, 128 or 256 inputs that share a scale (with layout "tile16").
            device: where the buffers live; ``"meta"`` to fill them later.

        Raises:
            ValueError: an option is none of these.
        """
        super().__init__()
        if activation_bits not in reference.LARGEST_Q:
            raise ValueError(f"BitLinear: activation_bits: expected 8 or 16, got {activation_bits}")
        if group_size not in (0, 64, 128, 256) or (group_size != 0 and layout != "tile16"):
            raise ValueError(
                "BitLinear: group_size: expected 0, or 64, 128 or 256 with layout 'tile16', "
                f"got {group_size} with layout {layout!r}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self.activation_bits = activation_bits
        self.group_size = group_size
        shape = packing.packed_shape(out_features, in_features, layout)
        scale_shape = (-(-in_features // group_size), out_features) if group_size else (out_features,)
        self.register_buffer(
            "packed_weight", torch.full(shape, packing.zero_byte(layout), dtype=torch.uint8, device=device)
        )
        self.register_buffer("weight_scale", torch.ones(scale_shape, dtype=torch.float32, device=device))
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        )

    @classmethod
    def from_ternary(
        cls,
        w: Tensor,
        weight_scale: Tensor | float,
        bias: Tensor | None = None,
        *,
        layout: str = "tile16",
        activation_bits: int = 8,
        group_size: int = 0,
    ) -> BitLinear:
        """Packs weights that are ternary already.

        Args:
            w: int8 [out_features, in_features] with values in {-1, 0, 1}.
            weight_scale: the multiplier, a number or a tensor that broadcasts to [out_features], with
                ``group_size`` to [ceil(in_features / group_size), out_features]. Those of groups stay float16
                if they are: 2.125 bits a weight in groups of 128.
            bias: float [out_features] or None.
            layout: how the weights are stored.
            activation_bits: 8 or 16.
            group_size: 0, 64, 128 or 256.

        Raises:
            ValueError: ``w`` is not ternary, or a shape does not fit.
        """
        if w.dim() != 2:
            raise ValueError(f"BitLinear.from_ternary: w: expected 2 dimensions [N, K], got {w.dim()}")
        out_features, in_features = w.shape
        layer = cls(
            in_features,
            out_features,
            bias=bias is not None,
            layout=layout,
            activation_bits=activation_bits,
            group_size=group_size,
            device="meta",
        )
        scale = torch.as_tensor(weight_scale).detach()
        scale = scale if group_size and scale.dtype == torch.float16 else scale.float()
        shape = layer.weight_scale.shape
        try:
            layer.weight_scale = scale.expand(shape).contiguous()
        except RuntimeError:
            raise ValueError(
                f"BitLinear.from_ternary: weight_scale: expected a shape that broadcasts to "
                f"{list(shape)}, got {list(scale.shape)}"
            ) from None
        if bias is not None:
            if bias.shape != (out_features,):
                raise ValueError(
                    f"BitLinear.from_ternary: bias: expected shape [{out_features}], got {list(bias.shape)}"
                )
            layer.bias = bias.detach().float().clone()
        layer.packed_weight = ops.pack_ternary(w, layout)
        return layer

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

    def unpack(self) -> Tensor:
        """The ternary weights, int8 [out_features, in_features]."""
        return ops.unpack_ternary(self.packed_weight, self.out_features, self.in_features, self.layout)

    def repack(self, layout: str) -> BitLinear:
        """Stores the weights in another layout, in place. Results stay the same.

        Raises:
            ValueError: unknown layout, or one that has no group scales for a layer that has.
        """
        packing.check_layout(layout)
        for holder in _holders.pop(self, ()):
            holder.drop()
        if self.group_size != 0 and layout != "tile16":
            raise ValueError(
                f"BitLinear.repack: layout: expected 'tile16', which has group scales, got {layout!r}"
            )
        self.packed_weight = self._in_layout(self.packed_weight, self.layout, layout)
        self.layout = layout
        return self

    def _in_layout(self, packed: Tensor, layout: str, wanted: str) -> Tensor:
        if layout == wanted:
            return packed
        if packed.device.type == "meta":
            return packed.new_empty(packing.packed_shape(self.out_features, self.in_features, wanted))
        return ops.repack_ternary(packed, self.out_features, self.in_features, layout, wanted)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``x``."""
        return ops.ternary_linear(
            x,
            self.packed_weight,
            self.weight_scale,
            self.bias,
            self.out_features,
            self.layout,
            self.activation_bits,
            self.group_size,
        )

    def extra_repr(self) -> str:
        """The sizes, as nn.Linear prints them, and options that are not the usual ones."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        if self.layout != "tile16":
            text += f", layout={self.layout!r}"
        if self.activation_bits != 8:
            text += f", activation_bits={self.activation_bits}"
        return text + (f", group_size={self.group_size}" if self.group_size else "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}packed_weight"
        destination[name] = self._in_layout(destination[name], self.layout, "tile16")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Another layout than the file's: convert what has the right shape; a wrong one is reported as ever.
        packed = state_dict.get(f"{prefix}packed_weight")
        expected = packing.packed_shape(self.out_features, self.in_features)
        if self.layout != "tile16" and packed is not None and packed.shape == expected:
            state_dict = {
                **state_dict,
                f"{prefix}packed_weight": self._in_layout(packed, "tile16", self.layout),
            }
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> BitLinear:
        # model.to(torch.bfloat16) must not round the scales: they are numbers of the format, not activations.
        kept = {"weight_scale": self.weight_scale, "bias": self.bias}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


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
    # Only one instruction set has a loop for base 3: it takes looking up 128 bytes at once.
    return tuple(layout for layout in packing.LAYOUTS if layout != "tile16_base3" or isa() == "avx512_vbmi")


def best_layout() -> str:
    """The layout that reads a whole matrix fastest on this machine: measured, see bench/LOG.md.

    "tile16_base3" moves a fifth fewer bytes and is decoded as fast as memory delivers where the CPU has
    AVX-512 VBMI; elsewhere "tile16".
    """
    return "tile16_base3" if "tile16_base3" in native_layouts() else "tile16"
