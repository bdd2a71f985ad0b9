"""The packed layouts of ternary weights, drawn, and packed and unpacked in plain PyTorch.

This module is the specification of the operators ``pack_ternary`` and ``unpack_ternary``; a matrix
packed on one CPU is read on any other. Every layout stores a weight as its code ``c = w + 1``, so -1, 0, 1
become 0, 1, 2, in cache lines of 64 bytes; rows and columns of padding hold weight 0, code 1.

``tile16`` (2 bits a weight), [ceil(N / 16), ceil(K / 16), 64]. One block of 64 bytes holds 16 rows
(out_features) x 16 inputs (in_features); the blocks of 16 rows follow one another along the inputs, then
come the next 16 rows: one sequential stream::

    packed[tile, block, 4 * r + j]         row 16 * tile + r, inputs 16 * block + 4 * p + j

          byte 4r+j  | p=3 | p=2 | p=1 | p=0 |
             bits      7 6   5 4   3 2   1 0

    (block >> 2p) & 3   =   | row 0: j=0 j=1 j=2 j=3 | row 1: j=0 .. j=3 | ... | row 15: j=0 .. j=3 |

so a shift and a mask give a step: for 16 rows, four neighbouring inputs each, the operand of one instruction
that multiplies four bytes and adds them up, against four activations that all rows share.

``tile16_base3`` (1.6 bits a weight), [ceil(N / 16), ceil(K / 20), 64]. The same with five steps to a byte,
as digits in base 3::

    packed[tile, block, 4 * r + j]  =  sum over p = 0..4 of
                                       3^p * code of row 16 * tile + r, input 20 * block + 4 * p + j

``row`` (2 bits), [N, ceil(K / 256), 64]. The four-byte words of ``tile16`` that belong to one row, one after
another, so that a row nobody needs is never read::

    packed[n, chunk, 4 * b + j]            row n, inputs 256 * chunk + 16 * b + 4 * p + j at bits 2p

``column`` (2 bits), [K, ceil(N / 256), 64]. The codes of one input side by side, so that an input of
zero costs nothing. A panel is 256 rows; interleaving the bytes of four inputs within 16-byte lanes, which
every vector unit can, gives a step of ``tile16``::

    packed[k, panel, 16 * l + 4 * u + d]   input k, rows 256 * panel + 64 * p + 16 * u + 4 * l + d at bits 2p

Scales of groups (one for each 64, 128 or 256 inputs of a row, with ``tile16``) lie in the order of the tiles,
[ceil(N / 16), G, 16] for G groups, so that those of a tile are one stream beside its blocks::

    packed_scales[tile, g, r]              row 16 * tile + r, inputs from group_size * g on
"""

import torch
from torch import Tensor

LAYOUTS = ("tile16", "tile16_base3", "row", "column")
TILE_ROWS = 16
BLOCK_INPUTS = 16
BASE3_BLOCK_INPUTS = 20
CHUNK_INPUTS = 256
PANEL_ROWS = 256
BLOCK_BYTES = 64

_STEPS = 4  # p: 2-bit codes to a byte
_BASE3_STEPS = 5
_NEIGHBOURS = 4  # j: bytes to a row, multiplied by one instruction


def check_layout(layout: str) -> None:
    """Raises ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")


def packed_shape(out_features: int, in_features: int, layout: str = "tile16") -> tuple[int, int, int]:
    """Shape of the uint8 tensor that holds a packed matrix.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        layout: one of `LAYOUTS`.

    Raises:
        ValueError: for an unknown layout.

    Example:
        >>> packed_shape(6912, 2560)
        (432, 160, 64)
        >>> packed_shape(6912, 2560, "row")
        (6912, 10, 64)
    """
    check_layout(layout)
    if layout == "row":
        return out_features, -(-in_features // CHUNK_INPUTS), BLOCK_BYTES
    if layout == "column":
        return in_features, -(-out_features // PANEL_ROWS), BLOCK_BYTES
    inputs = BASE3_BLOCK_INPUTS if layout == "tile16_base3" else BLOCK_INPUTS
    return -(-out_features // TILE_ROWS), -(-in_features // inputs), BLOCK_BYTES


def zero_byte(layout: str) -> int:
    """The byte that holds nothing but weights of 0: what padding and a fresh layer consist of."""
    check_layout(layout)
    return sum(3**p for p in range(_BASE3_STEPS)) if layout == "tile16_base3" else 0b01_01_01_01


def padded_size(out_features: int, in_features: int, layout: str) -> tuple[int, int]:
    """Rows and columns of a matrix with its padding.

    Args:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        layout: one of `LAYOUTS`.

    Raises:
        ValueError: for an unknown layout.
    """
    first, second, _ = packed_shape(out_features, in_features, layout)
    if layout == "row":
        return first, second * CHUNK_INPUTS
    if layout == "column":
        return second * PANEL_ROWS, first
    inputs = BASE3_BLOCK_INPUTS if layout == "tile16_base3" else BLOCK_INPUTS
    return first * TILE_ROWS, second * inputs


# The axes of the padded matrix [N, K], split up, and their order in the packed tensor; p, the place inside
# a byte, comes last.
def _axes(shape: tuple[int, int, int], layout: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, second, _ = shape
    if layout == "row":  # n, chunk, b, p, j
        return (first, second, CHUNK_INPUTS // BLOCK_INPUTS, _STEPS, _NEIGHBOURS), (0, 1, 2, 4, 3)
    if layout == "column":  # panel, p, u, l, d, k
        return (second, 4, 4, 4, 4, first), (5, 0, 3, 2, 4, 1)
    steps = _BASE3_STEPS if layout == "tile16_base3" else _STEPS
    return (first, TILE_ROWS, second, steps, _NEIGHBOURS), (0, 2, 1, 4, 3)  # tile, r, block, p, j


def pack(w: Tensor, layout: str = "tile16") -> Tensor:
    """Packs a ternary matrix, any device: the specification of ``ops.pack_ternary``.

    Args:
        w: int8 [N, K], values -1, 0, 1.
        layout: one of `LAYOUTS`.

    Returns:
        uint8 of shape ``packed_shape(N, K, layout)``.

    Raises:
        ValueError: for an unknown layout.
    """
    out_features, in_features = w.shape
    shape = packed_shape(out_features, in_features, layout)
    code = torch.ones(padded_size(out_features, in_features, layout), dtype=torch.uint8, device=w.device)
    code[:out_features, :in_features] = (w + 1).to(torch.uint8)
    sizes, order = _axes(shape, layout)
    digits = code.view(sizes).permute(order)
    base = 3 if layout == "tile16_base3" else 4
    place = torch.tensor([base**p for p in range(digits.shape[-1])], dtype=torch.uint8, device=w.device)
    return (digits * place).sum(-1, dtype=torch.uint8).reshape(shape)


def unpack(packed: Tensor, out_features: int, in_features: int, layout: str = "tile16") -> Tensor:
    """Inverse of ``pack``, any device: the specification of ``ops.unpack_ternary``.

    Args:
        packed: uint8 of shape ``packed_shape(out_features, in_features, layout)``.
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        layout: one of `LAYOUTS`.

    Returns:
        int8 [out_features, in_features].
    """
    sizes, order = _axes(packed_shape(out_features, in_features, layout), layout)
    base, steps = (3, _BASE3_STEPS) if layout == "tile16_base3" else (4, _STEPS)
    place = torch.tensor([base**p for p in range(steps)], dtype=torch.uint8, device=packed.device)
    digits = packed.reshape(*(sizes[axis] for axis in order[:-1]), 1) // place % base
    back = [order.index(axis) for axis in range(len(order))]
    code = digits.permute(back).reshape(padded_size(out_features, in_features, layout))
    return (code.to(torch.int8) - 1)[:out_features, :in_features].contiguous()


def pack_scales(scales: Tensor) -> Tensor:
    """Brings scales of groups into the order of the tiles.

    Args:
        scales: [G, N], any dtype and device: row ``g`` has those of the g-th group of inputs.

    Returns:
        [ceil(N / 16), G, 16] of the same dtype; rows of padding have scale 0.

    Example:
        >>> pack_scales(torch.ones(16, 40)).shape
        torch.Size([3, 16, 16])
    """
    groups, out_features = scales.shape
    tiles = -(-out_features // TILE_ROWS)
    padded = torch.nn.functional.pad(scales, (0, tiles * TILE_ROWS - out_features))
    return padded.view(groups, tiles, TILE_ROWS).transpose(0, 1).contiguous()


def unpack_scales(packed: Tensor, out_features: int) -> Tensor:
    """Inverse of `pack_scales`.

    Args:
        packed: [ceil(N / 16), G, 16].
        out_features: N.

    Returns:
        [G, N] of the same dtype.
    """
    return packed.transpose(0, 1).flatten(1)[:, :out_features].contiguous()
