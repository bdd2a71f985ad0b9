"""The packed layout of ternary weights, drawn, and packed and unpacked in plain PyTorch.

This module is the specification of the operators ``pack_ternary`` and ``unpack_ternary``; a file
packed on one CPU is read on any other.

``tile16`` stores a weight in 2 bits as its code ``c = w + 1``, so -1, 0, 1 become 0, 1, 2. One block of
64 bytes holds 16 rows (out_features) x 16 inputs (in_features); the blocks of 16 rows follow one
another along the inputs, then come the next 16 rows: one sequential stream::

    packed[tile, block, 4 * r + j]         row 16 * tile + r, inputs 16 * block + 4 * p + j

          byte 4r+j  | p=3 | p=2 | p=1 | p=0 |
             bits      7 6   5 4   3 2   1 0

    (block >> 2p) & 3   =   | row 0: j=0 j=1 j=2 j=3 | row 1: j=0 .. j=3 | ... | row 15: j=0 .. j=3 |

so a shift and a mask give, for 16 rows, four neighbouring inputs each: the operand of one instruction
that multiplies four bytes and adds them up, against four activations that all rows share. Rows and
columns of padding hold weight 0, code 1.
"""

import torch
from torch import Tensor

TILE_ROWS = 16
BLOCK_INPUTS = 16
BLOCK_BYTES = 64
ZERO_BYTE = 0b01_01_01_01
"""Four weights of 0: what padding and a fresh layer hold."""
_STEPS = 4  # p: 2-bit codes to a byte
_NEIGHBOURS = 4  # j: bytes to a row, multiplied by one instruction


def _check_layout(layout: str) -> None:
    if layout != "tile16":
        raise ValueError(f"layout must be 'tile16', got {layout!r}")


def packed_shape(out_features: int, in_features: int, layout: str = "tile16") -> tuple[int, int, int]:
    """Shape of the uint8 tensor that holds a packed matrix.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        layout: "tile16".

    Returns:
        ``(ceil(out_features / 16), ceil(in_features / 16), 64)``.

    Raises:
        ValueError: for an unknown layout.

    Example:
        >>> packed_shape(6912, 2560)
        (432, 160, 64)
    """
    _check_layout(layout)
    return -(-out_features // TILE_ROWS), -(-in_features // BLOCK_INPUTS), BLOCK_BYTES


def pack(w: Tensor, layout: str = "tile16") -> Tensor:
    """Packs a ternary matrix, any device: the specification of ``ops.pack_ternary``.

    Args:
        w: int8 [N, K], values -1, 0, 1.
        layout: "tile16".

    Returns:
        uint8 of shape ``packed_shape(N, K, layout)``.
    """
    out_features, in_features = w.shape
    tiles, blocks, _ = packed_shape(out_features, in_features, layout)
    code = torch.ones(tiles * TILE_ROWS, blocks * BLOCK_INPUTS, dtype=torch.uint8, device=w.device)
    code[:out_features, :in_features] = (w + 1).to(torch.uint8)
    # [tile, r, block, p, j] -> [tile, block, r, j, p]
    code = code.view(tiles, TILE_ROWS, blocks, _STEPS, _NEIGHBOURS).permute(0, 2, 1, 4, 3)
    place = torch.tensor([1, 4, 16, 64], dtype=torch.uint8, device=w.device)  # 4^p: bits 2p and 2p + 1
    return (code * place).sum(-1, dtype=torch.uint8).reshape(tiles, blocks, BLOCK_BYTES)


def unpack(packed: Tensor, out_features: int, in_features: int, layout: str = "tile16") -> Tensor:
    """Inverse of ``pack``, any device: the specification of ``ops.unpack_ternary``.

    Args:
        packed: uint8 of shape ``packed_shape(out_features, in_features, layout)``.
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        layout: "tile16".

    Returns:
        int8 [out_features, in_features].
    """
    tiles, blocks, _ = packed_shape(out_features, in_features, layout)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    byte = packed.view(tiles, blocks, TILE_ROWS, _NEIGHBOURS)
    code = (byte.unsqueeze(-1) >> shift) & 3  # [tile, block, r, j, p]
    w = code.permute(0, 2, 1, 4, 3).reshape(tiles * TILE_ROWS, blocks * BLOCK_INPUTS).to(torch.int8) - 1
    return w[:out_features, :in_features].contiguous()
