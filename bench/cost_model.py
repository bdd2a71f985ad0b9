"""What a decoded token of BitNet b1.58 2B4T costs with so many threads: regions, bytes, instructions.

    python bench/cost_model.py                     # measures this machine, predicts for it
    python bench/cost_model.py --model FOLDER      # and compares with decoding, with 1, 2, 4 ... threads
    python bench/cost_model.py --machine-read 300 --threads 4 8 16    # a machine with more memory channels

docs/threads.md has the formula. FOLDER is a packed folder of the model, or of what
`make_synthetic_checkpoint.py` wrote.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matrices import CONFIG
from measure import thread_counts
from probes import read_bandwidth, region_seconds

import bitnet_ops
from bitnet_ops import BitLinear, BitNet, ops
from bitnet_ops.layers.linear import best_layout

REGIONS_OF_LAYER = 5
"""q, k and v; attention; o; gate and up; down. What lies between them is too little for a second thread."""
REGIONS_OF_HEAD = 3
"""The copy of the table, then rows of the table, twice."""
PART_SECONDS = 2e-6
"""csrc/run/parallel.h: at the end of a region threads wait for half of one, on average."""
OVERLAP = 3.0
"""How well a core reads and computes at once: 1 one after the other, infinite perfectly. From three
instruction sets on one machine (bench/LOG.md)."""
CACHED_ROWS = 1024
"""A matrix of this many rows of 2560 weights is 0.5 to 0.7 MB: in L2 or near it, never in memory."""
CALLS = 40
CONTEXT = 128


@dataclass(frozen=True)
class Machine:
    """What the formula has to know.

    Attributes:
        core_read: bytes per second that one core reads from memory.
        machine_read: that all of them read together.
        core_decode: bytes of packed weights per second that one core multiplies, from its cache.
        region: seconds of an empty region with two threads.
        region_of_thread: what each thread more adds to it.
        serial: seconds of a token on the calling thread alone: norms, quantising, Python.
    """

    core_read: float
    machine_read: float
    core_decode: float
    region: float
    region_of_thread: float
    serial: float


def token_seconds(machine: Machine, read_bytes: float, threads: int) -> float:
    """A token that reads so many bytes."""
    read = min(machine.core_read, machine.machine_read / threads)
    rate = (read**-OVERLAP + machine.core_decode**-OVERLAP) ** (-1 / OVERLAP)
    streaming = read_bytes / (rate * threads)
    if threads == 1:
        return streaming + machine.serial
    regions = CONFIG.num_hidden_layers * REGIONS_OF_LAYER + REGIONS_OF_HEAD
    region = machine.region + (threads - 2) * machine.region_of_thread + PART_SECONDS / 2
    return streaming + regions * region + machine.serial


def median_seconds(run: Callable[[], object], times: int) -> float:
    """Median of several calls."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def core_decode_rate(layout: str) -> float:
    """Bytes of a packed matrix in cache that one thread multiplies in a second."""
    torch.set_num_threads(1)
    w = torch.randint(-1, 2, (CACHED_ROWS, CONFIG.hidden_size), dtype=torch.int8)
    small, large = (ops.pack_ternary(rows, layout=layout) for rows in (w[:16], w))
    q = torch.randint(-127, 128, (1, CONFIG.hidden_size), dtype=torch.int8)

    def call(packed: torch.Tensor, rows: int) -> Callable[[], object]:
        return lambda: ops.ternary_matmul(q, packed, rows, layout=layout)

    took = median_seconds(call(large, CACHED_ROWS), CALLS) - median_seconds(call(small, 16), CALLS)
    return (large.nbytes - small.nbytes) / took


def empty_region(threads: int) -> float:
    """Seconds of a region that does nothing."""
    return statistics.median(region_seconds(threads, 0, threads, 0.0, False) for _ in range(500))


def measured_machine(layout: str, serial: float) -> Machine:
    """The numbers of this machine."""
    threads = max(thread_counts())
    reads = [[read_bandwidth(n) for _ in range(5)] for n in (1, threads)]
    two, all_of_them = empty_region(2), empty_region(max(threads, 2))
    more = (all_of_them - two) / (threads - 2) if threads > 2 else 0.0
    core, machine = map(statistics.median, reads)
    return Machine(core, machine, core_decode_rate(layout), two, max(more, 0.0), serial)


def bytes_of_token(model: BitNet | None, layout: str) -> int:
    """Weights, the head's copy, and keys and values of `CONTEXT` tokens in float32."""
    cache = 2 * CONTEXT * CONFIG.num_key_value_heads * CONFIG.head_dim * 4 * CONFIG.num_hidden_layers
    if model is not None:
        head = model.screened_head()
        weights = sum(m.packed_weight.nbytes for m in model.modules() if isinstance(m, BitLinear))
        return weights + (0 if head is None else head.codes.nbytes) + cache
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    kv = CONFIG.num_key_value_heads * CONFIG.head_dim
    inputs, of_block = (20, 64) if layout == "tile16_base3" else (16, 64)
    blocks = (2 * hidden + 2 * kv + 2 * inner) // 16 * -(-hidden // inputs)
    blocks += hidden // 16 * -(-inner // inputs)
    head = CONFIG.vocab_size * hidden * 6 // 8
    return CONFIG.num_hidden_layers * blocks * of_block + head + cache


def decode_seconds(model: BitNet, threads: int) -> float:
    """A token behind `CONTEXT` others, greedy."""
    torch.set_num_threads(threads)
    prompt = torch.randint(100_000, (1, CONTEXT - 16), generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    with torch.inference_mode():
        tokens = model.stream_tokens(
            prompt, max_new_tokens=32, do_sample=False, eos_token_id=(), prompt_lookup_num_tokens=0
        )
        begin = None
        for _ in tokens:
            now = time.perf_counter()
            times += [] if begin is None else [now - begin]
            begin = now
    return statistics.median(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="packed folder of 2B4T to decode with")
    parser.add_argument("--machine-read", type=float, help="GB/s of all cores (default: measured)")
    parser.add_argument("--core-read", type=float, help="GB/s of one core (default: measured)")
    parser.add_argument(
        "--serial", type=float, default=1.5, help="ms of a token on one thread (default: 1.5)"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="to predict for (default: 1, 2, 4 ... all)")
    arguments = parser.parse_args()
    counts, layout = thread_counts(), best_layout()
    machine = measured_machine(layout, arguments.serial * 1e-3)
    if arguments.core_read:
        machine = replace(machine, core_read=arguments.core_read * 1e9)
    if arguments.machine_read:
        machine = replace(machine, machine_read=arguments.machine_read * 1e9)
    model = None if arguments.model is None else bitnet_ops.from_pretrained(arguments.model)
    read = bytes_of_token(model, layout)
    measured = model is not None
    print("| threads | predicted, ms | tok/s | share of reading alone |" + measured * " measured, ms |")
    print("|---:|---:|---:|---:|" + measured * "---:|")
    for threads in arguments.threads or counts:
        seconds = token_seconds(machine, read, threads)
        reading = read / min(threads * machine.core_read, machine.machine_read)
        line = f"| {threads} | {seconds * 1e3:.1f} | {1 / seconds:.1f} | {reading / seconds:.2f} |"
        if model is not None and threads in counts:
            line += f" {decode_seconds(model, threads) * 1e3:.1f} |"
        print(line)


if __name__ == "__main__":
    main()
