"""The check that a packed matrix holds codes of weights and nothing else, format by format."""

import torch
from torch import Tensor

from .. import ops, packing
from .tensor_source import TensorSource

CHUNK_BYTES = 1 << 20
"""Bytes that are checked at a time, so that the temporaries stay in the second-level cache."""

MOST_BASE3 = 3**5 - 1  # the byte of five codes 2


def check_codes(files: TensorSource, name: str, packed: Tensor, begin: int = 0) -> None:
    """Raises CheckpointError when a byte of the uint8 tensor ``packed`` holds the 2-bit code 3.

    Args:
        files: says where the tensor is from.
        name: of the tensor.
        packed: its bytes, or some of them.
        begin: bytes of it in front of these.
    """
    for start, chunk in enumerate(torch.split(packed.view(-1), CHUNK_BYTES)):
        both_bits = chunk & (chunk >> 1) & 0b01010101
        if both_bits.any():
            at = int(both_bits.nonzero()[0])
            raise files.error(
                name,
                "four 2-bit codes in {0, 1, 2} a byte",
                f"a code 3 in byte {begin + start * CHUNK_BYTES + at} (0x{int(chunk[at]):02x})",
            )


def check_packed(
    files: TensorSource, name: str, packed: Tensor, out_features: int, in_features: int, layout: str
) -> None:
    """Raises CheckpointError for bytes that stand for no weights, or other weights than 0 in the padding.

    Args:
        files: says where the tensor is from.
        name: of the tensor.
        packed: uint8 of shape ``packing.packed_shape(out_features, in_features, layout)``.
        out_features: N.
        in_features: K.
        layout: one of `packing.LAYOUTS`.
    """
    if layout == "tile16_base3":
        if packed.numel() and packed.max() > MOST_BASE3:
            raise files.error(name, f"bytes of at most {MOST_BASE3}, five codes in base 3", f"{packed.max()}")
    else:
        check_codes(files, name, packed)
    # Blocks are independent, so the last row and the last column of blocks are matrices of their own.
    rows, columns = packing.padded_size(out_features, in_features, layout)
    if rows > out_features:
        last = packed[:, -1:] if layout == "column" else packed[-1:]
        height = packing.PANEL_ROWS if layout == "column" else packing.TILE_ROWS
        padding = _unpack(last, height, columns, layout)[height - (rows - out_features) :]
        _need_zeros(files, name, padding)
    if columns > in_features:
        width = columns // packed.shape[1]
        padding = _unpack(packed[:, -1:], rows, width, layout)[:, width - (columns - in_features) :]
        _need_zeros(files, name, padding)


def _unpack(packed: Tensor, out_features: int, in_features: int, layout: str) -> Tensor:
    return ops.unpack_ternary(packed.contiguous(), out_features, in_features, layout)


def _need_zeros(files: TensorSource, name: str, padding: Tensor) -> None:
    if padding.any():
        raise files.error(name, "weight 0 in the padding of the last blocks", "others")
