"""Other systems: the extension built and linked for macOS and Windows, the C++ tests run as Windows programs.

Nothing here runs on a Mac, and no Python for Windows. PyTorch's wheels, 110 MB each, come from PyPI; the
environment variable BITNET_OPS_DOWNLOADS names a folder that keeps them.
"""

import os
import subprocess
from pathlib import Path

import pytest
from cross.build import TARGETS, build_extension, build_program
from sources import ROOT, setup_py
from test_kernels import DECODER_SIGNATURE
from test_threads import CHECKS
from tools import need, need_package

import bitnet_ops

pytestmark = pytest.mark.slow

LINUX_ONLY = ["one CPU", "fork", "short memory", "fork during work"]
"""Checks of tests/threads/pool_test.cpp."""
HANGS_AFTER = 600
"""Seconds."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each target, where objects are kept."""
    need_package("ziglang")
    return {name: tmp_path_factory.mktemp(name) for name in TARGETS}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("BITNET_OPS_DOWNLOADS") or tmp_path_factory.mktemp("downloads"))


def test_macos_extension(folders: dict[str, Path], downloads: Path) -> None:
    lief = need_package("lief")
    extension = lief.parse(str(build_extension(TARGETS["macos-arm64"], folders["macos-arm64"], downloads)))
    # The number of the library that has a symbol; 0: the linker found none.
    libraries = {symbol.name: symbol.library_ordinal for symbol in extension.imported_symbols}
    unresolved = {name for name, number in libraries.items() if number == 0}
    assert unresolved
    assert all(name.startswith(("_Py", "__Py")) for name in unresolved), sorted(unresolved)
    names = [library.name.split("/")[-1] for library in extension.libraries]
    assert set(names) == {
        "_C.abi3.so",
        "libSystem.B.dylib",
        "libc10.dylib",
        "libtorch.dylib",
        "libtorch_cpu.dylib",
    }
    assert "_PyInit__C" in {symbol.name for symbol in extension.exported_symbols}


def test_windows_extension(folders: dict[str, Path], downloads: Path) -> None:
    """PE files cannot have anything unresolved: here every symbol has the library that it comes from."""
    need_package("abi3info")
    lief = need_package("lief")
    target = TARGETS["windows-x86_64"]
    extension = lief.parse(str(build_extension(target, folders["windows-x86_64"], downloads)))
    libraries = {library.name.lower() for library in extension.imports}
    assert {"torch_cpu.dll", "python3.dll", "kernel32.dll"} <= libraries
    theirs = {name for name in libraries if not name.startswith("api-ms-win-")}
    assert theirs == {"torch_cpu.dll", "python3.dll", "kernel32.dll"}
    assert [entry.name for entry in extension.get_export().entries] == ["PyInit__C"]


@pytest.fixture(scope="module")
def wine(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """How to run a Windows program."""
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


def test_kernels_on_windows(folders: dict[str, Path], wine: list[str]) -> None:
    target, folder = TARGETS["windows-x86_64"], folders["windows-x86_64"]
    setup = setup_py()
    tests = [f"tests/kernels/{file.name}" for file in (ROOT / "tests/kernels").glob("*.cpp")]
    sources = [*tests, *setup.torch_free_sources(target.system, target.machine)]
    lines = output([*wine, build_program(target, sources, folder, "kernel_test")])
    outcome = dict(line.split(": ", 1) for line in lines)
    assert outcome.pop("signature") == DECODER_SIGNATURE
    supported = [name for name in bitnet_ops.supported_isas() if name != "amx_int8"]
    assert outcome.pop("chosen") == supported[0]
    for name in supported:
        assert "comparisons, 0 differences" in outcome[name]
    assert outcome["amx_int8"] == "not supported by this CPU"  # csrc/platform/windows.cpp does not ask for it


def test_threads_on_windows(folders: dict[str, Path], wine: list[str]) -> None:
    sources = ["tests/threads/pool_test.cpp", "csrc/run/thread_pool.cpp", "csrc/platform/windows.cpp"]
    program = build_program(TARGETS["windows-x86_64"], sources, folders["windows-x86_64"], "pool_test")
    assert output([*wine, program, "400"]) == [check for check in CHECKS if check not in LINUX_ONLY]
