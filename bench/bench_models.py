"""BitNet b1.58 2B4T against Llama 3.2 1B in several number formats: prefill, decode, peak memory.

    pytest bench/bench_models.py --benchmark-only

All models run in one process, one after the other, on random weights; every row shows what share of the
read bandwidth measured in the same run a decoded token gets.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_2b4t import prompt
from probes import read_bandwidth
from subjects import SUBJECTS, Subject

PROMPT_TOKENS = 128
DECODED_TOKENS = 32
ROUNDS = 5
TABLE = "BitNet b1.58 2B4T and Llama 3.2 1B, random weights, one sequence:"


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """One model at a time; the next is built only when this one is gone."""
    return SUBJECTS[request.param]()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def put(benchmark, model: str, **columns: float) -> None:
    """Names the row and the columns of the table that a result belongs to."""
    benchmark.extra_info |= {"table": TABLE, "row": {"model": model}, **columns}


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize(("tokens", "rounds"), [(PROMPT_TOKENS, ROUNDS), (4 * PROMPT_TOKENS, 3)])
def bench_prefill(benchmark, subject: Subject, tokens: int, rounds: int) -> None:
    """Reads a prompt."""
    benchmark.pedantic(subject.prefill, (prompt(tokens),), rounds=rounds, warmup_rounds=1)
    put(benchmark, subject.name, **{f"prefill {tokens}, tok/s": tokens / benchmark.stats.stats.median})


@pytest.mark.benchmark(group="decode")
def bench_decode(benchmark, subject: Subject) -> None:
    """Writes tokens one by one behind the prompt."""

    def decode(ids: torch.Tensor, cache: object) -> None:
        for _ in range(DECODED_TOKENS):
            ids = subject.step(ids, cache)

    benchmark.pedantic(
        decode, setup=lambda: (subject.prefill(prompt(PROMPT_TOKENS)), {}), rounds=ROUNDS, warmup_rounds=1
    )
    rate = DECODED_TOKENS / benchmark.stats.stats.median
    bandwidth = statistics.median(read_bandwidth(torch.get_num_threads()) for _ in range(ROUNDS))
    columns = {
        "decode, tok/s": rate,
        "read for a token, MB": subject.weight_bytes / 1e6,
        "share of read bandwidth": rate * subject.weight_bytes / bandwidth,
    }
    put(benchmark, subject.name, **columns)


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("key", SUBJECTS)
def bench_memory(benchmark, key: str) -> None:
    """Takes the peak memory of a fresh process, Python and torch included; its time counts for nothing."""
    command = [sys.executable, Path(__file__).with_name("peak_memory.py"), key]
    run = benchmark.pedantic(
        subprocess.run, (command,), {"stdout": subprocess.PIPE, "check": True, "text": True}, rounds=1
    )
    name, peak, running = run.stdout.rsplit(maxsplit=2)
    columns = {"peak memory, GB": int(peak) / 1e9, "of it while running, GB": int(running) / 1e9}
    put(benchmark, name, **columns)
