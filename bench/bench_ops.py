"""The operators at the shapes of BitNet b1.58 2B4T, against the limits of the machine.

    pytest bench/bench_ops.py --benchmark-only

Every row shows its share of the limit that binds it, reading memory or multiplying bytes, with the limit
measured between the row's own rounds (measure.py). Times are those of one call under torch.inference_mode,
activations quantised inside.
"""

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from matrices import CONFIG, SHAPES, Shape, all_layers, linear, more_than_caches_hold, random_packed
from measure import Work, limit_columns, limits, measure, median_ratio, put, rate, seconds, spread
from probes import INSTRUCTIONS, multiply_rate, read_bandwidth
from torch import Tensor

from bitnet_ops import ops, supported_isas, use_isa

PREFILL_PRODUCTS = 2_000_000_000
"""A prefill round is several calls where one is smaller: some 10 ms, long beside the clock and a wake-up."""

ROUNDS = 7
LONG_ROUNDS = 3
"""For rounds of a tenth of a second and more."""
FEWER_ROUNDS = 5
"""Where there are many rows."""

THREADS = sorted({1, torch.get_num_threads()})

BASE3_ISA = "avx512_vbmi"
"""It decodes base 3 in its inner loop; in all else it is avx512_vnni."""
ISAS = [isa for isa in supported_isas() if isa not in ("scalar", BASE3_ISA)]
KERNELS = [(isa, "tile16") for isa in ISAS]
KERNELS += [(isa, "tile16_base3") for isa in ("amx_int8", BASE3_ISA) if isa in supported_isas()]

SPARSE = {"row": "gate_proj, up_proj", "column": "down_proj"}
"""Where each sparse layout is of use: squared ReLU silences rows of up_proj, and columns of down_proj."""


@pytest.fixture(params=THREADS, ids=lambda threads: f"{threads}t")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs with one thread and with all."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs on every instruction set of this machine but the scalar one."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(params=KERNELS, ids="-".join)
def kernel(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Runs every instruction set on the dense layouts it has a loop for; gives the names of both."""
    with use_isa(request.param[0]):
        yield request.param


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


# ---- the limits ------------------------------------------------------------------------------------------


AVX2_PAIR = "vpmaddubsw + vpaddw ymm"
"""What the AVX2 kernel cannot do without; its limit is the multiplication alone."""


@pytest.mark.benchmark(group="limits")
@pytest.mark.parametrize(
    "probe", ["reading", *dict.fromkeys(INSTRUCTIONS.values()), "vpmaddubsw + vpaddw ymm"]
)
def bench_limit(benchmark, probe: str, threads: int) -> None:
    """What the machine gave at this moment; the rows below have measurements of their own."""

    def measured() -> float | None:
        return read_bandwidth(threads) if probe == "reading" else multiply_rate(probe, threads)

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


# ---- decode: one token -----------------------------------------------------------------------------------

DECODE = "Decode (one token), weights streamed from memory:"


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("name", SHAPES)
def bench_decode(benchmark, name: str, kernel: tuple[str, str], threads: int) -> None:
    """One token through as many matrices of a shape as do not fit into any cache."""
    isa, layout = kernel
    copies = more_than_caches_hold(SHAPES[name], layout)
    x = torch.randn(1, SHAPES[name][1])
    call = linear(SHAPES[name], layout)

    def decode() -> None:
        for packed in copies:
            call(x, packed)

    rounds = measure(benchmark, decode, limits(isa, threads), ROUNDS)
    weight_bytes = len(copies) * copies[0].nbytes
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
    put(benchmark, DECODE, row, rounds, **columns)


# ---- the whole stack: one token, and the few that drafts or a small batch bring --------------------------


@pytest.fixture(scope="module", params=["4 KB", "2 MB"])
def pages(request: pytest.FixtureRequest) -> str:
    """Size of the pages that weights lie in: what torch allocates, or huge ones."""
    return request.param


@pytest.mark.benchmark(group="stack")
@pytest.mark.parametrize("tokens", [1, 2, 4])
def bench_stack(benchmark, tokens: int, pages: str, kernel: tuple[str, str], threads: int) -> None:
    """A few tokens through the matrices of all layers."""
    isa, layout = kernel
    stack = all_layers(layout, large_pages=pages == "2 MB")
    calls = {shape: linear(shape, layout) for shape in SHAPES.values()}

    def forward(tokens: int) -> Callable[[], None]:
        x = {shape: torch.randn(tokens, shape[1]) for shape in SHAPES.values()}

        def run() -> None:
            for shape, packed in stack:
                calls[shape](x[shape], packed)

        return run

    one = forward(1)
    others = {**limits(isa, threads), "one token": lambda: seconds(one)}
    rounds = measure(benchmark, forward(tokens), others, ROUNDS)
    weight_bytes = sum(packed.nbytes for _, packed in stack)
    weights = sum(out_features * in_features for (out_features, in_features), _ in stack)
    row = {"tokens": tokens, "layout": layout, "pages": pages, "ISA": isa, "threads": threads}
    columns = {
        "GB/s": rate(weight_bytes, rounds),
        **limit_columns(Work(weight_bytes, tokens * weights), isa, rounds),
        "time over 1 token": median_ratio(rounds["seconds"], rounds["one token"]),
    }
    put(benchmark, f"The matrices of all {CONFIG.num_hidden_layers} layers:", row, rounds, **columns)


# ---- decode with exact sparsity --------------------------------------------------------------------------


@pytest.mark.benchmark(group="sparse")
@pytest.mark.parametrize("percent", [100, 70, 50, 35, 20, 10, 5, 2])
@pytest.mark.parametrize("layout", SPARSE)
def bench_sparse(benchmark, layout: str, percent: int, isa: str, threads: int) -> None:
    """Only some rows wanted, or only some inputs not zero: the time against the bytes that are needed."""
    name = SPARSE[layout]
    out_features, in_features = SHAPES[name]
    total = out_features if layout == "row" else in_features
    needed = torch.zeros(total, dtype=torch.bool)
    needed[torch.randperm(total)[: total * percent // 100]] = True
    x = torch.randn(1, in_features)
    x += 0.1 * x.sign()  # far from 0, which small values would be rounded to
    if layout == "column":
        x *= needed
    sparse = linear(SHAPES[name], layout, active=needed[None] if layout == "row" else None)
    dense = linear(SHAPES[name])
    copies = more_than_caches_hold(SHAPES[name], layout)
    dense_copies = more_than_caches_hold(SHAPES[name])[: len(copies)]

    def decode() -> None:
        for packed in copies:
            sparse(x, packed)

    def decode_dense() -> None:
        for packed in dense_copies:
            dense(x, packed)

    others = {**limits(isa, threads), "dense": lambda: seconds(decode_dense)}
    rounds = measure(benchmark, decode, others, FEWER_ROUNDS)
    needed_bytes = len(copies) * copies[0].nbytes * int(needed.sum()) // total
    row = {"shape": name, "layout": layout, "needed, %": percent, "ISA": isa, "threads": threads}
    shares = limit_columns(Work(needed_bytes), isa, rounds)
    columns = {
        "GB/s": rate(needed_bytes, rounds),
        "time over the limit": 1 / shares["share of limit"],
        "time over dense tile16": median_ratio(rounds["seconds"], rounds["dense"]),
    }
    put(benchmark, "Sparse layouts (one token):", row, rounds, len(copies), **columns)


# ---- 16-bit activations, group scales --------------------------------------------------------------------


@pytest.mark.benchmark(group="variants")
@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize(("bits", "group"), [(16, 0), (8, 128), (16, 128)])
def bench_variant(benchmark, bits: int, group: int, tokens: int, isa: str, threads: int) -> None:
    """Activations of 16 bits are two products; group scales come in between the sums."""
    shape = SHAPES["gate_proj, up_proj"]
    copies = more_than_caches_hold(shape)[: 3 if tokens > 1 else None]
    x = torch.randn(tokens, shape[1])

    def run(call: Callable[[Tensor, Tensor], Tensor]) -> None:
        for packed in copies:
            call(x, packed)

    plain, variant = linear(shape), linear(shape, bits=bits, group=group)
    others = {**limits(isa, threads), "plain": lambda: seconds(lambda: run(plain))}
    rounds = measure(benchmark, lambda: run(variant), others, FEWER_ROUNDS)
    products = len(copies) * tokens * shape[0] * shape[1] * bits // 8
    row = {"tokens": tokens, "bits": bits, "group": group or "row", "ISA": isa, "threads": threads}
    columns = {
        "GMAC/s": rate(products, rounds),
        **limit_columns(Work(len(copies) * copies[0].nbytes, products), isa, rounds),
        "time over 8 bits, scales per row": median_ratio(rounds["seconds"], rounds["plain"]),
    }
    put(benchmark, "16-bit activations and group scales (up_proj):", row, rounds, len(copies), **columns)


# ---- prefill ---------------------------------------------------------------------------------------------


PREFILLS = [
    (kernel, tokens)
    for kernel in KERNELS
    for tokens in (16, 128, 512, 2048)
    if tokens < 2048 or kernel[1] == "tile16"  # 2048 take longest, and differ from 512 by nothing of base 3
]


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize(
    ("kernel", "tokens"), PREFILLS, indirect=["kernel"], ids=[f"{'-'.join(k)}-{m}" for k, m in PREFILLS]
)
@pytest.mark.parametrize("name", SHAPES)
def bench_prefill(benchmark, name: str, tokens: int, kernel: tuple[str, str], threads: int) -> None:
    """Many tokens at once; torch's own products of the same shape, their weights in cache, for comparison."""
    isa, layout = kernel
    out_features, in_features = SHAPES[name]
    products = tokens * out_features * in_features
    calls = -(-PREFILL_PRODUCTS // products)
    packed = random_packed(SHAPES[name], layout)
    copies = [packed.clone() for _ in range(calls)]
    call = linear(SHAPES[name], layout)
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
    rounds = measure(benchmark, prefill, others, FEWER_ROUNDS if tokens < 2048 else LONG_ROUNDS)
    row = {"tokens": tokens, "shape": name, "layout": layout, "ISA": isa, "threads": threads}
    columns = {
        "GMAC/s": rate(calls * products, rounds),
        **limit_columns(Work(calls * packed.nbytes, calls * products), isa, rounds),
        "torch bfloat16 over ours": median_ratio(rounds["bfloat16"], rounds["seconds"]),
        "torch._int_mm over ours": median_ratio(rounds["int8"], rounds["seconds"]),
    }
    put(benchmark, "Prefill:", row, rounds, calls, **columns)


# ---- no cliff between decode and prefill -----------------------------------------------------------------


@pytest.mark.benchmark(group="sweep")
@pytest.mark.parametrize("name", ["q_proj, o_proj", "down_proj"])
def bench_sweep(benchmark, name: str, kernel: tuple[str, str], threads: int) -> None:
    """Every number of tokens from 1 to 64: how much one more costs, and how much twice as many."""
    isa, layout = kernel
    sizes = [*range(1, 66), *range(66, 129, 2)]
    copies = more_than_caches_hold(SHAPES[name], layout)
    x = torch.randn(max(sizes), SHAPES[name][1])
    call = linear(SHAPES[name], layout)
    times: dict[int, list[float]] = {tokens: [] for tokens in sizes}

    def timed(tokens: int, packed: Tensor) -> float:
        return seconds(lambda: call(x[:tokens], packed))

    def sweep() -> None:
        for i, tokens in enumerate(sizes):  # every call finds its weights in memory, not in a cache
            times[tokens].append(timed(tokens, copies[i % len(copies)]))

    rounds = measure(benchmark, sweep, {}, FEWER_ROUNDS)

    def worst(step: Callable[[int], int]) -> str:
        ratios = {m: median_ratio(times[step(m)][1:], times[m][1:]) for m in range(1, 65)}
        m = max(ratios, key=ratios.__getitem__)
        return f"{ratios[m]:.2f} ({m} to {step(m)})"

    row = {"shape": name, "layout": layout, "ISA": isa, "threads": threads}
    columns = {
        "worst time(M + 1) / time(M)": worst(lambda m: m + 1),
        "worst time(2 M) / time(M)": worst(lambda m: 2 * m),
    }
    put(benchmark, "Every number of tokens M from 1 to 64:", row, rounds, len(sizes), **columns)


# ---- what a call costs -----------------------------------------------------------------------------------


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
