"""Threads: what sharing work out costs, and what becomes of decoding on a machine that others keep busy.

    pytest bench/bench_threads.py --benchmark-only

How fast decoding, prompts and batches are with 1, 2, 4 ... threads is in bench_model.py and
bench_generate.py (chart.py draws the former), and cost_model.py says what to expect.

The busy processes compute without touching memory. A slowdown is in proportion where it is one over the share
of its CPUs that a step still gets, after what the busy processes took; "over proportion" is the ratio of the
two, at most 1 where nothing is lost.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from measure import REST_SECONDS, spread
from probes import region_seconds
from subjects import CONTEXT, bitnet_2b4t

CPUS = len(os.sched_getaffinity(0))
THREADS = torch.get_num_threads()

WORK_SECONDS = 60e-6
"""A projection of 2B4T at one token, on one core."""
GAPS = [(0.0, False), (20e-6, False), (50e-6, True), (500e-6, True), (5e-3, True)]
"""Seconds between two regions, and whether the caller sleeps meanwhile."""
REGION_THREADS = (2, 4, 8, 16)
"""Also where these are more than there are CPUs."""
REGIONS = 200

STEPS_OF_ROUND = 15
"""Half a second: long beside the time slices of the system, which are some milliseconds."""
ROUNDS = 5


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with torch.inference_mode():
        yield
    torch.set_num_threads(THREADS)


# ---- regions ---------------------------------------------------------------------------------------------


def rounds_of(seconds: float) -> int:
    """How many rounds of the probe's work one core does in so many seconds."""
    many = 1_000_000
    return round(many * seconds / min(region_seconds(1, many, 1, 0.0, False) for _ in range(5)))


@pytest.mark.benchmark(group="regions")
@pytest.mark.parametrize("threads", REGION_THREADS)
@pytest.mark.parametrize(("gap", "asleep"), GAPS, ids=lambda value: str(value))
def bench_region(benchmark, gap: float, asleep: bool, threads: int) -> None:
    """Regions without work, and work of one thread's 60 us shared out."""
    rounds = rounds_of(WORK_SECONDS)

    def times(rounds: int, parts: int) -> list[float]:
        region_seconds(threads, rounds, parts, gap, asleep)
        return [region_seconds(threads, rounds, parts, gap, asleep) for _ in range(REGIONS)]

    empty, full = times(0, threads), times(rounds, 4 * threads)
    benchmark.pedantic(region_seconds, (threads, rounds, 4 * threads, gap, asleep), rounds=1)
    benchmark.extra_info |= {
        "table": f"A region, and one of {WORK_SECONDS * 1e6:.0f} us of work, {CPUS} CPUs:",
        "row": {
            "threads": threads,
            "us since the last": f"{gap * 1e6:g}",
            "caller meanwhile": "asleep" if asleep else "awake",
        },
        "empty, us": statistics.median(empty) * 1e6,
        "with work, us": statistics.median(full) * 1e6,
        "ninth of ten, us": statistics.quantiles(full, n=10)[-1] * 1e6,
        "over an equal share, us": (statistics.median(full) - WORK_SECONDS / min(threads, CPUS)) * 1e6,
    }


# ---- busy machines ---------------------------------------------------------------------------------------


@contextmanager
def busy_processes(count: int) -> Iterator[Callable[[], float]]:
    """So many processes that never rest; gives the seconds of CPU that they have taken so far."""
    command = [sys.executable, "-S", "-E", "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]

    def cpu_seconds() -> float:
        ticks = 0
        for process in processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # in user mode and in the system
        return ticks / os.sysconf("SC_CLK_TCK")

    try:
        time.sleep(0.2 if count else REST_SECONDS)  # until they run, and the system has spread them
        yield cpu_seconds
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bitnet_step() -> Callable[[], object]:
    """Decodes a token of BitNet b1.58 2B4T."""
    subject = bitnet_2b4t()
    prompt = torch.randint(1000, (1, 16))
    logits, cache = subject.prefill(prompt)
    left = CONTEXT - prompt.shape[1]

    def step() -> None:
        nonlocal logits, cache, left
        if left == 0:
            logits, cache = subject.prefill(prompt)
            left = CONTEXT - prompt.shape[1]
        logits = subject.step(logits.argmax(-1, keepdim=True), cache)
        left -= 1

    return step


def torch_step() -> Callable[[], object]:
    """Multiplies by 64 matrices with PyTorch, whose threads are OpenMP's."""
    x = torch.randn(1, 2560, dtype=torch.bfloat16)
    weights = [torch.randn(2560, 2560, dtype=torch.bfloat16) for _ in range(64)]
    return lambda: [F.linear(x, weight) for weight in weights]


STEPS = {"BitNet b1.58 2B4T": bitnet_step, "64 x torch linear, bfloat16": torch_step}


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest) -> tuple[str, Callable[[], object]]:
    """What is timed, by name, one after another."""
    torch.manual_seed(0)
    with torch.inference_mode():
        return request.param, STEPS[request.param]()


def timed(run: Callable[[], object], busy: int) -> tuple[float, float]:
    """Seconds of a step beside busy processes, and how many CPUs these took meanwhile."""
    with busy_processes(busy) as cpu_seconds:
        run()
        taken, begin = cpu_seconds(), time.perf_counter()
        for _ in range(STEPS_OF_ROUND):
            run()
        elapsed = time.perf_counter() - begin
        return elapsed / STEPS_OF_ROUND, (cpu_seconds() - taken) / elapsed


@pytest.mark.benchmark(group="busy")
@pytest.mark.parametrize("threads", sorted({1, THREADS}))
@pytest.mark.parametrize("busy", sorted({1, CPUS}))
def bench_busy(benchmark, step: tuple[str, Callable[[], object]], threads: int, busy: int) -> None:
    """Steps beside one busy process and beside as many as there are CPUs, in turn with steps beside none."""
    name, run = step
    torch.set_num_threads(threads)
    alone: list[float] = []
    beside: list[float] = []
    taken: list[float] = []

    def take_turns() -> None:
        alone.append(timed(run, 0)[0])
        seconds, cpus = timed(run, busy)
        beside.append(seconds)
        taken.append(cpus)

    benchmark.pedantic(take_turns, rounds=ROUNDS)
    slowdowns = [b / a for b, a in zip(beside, alone, strict=True)]
    # What the others left of the CPUs that the threads have when alone.
    wanted = min(threads, CPUS)
    shares = [min(wanted, CPUS - cpus) / wanted for cpus in taken]
    benchmark.extra_info |= {
        "table": "Beside busy processes:",
        "row": {"step": name, "threads": threads, "busy processes": busy},
        "alone, ms": statistics.median(alone) * 1e3,
        "beside them, ms": statistics.median(beside) * 1e3,
        "spread": spread(beside),
        "slowdown": statistics.median(slowdowns),
        "CPUs they took": statistics.median(taken),
        "slowdown over proportion": statistics.median(s * p for s, p in zip(slowdowns, shares, strict=True)),
    }
