"""The operators at the shapes of BitNet b1.58 2B4T, against the limits of the machine.

    pytest bench/bench_ops.py --benchmark-only

Decode is held against the read bandwidth that the same run measures, prefill against torch's bfloat16 linear.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from probes import read_bandwidth
from torch import Tensor

from bitnet_ops import BitLinear, BitNetConfig, ops, supported_isas, use_isa

CONFIG = BitNetConfig()
SHAPES = {
    "q_proj, o_proj": (2560, 2560),
    "k_proj, v_proj": (640, 2560),
    "gate_proj, up_proj": (6912, 2560),
    "down_proj": (2560, 6912),
}
"""out_features, in_features."""

STREAM_BYTES = 256 << 20
"""Weights that a decode round runs through: many times the last-level cache, so that memory is measured."""

PREFILL_TOKENS = 128
ROUNDS = 7
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


def random_layer(out_features: int, in_features: int) -> BitLinear:
    """A layer of random ternary weights."""
    w = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    return BitLinear.from_ternary(w, in_features**-0.5)


def median(benchmark) -> float:
    """Seconds."""
    return benchmark.stats.stats.median


def row(isa: str, threads: int, name: str) -> str:
    """Name of a row of the tables."""
    return f"{isa}, {threads} thread{'s'[: threads != 1]}, {name}"


def put_bandwidth(benchmark, name: str, weight_bytes: int, threads: int) -> None:
    """Fills a row of the decode table for a round that read so many bytes of weights."""
    rate = weight_bytes / median(benchmark)
    benchmark.extra_info |= {
        "table": "Decode (one token), weights streamed from memory:",
        "row": name,
        "GB/s": rate / 1e9,
        "share of read bandwidth": rate / read_bandwidth(threads),
    }


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("name", SHAPES)
def bench_decode(benchmark, name: str, isa: str, threads: int) -> None:
    """One token through as many layers of a shape as do not fit into any cache."""
    out_features, in_features = SHAPES[name]
    layer = random_layer(out_features, in_features)
    copies = -(-STREAM_BYTES // layer.packed_weight.nbytes)
    packed = [layer.packed_weight.clone() for _ in range(copies)]
    x = torch.randn(1, in_features)

    def decode() -> None:
        for weights in packed:
            ops.ternary_linear(x, weights, layer.weight_scale, None, out_features=out_features)

    benchmark.pedantic(decode, rounds=ROUNDS, warmup_rounds=1)
    put_bandwidth(benchmark, row(isa, threads, name), copies * layer.packed_weight.nbytes, threads)


@pytest.mark.benchmark(group="head")
def bench_lm_head(benchmark, isa: str, threads: int) -> None:
    """One token through the bfloat16 head."""
    weight = torch.empty(CONFIG.vocab_size, CONFIG.hidden_size, dtype=torch.bfloat16).uniform_(-1, 1)
    x = torch.randn(1, CONFIG.hidden_size)
    benchmark.pedantic(ops.lm_head, (x, weight), rounds=ROUNDS, warmup_rounds=1)
    put_bandwidth(benchmark, row(isa, threads, "head in bfloat16"), weight.nbytes, threads)


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize("name", SHAPES)
def bench_prefill(benchmark, name: str, isa: str, threads: int) -> None:
    """Many tokens at once, the activations quantised inside the measurement."""
    out_features, in_features = SHAPES[name]
    layer = random_layer(out_features, in_features)
    x = torch.randn(PREFILL_TOKENS, in_features)
    benchmark.pedantic(layer, (x,), rounds=ROUNDS, iterations=5, warmup_rounds=1)
    seconds = median(benchmark)
    benchmark.extra_info |= {
        "table": f"Prefill ({PREFILL_TOKENS} tokens), multiplications a second:",
        "row": row(isa, threads, name),
        "GMAC/s": PREFILL_TOKENS * out_features * in_features / seconds / 1e9,
        "times as fast as torch bfloat16": bfloat16_seconds(x, out_features) / seconds,
    }


def bfloat16_seconds(x: Tensor, out_features: int) -> float:
    """Median seconds of torch's own linear of the same shape, measured right behind ours."""
    from torch.utils.benchmark import Timer

    weight = torch.randn(out_features, x.shape[1], dtype=torch.bfloat16)
    timer = Timer(
        "F.linear(x, weight)",
        globals={"F": F, "x": x.bfloat16(), "weight": weight},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=0.3).median
