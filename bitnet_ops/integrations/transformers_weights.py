"""Weights of transformers' ternary layers, as `BitLinear` holds them.

transformers has two such layers (transformers/integrations/bitnet.py), which differ in more than storage.
With ``acc`` the sum of products of int8 activations and ternary weights, as in docs/numerics.md:

    AutoBitLinear, offline   weight float [N, K] in {-1, 0, 1}     y = (acc * x_scale + bias) * weight_scale
    AutoBitLinear, online    weight float [N, K], master weights   y = acc * x_scale * mean(|weight|) + bias
    BitLinear                weight uint8 [N / 4, K], packed       y = acc * x_scale / weight_scale + bias

In files the weights of an offline AutoBitLinear may be packed as well. Each layer may have an RMSNorm of its
own in front (``use_rms_norm``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..checkpoint.codes import check_codes
from ..checkpoint.quarters import WEIGHTS_PER_BYTE, unpack_quarters
from ..layers.linear import BitLinear

ErrorMaker = Callable[[str, str], Exception]
"""Makes the error that says what was expected and what was given."""

KINDS = ("offline", "online", "bitlinear")
"""The rows of the table above."""


class NormedBitLinear(BitLinear):
    """A `BitLinear` behind the norm that transformers' layers have with ``use_rms_norm``.

    Attributes:
        rms_norm: their module, as it was.
    """

    rms_norm: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``x``."""
        return super().forward(self.rms_norm(x))


class Complaints:
    """What `check_codes` and `check_packed` call where something is wrong."""

    def __init__(self, error: ErrorMaker) -> None:
        self._error = error

    def error(self, tensor: str, expected: str, got: str) -> Exception:
        """The error about one of a layer's tensors."""
        return self._error(f"{tensor}: {expected}", got)


class TernaryWeights(NamedTuple):
    """The arguments of `BitLinear.from_ternary`."""

    w: Tensor
    weight_scale: Tensor
    bias: Tensor | None


def ternary_weights(
    kind: str,
    shape: tuple[int, int],
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    error: ErrorMaker,
    empty: Callable[..., Tensor] = torch.empty,
) -> TernaryWeights:
    """Converts the tensors of a layer.

    Args:
        kind: one of `KINDS`.
        shape: [N, K], of the layer.
        weight: as drawn above.
        weight_scale: [1] or []; not used with "online".
        bias: [N] or None.
        error: is called with what is wrong.
        empty: gives the memory of unpacked weights.

    Raises:
        Exception: that of ``error``: a shape does not fit, weights are not ternary, a scale is not finite.
    """
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise error(f"a bias [{shape[0]}]", f"{list(bias.shape)}")
    bias = None if bias is None else bias.detach().float()
    weight = weight.detach().contiguous()
    packed = weight.dtype == torch.uint8 and kind != "online"
    expected = (-(-shape[0] // WEIGHTS_PER_BYTE), shape[1]) if packed else shape
    if tuple(weight.shape) != expected or (packed and shape[0] % WEIGHTS_PER_BYTE):
        raise error(f"weights {list(expected)} of a layer {list(shape)}", f"{list(weight.shape)}")
    if kind == "online":
        return _from_masters(weight, bias, error)
    if weight_scale is None or weight_scale.numel() != 1:
        raise error("a weight_scale [1]", "none" if weight_scale is None else f"{list(weight_scale.shape)}")
    scale = weight_scale.detach().float().reshape(1)
    multiplier = 1.0 / scale if kind == "bitlinear" else scale
    if not bool((scale.isfinite() & multiplier.isfinite()).all()):
        raise error("a finite weight scale", f"{multiplier.tolist()}")
    if kind == "offline" and bias is not None:
        bias = bias * multiplier
    if packed:
        check_codes(Complaints(error), "packed weights", weight)  # type: ignore[arg-type]
        return TernaryWeights(unpack_quarters(weight, empty), multiplier, bias)
    if kind == "bitlinear":
        raise error("packed weights, uint8", f"{weight.dtype}")
    w = weight.to(torch.int8)
    if not bool((w == weight).all()) or (w.numel() and w.abs().max() > 1):
        raise error("weights in {-1, 0, 1}, because it has a weight_scale", "other numbers")
    return TernaryWeights(w, multiplier, bias)


def _from_masters(weight: Tensor, bias: Tensor | None, error: ErrorMaker) -> TernaryWeights:
    if not weight.is_floating_point():
        raise error("master weights of a float dtype", f"{weight.dtype}")
    # Like `reference.quantize_weight`, but by way of the reciprocal, as their layer does it: a weight next to
    # half the mean may be rounded otherwise. And in their dtype, to which it rounds what it multiplies with.
    reciprocal = 1.0 / weight.float().abs().mean().clamp(min=reference.ABSMAX_FLOOR)
    w = (weight.float() * reciprocal).round().clamp(-1, 1).to(torch.int8)
    scale = (1.0 / reciprocal).to(weight.dtype).float().reshape(1)
    if not bool(scale.isfinite().all()):
        raise error("a finite weight scale", f"{scale.tolist()}")
    return TernaryWeights(w, scale, bias)
