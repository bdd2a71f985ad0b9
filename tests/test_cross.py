"""The C++ tests as Windows programs, by zig and wine. The extension is in tests/test_wheels.py."""

import subprocess
from pathlib import Path

import pytest
from cross.build import TARGETS, build_kernel_test, build_program
from test_kernels import DECODER_SIGNATURE
from test_threads import CHECKS
from tools import need, need_package

import bitnet_ops

pytestmark = pytest.mark.slow

LINUX_ONLY = ["one CPU", "fork", "short memory", "fork during work"]
"""Checks of tests/threads/pool_test.cpp."""
HANGS_AFTER = 900
"""Seconds."""

TARGET = TARGETS["windows-x86_64"]


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to run a Windows program."""
    need_package("ziglang")
    program = need("wine64", "wine", "/usr/lib/wine/wine64", package="wine64")
    folder = tmp_path_factory.mktemp("wine")
    settings = {
        "WINEPREFIX": str(folder),
        "WINEDEBUG": "-all",
        "DISPLAY": "",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # it would ask for them in a window
    }
    return ["env", *(f"{name}={value}" for name, value in settings.items()), program]


def output(command: list[str | Path]) -> list[str]:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HANGS_AFTER)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return result.stdout.splitlines()


def test_kernels_on_windows(wine: list[str], tmp_path: Path) -> None:
    lines = output([*wine, build_kernel_test(TARGET, tmp_path)])
    outcome = dict(line.split(": ", 1) for line in lines)
    assert outcome.pop("signature") == DECODER_SIGNATURE
    supported = [name for name in bitnet_ops.supported_isas() if name != "amx_int8"]
    assert outcome.pop("chosen") == supported[0]
    for name in supported:
        assert "comparisons, 0 differences" in outcome[name]
    assert outcome["amx_int8"] == "not supported by this CPU"  # csrc/platform/windows.cpp does not ask for it


def test_threads_on_windows(wine: list[str], tmp_path: Path) -> None:
    sources = ["tests/threads/pool_test.cpp", "csrc/run/thread_pool.cpp", "csrc/platform/windows.cpp"]
    program = build_program(TARGET, sources, tmp_path, "pool_test")
    assert output([*wine, program, "400"]) == [check for check in CHECKS if check not in LINUX_ONLY]
