"""transformers' packing of ternary weights: four quarters of a matrix in the pairs of bits of a byte."""

from collections.abc import Callable

import torch
from torch import Tensor

WEIGHTS_PER_BYTE = 4


def unpack_quarters(packed: Tensor, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
    """Undoes the published packing.

    Args:
        packed: uint8 [N / 4, K] with codes in {0, 1, 2}.
        empty: gives the memory of the result.

    Returns:
        int8 [N, K] in {-1, 0, 1}.
    """
    codes = empty((WEIGHTS_PER_BYTE, *packed.shape), dtype=torch.uint8)
    for quarter, out in enumerate(codes):
        torch.bitwise_right_shift(packed, 2 * quarter, out=out).bitwise_and_(3)
    return codes.view(torch.int8).sub_(1).view(-1, packed.shape[1])


def pack_quarters(w: Tensor) -> Tensor:
    """The published packing.

    Args:
        w: int8 [N, K] in {-1, 0, 1}, N a multiple of 4.

    Returns:
        uint8 [N / 4, K].
    """
    codes = (w + 1).view(torch.uint8).view(WEIGHTS_PER_BYTE, -1, w.shape[1])
    packed = codes[0].clone()
    for quarter in range(1, WEIGHTS_PER_BYTE):
        packed |= codes[quarter] << 2 * quarter
    return packed
