"""The packed layout: golden bytes, the plain-PyTorch specification, and the operators against it."""

import pytest
import torch

from bitnet_ops import ops, packing

SIZES = [(1, 1), (15, 15), (16, 16), (17, 17), (31, 33), (48, 64), (5, 300), (100, 20)]


def random_ternary(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)


def test_golden_bytes() -> None:
    # Row 0: inputs 0, 4, 8, 12 (the four steps of byte 0) hold -1, 0, 1, -1: codes 0, 1, 2, 0.
    # Row 1: input 3 (step 0 of byte 7) holds 1: code 2. Everything else is 0: code 1, byte 0x55.
    w = torch.zeros(2, 17, dtype=torch.int8)
    w[0, 0], w[0, 4], w[0, 8], w[0, 12] = -1, 0, 1, -1
    w[1, 3] = 1
    w[1, 16] = -1  # first input of the second block, row 1: byte 4, code 0 in its lowest bits
    expected = torch.full((1, 2, 64), 0x55, dtype=torch.uint8)
    expected[0, 0, 0] = 0b00_10_01_00
    expected[0, 0, 7] = 0b01_01_01_10
    expected[0, 1, 4] = 0b01_01_01_00
    assert torch.equal(packing.pack(w), expected)
    assert torch.equal(ops.pack_ternary(w), expected)


@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_operators_equal_the_specification(out_features: int, in_features: int) -> None:
    w = random_ternary(out_features, in_features)
    packed = ops.pack_ternary(w)
    assert packed.shape == packing.packed_shape(out_features, in_features)
    assert torch.equal(packed, packing.pack(w))
    assert torch.equal(ops.unpack_ternary(packed, out_features, in_features), w)
    assert torch.equal(packing.unpack(packed, out_features, in_features), w)


@pytest.mark.parametrize(("out_features", "in_features"), [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(out_features: int, in_features: int) -> None:
    w = random_ternary(out_features, in_features)
    packed = ops.pack_ternary(w)
    assert torch.equal(packed, packing.pack(w))
    assert torch.equal(ops.unpack_ternary(packed, out_features, in_features), w)


@pytest.mark.parametrize("value", [-1, 0, 1])
def test_one_value_everywhere(value: int) -> None:
    w = torch.full((16, 16), value, dtype=torch.int8)
    byte = {-1: 0x00, 0: 0x55, 1: 0xAA}[value]
    assert torch.equal(ops.pack_ternary(w), torch.full((1, 1, 64), byte, dtype=torch.uint8))


def test_non_contiguous_matrix() -> None:
    w = random_ternary(40, 70)
    assert torch.equal(ops.pack_ternary(w.T), ops.pack_ternary(w.T.contiguous()))
    assert torch.equal(ops.pack_ternary(w[::2, 3:]), ops.pack_ternary(w[::2, 3:].contiguous()))
    packed = ops.pack_ternary(w)
    spread = torch.zeros(*packed.shape, 2, dtype=torch.uint8)
    spread[..., 0] = packed
    assert torch.equal(ops.unpack_ternary(spread[..., 0], 40, 70), w)


@pytest.mark.parametrize("value", [2, -2, 3, 127, -128])
def test_values_that_are_not_ternary_are_refused(value: int) -> None:
    w = torch.zeros(20, 20, dtype=torch.int8)
    w[19, 19] = value
    with pytest.raises(RuntimeError, match=r"pack_ternary: argument 'w': expected values -1, 0 and 1"):
        ops.pack_ternary(w)


def test_a_code_without_a_weight_is_refused() -> None:
    packed = ops.pack_ternary(torch.zeros(20, 20, dtype=torch.int8))
    packed[0, 0, 5] |= 0b11
    with pytest.raises(RuntimeError, match=r"unpack_ternary: argument 'packed': expected codes 0, 1 and 2"):
        ops.unpack_ternary(packed, 20, 20)
    # In the padding it stands for nothing: rows 16 to 19 are real, row 20 is not.
    packed = ops.pack_ternary(torch.zeros(20, 20, dtype=torch.int8))
    packed[1, 0, 4 * 4] = 0xFF
    assert torch.equal(ops.unpack_ternary(packed, 20, 20), torch.zeros(20, 20, dtype=torch.int8))


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match=r"layout must be one of 'tile16', .*, got 'rows'"):
        packing.packed_shape(1, 1, "rows")
