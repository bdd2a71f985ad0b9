"""The operator glu: against float64, bit for bit against itself, on difficult inputs."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bitnet_ops
from bitnet_ops import ops, reference

ACTIVATIONS = ["relu2", "silu", "gelu_tanh"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
U = 2.0**-24
EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 87.3, -87.3, 87.4, -87.4, 104.0, -104.0]
EDGES += [1e13, -1e13, 3e38, -3e38, math.inf, -math.inf, math.nan]

with_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
with_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits; one NaN is as good as another."""
    if one.dtype != other.dtype or not torch.equal(one.isnan(), other.isnan()):
        return False
    bits = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.nan_to_num(0.0).view(bits), other.nan_to_num(0.0).view(bits)) and torch.equal(
        one.isinf(), other.isinf()
    )


def edge_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every edge with every other."""
    edges = torch.tensor(EDGES).to(dtype)
    return edges.repeat_interleave(len(EDGES)), edges.repeat(len(EDGES))


def formula_bound(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The exact result, in float64, and how far the kernel's may be from it before it is rounded to 16 bits.

    csrc/kernels/glu.h derives it: 2 roundings of products, 5 u of the sigmoid, and for gelu_tanh what 8 u of
    its argument does, here over the path from it to itself off by so much. e below 2^-126 becomes 0, and a
    subnormal product is off by half of 2^-149, before it is multiplied and after.
    """
    gate, up = gate.double(), up.double()
    tiny = 2.0**-126 * (gate * up).abs() + 2.0**-150 * (up.abs() + 1)
    if activation == "relu2":
        exact = gate.clamp(min=0) ** 2 * up
        return exact, 2.01 * U * exact.abs() + tiny
    t = gate if activation == "silu" else 2 * (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    exact = gate * torch.sigmoid(t) * up
    argument = (
        torch.zeros_like(t) if activation == "silu" else torch.expm1(8 * U * t.abs() * torch.sigmoid(-t))
    )
    return exact, (7.01 * U + 1.01 * argument) * exact.abs() + tiny


@with_dtypes
@with_activations
@pytest.mark.parametrize("size", [0.01, 1.0, 6.0, 40.0])
def test_is_near_float64(isa: str, activation: str, dtype: torch.dtype, size: float) -> None:
    gate, up = (torch.randn(61, 67) * size).to(dtype), torch.randn(61, 67).to(dtype)
    y = ops.glu(gate, up, activation)
    assert y.dtype == dtype
    exact, bound = formula_bound(gate, up, activation)
    if dtype != torch.float32:
        step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        smallest = 2.0**-134 if dtype == torch.bfloat16 else 2.0**-25  # half a subnormal step
        bound = bound * (1 + step) + step * exact.abs() + smallest
    worst = ((y.double() - exact).abs() / bound).max()
    assert worst <= 1, f"{float(worst)} of the bound"


@with_activations
def test_silu_and_gelu_are_those_of_torch(activation: str) -> None:
    gate, up = torch.randn(50, 70) * 3, torch.randn(50, 70)
    theirs: dict[str, Callable[[Tensor], Tensor]] = {
        "relu2": lambda x: F.relu(x).square(),
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    expected = theirs[activation](gate.double()) * up.double()
    _, bound = formula_bound(gate, up, activation)
    # 1 + tanh in float64 cancels what sigmoid does not.
    off = (ops.glu(gate, up, activation) - expected).abs()
    assert (off <= bound + 2.0**-51 * (gate * up).abs()).all()


@with_dtypes
@with_activations
def test_every_instruction_set_gives_the_bits_of_scalar(
    isa: str, activation: str, dtype: torch.dtype
) -> None:
    inputs = [edge_inputs(dtype)]
    for count in (*range(20), 1023, 1025):
        inputs.append(((torch.randn(3, count) * 9).to(dtype), torch.randn(3, count).to(dtype)))
    for gate, up in inputs:
        given = ops.glu(gate, up, activation)
        with bitnet_ops.use_isa("scalar"):
            assert same(given, ops.glu(gate, up, activation))


@with_dtypes
@with_activations
def test_edges_are_those_of_the_reference(isa: str, activation: str, dtype: torch.dtype) -> None:
    """The same NaN, infinities, zeros and signs, wherever what is small may not vanish on one side only."""
    gate, up = edge_inputs(dtype)
    given, expected = ops.glu(gate, up, activation), reference.glu(gate, up, activation)
    # Beyond -87.3 exp(gate) is subnormal or 0, which times infinity, or times 3e38, is anything.
    vanishes = (gate <= -87) & gate.isfinite()
    if activation == "gelu_tanh":
        vanishes = (gate <= -8) & gate.isfinite()
    if activation == "relu2":
        vanishes = torch.zeros_like(vanishes)
    given, expected = given[~vanishes], expected[~vanishes]
    assert torch.equal(given.isnan(), expected.isnan())
    assert torch.equal(given.isinf(), expected.isinf())
    assert torch.equal(given == 0, expected == 0)
    number = ~given.isnan()
    assert torch.equal(given.signbit()[number], expected.signbit()[number])


@with_dtypes
def test_a_closed_gate_does_not_look_at_up(isa: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1.0, 0.0, -0.0, -math.inf, 1.0, math.nan]).to(dtype)
    for up in (math.nan, math.inf, -1.0):
        y = ops.glu(gate, torch.full_like(gate, up), "relu2")
        assert same(y[:4], torch.zeros(4, dtype=dtype))
        assert same(y[4:], torch.tensor([up, math.nan]).to(dtype))


def test_relu2_in_float16_does_not_overflow_in_between(isa: str) -> None:
    gate, up = torch.full((9,), 1000.0).half(), torch.full((9,), 0.0625).half()
    assert ops.glu(gate, up, "relu2").tolist() == [62500.0 - 4.0] * 9  # float16 has steps of 32 there
    assert (F.relu(gate).square() * up).isinf().all()


def test_relu2_is_what_torch_composes() -> None:
    gate, up = torch.randn(5, 33), torch.randn(5, 33)
    assert same(ops.glu(gate, up, "relu2"), torch.nn.functional.relu(gate).square() * up)


@with_dtypes
@with_activations
def test_threads_slices_and_shapes(activation: str, dtype: torch.dtype, threads: None) -> None:
    gate, up = (torch.randn(13, 7001) * 3).to(dtype), torch.randn(13, 7001).to(dtype)
    before = gate.clone(), up.clone()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.glu(gate, up, activation))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert same(ops.glu(gate[3], up[3], activation), results[0][3])
    assert same(ops.glu(gate.mT, up.mT, activation), results[0].mT)
    assert same(ops.glu(gate[:, ::2], up[:, ::2], activation), results[0][:, ::2])
    assert same(gate, before[0])
    assert same(up, before[1])
    for shape in ((0,), (3, 0), (0, 3)):
        empty = torch.empty(shape, dtype=dtype)
        assert ops.glu(empty, empty, activation).shape == shape


# ---- gradients, GPU path, errors --------------------------------------------------------------------


@with_activations
def test_gradients(activation: str) -> None:
    gate, up = (torch.randn(6, 17).requires_grad_() for _ in range(2))
    grad = torch.randn(6, 17)
    given = torch.autograd.grad(ops.glu(gate, up, activation), [gate, up], grad)
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    assert torch.autograd.gradcheck(lambda g, u: reference.glu(g, u, activation), wide)
    exact = torch.autograd.grad(reference.glu(*wide, activation), wide, grad.double())
    for one, other in zip(given, exact, strict=True):
        # Sums of a few products of numbers below 4, each of them rounded a few times.
        torch.testing.assert_close(one.double(), other, rtol=16 * U, atol=256 * U)


def test_no_gradient_comes_through_a_closed_gate() -> None:
    gate = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    up = torch.tensor([math.nan, math.inf, 3.0], requires_grad=True)
    ops.glu(gate, up, "relu2").sum().backward()
    assert gate.grad is not None
    assert up.grad is not None
    assert gate.grad.tolist() == [0.0, 0.0, 12.0]
    assert up.grad.tolist() == [0.0, 0.0, 4.0]


@with_dtypes
@with_activations
def test_opcheck(activation: str, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(2, 3, 18).to(dtype).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.bitnet_ops.glu.default, (gate, up, activation))


X = torch.zeros(2, 20)


@pytest.mark.parametrize(
    ("arguments", "argument", "expected", "given"),
    [
        ((X.long(), X, "silu"), "gate", "float32, bfloat16 or float16", "int64 [2, 20]"),
        ((X[0, 0], X[0, 0], "silu"), "gate", "[..., features]", "without dimensions"),
        ((X, X[:1], "silu"), "up", "float32 [2, 20] (as gate)", "float32 [1, 20]"),
        ((X, X.half(), "silu"), "up", "float32 [2, 20] (as gate)", "float16 [2, 20]"),
        ((X, X, "relu"), "activation", "'relu2', 'silu' or 'gelu_tanh'", "'relu'"),
    ],
)
def test_wrong_argument(arguments: Any, argument: str, expected: str, given: str) -> None:
    start = re.escape(f"bitnet_ops::glu: argument '{argument}': expected ")
    with pytest.raises(RuntimeError, match=f"^{start}.*{re.escape(expected)}.*, got .*{re.escape(given)}"):
        ops.glu(*arguments)


def test_wrong_argument_elsewhere() -> None:
    with pytest.raises(RuntimeError, match="glu: argument 'up': expected a tensor on cpu, got one on meta"):
        ops.glu(X, X.to("meta"), "silu")
    with pytest.raises(ValueError, match="expected 'relu2', 'silu' or 'gelu_tanh', got 'relu'"):
        reference.glu(X, X, "relu")
