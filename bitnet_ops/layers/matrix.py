"""TernaryMatrix: packed ternary weights with their scales, and what every module that has them does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from .. import ops, packing, reference
from ..locks import Lock

if TYPE_CHECKING:
    from typing_extensions import Self


class Holder(Protocol):
    """Holds weights of layers to run them faster."""

    def drop(self) -> None:
        """Lets go of them."""


_holders: WeakKeyDictionary[nn.Module, WeakSet[Holder]] = WeakKeyDictionary()
_holders_lock = Lock()  # without a global lock, one thread may add to what another goes through


def on_replacement(layer: TernaryMatrix, holder: Holder) -> None:
    """Has ``holder.drop()`` called when the layer stores its weights anew: they would be there twice."""
    with _holders_lock:
        _holders.setdefault(layer, WeakSet()).add(holder)


class TernaryMatrix(nn.Module):
    """A packed ternary matrix [out_features, in_features], the base of `BitLinear` and `TernaryEmbedding`.

    `BitLinear`, which users see, describes its attributes and what a ``state_dict`` holds.
    """

    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    only_tile16: ClassVar[bool] = False
    """Whether such a module has no other layout, with group scales or without."""

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
        """Makes a matrix of zero weights.

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
        name = type(self).__name__
        if activation_bits not in reference.LARGEST_Q:
            raise ValueError(f"{name}: activation_bits: expected 8 or 16, got {activation_bits}")
        if group_size not in (0, 64, 128, 256) or (group_size != 0 and layout != "tile16"):
            raise ValueError(
                f"{name}: group_size: expected 0, or 64, 128 or 256 with layout 'tile16', "
                f"got {group_size} with layout {layout!r}"
            )
        if self.only_tile16 and layout != "tile16":
            raise ValueError(f"{name}: layout: expected 'tile16', got {layout!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self.activation_bits = activation_bits
        self.group_size = group_size
        shape = packing.packed_shape(out_features, in_features, layout)
        self.register_buffer(
            "packed_weight", torch.full(shape, packing.zero_byte(layout), dtype=torch.uint8, device=device)
        )
        scales = torch.ones(self.scale_shape, dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", packing.pack_scales(scales) if group_size else scales)
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
    ) -> Self:
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
            raise ValueError(f"{cls.__name__}.from_ternary: w: expected 2 dimensions [N, K], got {w.dim()}")
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
        shape = layer.scale_shape
        try:
            layer.set_scales(scale.expand(shape))
        except RuntimeError:
            raise ValueError(
                f"{cls.__name__}.from_ternary: weight_scale: expected a shape that broadcasts to "
                f"{list(shape)}, got {list(scale.shape)}"
            ) from None
        if bias is not None:
            if bias.shape != (out_features,):
                raise ValueError(
                    f"{cls.__name__}.from_ternary: bias: expected shape [{out_features}], "
                    f"got {list(bias.shape)}"
                )
            layer.bias = bias.detach().float().clone()
        layer.packed_weight = ops.pack_ternary(w, layout)
        return layer

    def unpack(self) -> Tensor:
        """The ternary weights, int8 [out_features, in_features]."""
        return ops.unpack_ternary(self.packed_weight, self.out_features, self.in_features, self.layout)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of `scales`, [N] or [ceil(K / group_size), N]."""
        if self.group_size:
            return -(-self.in_features // self.group_size), self.out_features
        return (self.out_features,)

    def scales(self) -> Tensor:
        """The scales in the order of files and of `reference.ternary_linear`.

        Returns:
            [out_features], which is ``weight_scale`` itself, or with groups a copy
            [ceil(in_features / group_size), out_features]. The dtype is that of ``weight_scale``.
        """
        if self.group_size:
            return packing.unpack_scales(self.weight_scale, self.out_features)
        return self.weight_scale

    def set_scales(self, scales: Tensor) -> None:
        """Takes scales as `scales` gives them, [out_features] or with groups
        [ceil(in_features / group_size), out_features], in float32, with groups also float16.
        """
        self.weight_scale = packing.pack_scales(scales) if self.group_size else scales.contiguous()

    def dense(self) -> Tensor:
        """The weights times their scales, float32 [out_features, in_features]."""
        scale = self.scales().float()
        if not self.group_size:
            return self.unpack() * scale.unsqueeze(1)
        return self.unpack() * scale.repeat_interleave(self.group_size, 0)[: self.in_features].T

    def repack(self, layout: str) -> Self:
        """Stores the weights in another layout, in place. Results stay the same.

        Raises:
            ValueError: unknown layout, or one that has no group scales for a layer that has.
        """
        packing.check_layout(layout)
        with _holders_lock:
            holders = list(_holders.pop(self, ()))
        for holder in holders:
            holder.drop()
        if layout not in self.layouts:
            why = "the only one of an embedding" if self.only_tile16 else "which has group scales"
            raise ValueError(
                f"{type(self).__name__}.repack: layout: expected 'tile16', {why}, got {layout!r}"
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

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those that it may have."""
        return ("tile16",) if self.only_tile16 or self.group_size else packing.LAYOUTS

    def product(self, x: Tensor) -> Tensor:
        """``x @ w.T`` with quantised activations, as `reference.ternary_linear` defines it.

        Args:
            x: float [..., in_features].

        Returns:
            [..., out_features] in the dtype of ``x``.
        """
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
        if self.group_size:
            name = f"{prefix}weight_scale"
            destination[name] = packing.unpack_scales(destination[name], self.out_features)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Another layout than the file's: convert what has the right shape; a wrong one is reported as ever.
        packed = state_dict.get(f"{prefix}packed_weight")
        expected = packing.packed_shape(self.out_features, self.in_features)
        if self.layout != "tile16" and packed is not None and packed.shape == expected:
            state_dict = {
                **state_dict,
                f"{prefix}packed_weight": self._in_layout(packed, "tile16", self.layout),
            }
        scales = state_dict.get(f"{prefix}weight_scale")
        if self.group_size and scales is not None and scales.shape == self.scale_shape:
            state_dict = {**state_dict, f"{prefix}weight_scale": packing.pack_scales(scales)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # model.to(torch.bfloat16) must not round the scales: they are numbers of the format, not activations.
        kept = {"weight_scale": self.weight_scale, "bias": self.bias}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self
