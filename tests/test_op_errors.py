"""Wrong arguments to every operator: one Python exception that names operator, argument and both sides."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitnet_ops import ops

X = torch.zeros(2, 20)
Q = torch.zeros(2, 20, dtype=torch.int8)
W = torch.zeros(18, 20, dtype=torch.int8)
PACKED = ops.pack_ternary(W)  # uint8 [2, 2, 64]
CODES = torch.full((5, 2, 16), 0b01_01_01_01, dtype=torch.uint8)
ROWS = ops.pack_ternary(W, "row")
SCALE = torch.ones(18)
MASK = torch.ones(2, 18, dtype=torch.bool)
SHAPE = r"uint8 [2, 2, 64] (tile16 of out_features=18, in_features=20)"


def linear(**others: Any) -> torch.Tensor:
    """A call of ternary_linear that is right but for the arguments given."""
    arguments = {"x": X, "packed": PACKED, "weight_scale": SCALE, "bias": None, "out_features": 18}
    return ops.ternary_linear(**{**arguments, **others})


COPY = ops.screen_lm_head(X)

# What is called, the operator and argument that the error must name, what it must say was expected
# and what was given.
CASES: list[tuple[Callable[[], object], str, str, str, str]] = [
    (
        lambda: ops.quantize_activations(X.double()),
        "quantize_activations",
        "x",
        "float32, bfloat16",
        "float64 [2, 20]",
    ),
    (lambda: ops.quantize_activations(Q), "quantize_activations", "x", "float32", "int8 [2, 20]"),
    (
        lambda: ops.quantize_activations(torch.tensor(1.0)),
        "quantize_activations",
        "x",
        "[..., in_features]",
        "without dim",
    ),
    (
        lambda: ops.quantize_activations(torch.zeros(1, 2**18 + 1)),
        "quantize_activations",
        "x",
        "at most 262144",
        "262145",
    ),
    (
        lambda: ops.pack_ternary(W.float()),
        "pack_ternary",
        "w",
        "int8 [out_features, in_features]",
        "float32 [18, 20]",
    ),
    (lambda: ops.pack_ternary(W[0]), "pack_ternary", "w", "int8 [out_features, in_features]", "int8 [20]"),
    (lambda: ops.pack_ternary(W + 2), "pack_ternary", "w", "values -1, 0 and 1", "other values"),
    (lambda: ops.pack_ternary(W, "rows"), "pack_ternary", "layout", "'tile16'", "'rows'"),
    (
        lambda: ops.pack_ternary(torch.zeros(1, 2**16 + 1, dtype=torch.int8), "column"),
        "pack_ternary",
        "w",
        "at most 65536",
        "65537",
    ),
    (lambda: ops.quantize_activations(X, bits=4), "quantize_activations", "bits", "8 or 16", "4"),
    (lambda: linear(layout="Row"), "ternary_linear", "layout", "'row'", "'Row'"),
    (
        lambda: linear(layout="row"),
        "ternary_linear",
        "packed",
        "uint8 [18, 1, 64] (row of",
        "uint8 [2, 2, 64]",
    ),
    (lambda: linear(activation_bits=7), "ternary_linear", "activation_bits", "8 or 16", "7"),
    (lambda: linear(group_size=32), "ternary_linear", "group_size", "64, 128 or 256", "32"),
    (lambda: linear(group_size=64), "ternary_linear", "weight_scale", "float32 [2, 1, 16]", "float32 [18]"),
    (lambda: linear(active=MASK), "ternary_linear", "active", "None with layout 'tile16'", "bool [2, 18]"),
    (
        lambda: linear(packed=ROWS, layout="row", active=MASK[0]),
        "ternary_linear",
        "active",
        "bool [2, 18]",
        "bool [18]",
    ),
    (
        lambda: linear(packed=ROWS, layout="row", active=MASK.int()),
        "ternary_linear",
        "active",
        "bool [2, 18]",
        "int32 [2, 18]",
    ),
    (
        lambda: linear(packed=ROWS, layout="row", group_size=64),
        "ternary_linear",
        "group_size",
        "only tile16",
        "64",
    ),
    (
        lambda: ops.pack_ternary(torch.zeros(1, 2**18 + 1, dtype=torch.int8)),
        "pack_ternary",
        "w",
        "at most",
        "262145",
    ),
    (lambda: ops.unpack_ternary(PACKED.int(), 18, 20), "unpack_ternary", "packed", SHAPE, "int32 [2, 2, 64]"),
    (lambda: ops.unpack_ternary(PACKED[0], 18, 20), "unpack_ternary", "packed", SHAPE, "uint8 [2, 64]"),
    (
        lambda: ops.unpack_ternary(PACKED, 18, 33),
        "unpack_ternary",
        "packed",
        "uint8 [2, 3, 64]",
        "uint8 [2, 2, 64]",
    ),
    (
        lambda: ops.pack_two_bits(CODES.view(5, 32), 1),
        "pack_two_bits",
        "codes",
        "uint8 [out_features, parts, part_bytes]",
        "uint8 [5, 32]",
    ),
    (lambda: ops.pack_two_bits(CODES.char(), 1), "pack_two_bits", "codes", "uint8", "int8 [5, 2, 16]"),
    (lambda: ops.pack_two_bits(CODES, 8), "pack_two_bits", "width", "1, 16 or 32", "8"),
    (lambda: ops.pack_two_bits(CODES, 32), "pack_two_bits", "codes", "that 32 divides", "uint8 [5, 2, 16]"),
    (lambda: ops.pack_two_bits(CODES[:, :, 1:], 1), "pack_two_bits", "codes", "that 4 divides", "[5, 2, 15]"),
    (lambda: ops.pack_two_bits(CODES, 1, True), "pack_two_bits", "high_first", "False", "True"),
    (lambda: ops.pack_two_bits(CODES, 1, False, "rows"), "pack_two_bits", "layout", "'tile16'", "'rows'"),
    (lambda: ops.pack_two_bits(CODES | 3, 16), "pack_two_bits", "codes", "0, 1 and 2 only", "a code 3"),
    (
        lambda: ops.pack_two_bits(CODES[:1, :1].expand(1, 2**40, 16), 16),
        "pack_two_bits",
        "codes",
        f"at most {2**18} weights in a row",
        f"uint8 [1, {2**40}, 16]",
    ),
    (
        lambda: ops.pack_two_bits(CODES[:1, :1].expand(2**31, 1, 16), 16),
        "pack_two_bits",
        "codes",
        "below 2^31",
        str(2**31),
    ),
    (
        lambda: ops.unpack_ternary(PACKED, 33, 20),
        "unpack_ternary",
        "packed",
        "uint8 [3, 2, 64]",
        "uint8 [2, 2, 64]",
    ),
    (lambda: ops.unpack_ternary(PACKED, -1, 20), "unpack_ternary", "out_features", "at least 0", "-1"),
    (lambda: ops.unpack_ternary(PACKED, 18, -1), "unpack_ternary", "in_features", "at least 0", "-1"),
    (
        lambda: ops.unpack_ternary(PACKED, 2**63 - 1, 20),
        "unpack_ternary",
        "out_features",
        "below 2^31",
        str(2**63 - 1),
    ),
    (
        lambda: ops.unpack_ternary(PACKED, 18, 2**63 - 1),
        "unpack_ternary",
        "in_features",
        "below 2^31",
        str(2**63 - 1),
    ),
    (lambda: ops.unpack_ternary(PACKED, 18, 20, "rows"), "unpack_ternary", "layout", "'tile16'", "'rows'"),
    (
        lambda: ops.repack_ternary(PACKED, 18, 33, "tile16", "row"),
        "repack_ternary",
        "packed",
        "uint8 [2, 3, 64]",
        "uint8 [2, 2, 64]",
    ),
    (
        lambda: ops.repack_ternary(PACKED, 18, 20, "rows", "row"),
        "repack_ternary",
        "layout",
        "'tile16'",
        "'rows'",
    ),
    (
        lambda: ops.repack_ternary(PACKED, 18, 20, "tile16", "rows"),
        "repack_ternary",
        "wanted",
        "'tile16'",
        "'rows'",
    ),
    (
        lambda: ops.ternary_matmul(X, PACKED, 18),
        "ternary_matmul",
        "q",
        "int8 [tokens, in_features]",
        "float32 [2, 20]",
    ),
    (
        lambda: ops.ternary_matmul(Q[0], PACKED, 18),
        "ternary_matmul",
        "q",
        "int8 [tokens, in_features]",
        "int8 [20]",
    ),
    (
        lambda: ops.ternary_matmul(Q[:, :16], PACKED, 18),
        "ternary_matmul",
        "packed",
        "uint8 [2, 1, 64]",
        "uint8 [2, 2, 64]",
    ),
    (
        lambda: ops.ternary_matmul(Q, PACKED, 33),
        "ternary_matmul",
        "packed",
        "uint8 [3, 2, 64]",
        "uint8 [2, 2, 64]",
    ),
    (lambda: ops.ternary_matmul(Q, PACKED, -5), "ternary_matmul", "out_features", "at least 0", "-5"),
    (
        lambda: ops.ternary_linear(X.double(), PACKED, SCALE, None, 18),
        "ternary_linear",
        "x",
        "float32",
        "float64 [2, 20]",
    ),
    (
        lambda: ops.ternary_linear(X[0, 0], PACKED, SCALE, None, 18),
        "ternary_linear",
        "x",
        "[..., in_features]",
        "without",
    ),
    (
        lambda: ops.ternary_linear(X, PACKED.char(), SCALE, None, 18),
        "ternary_linear",
        "packed",
        SHAPE,
        "int8 [2, 2, 64]",
    ),
    (
        lambda: ops.ternary_linear(X, PACKED[:1], SCALE, None, 18),
        "ternary_linear",
        "packed",
        SHAPE,
        "uint8 [1, 2, 64]",
    ),
    (
        lambda: ops.ternary_linear(X, PACKED, SCALE[:17], None, 18),
        "ternary_linear",
        "weight_scale",
        "float32 [18]",
        "[17]",
    ),
    (
        lambda: ops.ternary_linear(X, PACKED, SCALE.half(), None, 18),
        "ternary_linear",
        "weight_scale",
        "float32",
        "float16",
    ),
    (
        lambda: ops.ternary_linear(X, PACKED, SCALE, SCALE[1:], 18),
        "ternary_linear",
        "bias",
        "float32 [18]",
        "float32 [17]",
    ),
    (
        lambda: ops.ternary_linear(X, PACKED, SCALE, SCALE.bool(), 18),
        "ternary_linear",
        "bias",
        "float32 [18]",
        "bool [18]",
    ),
    (
        lambda: ops.ternary_linear(X, PACKED, SCALE, None, 2**40),
        "ternary_linear",
        "out_features",
        "below 2^31",
        str(2**40),
    ),
    (
        lambda: ops.rms_norm(X.long(), SCALE, 0.0),
        "rms_norm",
        "x",
        "float32, bfloat16 or float16",
        "int64 [2, 20]",
    ),
    (lambda: ops.rms_norm(X[0, 0], SCALE, 0.0), "rms_norm", "x", "[..., features]", "without dimensions"),
    (lambda: ops.rms_norm(X, SCALE, 0.0), "rms_norm", "weight", "shape [20]", "float32 [18]"),
    (lambda: ops.rms_norm(X, X[:1], 0.0), "rms_norm", "weight", "shape [20]", "float32 [1, 20]"),
    (
        lambda: ops.rms_norm(X, X[0].double(), 0.0),
        "rms_norm",
        "weight",
        "float32, bfloat16 or float16",
        "float64 [20]",
    ),
    (lambda: ops.rms_norm(X, X[0], -1.0), "rms_norm", "eps", "at least 0", "-1"),
    (lambda: ops.rms_norm(X, X[0], float("nan")), "rms_norm", "eps", "at least 0", "nan"),
    (lambda: ops.lm_head(Q, X), "lm_head", "x", "float32, bfloat16 or float16", "int8 [2, 20]"),
    (lambda: ops.lm_head(X[0, 0], X), "lm_head", "x", "[..., in_features]", "without dimensions"),
    (lambda: ops.lm_head(X, X[:, :19]), "lm_head", "weight", "shape [vocabulary, 20]", "float32 [2, 19]"),
    (lambda: ops.lm_head(X, X[0]), "lm_head", "weight", "shape [vocabulary, 20]", "float32 [20]"),
    (
        lambda: ops.lm_head(X, X.double()),
        "lm_head",
        "weight",
        "float32, bfloat16 or float16",
        "float64 [2, 20]",
    ),
    (lambda: ops.lm_head_top_k(X, X, 0), "lm_head_top_k", "k", "at least 1", "0"),
    (
        lambda: ops.lm_head_top_k(X, X[0], 1),
        "lm_head_top_k",
        "weight",
        "shape [vocabulary, 20]",
        "float32 [20]",
    ),
    (lambda: ops.lm_head_top_k(X, X, 1, *COPY, 0.0), "lm_head_top_k", "temperature", "above 0", "0.0"),
    (
        lambda: ops.lm_head_top_k(X, X, 1, COPY[0]),
        "lm_head_top_k",
        "bounds",
        "both of codes and",
        "codes alone",
    ),
    (
        lambda: ops.lm_head_top_k(torch.zeros(2, 65), torch.zeros(2, 65), 1, *COPY),
        "lm_head_top_k",
        "codes",
        f"uint8 {list(ops.screen_lm_head(torch.zeros(2, 65))[0].shape)}",
        f"uint8 {list(COPY[0].shape)}",
    ),
    (
        lambda: ops.lm_head_top_k(X, X, 1, COPY[0], COPY[1][:2]),
        "lm_head_top_k",
        "bounds",
        "float32 [3, 16]",
        "float32 [2, 16]",
    ),
    (
        lambda: ops.lm_head_top_k(X, X, 1, *COPY, 1.0, X),
        "lm_head_top_k",
        "noise",
        "float32 [2, 2]",
        "float32 [2, 20]",
    ),
    (lambda: ops.screen_lm_head(X[0]), "screen_lm_head", "weight", "shape [vocabulary, in_features]", "[20]"),
    (
        lambda: ops.screen_lm_head(torch.zeros(1, 2**16 + 1)),
        "screen_lm_head",
        "weight",
        "at most 65536 columns",
        "65537",
    ),
    (lambda: ops.gumbel_noise(X, 5), "gumbel_noise", "seed", "int64", "float32 [2, 20]"),
    (lambda: ops.gumbel_noise(torch.tensor(1), -1), "gumbel_noise", "size", "at least 0", "-1"),
]


@pytest.mark.parametrize(
    ("call", "operator", "argument", "expected", "given"),
    CASES,
    ids=[f"{c[1]}-{c[2]}-{i}" for i, c in enumerate(CASES)],
)
def test_wrong_argument(
    call: Callable[[], object], operator: str, argument: str, expected: str, given: str
) -> None:
    start = re.escape(f"bitnet_ops::{operator}: argument '{argument}': expected ")
    pattern = f"^{start}.*{re.escape(expected)}.*, got .*{re.escape(given)}"
    with pytest.raises(RuntimeError, match=pattern):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.quantize_activations(None),  # type: ignore[arg-type]
        lambda: ops.pack_ternary(W, 3),  # type: ignore[arg-type]
        lambda: ops.unpack_ternary(PACKED, 1.5, 20),  # type: ignore[arg-type]
        lambda: ops.ternary_matmul(Q, PACKED, 2**64),
        lambda: ops.ternary_linear(X, None, SCALE, None, 18),  # type: ignore[arg-type]
        lambda: ops.rms_norm(X, X[0], "small"),  # type: ignore[arg-type]
        lambda: ops.lm_head(X, [[1.0]]),  # type: ignore[arg-type]
    ],
)
def test_wrong_python_type(call: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        call()


def test_an_argument_on_another_device() -> None:
    with pytest.raises(RuntimeError, match="ternary_linear: argument 'packed': expected a tensor on cpu"):
        ops.ternary_linear(X, PACKED.to("meta"), SCALE, None, 18)
    with pytest.raises(RuntimeError, match="lm_head: argument 'weight': expected a tensor on meta"):
        ops.lm_head(X.to("meta"), X)


def test_sparse_tensors_have_no_kernel() -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        ops.ternary_linear(X.to_sparse(), PACKED, SCALE, None, 18)
