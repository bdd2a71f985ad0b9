"""The check that a packed matrix holds codes of weights and nothing else, format by format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import ops, packing

if TYPE_CHECKING:
    from .tensor_source import TensorSource

MOST_BASE3 = 3**5 - 1  # the byte of five codes 2


def check_codes(files: TensorSource, name: str, packed: Tensor, begin: int = 0) -> None:
    """Raises CheckpointError when a byte of the uint8 tensor ``packed`` holds the 2-bit code 3.

    Args:
        files: says where the tensor is from.
        name: of the tensor.
        packed: its bytes, or some of them.
        begin: bytes of it in front of these.
    """
    at = int(ops.find_bad_byte(packed))
    if at >= 0:
        raise files.error(
            name,
            "four 2-bit codes in {0, 1, 2} a byte",
            f"a code 3 in byte {begin + at} (0x{int(packed.view(-1)[at]):02x})",
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
        at = int(ops.find_bad_byte(packed, layout))
        if at >= 0:
            raise files.error(
                name,
                f"bytes of at most {MOST_BASE3}, five codes in base 3",
                f"{int(packed.view(-1)[at])} in byte {at}",
            )
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
