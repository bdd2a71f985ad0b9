"""What the machine can do at best, measured in the same run as what is compared with it.

A shared machine's speed moves from minute to minute, so one call is one short measurement (some 10 ms): take
it right beside what it is compared with, as measure.py does, or take the median of several.
"""

import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = ("read_bandwidth.cpp", "multiply_rate.cpp")

INSTRUCTIONS = {
    "avx512_vnni": "vpdpbusd zmm",
    "avx_vnni": "vpdpbusd ymm",
    "avx2": "vpmaddubsw ymm",
    "neon_dotprod": "sdot",
    "neon_i8mm": "smmla",
}
"""The instruction an instruction set's ternary product stands on. For AVX2 the bare multiplication, although
no kernel can do without an addition too: what it costs is part of the distance to the limit."""

VARIANT_REPEATS = 5


@cache
def _library() -> ctypes.CDLL:
    """Compiles the probes for this very CPU, once per process; they are too small to be worth keeping."""
    here = Path(__file__).parent
    cpu = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = ["-std=c++17", "-O3", cpu, "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory(prefix="bitnet-probes-") as folder:
        path = Path(folder) / "probes.so"
        sources = [here / name for name in SOURCES]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-o", path], check=True)
        library = ctypes.CDLL(str(path))
    library.read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int]
    library.read_bandwidth.restype = ctypes.c_double
    library.multiply_rate.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.multiply_rate.restype = ctypes.c_double
    return library


@cache
def _fastest_variant(threads: int) -> int:
    """Which way of reading gets most out of this machine: the best median, the variants taking turns."""
    library = _library()
    variants = range(library.read_variants())
    rates = [[library.read_bandwidth(v, threads) for v in variants] for _ in range(VARIANT_REPEATS)]
    return max(variants, key=lambda v: statistics.median(turn[v] for turn in rates))


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads together read from memory."""
    return _library().read_bandwidth(_fastest_variant(threads), threads)


def multiply_rate(instruction: str, threads: int) -> float | None:
    """Multiplications per second of ``threads`` threads that do nothing else; None where there is no such
    instruction.
    """
    return _library().multiply_rate(instruction.encode(), threads) or None
