"""What stands below csrc/ops knows neither torch nor Python: C++ alone compiles it (docs/architecture.md)."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sources import ROOT, setup_py

CSRC = ROOT / "csrc"


def complaint(file: Path) -> str | None:
    """What the compiler says of a file that it cannot compile."""
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{CSRC}", str(file)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    return None if compiled.returncode == 0 else f"{file.relative_to(ROOT)}:\n{compiled.stderr[:1000]}"


def test_nothing_below_the_operators_needs_torch() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sources = [ROOT / file for file in setup_py().torch_free_sources()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = [text for text in pool.map(complaint, sources) if text is not None]
    assert not complaints, "\n".join(complaints)
