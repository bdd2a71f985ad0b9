"""What stands below csrc/ops knows neither torch nor Python: C++ alone compiles it (docs/architecture.md)."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
# Kernels of other architectures, by this machine's.
OTHER_KERNELS = {"x86_64": "neon", "amd64": "neon", "aarch64": "avx", "arm64": "avx"}


def sources() -> list[Path]:
    others = OTHER_KERNELS.get(platform.machine().lower(), ("avx", "neon"))
    kernels = [file for file in (CSRC / "kernels").glob("*.cpp") if not file.name.startswith(others)]
    rooms = ("run", "layouts", "platform")
    return [*kernels, *(file for room in rooms for file in (CSRC / room).glob("*.cpp"))]


def complaint(file: Path) -> str | None:
    """What the compiler says of a file that it cannot compile."""
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{CSRC}", str(file)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    return None if compiled.returncode == 0 else f"{file.relative_to(ROOT)}:\n{compiled.stderr[:1000]}"


def test_nothing_below_the_operators_needs_torch() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = [text for text in pool.map(complaint, sources()) if text is not None]
    assert not complaints, "\n".join(complaints)
