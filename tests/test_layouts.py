"""Layouts, 16-bit activations, group scales and skipped rows: the same results on every instruction set."""

import pytest
import torch
from torch import Tensor

from bitnet_ops import ops, packing, reference

# One row of q, the most that sparse kernels take (4, or 2 tokens of 16 bits), one more, a register block.
TOKENS = [1, 2, 4, 5, 13]
# Around a word (16), a base-3 block (20), a chunk or a panel (256).
SIZES = [(1, 1), (17, 19), (16, 20), (33, 21), (255, 257), (300, 520)]


def random_ternary(out_features: int, in_features: int) -> Tensor:
    return torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)


def sparse_activations(tokens: int, in_features: int) -> Tensor:
    """Rows in which many a quantised value is 0, and one that is 0 altogether."""
    x = torch.randn(tokens, in_features) * (torch.rand(tokens, in_features) < 0.3)
    x[tokens // 2] = 0
    return x


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize(("out_features", "in_features"), [*SIZES, (0, 5), (5, 0), (0, 0)])
def test_packing_equals_the_specification(layout: str, out_features: int, in_features: int) -> None:
    w = random_ternary(out_features, in_features)
    packed = ops.pack_ternary(w, layout)
    assert packed.shape == packing.packed_shape(out_features, in_features, layout)
    assert torch.equal(packed, packing.pack(w, layout))
    assert torch.equal(ops.unpack_ternary(packed, out_features, in_features, layout), w)
    assert torch.equal(packing.unpack(packed, out_features, in_features, layout), w)


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize(
    ("width", "high_first"), [(1, False), (16, False), (16, True), (32, False), (32, True)]
)
@pytest.mark.parametrize(
    ("rows", "parts", "part_bytes"), [(1, 1, 32), (16, 3, 64), (37, 2, 96), (0, 2, 32), (3, 0, 32), (3, 2, 0)]
)
def test_two_bits_equal_the_specification(
    layout: str, width: int, high_first: bool, rows: int, parts: int, part_bytes: int
) -> None:
    codes = torch.randint(0, 3, (4, rows, parts, part_bytes), dtype=torch.uint8)
    codes = codes[0] + 4 * codes[1] + 16 * codes[2] + 64 * codes[3]
    expected = reference.pack_two_bits(codes, width, high_first, layout)
    # Where they lie in a file: behind something in front of each row and each part, at any byte.
    apart = torch.full((rows, 5 + parts * (part_bytes + 3)), 255, dtype=torch.uint8)
    between = apart[:, 5:].unflatten(1, (parts, part_bytes + 3))[:, :, 3:]
    between.copy_(codes)
    for given in (codes, between, codes.mT.contiguous().mT):
        assert torch.equal(ops.pack_two_bits(given, width, high_first, layout), expected)


@pytest.mark.parametrize("wanted", packing.LAYOUTS)
@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize(("out_features", "in_features"), [*SIZES, (0, 5), (5, 0)])
def test_repacking_equals_packing(layout: str, wanted: str, out_features: int, in_features: int) -> None:
    w = random_ternary(out_features, in_features)
    packed = packing.pack(w, layout)
    repacked = ops.repack_ternary(packed, out_features, in_features, layout, wanted)
    assert torch.equal(repacked, packing.pack(w, wanted))
    if repacked.numel():
        assert repacked.data_ptr() != packed.data_ptr()


def test_golden_bytes() -> None:
    w = torch.zeros(300, 300, dtype=torch.int8)
    # tile16_base3: row 1, inputs 20 + 4*p + 2 are the five digits of block 1, byte 4*1 + 2.
    w[1, 22:42:4] = torch.tensor([-1, 0, 1, 1, -1], dtype=torch.int8)  # codes 0, 1, 2, 2, 0
    assert packing.pack(w, "tile16_base3")[0, 1, 6] == 1 * 3 + 2 * 9 + 2 * 27
    assert packing.pack(w, "tile16_base3")[0, 0, 6] == packing.zero_byte("tile16_base3") == 121
    # row: row 1, inputs 256 + 16*2 + 4*p + 3 are the four codes of chunk 1, byte 4*2 + 3.
    w[1, 291] = -1  # p = 0
    w[1, 295] = 1  # p = 1
    assert packing.pack(w, "row")[1, 1, 11] == 0b01_01_10_00
    # column: input 7, rows 256 + 64*p + 16*1 + 4*2 + 3 are the codes of panel 1, byte 16*2 + 4*1 + 3.
    w[283, 7] = 1  # p = 0
    assert packing.pack(w, "column")[7, 1, 39] == 0b01_01_01_10
    for layout in packing.LAYOUTS:
        assert torch.equal(ops.pack_ternary(w, layout), packing.pack(w, layout))


def test_base3_bytes_that_stand_for_no_weights_are_refused() -> None:
    packed = ops.pack_ternary(random_ternary(16, 20), "tile16_base3")
    for byte in (243, 255):
        packed[0, 0, 5] = byte
        with pytest.raises(
            RuntimeError, match=r"unpack_ternary: argument 'packed': expected codes 0, 1 and 2"
        ):
            ops.unpack_ternary(packed, 16, 20, "tile16_base3")


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_every_layout_equals_the_reference(
    isa: str, layout: str, out_features: int, in_features: int
) -> None:
    w, weight_scale, bias = (
        random_ternary(out_features, in_features),
        torch.rand(out_features),
        torch.randn(out_features),
    )
    packed = ops.pack_ternary(w, layout)
    for tokens in TOKENS:
        q = torch.randint(-128, 128, (tokens, in_features), dtype=torch.int8)
        q[:, ::3] = 0
        acc = ops.ternary_matmul(q, packed, out_features, layout)
        assert torch.equal(acc, reference.ternary_matmul(q, w))
        for bits in (8, 16):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = sparse_activations(tokens, in_features).to(dtype)
                y = ops.ternary_linear(x, packed, weight_scale, bias, out_features, layout, bits)
                assert torch.equal(y, reference.ternary_linear(x, w, weight_scale, bias, bits))


@pytest.mark.parametrize("group_size", [64, 128, 256])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_group_scales_equal_the_reference(
    isa: str, out_features: int, in_features: int, bits: int, group_size: int
) -> None:
    w = random_ternary(out_features, in_features)
    weight_scale = torch.rand(-(-in_features // group_size), out_features)
    packed, scales = ops.pack_ternary(w), packing.pack_scales(weight_scale)
    for tokens in TOKENS:
        x = torch.randn(tokens, in_features)
        for bias in (None, torch.randn(out_features)):
            y = ops.ternary_linear(x, packed, scales, bias, out_features, "tile16", bits, group_size)
            assert torch.equal(y, reference.ternary_linear(x, w, weight_scale, bias, bits, group_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_only_active_rows_are_computed(isa: str, density: float, dtype: torch.dtype) -> None:
    w, weight_scale, bias = random_ternary(300, 520), torch.rand(300), torch.randn(300)
    packed = ops.pack_ternary(w, "row")
    for tokens in TOKENS:
        x, active = torch.randn(tokens, 520).to(dtype), torch.rand(tokens, 300) < density
        y = ops.ternary_linear(x, packed, weight_scale, bias, 300, "row", active=active)
        assert torch.equal(y, reference.ternary_linear(x, w, weight_scale, bias, active=active))


def test_a_bad_row_is_nan_and_alone(isa: str) -> None:
    w = random_ternary(300, 520)
    clean = torch.randn(4, 520)
    bad = clean.clone()
    bad[1, 7] = torch.inf
    active = torch.ones(4, 300, dtype=torch.bool)
    active[1, ::2] = False
    for layout in packing.LAYOUTS:
        packed = ops.pack_ternary(w, layout)
        for bits in (8, 16):
            for tokens in (2, 4):
                given = [
                    ops.ternary_linear(x[:tokens], packed, torch.ones(300), None, 300, layout, bits)
                    for x in (clean, bad)
                ]
                others = [i for i in range(tokens) if i != 1]
                assert torch.equal(given[1][others], given[0][others])
                assert given[1][1].isnan().all()
    y = ops.ternary_linear(bad, ops.pack_ternary(w, "row"), torch.ones(300), None, 300, "row", active=active)
    assert y[1, 1::2].isnan().all()
    assert (y[1, ::2] == 0).all()


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("bits", [8, 16])
def test_threads_and_batch_change_nothing(isa: str, layout: str, bits: int, threads: None) -> None:
    # Large enough that the sparse kernels have work for three threads.
    w, x = random_ternary(1100, 1000), sparse_activations(6, 1000)
    packed = ops.pack_ternary(w, layout)
    torch.set_num_threads(1)
    expected = ops.ternary_linear(x, packed, torch.ones(1100), None, 1100, layout, bits)
    for count in (2, 3):
        torch.set_num_threads(count)
        for tokens in (1, 3, 6):
            y = ops.ternary_linear(x[:tokens], packed, torch.ones(1100), None, 1100, layout, bits)
            assert torch.equal(y, expected[:tokens])


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_int16_activations_that_reach_the_ends(isa: str, layout: str) -> None:
    # Every q is +-32639, every weight 1: |acc| = 32639 * 600 needs both planes and more than 24 bits.
    w, x = torch.ones(17, 600, dtype=torch.int8), torch.ones(2, 600)
    x[1] = -1
    packed = ops.pack_ternary(w, layout)
    q, _ = ops.quantize_activations(x, bits=16)
    assert q.dtype == torch.int16
    assert torch.equal(q, torch.tensor([[32639], [-32639]], dtype=torch.int16).expand(2, 600))
    y = ops.ternary_linear(x, packed, torch.ones(17), None, 17, layout, activation_bits=16)
    assert torch.equal(y, reference.ternary_linear(x, w, torch.ones(17), None, 16))


def test_sixteen_bits_are_closer_than_eight() -> None:
    w, x = random_ternary(64, 512), torch.randn(20, 512)
    exact = x.double() @ w.double().T
    error = {
        bits: (ops.ternary_linear(x, ops.pack_ternary(w), torch.ones(64), None, 64, "tile16", bits) - exact)
        .abs()
        .max()
        for bits in (8, 16)
    }
    assert error[16] < error[8] / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [1, 7, 8, 15, 16, 17, 64, 65, 300])
def test_quantising_to_sixteen_bits(isa: str, in_features: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, in_features)
    x[1] = 0
    x[2] *= 1e-6
    x[3, in_features // 2] = torch.nan
    x[4, 0] = 6e4
    q, x_scale = ops.quantize_activations(x.to(dtype), bits=16)
    expected_q, expected_scale = reference.quantize_activations(x.to(dtype), bits=16)
    assert torch.equal(q, expected_q)
    assert torch.equal(x_scale.nan_to_num(nan=-1.0), expected_scale.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(layout: str) -> None:
    w, weight_scale = random_ternary(40, 90), torch.rand(40)
    x, grad_y = torch.randn(3, 90, requires_grad=True), torch.randn(3, 40)
    ops.ternary_linear(x, ops.pack_ternary(w, layout), weight_scale, None, 40, layout).backward(grad_y)
    torch.testing.assert_close(x.grad, (grad_y * weight_scale) @ w.float())


def test_gradients_of_groups_and_active_rows() -> None:
    w, x, grad_y = random_ternary(40, 150), torch.randn(3, 150, requires_grad=True), torch.randn(3, 40)
    scale = torch.rand(3, 40)
    ops.ternary_linear(x, ops.pack_ternary(w), scale, None, 40, "tile16", 8, 64).backward(grad_y)
    wide = scale.repeat_interleave(64, dim=0)[:150].T
    torch.testing.assert_close(x.grad, grad_y @ (w * wide))

    x.grad = None
    bias = torch.zeros(40, requires_grad=True)
    active = torch.rand(3, 40) < 0.5
    ops.ternary_linear(
        x, ops.pack_ternary(w, "row"), torch.ones(40), bias, 40, "row", active=active
    ).backward(grad_y)
    torch.testing.assert_close(x.grad, (grad_y * active) @ w.float())
    torch.testing.assert_close(bias.grad, (grad_y * active).sum(0))


@pytest.mark.parametrize("out_features", [1, 15, 16, 40])
def test_scales_in_the_order_of_tiles(out_features: int) -> None:
    scales = torch.arange(3 * out_features).view(3, out_features).half() + 1
    packed = packing.pack_scales(scales)
    assert packed.shape == (-(-out_features // 16), 3, 16)
    assert packed.dtype == torch.float16
    assert packed.is_contiguous()
    for row in range(packed.shape[0] * 16):
        expected = scales[:, row] if row < out_features else torch.zeros(3, dtype=torch.float16)
        assert torch.equal(packed[row // 16, :, row % 16], expected)
    assert torch.equal(packing.unpack_scales(packed, out_features), scales)
