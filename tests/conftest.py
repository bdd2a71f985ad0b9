"""Fixtures that every test file may use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bitnet_ops


@pytest.fixture(params=bitnet_ops.known_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set of this architecture, and proves that it did."""
    name = request.param
    if name not in bitnet_ops.supported_isas():
        pytest.skip(f"this CPU does not support {name} (tests/test_kernels.py runs avx_vnni, too)")
    with bitnet_ops.use_isa(name):
        assert bitnet_ops.isa() == name
        yield name
        assert bitnet_ops.isa() == name, "the test switched the instruction set under itself"


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
