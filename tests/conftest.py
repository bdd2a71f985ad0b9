"""Fixtures that every test file may use, and what the terminal says about instruction sets and skips."""

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import LLAMA
from tiny_checkpoints import Weights, published_tensors, tiny_folder, write_folder

import bitnet_ops
from bitnet_ops import from_pretrained, repack

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores; tests of threads set their own number

# A shell has what it starts in the background ignore Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    tested = bitnet_ops.supported_isas()
    others = [name for name in bitnet_ops.known_isas() if name not in tested]
    line = f"instruction sets tested: {', '.join(tested)}"
    if others:
        line += f"; not tested, because this CPU lacks them: {', '.join(others)}"
    if "avx_vnni" in others:
        line += " (`pytest -m slow` runs avx_vnni in another encoding where there is AVX-512 VNNI)"
    return line


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for all skips: in the list of `-rs` each test file has lines of its own."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(re.sub("^Skipped: ", "", report.longrepr[2]) for report in skipped)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    terminalreporter.write_line(f"{len(skipped)} skipped: {told}", yellow=True)


@pytest.fixture(params=bitnet_ops.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set of this CPU, and proves that it did."""
    name = request.param
    with bitnet_ops.use_isa(name):
        assert bitnet_ops.isa() == name
        yield name
        assert bitnet_ops.isa() == name, "the test switched the instruction set under itself"


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """The quantisers of transformers are compiled, which takes minutes here and changes the order of sums."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Gives every test the same random numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the source tree: a program started there would import its bitnet_ops/, maybe not built."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid packed checkpoint in the published format, for a test to spoil."""
    return tiny_folder(tmp_path / "checkpoint")


@pytest.fixture
def ours(folder: Path, tmp_path: Path) -> Path:
    """The same model in our own format, in tile16 on every machine."""
    repack(from_pretrained(folder), "tile16").save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A valid Llama-class checkpoint as published, with biases and with norms inside projections."""
    tensors = published_tensors(Weights.random(LLAMA), reciprocal=True)
    return write_folder(tmp_path / "llama", LLAMA.config(), tensors)


@pytest.fixture
def our_llama(llama: Path, tmp_path: Path) -> Path:
    """The same in our own format, in tile16 on every machine."""
    repack(from_pretrained(llama), "tile16").save_pretrained(tmp_path / "our-llama")
    return tmp_path / "our-llama"
