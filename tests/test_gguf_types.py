"""The table of GGUF tensor types, against that of the package gguf."""

import math

import gguf
import pytest

from bitnet_ops.checkpoint.gguf.types import REFUSED, TYPES, TensorType, types_of

BY_NAME = {type.name: type for type in TYPES}


@pytest.mark.parametrize("number", [n for n in gguf.GGMLQuantizationType if n not in REFUSED])
def test_numbers_names_and_sizes_are_those_of_gguf(number: gguf.GGMLQuantizationType) -> None:
    (type,) = types_of(number.value)[:1]
    assert type.name == number.name
    assert (type.block, type.block_bytes) == gguf.GGML_QUANT_SIZES[number]
    assert (type.row_bytes, type.tensor_bytes) == (0, 0)


@pytest.mark.parametrize("number", [n for n in gguf.GGMLQuantizationType if n in REFUSED])
def test_refused_types_are_named(number: gguf.GGMLQuantizationType) -> None:
    assert number.name in REFUSED[number.value]


def test_a_number_is_read_or_refused() -> None:
    assert not {type.number for type in TYPES} & REFUSED.keys()
    assert [number for number in range(200) if len(types_of(number)) > 1] == [42]
    assert [types_of(number) for number in (5, 10, -1, 2**32)] == [()] * 4
    assert [type.name for type in TYPES if type.refused] == ["STQ1_0"]


def test_the_three_types_of_number_42_have_different_sizes() -> None:
    sizes = {type.name: type.nbytes((3, 256)) for type in types_of(42)}
    assert sizes == {"Q2_0": 3 * 4 * 18, "Q2_0_128": 3 * 2 * 34, "STQ1_0": 3 * 42}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("F32", (), 4),
        ("F32", (7,), 28),
        ("F16", (0, 5), 0),
        ("BF16", (5, 0), 0),
        ("Q8_0", (3, 64), 3 * 2 * 34),
        ("Q6_K", (2, 3, 256), 6 * 210),
        ("TQ1_0", (1, 256), 54),
        ("I2_S", (1, 128), 64),
        ("I2_S", (2, 64), 64),
        ("I2_S", (6, 192), 9 * 32 + 32),
        ("IQ1_BN", (3, 128), 3 * (2 + 2 * 13)),
        ("IQ2_BN", (3, 128), 3 * (4 + 2 * 16)),
        ("IQ2_BN", (3, 0), 12),
        ("PTQ1_0", (2, 384), 2 * 3 * 28),
        ("Q6_K", (2**40, 2**40), 2**80 // 256 * 210),
    ],
)
def test_bytes_of_a_tensor(name: str, shape: tuple[int, ...], expected: int) -> None:
    assert BY_NAME[name].nbytes(shape) == expected


@pytest.mark.parametrize("type", [type for type in TYPES if type.block > 1], ids=lambda type: type.name)
def test_sizes_that_do_not_fit_the_blocks_are_an_error(type: TensorType) -> None:
    for shape in ((1, type.block // 2), (3, type.block + 1), (), (type.block - 1,)):
        fitted = math.prod(shape if type.name == "I2_S" else shape[-1:])
        with pytest.raises(ValueError, match=rf"{type.block} divides.*got {fitted} in"):
            type.nbytes(shape)


def test_negative_sizes_are_an_error() -> None:
    for shape in ((-256, 256), (256, -256), (-1, -256)):
        with pytest.raises(ValueError, match="0 or more"):
            BY_NAME["TQ1_0"].nbytes(shape)
