"""Ternary matrices in GGUF files: weights and scales of rows from the bytes of a tensor, and back."""

import torch
from torch import Tensor

from .... import ops
from ...weights import CHUNK_ROWS
from ..types import TensorType
from . import base3, two_bits
from .layout import Layout

LAYOUTS = {
    "I2_S": two_bits.I2_S,
    "I2_S_ARM": two_bits.I2_S_ARM,
    "TQ2_0": two_bits.TQ2_0,
    "Q2_0": two_bits.Q2_0,
    "Q2_0_128": two_bits.PQ2_0,
    "PQ2_0": two_bits.PQ2_0,
    "IQ2_BN": two_bits.IQ2_BN,
    "TQ1_0": base3.TQ1_0,
    "PTQ1_0": base3.PTQ1_0,
    "IQ1_BN": base3.IQ1_BN,
}
"""By `TensorType.name`."""


def decode_rows(type: TensorType, data: Tensor, shape: tuple[int, int], begin: int, end: int) -> Tensor:
    """The weights of some rows of a matrix.

    They are 0 wherever the scale is 0, whatever the codes are.

    Args:
        type: a ternary one.
        data: uint8 [type.nbytes(shape)], the whole tensor as it lies in the file.
        shape: [N, K] of the matrix.
        begin: the first row.
        end: the first row behind them.

    Returns:
        int8 [end - begin, K] in {-1, 0, 1}, in memory of its own.

    Raises:
        ValueError: the size of ``data`` does not fit, a byte stands for no weights, or a scale is negative,
            infinite or a NaN. The text is "expected ..., got ...".

    Example:
        >>> TQ2_0 = types_of(35)[0]
        >>> data = encode(TQ2_0, torch.ones(2, 256, dtype=torch.int8), torch.full((1, 2), 0.5))
        >>> decode_rows(TQ2_0, data, (2, 256), 1, 2)[0, :4]
        tensor([1, 1, 1, 1], dtype=torch.int8)
    """
    layout = _layout_for(type, data, shape)
    columns, groups = shape[1], shape[1] // type.block
    if not 0 <= begin <= end <= shape[0]:
        raise ValueError(f"expected rows of {shape[0]}, got {begin} to {end}")
    if begin == end or columns == 0:
        return torch.empty(end - begin, columns, dtype=torch.int8)
    scales = _scales_of_rows(layout, type, data, shape, begin, end)
    first, code_bytes = layout.codes[0], layout.codes[1] - layout.codes[0]
    if layout.scale_of == "tensor":
        # Whole blocks that cover the rows.
        block, last = begin * columns // type.block, -(-end * columns // type.block)
        blocks = data[block * type.block_bytes : last * type.block_bytes].view(-1, code_bytes)
    else:
        rows = data.view(shape[0], -1)[begin:end, type.row_bytes :].unflatten(1, (groups, type.block_bytes))
        blocks = rows[:, :, first : first + code_bytes].reshape(-1, code_bytes)
    if blocks.storage_offset() % 8 or blocks.data_ptr() % 8 or not blocks.is_contiguous():
        blocks = blocks.clone(memory_format=torch.contiguous_format)  # for words of eight bytes
    damaged = layout.damaged(blocks)
    if damaged is not None:
        at, byte = map(int, damaged.nonzero()[0])
        value = int(blocks[at, byte])
        if layout.scale_of == "tensor":
            at = (block + at) * type.block_bytes
        else:
            row, of_row = divmod(at, groups)
            at = (begin + row) * (data.numel() // shape[0]) + type.row_bytes + of_row * type.block_bytes
        raise ValueError(f"expected {layout.what}, got 0x{value:02x} in byte {at + first + byte}")
    weights = layout.decode(blocks).view(-1)
    skip = begin * columns % type.block  # 0 but where blocks run over the ends of rows
    weights = weights[skip : skip + (end - begin) * columns].view(end - begin, columns)
    if not scales.all():
        weights.view(*scales.shape, -1).mul_((scales != 0).to(torch.int8).unsqueeze(-1))
    return weights


def pack_codes(
    type: TensorType, data: Tensor, shape: tuple[int, int], rows: slice | Tensor, layout: str
) -> Tensor | None:
    """Packs rows of a matrix whose codes lie in the file with two bits. Scales are not looked at.

    Args:
        type: a ternary one.
        data: uint8 [type.nbytes(shape)], the whole tensor as it lies in the file.
        shape: [N, K] of the matrix.
        rows: which ones, or their numbers.
        layout: of the result.

    Returns:
        What `ops.pack_ternary` makes of `decode_rows` where no scale is 0. None where codes have other sizes,
        where a block runs over the end of a row, and where a byte stands for no weights:
        `decode_rows` says which one it is.

    Raises:
        ValueError: the size of ``data`` does not fit.
    """
    form = _layout_for(type, data, shape)
    groups, over = divmod(shape[1], type.block)
    if form.two_bits is None or over or data.numel() == type.tensor_bytes:
        return None
    blocks = data[: data.numel() - type.tensor_bytes].view(shape[0], -1)[rows, type.row_bytes :]
    codes = blocks.unflatten(1, (groups, type.block_bytes))[:, :, slice(*form.codes)]
    try:
        return ops.pack_two_bits(codes, *form.two_bits, layout)
    except RuntimeError:
        return None


def scales(type: TensorType, data: Tensor, shape: tuple[int, int]) -> Tensor:
    """The multipliers of a matrix: ``y = acc * x_scale * scale``. Weights are not looked at.

    Args:
        type: a ternary one.
        data: uint8 [type.nbytes(shape)], the whole tensor as it lies in the file.
        shape: [N, K] of the matrix.

    Returns:
        float32 [G, N]: one for each group of `group_size` inputs; G is 1 where a row or the tensor has one.

    Raises:
        ValueError: the size of ``data`` does not fit, or a scale is negative, infinite or a NaN.
    """
    layout = _layout_for(type, data, shape)
    return _scales_of_rows(layout, type, data, shape, 0, shape[0]).T.contiguous()


def group_size(type: TensorType) -> int:
    """Inputs with one scale: 64, 128 or 256; 0 where a row or the tensor has one."""
    return type.block if _layout(type).scale_of == "block" else 0


def encode(type: TensorType, w: Tensor, scales: Tensor) -> Tensor:
    """The bytes of a matrix.

    A scale is written as it is given, also where all weights of its block are 0. (There the quantisers of
    llama.cpp write 0.)

    Args:
        type: I2_S, TQ1_0, TQ2_0, Q2_0, Q2_0_128, PQ2_0 or PTQ1_0.
        w: int8 [N, K] in {-1, 0, 1}.
        scales: the multipliers, float32 [K / type.block, N], or [1, N] with one for each row.

    Returns:
        uint8 [type.nbytes((N, K))].

    Raises:
        ValueError: this type is not written, a weight is another number, K does not fit the blocks, or the
            scales do not fit: one is negative, infinite or a NaN, they differ (I2_S has one for the tensor),
            or one is not exact in float16 (the other types).
    """
    layout = _layout(type)
    if layout.encode is None:
        raise ValueError(f"expected a type that is written, got {type.name}")
    if w.dtype != torch.int8 or w.dim() != 2:
        raise ValueError(f"expected w int8 [N, K], got {w.dtype} {list(w.shape)}")
    if w.numel() and (w.min() < -1 or w.max() > 1):
        raise ValueError("expected weights in {-1, 0, 1}, got others")
    rows, columns = w.shape
    data = torch.zeros(type.nbytes((rows, columns)), dtype=torch.uint8)
    groups = columns // type.block
    shapes = [(1, rows), (groups, rows)][: 2 if layout.scale_of == "block" else 1]
    if scales.dtype != torch.float32 or tuple(scales.shape) not in shapes:
        raise ValueError(
            f"expected scales float32 {' or '.join(str(list(shape)) for shape in shapes)}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )
    _check_scales(scales.T)
    if w.numel() == 0:
        return data
    if layout.scale_of == "tensor":
        return _encode_flat(layout, type, w, scales, data)
    stored = scales.to(layout.scale_dtype)
    if not torch.equal(stored.float(), scales):
        wrong = scales[stored.float() != scales][0].item()
        raise ValueError(f"expected scales that {layout.scale_dtype} holds exactly, got {wrong!r}")
    first, last = layout.codes
    blocks = data.view(rows, groups, type.block_bytes)
    at = 0 if first else last
    blocks[:, :, at : at + stored.itemsize] = stored.T.contiguous().unsqueeze(-1).view(torch.uint8)
    for part, out in zip(w.split(CHUNK_ROWS), blocks.split(CHUNK_ROWS), strict=True):
        out[:, :, first:last] = layout.encode(part.reshape(-1, type.block)).view(*out.shape[:2], -1)
    return data


def _encode_flat(layout: Layout, type: TensorType, w: Tensor, scales: Tensor, data: Tensor) -> Tensor:
    assert layout.encode is not None
    if scales.min() != scales.max():
        raise ValueError(
            f"expected one scale for the tensor, got from {scales.min().item()!r} to {scales.max().item()!r}"
        )
    end = data.numel() - type.tensor_bytes
    data[end : end + scales.itemsize] = scales[0, :1].clone().view(torch.uint8)
    blocks = w.reshape(-1, type.block)
    chunk = max(1, CHUNK_ROWS * w.shape[1] // type.block)
    for part, out in zip(
        blocks.split(chunk), data[:end].view(-1, type.block_bytes).split(chunk), strict=True
    ):
        out.copy_(layout.encode(part))
    return data


def _layout(type: TensorType) -> Layout:
    if type.name not in LAYOUTS:
        raise ValueError(f"expected {' or '.join(LAYOUTS)}, got {type.name}")
    return LAYOUTS[type.name]


def _layout_for(type: TensorType, data: Tensor, shape: tuple[int, int]) -> Layout:
    layout = _layout(type)
    if len(shape) != 2:
        raise ValueError(f"expected a matrix, got {list(shape)!r:.200}")
    expected = type.nbytes(shape)
    if data.dtype != torch.uint8 or data.shape != (expected,):
        raise ValueError(
            f"expected {expected} bytes for {type.name} {list(shape)}, got {data.dtype} {list(data.shape)}"
        )
    return layout


def _scales_of_rows(
    layout: Layout, type: TensorType, data: Tensor, shape: tuple[int, int], begin: int, end: int
) -> Tensor:
    """float32 [rows, groups]."""
    groups = shape[1] // type.block if layout.scale_of == "block" else 1
    if begin == end or groups == 0:
        return torch.empty(end - begin, groups)
    if layout.scale_of == "tensor":
        at = data.numel() - type.tensor_bytes
        stored = data[at : at + layout.scale_dtype.itemsize].expand(end - begin, 1, -1)
    elif layout.scale_of == "row":
        stored = data.view(shape[0], -1)[begin:end, None, : type.row_bytes]
    else:
        at = 0 if layout.codes[0] else layout.codes[1]
        rows = data.view(shape[0], groups, type.block_bytes)[begin:end]
        stored = rows[:, :, at : at + layout.scale_dtype.itemsize]
    # A copy begins where a number may begin.
    values = stored.clone(memory_format=torch.contiguous_format).view(layout.scale_dtype).squeeze(-1).float()
    _check_scales(values, begin)
    return values


def _check_scales(values: Tensor, begin: int = 0) -> None:
    """Raises ValueError for a scale that no writer makes; ``values`` is [rows from ``begin`` on, groups].

    All writers take the largest absolute value. A negative one would turn the signs of the weights around.
    """
    good = (values >= 0) & (values < torch.inf)
    if not good.all():
        row, group = map(int, (~good).nonzero()[0])
        raise ValueError(
            f"expected scales that are finite and 0 or more, got {values[row, group].item()!r} in "
            f"row {begin + row}, group {group}"
        )
