"""BitNet b1.58 2B4T through the Python API: threads, context, cache, sparsity, loading, where the time goes.

    pytest bench/bench_model.py bench/bench_models.py --benchmark-only --benchmark-json=model.json
    python bench/chart.py model.json bench/speed.png

The second file brings Llama 3.2 1B into the same run. On the synthetic checkpoint
(make_synthetic_checkpoint.py), converted and loaded as a user's would be. Tokens come from `stream_tokens`,
greedy. The share of the limit is what reading all bytes that a step needs would take at the bandwidth
measured between the rounds, over what the step takes.
"""

import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import Work, limit_columns, limits, measure, spread, thread_counts
from model_2b4t import filled_cache, prompt

import bitnet_ops
from bitnet_ops import BitLinear, BitNet, KVCache, ops
from bitnet_ops.evaluation.sparsity import LayerSparsity, layouts_for, measure_sparsity

THREADS = thread_counts()
CONTEXTS = (128, 512, 4000)
CACHES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
STEPS = 16
ROUNDS = 7


def run_steps(model: BitNet, cache: KVCache, context: int) -> None:
    """Decodes `STEPS` tokens behind the context."""
    cache.length = context
    steps = model.stream_tokens(
        prompt(context + 1),
        cache=cache,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=(),
        prompt_lookup_num_tokens=0,  # a token at a time: random weights soon repeat themselves
    )
    assert sum(1 for _ in steps) == STEPS


def step_bytes(
    model: BitNet, context: int, cache: KVCache, sparsity: list[LayerSparsity] | None = None
) -> int:
    """What a decoded token has to read: weights, the screened head, and what the cache holds."""
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            share = 1.0
            if sparsity is not None:
                layer = sparsity[int(name.split(".")[2])]
                share = {"row": layer.open_gates, "column": layer.used_inputs}.get(module.layout, 1.0)
            total += share * module.packed_weight.nbytes
    head = model.screened_head()
    assert head is not None
    total += head.codes.nbytes
    config = model.config
    scalars = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return round(total) + context * scalars * cache.dtype.itemsize


def time_steps(
    benchmark,
    model: BitNet,
    threads: int,
    context: int,
    dtype: str,
    sparsity: list[LayerSparsity] | None = None,
) -> dict[str, float | str]:
    """Times decoding; the columns of the result."""
    torch.set_num_threads(threads)
    cache = filled_cache(model, 1, context + STEPS, CACHES[dtype])
    work = Work(STEPS * step_bytes(model, context, cache, sparsity))
    isa = bitnet_ops.isa()
    rounds = measure(benchmark, lambda: run_steps(model, cache, context), limits(isa, threads), ROUNDS)
    seconds = statistics.median(rounds["seconds"]) / STEPS
    share = limit_columns(work, isa, rounds)["share of limit"]
    return {
        "tok/s": 1 / seconds,
        "spread": spread(rounds["seconds"]),
        "read for a token, MB": work.weight_bytes / STEPS / 1e6,
        "read, GB/s": statistics.median(rounds["read bandwidth"]) / 1e9,
        "share of limit": share,
        "time over limit": 1 / share,
    }


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    ("context", "dtype"),
    [(context, dtype) for dtype in CACHES for context in CONTEXTS if context > 128 or dtype == "float32"],
)
def bench_decode(benchmark, model: BitNet, threads: int, context: int, dtype: str) -> None:
    """Writes tokens behind contexts of several lengths."""
    columns = time_steps(benchmark, model, threads, context, dtype)
    row = {"context": context, "cache": dtype, "threads": threads}
    benchmark.extra_info |= {"table": "2B4T, decode:", "row": row, **columns}


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens", [128, 512])
def bench_prefill(benchmark, model: BitNet, threads: int, tokens: int) -> None:
    """Reads a prompt; its first token included."""
    torch.set_num_threads(threads)
    isa = bitnet_ops.isa()
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, BitLinear))

    def run() -> None:
        next(model.stream_tokens(prompt(tokens), max_new_tokens=1, do_sample=False))

    rounds = measure(benchmark, run, limits(isa, threads), ROUNDS // 2)
    seconds = statistics.median(rounds["seconds"])
    benchmark.extra_info |= {
        "table": "2B4T, reading a prompt:",
        "row": {"tokens": tokens, "threads": threads},
        "tok/s": tokens / seconds,
        "first token after, s": seconds,
        "spread": spread(rounds["seconds"]),
        **limit_columns(Work(0, weights * tokens), isa, rounds),
    }


LOAD = """
import sys, time, torch, bitnet_ops
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
start = time.perf_counter()
model = bitnet_ops.from_pretrained(sys.argv[1])
loaded = time.perf_counter() - start
model.generate(torch.arange(100, 548)[None], max_new_tokens=64, do_sample=False, eos_token_id=())
print(loaded, memory("VmHWM"), memory("RssAnon"))
"""


@pytest.mark.benchmark(group="load")
def bench_load(benchmark, folder: Path) -> None:
    """Loads the packed folder in new processes, with the files in the page cache, and writes 64 tokens."""

    def run() -> list[float]:
        output = subprocess.run(
            [sys.executable, "-c", LOAD, str(folder)], check=True, capture_output=True, text=True
        )
        return [float(number) for number in re.findall(r"[\d.e+]+", output.stdout)]

    results = [run() for _ in range(5)]
    benchmark.pedantic(run, rounds=1)
    loaded, peak, anonymous = (statistics.median(column) for column in zip(*results, strict=True))
    benchmark.extra_info |= {
        "table": "2B4T, a new process (Python and torch included, context of 512):",
        "row": {"folder": "packed, in the page cache"},
        "load, s": loaded,
        "peak memory, MB": peak / 1e6,
        "of it not shared with the file, MB": anonymous / 1e6,
    }


@pytest.mark.benchmark(group="profile")
@pytest.mark.parametrize("threads", THREADS)
def bench_profile(benchmark, model: BitNet, threads: int) -> None:
    """Times each operator of a decoded token, the layers as modules."""
    torch.set_num_threads(threads)
    cache = filled_cache(model, 1, 128 + STEPS)
    # Layers with a hook run as modules.
    hooks = [layer.register_forward_hook(lambda *_: None) for layer in model.model.layers]
    run_steps(model, cache, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        benchmark.pedantic(run_steps, (model, cache, 128), rounds=ROUNDS)
    for hook in hooks:
        hook.remove()
    tokens = ROUNDS * STEPS
    averages = profile.key_averages()
    own = {event.key: event for event in averages if event.key.startswith("bitnet_ops::")}
    whole = benchmark.stats.stats.mean / STEPS
    columns = {
        f"{key.removeprefix('bitnet_ops::')} x {event.count / tokens:.0f}, ms": event.self_cpu_time_total
        / tokens
        / 1e3
        for key, event in sorted(own.items(), key=lambda item: -item[1].self_cpu_time_total)
    }
    columns["torch, Python, profiler, ms"] = whole * 1e3 - sum(columns.values())
    benchmark.extra_info |= {
        "table": "2B4T, one decoded token by operator (context 128, layers as modules):",
        "row": {"threads": threads},
        "token, ms": whole * 1e3,
        **columns,
    }


@pytest.fixture(scope="module", params=[0.5, 0.35, 0.2, 0.1])
def sparse(request: pytest.FixtureRequest, model: BitNet) -> list[LayerSparsity]:
    """Closes gates of the model for good, by rows of zeros: so this comes last."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        gate = layer.mlp.gate_proj
        w = gate.unpack()
        closed = torch.rand(len(w), generator=generator) >= 2 * request.param  # of random rows half are open
        w[closed] = 0
        gate.packed_weight = ops.pack_ternary(w, gate.layout)
    return measure_sparsity(model, prompt(32))


@pytest.mark.benchmark(group="sparsity")
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("skipping", [False, True], ids=["dense", "skipping"])
def bench_sparsity(
    benchmark, model: BitNet, sparse: list[LayerSparsity], skipping: bool, threads: int
) -> None:
    """Writes tokens with weights that few gates need, stored for skipping or not."""
    dense = [LayerSparsity(1.0, 1.0)] * len(sparse)
    layouts = layouts_for(model, sparse if skipping else dense)
    for name, layout in layouts.items():
        model.get_submodule(name).repack(layout)
    columns = time_steps(benchmark, model, threads, 128, "float32", sparse)
    benchmark.extra_info |= {
        "table": "2B4T, decode with closed gates:",
        "row": {
            "gates open, %": 100 * statistics.mean(layer.open_gates for layer in sparse),
            "inputs of down_proj not 0, %": 100 * statistics.mean(layer.used_inputs for layer in sparse),
            "layouts": ", ".join(sorted(set(layouts.values()))),
            "threads": threads,
        },
        **columns,
    }
