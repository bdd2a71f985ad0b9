"""Every operator against the reference, on every instruction set, with the inputs that break kernels."""

import pytest
import torch
from text_models import tiny_model
from torch import Tensor
from torch.library import opcheck

from bitnet_ops import KVCache, ops, packing, reference, use_isa
from bitnet_ops.decoder.model import KNOWN
from bitnet_ops.decoder.plan import collect

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Below, at and above a register (8, 16), a tile (16), a block of activations (64), and longer.
IN_FEATURES = [1, 15, 16, 17, 63, 64, 65, 144, 300]
OUT_FEATURES = [1, 15, 16, 17, 33, 64]
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_SUBNORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def random_ternary(out_features: int, in_features: int) -> Tensor:
    return torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)


def assert_same(given: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, except that every NaN is the same NaN."""
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    assert torch.equal(given.isnan(), expected.isnan())
    assert torch.equal(given.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def edge_rows(in_features: int) -> Tensor:
    """One row for each way in which quantisation can go wrong."""
    k = torch.arange(in_features)
    rows = {
        "random": torch.randn(in_features),
        "zero": torch.zeros(in_features),
        "negative zero": -torch.zeros(in_features),
        "all equal": torch.full((in_features,), 3.0),
        "alternating extremes": torch.where(k % 2 == 0, 5.0, -5.0),
        "exact ties": torch.where(k == 0, 127.0, k % 253 - 126 + 0.5),  # scale 1: x * s is x
        "tiny": torch.randn(in_features) * 1e-6,  # below the floor of absmax
        "subnormal": torch.randn(in_features) * 1e-40,
        "large": torch.randn(in_features) * 1e4,
        "one NaN": torch.where(k == in_features // 2, torch.nan, 1.0),
        "one infinity": torch.where(k == in_features - 1, torch.inf, 1.0),
        "one minus infinity": torch.where(k == 0, -torch.inf, 1.0),
        "random again": torch.randn(in_features),  # rows after a bad one are untouched
    }
    return torch.stack(list(rows.values()))


class TestQuantizeActivations:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("in_features", IN_FEATURES)
    def test_equals_reference(self, isa: str, in_features: int, dtype: torch.dtype) -> None:
        x = edge_rows(in_features).to(dtype)
        q, x_scale = ops.quantize_activations(x)
        expected_q, expected_scale = reference.quantize_activations(x)
        assert torch.equal(q, expected_q)
        assert_same(x_scale, expected_scale)

    def test_range_of_float32(self, isa: str) -> None:
        for magnitude in (3e38, 1e-5, 1.0000001e-5, 9.99e-6, 1e-38):
            x = torch.randn(4, 50).clamp(-1, 1) * magnitude
            q, x_scale = ops.quantize_activations(x)
            expected_q, expected_scale = reference.quantize_activations(x)
            assert torch.equal(q, expected_q)
            assert torch.equal(x_scale, expected_scale)

    def test_ties_go_to_even(self, isa: str) -> None:
        x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
        q, x_scale = ops.quantize_activations(x)
        assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
        assert x_scale.item() == 1.0


class TestTernaryMatmul:
    @pytest.mark.parametrize("out_features", OUT_FEATURES)
    @pytest.mark.parametrize("in_features", IN_FEATURES)
    def test_equals_reference(self, isa: str, in_features: int, out_features: int) -> None:
        w = random_ternary(out_features, in_features)
        packed = ops.pack_ternary(w)
        for tokens in (1, 2, 5, 13, 25):
            q = torch.randint(-128, 128, (tokens, in_features), dtype=torch.int8)
            assert torch.equal(ops.ternary_matmul(q, packed, out_features), reference.ternary_matmul(q, w))

    @pytest.mark.parametrize("weight", [-1, 0, 1])
    @pytest.mark.parametrize("activation", [-128, -127, 127])
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_extreme_sums(self, isa: str, tokens: int, activation: int, weight: int) -> None:
        in_features = 2570  # long enough to overflow an int16 lane 40 times over
        q = torch.full((tokens, in_features), activation, dtype=torch.int8)
        packed = ops.pack_ternary(torch.full((17, in_features), weight, dtype=torch.int8))
        expected = torch.full((tokens, 17), activation * weight * in_features, dtype=torch.int32)
        assert torch.equal(ops.ternary_matmul(q, packed, 17), expected)


class TestTernaryLinear:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("in_features", IN_FEATURES)
    def test_equals_reference(self, isa: str, in_features: int, with_bias: bool, dtype: torch.dtype) -> None:
        x = edge_rows(in_features).to(dtype)
        for out_features in OUT_FEATURES:
            w = random_ternary(out_features, in_features)
            weight_scale = torch.randn(out_features)
            bias = torch.randn(out_features) if with_bias else None
            y = ops.ternary_linear(x, ops.pack_ternary(w), weight_scale, bias, out_features)
            assert_same(y, reference.ternary_linear(x, w, weight_scale, bias))

    def test_equals_its_parts(self, isa: str) -> None:
        x, w, weight_scale = torch.randn(7, 100), random_ternary(40, 100), torch.rand(40)
        packed = ops.pack_ternary(w)
        q, x_scale = ops.quantize_activations(x)
        acc = ops.ternary_matmul(q, packed, 40)
        y = acc.float() * (x_scale.unsqueeze(-1) * weight_scale)
        assert torch.equal(ops.ternary_linear(x, packed, weight_scale, None, 40), y)

    def test_a_bad_row_is_nan_and_alone(self, isa: str) -> None:
        x, w = torch.randn(5, 64), random_ternary(20, 64)
        clean = ops.ternary_linear(x, ops.pack_ternary(w), torch.ones(20), torch.ones(20), 20)
        for bad in (torch.nan, torch.inf, -torch.inf):
            x[2, 63] = bad
            y = ops.ternary_linear(x, ops.pack_ternary(w), torch.ones(20), torch.ones(20), 20)
            assert y[2].isnan().all()
            others = [0, 1, 3, 4]
            assert torch.equal(y[others], clean[others])

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 2, 2)])
    def test_leading_shapes(self, isa: str, shape: tuple[int, ...]) -> None:
        x, w = torch.randn(*shape, 33), random_ternary(18, 33)
        y = ops.ternary_linear(x, ops.pack_ternary(w), torch.ones(18), None, 18)
        assert y.shape == (*shape, 18)
        assert torch.equal(y, reference.ternary_linear(x, w, torch.ones(18)))

    def test_no_rows_and_no_columns(self, isa: str) -> None:
        no_rows = ops.pack_ternary(torch.zeros(0, 8, dtype=torch.int8))
        assert ops.ternary_linear(torch.randn(3, 8), no_rows, torch.ones(0), None, 0).shape == (3, 0)
        no_columns = ops.pack_ternary(torch.zeros(5, 0, dtype=torch.int8))
        bias = torch.randn(5)
        y = ops.ternary_linear(torch.randn(2, 0), no_columns, torch.ones(5), bias, 5)
        assert torch.equal(y, bias.expand(2, 5))


class TestRmsNorm:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("features", [1, 7, 16, 63, 64, 65, 300, 2560])
    def test_within_the_rounding_bound(self, isa: str, features: int, dtype: torch.dtype) -> None:
        x = (torch.randn(9, features) * torch.logspace(-3, 3, 9).unsqueeze(1)).to(dtype)
        weight = torch.randn(features)
        eps = 1e-5
        wide = x.double()
        eps32 = torch.tensor(eps, dtype=torch.float32).double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + eps32).sqrt() * weight.double()
        # Terms of the sum are positive, so its relative error is at most one roundoff u for every
        # addition on the way: ceil(K / 64) fused ones in a lane, 6 folds. The division by K and the
        # addition of eps add one each; the square root halves it all and, like the reciprocal and the
        # two products, adds one of its own. The last product is rounded again to the output's dtype.
        u = UNIT_ROUNDOFF[torch.float32]
        relative = ((-(-features // 64) + 6 + 2) / 2 + 4) * u * 1.01 + UNIT_ROUNDOFF[dtype] * 1.01
        bound = exact.abs() * relative + SMALLEST_SUBNORMAL[dtype]
        assert ((ops.rms_norm(x, weight, eps).double() - exact).abs() <= bound).all()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_every_instruction_set_gives_the_same_bits(self, isa: str, dtype: torch.dtype) -> None:
        for features in (1, 31, 64, 100, 641):
            x, weight = edge_rows(features).to(dtype), torch.randn(features).to(dtype)
            with use_isa("scalar"):
                expected = ops.rms_norm(x, weight, 1e-6)
            assert_same(ops.rms_norm(x, weight, 1e-6), expected)

    def test_a_bad_row_stays_alone(self, isa: str) -> None:
        x = torch.randn(3, 100)
        clean = ops.rms_norm(x, torch.ones(100), 1e-5)
        x[1, 50] = torch.nan
        y = ops.rms_norm(x, torch.ones(100), 1e-5)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])

    @pytest.mark.parametrize("weight_dtype", FLOATS)
    def test_weight_dtypes(self, isa: str, weight_dtype: torch.dtype) -> None:
        x, weight = torch.randn(3, 70), torch.randn(70).to(weight_dtype)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight.float(), 1e-5))


class TestLmHead:
    @pytest.mark.parametrize("weight_dtype", FLOATS)
    @pytest.mark.parametrize("in_features", [1, 63, 64, 65, 300])
    def test_within_the_rounding_bound(self, isa: str, in_features: int, weight_dtype: torch.dtype) -> None:
        weight = torch.randn(50, in_features).to(weight_dtype)
        # An element passes ceil(K / 64) fused multiply-adds of its lane and 6 folds, so the error is
        # at most gamma = n u / (1 - n u) of the sum of magnitudes (Higham, section 3.1).
        n = (-(-in_features // 64) + 6) * UNIT_ROUNDOFF[torch.float32]
        for tokens in (1, 2, 7, 13):
            x = torch.randn(tokens, in_features)
            exact = x.double() @ weight.double().T
            bound = n / (1 - n) * (x.double().abs() @ weight.double().abs().T)
            logits = ops.lm_head(x, weight)
            assert logits.dtype == torch.float32
            assert ((logits.double() - exact).abs() <= bound).all()

    @pytest.mark.parametrize("weight_dtype", FLOATS)
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_every_instruction_set_gives_the_same_bits(
        self, isa: str, dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> None:
        for tokens, in_features, vocabulary in [(1, 100, 37), (5, 64, 20), (3, 641, 9)]:
            x = torch.randn(tokens, in_features).to(dtype)
            weight = torch.randn(vocabulary, in_features).to(weight_dtype)
            with use_isa("scalar"):
                expected = ops.lm_head(x, weight)
            assert torch.equal(ops.lm_head(x, weight), expected)

    def test_a_bad_row_stays_alone(self, isa: str) -> None:
        x, weight = torch.randn(4, 70), torch.rand(30, 70) + 1
        clean = ops.lm_head(x, weight)
        x[1, 69] = torch.nan
        logits = ops.lm_head(x, weight)
        assert logits[1].isnan().all()
        assert torch.equal(logits[[0, 2, 3]], clean[[0, 2, 3]])

    @pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0)])
    def test_leading_shapes(self, isa: str, shape: tuple[int, ...]) -> None:
        assert ops.lm_head(torch.randn(*shape, 20), torch.randn(7, 20)).shape == (*shape, 7)


def all_operators(x: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every operator makes of the same rows."""
    out_features = weights["weight_scale"].shape[0]
    q, x_scale = ops.quantize_activations(x)
    return {
        "q": q,
        "x_scale": x_scale,
        "acc": ops.ternary_matmul(q.reshape(-1, q.shape[-1]), weights["packed"], out_features),
        "y": ops.ternary_linear(x, weights["packed"], weights["weight_scale"], weights["bias"], out_features),
        "norm": ops.rms_norm(x, weights["norm"], 1e-5),
        "logits": ops.lm_head(x, weights["table"]),
    }


def some_weights(out_features: int, in_features: int) -> dict[str, Tensor]:
    return {
        "packed": ops.pack_ternary(random_ternary(out_features, in_features)),
        "weight_scale": torch.rand(out_features),
        "bias": torch.randn(out_features),
        "norm": torch.randn(in_features),
        "table": torch.randn(3 * out_features, in_features).bfloat16(),
    }


@pytest.mark.parametrize("tokens", [1, 2, 29])
def test_thread_count_changes_nothing(isa: str, tokens: int, threads: None) -> None:
    # Large enough that every parallel region has work for three threads (csrc/run/parallel.h).
    weights, x = some_weights(1000, 1000), torch.randn(tokens, 1000)
    torch.set_num_threads(1)
    expected = all_operators(x, weights)
    for count in (2, 3):
        torch.set_num_threads(count)
        for name, value in all_operators(x, weights).items():
            assert torch.equal(value, expected[name]), name


def test_batch_changes_nothing(isa: str) -> None:
    weights, x = some_weights(50, 200), torch.randn(14, 200)
    alone = [all_operators(x[i : i + 1], weights) for i in range(14)]
    for tokens in (2, 3, 7, 12, 13, 14):
        for name, value in all_operators(x[:tokens], weights).items():
            assert torch.equal(value, torch.cat([each[name] for each in alone[:tokens]])), name


def test_non_contiguous_inputs(isa: str) -> None:
    weights = some_weights(50, 200)
    for x in (torch.randn(200, 6).T, torch.randn(12, 200)[::2], torch.randn(6, 403)[:, 3::2]):
        assert not x.is_contiguous()
        expected = all_operators(x.contiguous(), weights)
        for name, value in all_operators(x, weights).items():
            assert torch.equal(value, expected[name]), name
    # Weights that are slices of something larger.
    spread = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in weights.items()}
    assert not any(value.is_contiguous() for value in spread.values())
    x = torch.randn(3, 200)
    expected = all_operators(x, weights)
    for name, value in all_operators(x, spread).items():
        assert torch.equal(value, expected[name]), name


def test_unaligned_inputs(isa: str) -> None:
    weights, x = some_weights(48, 200), torch.randn(3, 200)

    def shifted(tensor: Tensor) -> Tensor:
        """A contiguous copy that starts one element after an aligned address."""
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        room[1:] = tensor.flatten()
        return room[1:].view(tensor.shape)

    expected = all_operators(x, weights)
    for name, value in all_operators(shifted(x), {n: shifted(w) for n, w in weights.items()}).items():
        assert torch.equal(value, expected[name]), name


def test_inputs_are_unchanged(isa: str) -> None:
    weights, x = some_weights(33, 65), edge_rows(65)
    before = {name: value.clone() for name, value in weights.items()}
    x_before = x.clone()
    all_operators(x, weights)
    assert_same(x, x_before)
    for name, value in weights.items():
        assert torch.equal(value, before[name]), name


def test_a_large_call_leaves_small_ones_right(isa: str) -> None:
    # The scratch of a thread grows, is given back and grows again (csrc/run/scratch.h).
    weights = some_weights(20, 300)
    small, large = torch.randn(2, 300), torch.randn(20000, 300)
    expected = all_operators(small, weights)
    for x in (large, small, large[:5000], small):
        results = all_operators(x, weights)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


DECODER = tiny_model().requires_grad_(False)


def decoder_arguments() -> tuple[object, ...]:
    """The layers of `DECODER`, two rows of three tokens."""
    ((_, _, lists),) = collect(DECODER.model.layers, KNOWN)
    cos, sin, _, tensors = zeroed_cache().context()
    x = torch.randn(2, 3, DECODER.config.hidden_size)
    return x, *lists, cos, sin, torch.tensor([0, 5]), *tensors


def prepared_arguments() -> tuple[object, ...]:
    x, weights, structure, constants, *rest = decoder_arguments()
    return x, torch.ops.bitnet_ops.prepare_layers(weights, structure, constants), *rest


def zeroed_cache() -> KVCache:
    cache = KVCache(DECODER.config, 2, 64)
    cache.keys.zero_()
    cache.values.zero_()
    return cache


def opaque_decoder_arguments() -> tuple[object, ...]:
    cos, sin, _, tensors = zeroed_cache().context()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    return ids, DECODER.model._number, cos, sin, torch.tensor([0, 5]), *tensors


def opcheck_cases() -> dict[str, tuple[torch._ops.OpOverload, tuple]]:
    namespace = torch.ops.bitnet_ops
    w = random_ternary(33, 50)
    packed = ops.pack_ternary(w)
    x, weight_scale, bias = torch.randn(2, 3, 50), torch.rand(33), torch.randn(33)
    table = torch.randn(70, 50)

    q, k, v = torch.randn(2, 5, 4 * 12), torch.randn(2, 5, 2 * 12), torch.randn(2, 5, 2 * 12)
    cos, sin = reference.rotary_embedding(torch.arange(8), 12, 10000.0)

    def grad(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_()

    # Blocks of 64 keys, 12 wide; rows of values 16 wide; with int8 spans of 256 of both.
    cache_shapes = dict.fromkeys((torch.float32, torch.bfloat16), ((2, 2, 1, 12, 64), (2, 2, 64, 16)))
    cache_shapes[torch.int8] = ((2, 2, 1, 4096), (2, 2, 1, 4096))

    return {
        "quantize_activations": (namespace.quantize_activations.default, (x,)),
        "pack_ternary": (namespace.pack_ternary.default, (random_ternary(33, 50),)),
        "pack_two_bits": (
            namespace.pack_two_bits.default,
            (torch.full((33, 2, 32), 0b10_01_00_01, dtype=torch.uint8), 16, True, "row"),
        ),
        "unpack_ternary": (namespace.unpack_ternary.default, (packed, 33, 50)),
        "repack_ternary": (namespace.repack_ternary.default, (packed, 33, 50, "tile16", "row")),
        "find_bad_byte": (namespace.find_bad_byte.default, (packed,)),
        "ternary_matmul": (
            namespace.ternary_matmul.default,
            (torch.randint(-128, 128, (4, 50), dtype=torch.int8), packed, 33),
        ),
        "ternary_linear": (namespace.ternary_linear.default, (grad(x), packed, weight_scale, grad(bias), 33)),
        "ternary_linear without bias": (
            namespace.ternary_linear.default,
            (grad(x.bfloat16()), packed, weight_scale, None, 33),
        ),
        "quantize_activations to 16 bits": (namespace.quantize_activations.default, (x, 16)),
        "ternary_linear, layout column, 16 bits": (
            namespace.ternary_linear.default,
            (grad(x), ops.pack_ternary(w, "column"), weight_scale, None, 33, "column", 16),
        ),
        "ternary_linear, groups": (
            namespace.ternary_linear.default,
            (grad(x), packed, packing.pack_scales(torch.rand(1, 33)), None, 33, "tile16", 8, 64),
        ),
        "ternary_linear, active rows": (
            namespace.ternary_linear.default,
            (
                grad(x),
                ops.pack_ternary(w, "row"),
                weight_scale,
                None,
                33,
                "row",
                8,
                0,
                torch.rand(2, 3, 33) < 0.5,
            ),
        ),
        "embedding": (namespace.embedding.default, (torch.tensor([[3, 69], [0, 3]]), table)),
        "rms_norm": (namespace.rms_norm.default, (grad(x), grad(torch.rand(50)), 1e-5)),
        "glu": (namespace.glu.default, (grad(x), grad(torch.randn(2, 3, 50)), "silu")),
        "lm_head": (namespace.lm_head.default, (grad(x), grad(torch.randn(70, 50)))),
        "attention": (namespace.attention.default, (q, k, v, cos, sin, torch.tensor([0, -2]))),
        "attention, gradients": (namespace.attention.default, (*map(grad, (q, k, v)), cos, sin)),
        "attention, gradients with padding": (
            namespace.attention.default,
            (*map(grad, (q, k, v)), cos, sin, torch.tensor([0, -2])),
        ),
        "attention with a window": (
            namespace.attention.default,
            (*map(grad, (q, k, v)), cos, sin, None, 0.5, 3),
        ),
        **{
            f"cached_attention, {dtype}": (
                namespace.cached_attention.default,
                (
                    *(q, k, v, cos, sin, torch.tensor([3, -2])),
                    *(torch.zeros(shape, dtype=dtype) for shape in cache_shapes[dtype]),
                    *(torch.ones(2, 2, 256) if dtype == torch.int8 else None for _ in range(2)),
                ),
            )
            for dtype in (torch.float32, torch.bfloat16, torch.int8)
        },
        "decoder_layers": (namespace.decoder_layers.default, decoder_arguments()),
        "decoder_layers without a cache": (namespace.decoder_layers.default, decoder_arguments()[:6]),
        "run_prepared_layers": (namespace.run_prepared_layers.default, prepared_arguments()),
        "opaque_decoder": (namespace.opaque_decoder.default, opaque_decoder_arguments()),
        "opaque_decoder without a cache": (namespace.opaque_decoder.default, opaque_decoder_arguments()[:4]),
        "lm_head in bfloat16": (
            namespace.lm_head.default,
            (grad(x.bfloat16()), grad(torch.randn(70, 50).bfloat16())),
        ),
        "screen_lm_head": (namespace.screen_lm_head.default, (torch.randn(70, 50),)),
        "lm_head_top_k": (
            namespace.lm_head_top_k.default,
            (x, table, 3, *ops.screen_lm_head(table), 0.7, torch.rand(2, 3, 70)),
        ),
        "lm_head_top_k of all logits": (namespace.lm_head_top_k.default, (x, table, 100)),
        "gumbel_noise": (namespace.gumbel_noise.default, (torch.arange(3), 70)),
    }


@pytest.mark.parametrize(
    "name",
    # The gradient of attention is by far the largest graph, and takes ten seconds to trace.
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow]
            if name.startswith(("attention, gradients", "attention with a window"))
            else [],
        )
        for name in opcheck_cases()
    ],
)
def test_opcheck(name: str) -> None:
    operator, arguments = opcheck_cases()[name]
    opcheck(operator, arguments)


def test_opcheck_covers_every_operator() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name for name in names if name.startswith("bitnet_ops::")}
    covered = {operator._schema.name for operator, _ in opcheck_cases().values()}
    # No part of a graph: they keep and drop what run_prepared_layers runs.
    not_traced = {"bitnet_ops::prepare_layers", "bitnet_ops::release_layers"}
    assert covered == registered - not_traced
