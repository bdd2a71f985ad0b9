"""What a layout of ternary weights consists of: where codes and scales lie, and how bytes become weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The inside of a block, and the scale that belongs to it.

    Attributes:
        codes: the first byte of a block that holds weights, and the first one behind them.
        scale_of: what has one scale: "tensor" (it lies behind the last block), "row" (in front of the row),
            "block" (in the bytes of a block that hold no weights).
        scale_dtype: of the scale in the file.
        decode: from the bytes, uint8 [blocks, bytes] without gaps, to weights int8 [blocks, weights].
        damaged: from the same bytes to bool of the same shape, true for a byte that stands for no weights; or
            None where a look at all of them shows that there is none.
        what: what good bytes hold, for errors.
        two_bits: ``width`` and ``high_first`` of `ops.pack_two_bits`, which packs the bytes as they are; None
            where weights have no two bits.
        encode: the inverse of ``decode``; None where this type is not written.
    """

    codes: tuple[int, int]
    scale_of: str
    scale_dtype: torch.dtype
    decode: Callable[[Tensor], Tensor]
    damaged: Callable[[Tensor], Tensor | None]
    what: str
    two_bits: tuple[int, bool] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
