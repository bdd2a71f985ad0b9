"""The operators at the shapes of BitNet b1.58 2B4T, against the limits of the machine.

    pytest bench/bench_ops.py --benchmark-only

Every row shows its share of the limit that binds it, reading memory or multiplying bytes, with the limit
measured between the row's own rounds (measure.py). All figures stand for one call under
torch.inference_mode, activations quantised inside.
"""

import mmap
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import Work, limit_columns, limits, measure, median_ratio, seconds, spread
from probes import INSTRUCTIONS, multiply_rate, read_bandwidth
from shapes import CONFIG, LAYER, SHAPES, Shape
from torch import Tensor

from bitnet_ops import ops, supported_isas, use_isa

STREAM_BYTES = 256 << 20
"""Weights that a decode round runs through: many times the last-level cache, so that memory is measured."""

PREFILL_PRODUCTS = 2_000_000_000
"""A prefill round is several calls where one is smaller: some 10 ms, long beside the clock and a wake-up."""

ROUNDS = 7
SWEEP_ROUNDS = 5
ROUNDS_OF_LONG = 3
"""For rounds of a tenth of a second and more."""

THREADS = sorted({1, torch.get_num_threads()})
VECTOR_ISAS = [isa for isa in supported_isas() if isa != "scalar"]


@pytest.fixture(params=THREADS, ids=lambda threads: f"{threads}t")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs with one thread and with all."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=VECTOR_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs on every instruction set of this machine but the scalar one."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


# ---- what the rows have in common ----------------------------------------------------------------------


def random_packed(shape: Shape, layout: str = "tile16") -> Tensor:
    """Random ternary weights."""
    return ops.pack_ternary(torch.randint(-1, 2, shape, dtype=torch.int8), layout)


def linear(shape: Shape) -> Callable[[Tensor, Tensor], Tensor]:
    """The operator as a function of x and packed weights."""
    out_features, in_features = shape
    weight_scale = torch.full((out_features,), in_features**-0.5)
    return lambda x, packed: ops.ternary_linear(x, packed, weight_scale, None, out_features)


def put(
    benchmark, table: str, row: dict[str, Any], rounds: dict[str, Any], calls: int, **columns: Any
) -> None:
    """Fills a row with what all have, and with columns of its own."""
    benchmark.extra_info |= {
        "table": table,
        "row": row,
        "median, us": statistics.median(rounds["seconds"]) / calls * 1e6,
        "spread": spread(rounds["seconds"]),
        **columns,
    }


def rate(amount: float, rounds: dict[str, Any]) -> float:
    """Thousand millions a second."""
    return amount / statistics.median(rounds["seconds"]) / 1e9


# ---- the limits ----------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="limits")
@pytest.mark.parametrize("probe", ["reading", *INSTRUCTIONS.values(), "vpmaddubsw + vpaddw ymm"])
def bench_limit(benchmark, probe: str, threads: int) -> None:
    """What the machine gave at this moment; the rows below have measurements of their own."""
    measured: Callable[[], float | None] = (
        (lambda: read_bandwidth(threads)) if probe == "reading" else (lambda: multiply_rate(probe, threads))
    )
    if measured() is None:
        pytest.skip(f"this CPU has no {probe}")
    rates: list[float] = []
    benchmark.pedantic(lambda: rates.append(measured()), rounds=ROUNDS)
    benchmark.extra_info |= {
        "table": "Limits:",
        "row": {"limit": probe, "threads": threads},
        "median": f"{statistics.median(rates) / 1e9:.3g} {'GB/s' if probe == 'reading' else 'GMAC/s'}",
        "spread": spread(rates),
    }


# ---- decode: one token ---------------------------------------------------------------------------------

DECODE = "Decode (one token), weights streamed from memory:"


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("name", SHAPES)
def bench_decode(benchmark, name: str, isa: str, threads: int) -> None:
    """One token through as many matrices of a shape as do not fit into any cache."""
    layout = "tile16"
    packed = random_packed(SHAPES[name], layout)
    copies = [packed.clone() for _ in range(-(-STREAM_BYTES // packed.nbytes))]
    x = torch.randn(1, SHAPES[name][1])
    call = linear(SHAPES[name])

    def decode() -> None:
        for weights in copies:
            call(x, weights)

    rounds = measure(benchmark, decode, limits(isa, threads), ROUNDS)
    weight_bytes = len(copies) * packed.nbytes
    row = {"shape": name, "layout": layout, "ISA": isa, "threads": threads}
    columns = {"GB/s": rate(weight_bytes, rounds), **limit_columns(Work(weight_bytes), isa, rounds)}
    put(benchmark, DECODE, row, rounds, len(copies), **columns)


@pytest.mark.benchmark(group="head")
def bench_lm_head(benchmark, isa: str, threads: int) -> None:
    """One token through the bfloat16 head."""
    weight = torch.empty(CONFIG.vocab_size, CONFIG.hidden_size, dtype=torch.bfloat16).uniform_(-1, 1)
    x = torch.randn(1, CONFIG.hidden_size)
    rounds = measure(benchmark, lambda: ops.lm_head(x, weight), limits(isa, threads), ROUNDS)
    row = {"shape": "head", "layout": "bfloat16", "ISA": isa, "threads": threads}
    columns = {"GB/s": rate(weight.nbytes, rounds), **limit_columns(Work(weight.nbytes), isa, rounds)}
    put(benchmark, DECODE, row, rounds, 1, **columns)


# ---- the whole stack: one token, and the few that drafts or a small batch bring ------------------------


def on_large_pages(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that lie one after another in 2 MB pages, where the system grants them."""
    total = sum(tensor.nbytes for tensor in tensors)
    memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pieces = torch.frombuffer(memory, dtype=torch.uint8).split([tensor.nbytes for tensor in tensors])
    return [piece.view(tensor.shape).copy_(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


@pytest.fixture(scope="module", params=["4 KB", "2 MB"])
def stack(request: pytest.FixtureRequest) -> tuple[str, list[tuple[Shape, Tensor]]]:
    """The size of the pages, and all matrices of the model in the order in which a token meets them."""
    packed = {shape: random_packed(shape) for shape in SHAPES.values()}
    shapes = LAYER * CONFIG.num_hidden_layers
    weights = [packed[shape] for shape in shapes]
    copies = [w.clone() for w in weights] if request.param == "4 KB" else on_large_pages(weights)
    return request.param, list(zip(shapes, copies, strict=True))


@pytest.mark.benchmark(group="stack")
@pytest.mark.parametrize("tokens", [1, 2, 4])
def bench_stack(
    benchmark, tokens: int, stack: tuple[str, list[tuple[Shape, Tensor]]], isa: str, threads: int
) -> None:
    """A few tokens through the matrices of all layers."""
    pages, matrices = stack
    calls = {shape: linear(shape) for shape in SHAPES.values()}

    def forward(tokens: int) -> Callable[[], None]:
        x = {shape: torch.randn(tokens, shape[1]) for shape in SHAPES.values()}

        def run() -> None:
            for shape, packed in matrices:
                calls[shape](x[shape], packed)

        return run

    one = forward(1)
    others = {**limits(isa, threads), "one token": lambda: seconds(one)}
    rounds = measure(benchmark, forward(tokens), others, ROUNDS)
    weight_bytes = sum(packed.nbytes for _, packed in matrices)
    weights = sum(out_features * in_features for (out_features, in_features), _ in matrices)
    row = {"tokens": tokens, "layout": "tile16", "pages": pages, "ISA": isa, "threads": threads}
    columns = {
        "GB/s": rate(weight_bytes, rounds),
        **limit_columns(Work(weight_bytes, tokens * weights), isa, rounds),
        "time over 1 token": median_ratio(rounds["seconds"], rounds["one token"]),
    }
    put(benchmark, "The matrices of all 30 layers (521 MB):", row, rounds, 1, **columns)


# ---- prefill -------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize("tokens", [16, 128, 512, 2048])
@pytest.mark.parametrize("name", SHAPES)
def bench_prefill(benchmark, name: str, tokens: int, isa: str, threads: int) -> None:
    """Many tokens at once; torch's own products of the same shape, their weights in cache, for comparison."""
    out_features, in_features = SHAPES[name]
    products = tokens * out_features * in_features
    calls = -(-PREFILL_PRODUCTS // products)
    packed = random_packed(SHAPES[name])
    copies = [packed.clone() for _ in range(calls)]
    call = linear(SHAPES[name])
    x = torch.randn(tokens, in_features)
    x_bfloat16 = x.bfloat16()
    x_int8 = torch.randint(-127, 128, x.shape, dtype=torch.int8)
    weight = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    weight_bfloat16 = weight.bfloat16()

    def prefill() -> None:
        for weights in copies:
            call(x, weights)

    others = {
        **limits(isa, threads),
        "bfloat16": lambda: calls * seconds(lambda: F.linear(x_bfloat16, weight_bfloat16)),
        "int8": lambda: calls * seconds(lambda: torch._int_mm(x_int8, weight.T)),
    }
    rounds = measure(benchmark, prefill, others, ROUNDS if tokens <= 512 else ROUNDS_OF_LONG)
    row = {"tokens": tokens, "shape": name, "layout": "tile16", "ISA": isa, "threads": threads}
    columns = {
        "GMAC/s": rate(calls * products, rounds),
        **limit_columns(Work(calls * packed.nbytes, calls * products), isa, rounds),
        "torch bfloat16 over ours": median_ratio(rounds["bfloat16"], rounds["seconds"]),
        "torch._int_mm over ours": median_ratio(rounds["int8"], rounds["seconds"]),
    }
    put(benchmark, "Prefill:", row, rounds, calls, **columns)


# ---- no cliff between decode and prefill ---------------------------------------------------------------


@pytest.mark.benchmark(group="sweep")
@pytest.mark.parametrize("name", ["q_proj, o_proj", "down_proj"])
def bench_sweep(benchmark, name: str, isa: str, threads: int) -> None:
    """Every number of tokens from 1 to 64: how much one more costs, and how much twice as many."""
    sizes = [*range(1, 66), *range(66, 129, 2)]
    packed = random_packed(SHAPES[name])
    copies = [packed.clone() for _ in range(-(-STREAM_BYTES // packed.nbytes))]
    x = torch.randn(max(sizes), SHAPES[name][1])
    call = linear(SHAPES[name])
    times: dict[int, list[float]] = {tokens: [] for tokens in sizes}

    def sweep() -> None:
        for i, tokens in enumerate(sizes):  # each call finds its weights in memory, not in a cache
            times[tokens].append(seconds(lambda: call(x[:tokens], copies[i % len(copies)])))  # noqa: B023

    rounds = measure(benchmark, sweep, {}, SWEEP_ROUNDS)

    def worst(step: Callable[[int], int]) -> str:
        ratios = {m: median_ratio(times[step(m)][1:], times[m][1:]) for m in range(1, 65)}
        m = max(ratios, key=ratios.__getitem__)
        return f"{ratios[m]:.2f} ({m} to {step(m)})"

    row = {"shape": name, "layout": "tile16", "ISA": isa, "threads": threads}
    columns = {
        "worst time(M + 1) / time(M)": worst(lambda m: m + 1),
        "worst time(2 M) / time(M)": worst(lambda m: 2 * m),
    }
    put(benchmark, "Every number of tokens M from 1 to 64:", row, rounds, 1, **columns)


# ---- what a call costs ---------------------------------------------------------------------------------


@pytest.mark.benchmark(group="calls")
@pytest.mark.parametrize("gradients", ["inference_mode", "no_grad"])
@pytest.mark.parametrize("shape", [(16, 16), SHAPES["k_proj, v_proj"]], ids=["one block", "k_proj"])
def bench_call(benchmark, shape: Shape, gradients: str, threads: int) -> None:
    """One token, the weights in cache: on one block nothing but the call itself."""
    calls = 1000
    with torch.inference_mode(gradients == "inference_mode"), torch.no_grad():
        packed = random_packed(shape)
        x = torch.randn(1, shape[1])
        call = linear(shape)

        def repeat() -> None:
            for _ in range(calls):
                call(x, packed)

        rounds = measure(benchmark, repeat, {}, ROUNDS)
    row = {"weights, in cache": f"{shape[0]} x {shape[1]}", "under": gradients, "threads": threads}
    put(benchmark, "One call:", row, rounds, calls)
