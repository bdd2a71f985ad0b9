"""Facts about the machine for every benchmark run, and the tables of the run at its end."""

from typing import Any

import pytest
import torch
import transformers
from report import report

import bitnet_ops


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Adds what pytest-benchmark cannot know."""
    machine_info["bitnet_ops"] = [
        f"{torch.get_num_threads()} threads unless said otherwise",
        f"bitnet_ops {bitnet_ops.__version__} with {bitnet_ops.isa()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints what README.md would show."""
    session = config._benchmarksession
    rows = [benchmark.extra_info for benchmark in session.benchmarks]
    if any("table" in row for row in rows):
        info = config.hook.pytest_benchmark_generate_machine_info(config=config)
        pytest_benchmark_update_machine_info(info)
        terminalreporter.write_line("\n" + report(rows, info))
