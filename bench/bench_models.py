"""BitNet b1.58 2B4T beside other programs, and beside Llama 3.2 1B and Gemma 3 1B; models with group scales.

    pytest bench/bench_models.py --benchmark-only --benchmark-json=models.json

Each model is a process of its own, and all take turns (comparison/turns.py), within 15 minutes. -k runs some
of the models. Other programs take part where they are installed (comparison/rows.py; docs/development.md).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from comparison.rows import Row, comparison_rows
from comparison.turns import Comparison, Figure, Plan, Results
from probes import read_bandwidth

THREADS = tuple(sorted({1, torch.get_num_threads()}, reverse=True))
PLAN = Plan(THREADS)
SHORT, LONG = PLAN.prompts
NOT_READABLE = "not readable"


@pytest.fixture(scope="module", params=comparison_rows(Path()))
def key(request: pytest.FixtureRequest) -> str:
    """One model after the other."""
    return request.param


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    """Those that this run asks for."""
    wanted = {item.callspec.params["key"] for item in request.session.items if item.path == request.path}
    packed = request.getfixturevalue("folder") if "bitnet" in wanted else Path()
    return {key: row for key, row in comparison_rows(packed).items() if key in wanted}


@pytest.fixture(scope="module")
def results(rows: dict[str, Row]) -> Iterator[dict[str, Results]]:
    """The whole comparison, on behalf of all benchmarks below."""
    there = {key: row for key, row in rows.items() if row.program.command is not None}
    with tempfile.TemporaryDirectory(prefix="bitnet-comparison-") as folder:  # some gigabytes
        yield Comparison(there, PLAN, Path(folder), read_bandwidth).run()


def put(
    benchmark, row: Row, results: dict[str, Results], key: str, what: str, columns: dict[str, Any]
) -> None:
    """Fills a row of a table."""
    benchmark.pedantic(lambda: None, rounds=1)  # everything was measured in turns
    title = f"{row.table}, random weights, one sequence, {what}:"
    benchmark.extra_info |= {"table": title, "row": {"model": row.name}, **columns}
    if results[key].failure:
        pytest.fail(f"{row.name}: {results[key].failure}", pytrace=False)


def skip_missing(row: Row) -> None:
    """Says which program is not there."""
    if row.program.command is None:
        pytest.skip(row.program.missing)


@pytest.mark.benchmark(group="models")
@pytest.mark.parametrize("threads", THREADS)
def bench_speed(
    benchmark, key: str, rows: dict[str, Row], threads: int, request: pytest.FixtureRequest
) -> None:
    """Reads prompts and writes tokens."""
    skip_missing(rows[key])
    results = request.getfixturevalue("results")
    result = results[key]
    lengths = PLAN.prompts if threads == THREADS[0] else (SHORT,)
    columns = {
        f"prompt of {tokens}, tok/s": result.rates.get((threads, tokens), Figure()).cell()
        for tokens in lengths
    }
    columns["decode, tok/s"] = result.rates.get((threads, 0), Figure()).cell()
    shares = result.shares.get(threads)
    columns["share of read bandwidth"] = median(shares) if shares else None
    columns["spread"] = "did not run" if result.failure else result.spread(threads)
    what = f"{threads} thread{'s' if threads > 1 else ''}"
    put(benchmark, rows[key], results, key, what, columns)


@pytest.mark.benchmark(group="models")
def bench_memory(benchmark, key: str, rows: dict[str, Row], request: pytest.FixtureRequest) -> None:
    """Takes peak memory, and energy where the machine counts it."""
    skip_missing(rows[key])
    results = request.getfixturevalue("results")
    result = results[key]
    columns = {
        "read for a token, MB": result.read and result.read / 1e6,
        "peak memory, GB": result.peak_bytes / 1e9 or None,
        "of it while running, GB": result.running_bytes / 1e9 or None,
        "energy for a token, J": median(result.joules) if result.joules else NOT_READABLE,
    }
    put(benchmark, rows[key], results, key, "memory and energy", columns)
