"""The kernels without Python or torch: a C++ program compares every table with scalar, bit for bit.

It also runs the AVX-VNNI kernel on CPUs that only have AVX-512 VNNI (the one instruction they lack is
emulated), and all of it under the address and undefined-behaviour sanitizers.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import bitnet_ops

ROOT = Path(__file__).parent.parent
BASELINE = ["-std=c++17", "-fno-math-errno", "-ffp-contract=off"]  # as in setup.py
BUILDS = {
    "optimised": ["-O3"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    kernels = sorted((csrc / "kernels").glob("*.cpp"))
    if platform.machine().lower() not in ("x86_64", "amd64"):
        kernels = [csrc / "kernels" / "scalar.cpp"]
    torch_free = [csrc / name for name in ("dispatch.cpp", "cpu_features.cpp", "tile16.cpp")]
    return [ROOT / "tests/kernels/kernel_test.cpp", *torch_free, *kernels]


@pytest.mark.parametrize("build", BUILDS)
def test_every_kernel_equals_scalar(build: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "kernel_test"
    command = [compiler, *BASELINE, *BUILDS[build], "-o", str(program), *map(str, sources())]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[-4000:]

    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    outcome = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert outcome.keys() == set(bitnet_ops.known_isas())
    for name in bitnet_ops.supported_isas():
        assert "comparisons, 0 differences" in outcome[name]
    if "avx2" in bitnet_ops.supported_isas():
        assert "comparisons, 0 differences" in outcome["avx_vnni"]  # natively or emulated
