"""Facts about the machine for every benchmark run, the tables of the run at its end, and the 2B4T model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_2b4t import make_packed
from report import report

import bitnet_ops


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic 2B4T in the layouts of this machine."""
    return make_packed(tmp_path_factory.mktemp("2b4t"))


@pytest.fixture(scope="module")
def model(folder: Path) -> bitnet_ops.BitNet:
    """The same, loaded once a file, because some change it."""
    return bitnet_ops.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Ends what a benchmark set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Adds what pytest-benchmark cannot know."""
    machine_info["bitnet_ops"] = [
        f"{torch.get_num_threads()} threads unless said otherwise",
        f"bitnet_ops {bitnet_ops.__version__} with {bitnet_ops.isa()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the tables."""
    session = config._benchmarksession
    rows = [benchmark.extra_info for benchmark in session.benchmarks]
    if any("table" in row for row in rows):
        info = config.hook.pytest_benchmark_generate_machine_info(config=config)
        pytest_benchmark_update_machine_info(info)
        terminalreporter.write_line("\n" + report(rows, info))
