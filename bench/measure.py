"""Times one row of a table, with whatever it is compared with measured right beside it.

The speed of a shared machine moves within seconds, so two figures are compared only where they were taken
within a few milliseconds of each other: before every timed round all the others take their turn, a ratio is
formed per round, and the table shows the median of the ratios.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from probes import INSTRUCTIONS, multiply_rate, read_bandwidth

REST_SECONDS = 0.02
"""Workers of torch's pool spin on for some 10 ms after their last work, on processors that ours then lack."""


def thread_counts() -> list[int]:
    """1, 2, 4 and so on, and as many as torch uses on this machine."""
    most = torch.get_num_threads()
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})


Rounds = Mapping[str, Sequence[Any]]
"""What was measured in each round, by name; "seconds" is the time of what the row is about."""


def seconds(run: Callable[[], Any]) -> float:
    """Time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rested_seconds(run: Callable[[], Any]) -> float:
    """Time of one run after the pause that `measure` makes before its own, to compare small differences."""
    time.sleep(REST_SECONDS)
    return seconds(run)


def measure(
    benchmark, run: Callable[[], Any], others: Mapping[str, Callable[[], float | None]], rounds: int
) -> Rounds:
    """Times ``run`` with pytest-benchmark, and calls the others before every round.

    Returns:
        What each of the others gave in each round, and under "seconds" the rounds' own times.
    """
    beside: dict[str, list[float | None]] = {name: [] for name in others}

    def take_turns() -> None:
        for name, other in others.items():
            beside[name].append(other())
        time.sleep(REST_SECONDS)

    benchmark.pedantic(run, setup=take_turns, rounds=rounds, warmup_rounds=1)
    return {name: values[1 : rounds + 1] for name, values in beside.items()} | {
        "seconds": benchmark.stats.stats.data
    }


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: Sequence[float]) -> str:
    """Interquartile range over median, in per cent."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{(high - low) / middle:.0%}"


def put(benchmark, table: str, row: dict[str, Any], rounds: Rounds, calls: int = 1, **columns: Any) -> None:
    """Fills a row of a table with what all rows have, and with columns of its own."""
    benchmark.extra_info |= {
        "table": table,
        "row": row,
        "median, us": statistics.median(rounds["seconds"]) / calls * 1e6,
        "spread": spread(rounds["seconds"]),
        **columns,
    }


def rate(amount: float, rounds: Rounds) -> float:
    """Thousand millions a second."""
    return amount / statistics.median(rounds["seconds"]) / 1e9


@dataclass(frozen=True)
class Work:
    """What a round has to do at least, whatever the kernel.

    Attributes:
        weight_bytes: read from memory.
        products: multiplications of two bytes, or 0 where no instruction's rate is a limit.
    """

    weight_bytes: int
    products: int = 0


def limits(isa: str, threads: int) -> dict[str, Callable[[], float | None]]:
    """The probes to measure beside a row, by the names that `limit_columns` looks for."""
    instruction = INSTRUCTIONS.get(isa)
    return {
        "read bandwidth": lambda: read_bandwidth(threads),
        "multiply rate": lambda: instruction and multiply_rate(instruction, threads),
    }


def limit_columns(work: Work, isa: str, rounds: Rounds) -> dict[str, Any]:
    """The columns "share of limit" and "limit": how much of a round the binding limit explains.

    None where multiplying may bind and there is no probe for it.
    """
    if work.products and None in rounds["multiply rate"]:
        return {}
    read = [work.weight_bytes / rate for rate in rounds["read bandwidth"]]
    multiply = [work.products / rate if work.products else 0.0 for rate in rounds["multiply rate"]]
    memory_binds = statistics.median(read) >= statistics.median(multiply)
    return {
        "share of limit": median_ratio(read if memory_binds else multiply, rounds["seconds"]),
        "limit": "reading" if memory_binds else INSTRUCTIONS[isa],
    }
