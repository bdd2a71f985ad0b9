"""The layers of a decoder in one operator. Inference only."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ._registry import OPS, check_device, fake_kernel, without_gradient


def decoder_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    structure: Sequence[int],
    constants: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    slot: int = 0,
) -> Tensor:
    """The layers of a decoder, one after another: what bitnet_ops/decoder/model.py computes, bit for bit.

    Has no gradients. `bitnet_ops.decoder.plan` makes the three lists from modules, and says what is in them.

    Args:
        x: float32 [B, T, hidden_size], on the CPU.
        weights: tensors of all layers.
        structure: which parts the layers have, and their sizes.
        constants: epsilons and scales.
        cos: float32 [tables, positions, head_dim / 2]; a layer's structure says which table it uses.
        sin: likewise.
        start: int64 [B], as in `cached_attention`, without a cache as in `attention`.
        keys: as in `cached_attention` with an axis in front, the layers, of which there may be more; changed
            in place. None without a cache, like the next three.
        values: likewise; changed in place.
        key_scale: likewise, None where the cache is not int8; changed in place.
        value_scale: likewise; changed in place.
        slot: the first layer's place in the cache.

    Returns:
        float32 [B, T, hidden_size].

    Raises:
        RuntimeError: if lengths of lists, dtypes or shapes do not fit together.
    """
    result: Tensor = without_gradient(
        OPS.decoder_layers.default,
        x, weights, structure, constants,
        cos, sin, start, keys, values, key_scale, value_scale, slot,
    )  # fmt: skip
    return result


class PreparedLayers:
    """`decoder_layers` for layers that were handed over beforehand: a call hands on no weights.

    Handing 540 tensors from Python to C++ takes 0.5 ms, with the caches of the processor full of weights.
    Tensors may be written to; where one gets other memory (``tensor.data = ...``), that is seen too.
    """

    def __init__(
        self, weights: Sequence[Tensor], structure: Sequence[int], constants: Sequence[float]
    ) -> None:
        """Checks the layers; arguments and errors are those of `decoder_layers`."""
        self._number: int = OPS.prepare_layers.default(weights, structure, constants)
        release = weakref.finalize(self, OPS.release_layers.default, self._number)
        release.atexit = False

    def __call__(self, x: Tensor, *rest: Tensor | int | None) -> Tensor:
        """`decoder_layers`, with its arguments from ``cos`` on."""
        result: Tensor = OPS.run_prepared_layers.default(x, self._number, *rest)
        return result


def _shape_only(x: Tensor, cos: Tensor, sin: Tensor, *others: Tensor | None) -> Tensor:
    names = ("start", "keys", "values", "key_scale", "value_scale")
    check_device("decoder_layers", x, cos=cos, sin=sin, **dict(zip(names, others, strict=False)))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake_kernel("decoder_layers")
def _(
    x: Tensor,
    weights: list[Tensor],
    structure: list[int],
    constants: list[float],
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    slot: int = 0,
) -> Tensor:
    return _shape_only(x, cos, sin, start, keys, values, key_scale, value_scale)


@fake_kernel("run_prepared_layers")
def _(
    x: Tensor,
    prepared: int,
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    slot: int = 0,
) -> Tensor:
    return _shape_only(x, cos, sin, start, keys, values, key_scale, value_scale)
