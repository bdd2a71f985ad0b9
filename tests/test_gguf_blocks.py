"""Ternary blocks of GGUF files, against the package gguf and against loops from the formulas."""

import gguf
import numpy as np
import pytest
import torch
from gguf_encoders import BLOCK, ROW_SCALE, SCALE_IN_FRONT, TENSOR_SCALE, encode_codes
from gguf_encoders import encode as encode_slowly
from torch import Tensor

from bitnet_ops import ops, packing
from bitnet_ops.checkpoint.gguf import dense, ternary
from bitnet_ops.checkpoint.gguf.types import I2_S_ARM, TYPES

BY_NAME = {type.name: type for type in (*TYPES, I2_S_ARM)}
TERNARY = [name for name, type in BY_NAME.items() if type.ternary and not type.refused]
TWO_BITS = [name for name in TERNARY if name not in ("TQ1_0", "PTQ1_0", "IQ1_BN")]
BASE3 = [name for name in TERNARY if name not in TWO_BITS]
BLOCK_SCALE = [name for name in TERNARY if name not in ROW_SCALE and name not in TENSOR_SCALE]
WRITTEN = ["I2_S", *BLOCK_SCALE]
BY_GGUF = ["TQ1_0", "TQ2_0"]


def some_scales(name: str, rows: int, columns: int) -> Tensor:
    """float32 [G, N], as exact as the type needs, among them 0 where one block or row has one."""
    groups = columns // BLOCK[name] if name in BLOCK_SCALE else 1
    if name in TENSOR_SCALE:
        return torch.full((1, rows), 0.3)
    scales = torch.rand(groups, rows) + 0.01
    return scales if name == "IQ2_BN" else scales.half().float()


def encoded(name: str, w: Tensor, scales: Tensor) -> Tensor:
    data = encode_slowly(name, w.numpy(), scales.numpy())
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def sizes(name: str) -> list[tuple[int, int]]:
    """One block, a few, more rows than are read at a time, and for I2_S blocks that straddle rows."""
    block = BLOCK[name]
    odd = [(1, 384), (2, 64), (6, 192), (4, 160), (128, 1), (64, 2), (384, 3), (256, 127)]
    return [(1, block), (3, 2 * block), (300, block), (5, 5 * block), *(odd if name in TENSOR_SCALE else [])]


WITH_SIZES = [(name, *size) for name in TERNARY for size in sizes(name)]


@pytest.mark.parametrize(("name", "rows", "columns"), WITH_SIZES)
def test_decode_gives_the_weights_and_scales_that_went_in(name: str, rows: int, columns: int) -> None:
    type = BY_NAME[name]
    w = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    scales = some_scales(name, rows, columns)
    data = encoded(name, w, scales)
    before = data.clone()
    assert data.numel() == type.nbytes((rows, columns))
    parts = {0, 1, rows // 3, rows // 2, rows - 1, rows, min(256, rows)}
    for begin in parts:
        for end in parts:
            if begin <= end:
                part = ternary.decode_rows(type, data, (rows, columns), begin, end)
                assert part.is_contiguous()
                assert torch.equal(part, w[begin:end])
    assert torch.equal(ternary.scales(type, data, (rows, columns)), scales)
    assert ternary.group_size(type) == (BLOCK[name] if name in BLOCK_SCALE else 0)
    assert torch.equal(data, before)


@pytest.mark.parametrize("name", TERNARY)
def test_every_weight_at_every_position(name: str) -> None:
    type, block = BY_NAME[name], BLOCK[name]
    w = torch.randint(-1, 2, (3 * block, block), dtype=torch.int8)
    for row in range(len(w)):
        w[row, row // 3] = row % 3 - 1
    scales = some_scales(name, *w.shape)
    assert torch.equal(
        ternary.decode_rows(type, encoded(name, w, scales), (3 * block, block), 0, 3 * block), w
    )


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize(("name", "rows", "columns"), [one for one in WITH_SIZES if one[0] in TWO_BITS])
def test_packed_codes_are_packed_weights(name: str, rows: int, columns: int, layout: str) -> None:
    type, shape = BY_NAME[name], (rows, columns)
    w = torch.randint(-1, 2, shape, dtype=torch.int8)
    data = encoded(name, w, some_scales(name, rows, columns))
    for picked in (slice(0, rows), slice(rows // 2, rows), torch.randperm(rows)):
        packed = ternary.pack_codes(type, data, shape, picked, layout)
        if columns % BLOCK[name]:
            assert packed is None
        else:
            assert packed is not None
            assert torch.equal(packed, ops.pack_ternary(w[picked], layout))


@pytest.mark.parametrize("name", TERNARY)
def test_damaged_codes_are_not_packed(name: str) -> None:
    type, shape = BY_NAME[name], (5, 2 * BLOCK[name])
    data = encoded(name, torch.ones(shape, dtype=torch.int8), some_scales(name, *shape))
    end = len(data) - type.tensor_bytes
    begin = end - type.block_bytes + (2 if name in SCALE_IN_FRONT else 0)
    for at in (begin, begin + code_bytes(name) - 1):
        for place in range(4):
            damaged = data.clone()
            damaged[at] |= 3 << 2 * place
            assert ternary.pack_codes(type, damaged, shape, slice(0, 5), "tile16_base3") is None
            if name in TWO_BITS:
                assert ternary.pack_codes(type, damaged, shape, slice(0, 4), "tile16_base3") is not None


def code_bytes(name: str) -> int:
    """Bytes of a block that hold weights."""
    return encode_codes(name, np.zeros((1, BLOCK[name]), dtype=np.int64)).shape[1]


def place_of_byte(name: str, shape: tuple[int, int], row: int, block: int, byte: int) -> int:
    """Where byte ``byte`` of the weights of a block lies in the tensor."""
    type = BY_NAME[name]
    row_bytes = type.row_bytes + shape[1] // type.block * type.block_bytes
    in_front = 2 if name in SCALE_IN_FRONT else 0
    return row * row_bytes + type.row_bytes + block * type.block_bytes + in_front + byte


@pytest.mark.parametrize("name", BASE3)
def test_bytes_of_base_3_are_rounded_fractions_and_others_are_an_error(name: str) -> None:
    type, shape = BY_NAME[name], (1, BLOCK[name])
    # The weights of the first byte of a block, the highest digit first.
    digits = {"IQ1_BN": [4, 3, 2, 1, 0], "TQ1_0": [0, 32, 64, 96, 128], "PTQ1_0": [0, 16, 32, 48, 64]}[name]
    good = {-(-256 * v // 243): v for v in range(243)}
    assert len(good) == 243
    data = encoded(name, torch.ones(shape, dtype=torch.int8), torch.ones(1, 1))
    at = place_of_byte(name, shape, 0, 0, 0)
    for byte in range(256):
        data[at] = byte
        if byte in good:
            w = ternary.decode_rows(type, data, shape, 0, 1)[0]
            assert sum(3 ** (4 - n) * (int(w[j]) + 1) for n, j in enumerate(digits)) == good[byte]
        else:
            with pytest.raises(ValueError, match=f"five digits in base 3, got 0x{byte:02x} in byte {at}$"):
                ternary.decode_rows(type, data, shape, 0, 1)


@pytest.mark.parametrize("name", TERNARY)
def test_a_damaged_byte_is_named(name: str) -> None:
    type, shape = BY_NAME[name], (6, 2 * BLOCK[name])
    w = torch.randint(-1, 2, shape, dtype=torch.int8)
    good = encoded(name, w, some_scales(name, *shape))
    bad = [0b11, 0b1100, 0b110000, 0b11000000, 0xFF] if name in TWO_BITS else [1, 255 - 18]
    for row, block, byte in ((0, 0, 0), (2, 1, 3), (5, 1, code_bytes(name) - 1)):
        at = place_of_byte(name, shape, row, block, byte)
        for value in bad:
            data = good.clone()
            data[at] = value
            with pytest.raises(ValueError, match=f"expected .*, got 0x{value:02x} in byte {at}$"):
                ternary.decode_rows(type, data, shape, 0, 6)
            # Nothing else is read.
            assert torch.equal(ternary.decode_rows(type, data, shape, row + 1, 6), w[row + 1 :])
            assert torch.equal(ternary.decode_rows(type, data, shape, 0, row), w[:row])


@pytest.mark.parametrize("name", TERNARY)
def test_a_scale_of_0_makes_weights_of_0(name: str) -> None:
    type, shape = BY_NAME[name], (3, 2 * BLOCK[name])
    w = torch.randint(-1, 2, shape, dtype=torch.int8)
    scales = some_scales(name, *shape)
    scales[-1, slice(None) if name in TENSOR_SCALE else 1] = 0
    data = encoded(name, w, scales)
    expected = w * (scales != 0).T.repeat_interleave(shape[1] // len(scales), 1)
    assert torch.equal(ternary.decode_rows(type, data, shape, 0, 3), expected)
    assert torch.equal(ternary.decode_rows(type, data, shape, 1, 2), expected[1:2])
    assert torch.equal(ternary.scales(type, data, shape), scales)
    assert not torch.equal(expected, w)


@pytest.mark.parametrize("scale", [-1.0, -(2.0**-24), float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", TERNARY)
def test_a_scale_that_no_writer_makes_is_an_error(name: str, scale: float) -> None:
    type, shape = BY_NAME[name], (3, 2 * BLOCK[name])
    scales = some_scales(name, *shape)
    scales[-1, slice(None) if name in TENSOR_SCALE else 1] = scale
    w = torch.ones(shape, dtype=torch.int8)
    data = encoded(name, w, scales)
    row, group = (0 if name in TENSOR_SCALE else 1), len(scales) - 1
    text = rf"finite and 0 or more, got {scale!r} in row {row}, group {group}$"
    with pytest.raises(ValueError, match="in row 1, "):
        ternary.decode_rows(type, data, shape, 1, 2)
    for read in (
        lambda: ternary.scales(type, data, shape),
        lambda: ternary.decode_rows(type, data, shape, 0, 3),
        *((lambda: ternary.encode(type, w, scales),) if name in WRITTEN else ()),
    ):
        with pytest.raises(ValueError, match=text):
            read()


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_data_may_begin_anywhere(name: str) -> None:
    type, shape = BY_NAME[name], (3, 2 * BLOCK[name])
    w, scales = torch.randint(-1, 2, shape, dtype=torch.int8), some_scales(name, *shape)
    data = encoded(name, w, scales)
    for begin in range(1, 9):
        moved = torch.cat([torch.zeros(begin, dtype=torch.uint8), data])[begin:]
        assert torch.equal(ternary.decode_rows(type, moved, shape, 0, 3), w)
        assert torch.equal(ternary.scales(type, moved, shape), scales)


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_sizes_that_do_not_fit_are_an_error(name: str) -> None:
    type, shape = BY_NAME[name], (4, 2 * BLOCK[name])
    data = encoded(name, torch.ones(shape, dtype=torch.int8), some_scales(name, *shape))
    for wrong in (data[:-1], torch.cat([data, data[:1]]), data[:0], data.view(1, -1), data.view(torch.int8)):
        with pytest.raises(ValueError, match=f"expected {data.numel()} bytes for {name}"):
            ternary.decode_rows(type, wrong, shape, 0, 4)
        with pytest.raises(ValueError, match=f"expected {data.numel()} bytes for {name}"):
            ternary.scales(type, wrong, shape)
    with pytest.raises(ValueError, match="divides"):
        ternary.decode_rows(type, data, (4, 2 * BLOCK[name] - 1), 0, 4)
    with pytest.raises(ValueError, match="expected a matrix"):
        ternary.decode_rows(type, data, (1, *shape), 0, 1)  # type: ignore[arg-type]
    for begin, end in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="expected rows of 4"):
            ternary.decode_rows(type, data, shape, begin, end)


def test_dense_types_are_no_ternary_ones() -> None:
    with pytest.raises(ValueError, match="got F32"):
        ternary.group_size(BY_NAME["F32"])
    with pytest.raises(ValueError, match="got STQ1_0"):
        ternary.scales(BY_NAME["STQ1_0"], torch.zeros(42, dtype=torch.uint8), (1, 256))
    with pytest.raises(ValueError, match="got TQ1_0"):
        dense.dequantize(BY_NAME["TQ1_0"], torch.zeros(54, dtype=torch.uint8), (1, 256), torch.float32)


@pytest.mark.parametrize(("name", "rows", "columns"), [size for size in WITH_SIZES if size[0] in WRITTEN])
def test_encode_gives_the_bytes_of_the_formulas(name: str, rows: int, columns: int) -> None:
    w = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    scales = some_scales(name, rows, columns)
    scales[:, 0] = 0 if name != "I2_S" else scales[:, 0]
    assert torch.equal(ternary.encode(BY_NAME[name], w, scales), encoded(name, w, scales))
    row_scales = scales[:1]  # one for each row
    everywhere = row_scales.expand(len(scales), rows)
    assert torch.equal(ternary.encode(BY_NAME[name], w.clone(), row_scales), encoded(name, w, everywhere))


@pytest.mark.parametrize("name", BY_GGUF)
def test_encode_gives_the_bytes_of_gguf(name: str) -> None:
    w = torch.randint(-1, 2, (300, 768), dtype=torch.int8)
    scales = some_scales(name, 300, 768)
    w[7, 256:512] = 0
    scales[1, 7] = 0  # as gguf finds it
    numbers = (w.view(300, 3, 256) * scales.T.unsqueeze(-1)).view(300, 768)
    theirs = torch.from_numpy(
        gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[name]).reshape(-1)
    )
    assert torch.equal(ternary.encode(BY_NAME[name], w, scales), theirs)
    assert torch.equal(ternary.decode_rows(BY_NAME[name], theirs, (300, 768), 0, 300), w)
    assert torch.equal(ternary.scales(BY_NAME[name], theirs, (300, 768)), scales)


@pytest.mark.parametrize("name", BY_GGUF)
def test_gguf_dequantizes_what_we_encode(name: str) -> None:
    w = torch.randint(-1, 2, (5, 512), dtype=torch.int8)
    scales = some_scales(name, 5, 512)
    data = ternary.encode(BY_NAME[name], w, scales).view(5, -1)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(theirs, (w.view(5, 2, 256) * scales.T.unsqueeze(-1)).view(5, 512).numpy())


GOLDEN = {
    "I2_S": (
        "24499224499224499224499224499224499224499224499224499224499224490000003f000000000000000000"
        "00000000000000000000000000000000000000"
    ),
    "I2_S_ARM": (
        "186186186186186186186186186186180000003f00000000000000000000000000000000000000000000000000000000"
    ),
    "TQ1_0": (
        "456ccf456ccf456ccf456ccf456ccf456ccf456ccf456ccf456ccf456ccf456c94bb3194bb3194bb3194bb3194"
        "bb31943092bb300038"
    ),
    "TQ2_0": (
        "186186186186186186186186186186186186186186186186186186186186186186186186186186186186186186"
        "186186186186186186186186186186186186180038"
    ),
    "Q2_0": "003824499224499224499224499224499224",
    "Q2_0_128": "00382449922449922449922449922449922449922449922449922449922449922449",
    "PQ2_0": "00382449922449922449922449922449922449922449922449922449922449922449",
    "PTQ1_0": "3194bb3194bb3194bb3194bb3194bb31cf456ccf456ccf45436c0038",
    "IQ1_BN": "00386c45cfcf6c4545cf6c6c45cf17",
    "IQ2_BN": "0000003f24499224499224499224499224499224",
}
"""A block of the weights -1, 0, 1, -1, 0, 1 ..., scale 0.5; written once, the first byte checked by hand."""


@pytest.mark.parametrize("name", TERNARY)
def test_golden_bytes(name: str) -> None:
    type, shape = BY_NAME[name], (1, BLOCK[name])
    data = torch.frombuffer(bytearray.fromhex(GOLDEN[name]), dtype=torch.uint8)
    w = (torch.arange(BLOCK[name]) % 3 - 1).to(torch.int8).view(shape)
    assert torch.equal(ternary.decode_rows(type, data, shape, 0, 1), w)
    assert ternary.scales(type, data, shape).tolist() == [[0.5]]
    if name in WRITTEN:
        assert torch.equal(ternary.encode(type, w, torch.full((1, 1), 0.5)), data)


@pytest.mark.parametrize("name", WRITTEN)
def test_encode_refuses_what_the_type_cannot_hold(name: str) -> None:
    type, block = BY_NAME[name], BLOCK[name]
    w = torch.zeros(2, 3 * block, dtype=torch.int8)
    scales = torch.full((1, 2), 0.5)
    for wrong in (2, -2, -128, 127):
        damaged = w.clone()
        damaged[1, -1] = wrong
        with pytest.raises(ValueError, match="weights in"):
            ternary.encode(type, damaged, scales)
    for wrong_w in (w.float(), w[0], w.unsqueeze(0)):
        with pytest.raises(ValueError, match="w int8"):
            ternary.encode(type, wrong_w, scales)
    for wrong_scales in (
        scales.double(),
        scales.T,
        scales[0],
        torch.full((2, 2), 0.5),
        torch.full((1, 1), 0.5),
    ):
        with pytest.raises(ValueError, match="expected scales float32"):
            ternary.encode(type, w, wrong_scales)
    with pytest.raises(ValueError, match="divides"):
        ternary.encode(type, w[:, :-1], scales)
    differing = torch.tensor([[0.5, 0.3]])
    text = "one scale for the tensor, got from 0.3" if name == "I2_S" else "float16 holds exactly, got 0.3"
    for wrong_scales in (differing, torch.tensor([[0.5, 1e6]]), torch.tensor([[0.5, 1e-9]])):
        with pytest.raises(ValueError, match=text if wrong_scales is differing else "scale"):
            ternary.encode(type, w, wrong_scales)


@pytest.mark.parametrize("name", [*ROW_SCALE, "I2_S_ARM"])
def test_some_types_are_not_written(name: str) -> None:
    with pytest.raises(ValueError, match=f"a type that is written, got {name}"):
        ternary.encode(BY_NAME[name], torch.zeros(1, 64, dtype=torch.int8), torch.ones(1, 1))


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_matrices_of_no_weights(name: str) -> None:
    type = BY_NAME[name]
    for shape in ((0, 2 * BLOCK[name]), (3, 0), (0, 0)):
        data = torch.zeros(type.nbytes(shape), dtype=torch.uint8)
        assert ternary.decode_rows(type, data, shape, 0, shape[0]).shape == shape
        scales = ternary.scales(type, data, shape)
        assert scales.shape == (shape[1] // type.block if name in BLOCK_SCALE else 1, shape[0])
        if name in WRITTEN:
            assert torch.equal(ternary.encode(type, torch.zeros(shape, dtype=torch.int8), scales), data)
