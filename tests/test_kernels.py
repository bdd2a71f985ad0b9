"""The kernels without Python or torch: a C++ program compares every table with scalar, bit for bit.

It also runs the AVX-VNNI kernel on CPUs that only have AVX-512 VNNI (the one instruction they lack is
replaced by its other encoding), all of it under the address and undefined-behaviour sanitizers, and the
NEON kernels on other CPUs, cross-compiled, in QEMU.
"""

import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from sources import ROOT, setup_py
from tools import need

import bitnet_ops

# To compile all kernels takes a minute of CPU time. Fast tests run the same kernels through the operators.
pytestmark = pytest.mark.slow

BASELINE = ["-std=c++17", "-fno-math-errno", "-ffp-contract=off"]  # as in setup.py
BUILDS = {
    "optimised": ["-O3"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}

WARNINGS = {
    # What GCC 12 says of its own AVX-512 headers is not about this code.
    "g++": ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    "clang++": ["-Wall", "-Wextra", "-Werror"],
}

PACKAGES = {"g++": "g++", "clang++": "clang"}  # Debian's

MACHINE = platform.machine().lower()
ARCHITECTURE = {"amd64": "x86_64", "arm64": "aarch64"}.get(MACHINE, MACHINE)

# What QEMU's models of CPUs have. The first table is chosen, and every table named here is compared. The
# last is Apple's M2 as far as MIDR_EL1 goes, the register that says who made a core.
EMULATED_CPUS = {
    "cortex-a53": ["neon", "scalar"],
    "neoverse-n1": ["neon_dotprod", "neon", "scalar"],
    "max": ["neon_i8mm", "neon_dotprod", "neon", "scalar"],
    "max,midr=0x610f0330": ["neon_dotprod", "neon_i8mm", "neon", "scalar"],
}
HANGS_AFTER = 900
"""Seconds. It takes 2 to 20 on a quiet machine, but busy ones are tested on, too."""

DECODER_SIGNATURE = "1c0debf2155a0eb1"
"""A hash of what the layers of tests/kernels/decoder_test.cpp give, on every architecture."""

NEON_ISAS = set(EMULATED_CPUS["max"])


def build(compiler: str, flags: list[str], architecture: str, program: Path) -> None:
    torch_free = setup_py().torch_free_sources("Linux", architecture)
    sources = [*(ROOT / "tests/kernels").glob("*.cpp"), *(ROOT / file for file in torch_free)]
    # Several folders may have a file of the same name.
    objects = [
        program.with_name("-".join(source.relative_to(ROOT).with_suffix(".o").parts)) for source in sources
    ]

    def execute(*arguments: str | Path) -> None:
        command = [compiler, *BASELINE, f"-I{ROOT / 'csrc'}", *flags, *map(str, arguments)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stderr[-4000:]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # largest first: no core waits for the last one
        by_size = sorted(zip(sources, objects, strict=True), key=lambda pair: -pair[0].stat().st_size)
        list(pool.map(lambda pair: execute("-c", pair[0], "-o", pair[1]), by_size))
    execute(*objects, "-pthread", "-o", program)


def run(command: list[str]) -> dict[str, str]:
    """Runs the program and returns what it says about each instruction set and of its choice."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return dict(line.split(": ", 1) for line in result.stdout.splitlines())


Builder = Callable[[str, str, str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Gives the program of a compiler, an entry of BUILDS and an architecture, and makes each only once."""

    @cache
    def program(compiler: str, flags: str, architecture: str) -> Path:
        path = tmp_path_factory.mktemp(f"{Path(compiler).name}-{flags}") / "kernel_test"
        build(compiler, [*WARNINGS.get(compiler, []), *BUILDS[flags]], architecture, path)
        return path

    return program


@pytest.mark.parametrize(
    ("compiler", "flags"), [("g++", "optimised"), ("g++", "sanitized"), ("clang++", "optimised")]
)
def test_every_kernel_equals_scalar(compiler: str, flags: str, built: Builder) -> None:
    need(compiler, package=PACKAGES[compiler])
    outcome = run([str(built(compiler, flags, ARCHITECTURE))])
    assert outcome.pop("chosen") == bitnet_ops.supported_isas()[0]
    assert outcome.pop("signature") == DECODER_SIGNATURE
    assert outcome.keys() == set(bitnet_ops.known_isas())
    for name in bitnet_ops.supported_isas():
        assert "comparisons, 0 differences" in outcome[name]
    if "avx512_vnni" in bitnet_ops.supported_isas():
        assert "comparisons, 0 differences" in outcome["avx_vnni"]  # natively or in the other encoding


@pytest.mark.skipif(ARCHITECTURE == "aarch64", reason="this CPU runs the NEON kernels itself")
@pytest.mark.parametrize(
    ("flags", "cpu"), [*(("optimised", cpu) for cpu in EMULATED_CPUS), ("sanitized", "max")]
)
def test_every_neon_kernel_equals_scalar(
    flags: str, cpu: str, built: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = need("aarch64-linux-gnu-g++", package="g++-aarch64-linux-gnu")
    emulator = need("qemu-aarch64-static", "qemu-aarch64", package="qemu-user-static")
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # its leak detector needs ptrace, QEMU has none
    libraries = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler has them
    outcome = run([emulator, "-cpu", cpu, "-L", libraries, str(built(compiler, flags, "aarch64"))])
    assert outcome.pop("chosen") == EMULATED_CPUS[cpu][0]
    assert outcome.pop("signature") == DECODER_SIGNATURE
    assert outcome.keys() == NEON_ISAS
    for name in NEON_ISAS:
        expected = "comparisons, 0 differences" if name in EMULATED_CPUS[cpu] else "not supported by this CPU"
        assert expected in outcome[name]
