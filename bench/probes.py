"""What the machine can do at best, measured in the same run as what is compared with it.

A shared machine's speed moves from minute to minute, so one call is one short measurement (some 10 ms): take
it right beside what it is compared with, as measure.py does, or take the median of several.
"""

import ctypes
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = (
    "read_bandwidth.cpp",
    "multiply_rate.cpp",
    "region_cost.cpp",
    CSRC / "run/thread_pool.cpp",
    CSRC / "platform/posix.cpp",
    CSRC / "platform/linux.cpp",
    CSRC / "platform/sleep_by_futex.cpp",
)

INSTRUCTIONS = {
    "amx_int8": "tdpbsud",
    "avx512_vbmi": "vpdpbusd zmm",
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
    flags = ["-std=c++17", "-O3", cpu, "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", f"-I{CSRC}"]
    with tempfile.TemporaryDirectory(prefix="bitnet-probes-") as folder:
        path = Path(folder) / "probes.so"
        sources = [here / name for name in SOURCES]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-o", path], check=True)
        library = ctypes.CDLL(str(path))
    cpus = ctypes.POINTER(ctypes.c_int)
    library.read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int, cpus]
    library.read_bandwidth.restype = ctypes.c_double
    library.multiply_rate.argtypes = [ctypes.c_char_p, ctypes.c_int, cpus]
    library.multiply_rate.restype = ctypes.c_double
    library.region_seconds.argtypes = [
        ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_double, ctypes.c_bool,
    ]  # fmt: skip
    library.region_seconds.restype = ctypes.c_double
    return library


@cache
def _cpus(threads: int) -> ctypes.Array[ctypes.c_int]:
    """One CPU for each thread: the first of every core, and the cores' others only once these run out."""

    def place_in_core(cpu: int) -> int:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        numbers = [int(n) for n in re.findall(r"\d+", siblings.read_text())] if siblings.exists() else []
        return numbers.index(cpu) if cpu in numbers else 0

    allowed = sorted(os.sched_getaffinity(0), key=lambda cpu: (place_in_core(cpu), cpu))
    return (ctypes.c_int * threads)(*(allowed[t % len(allowed)] for t in range(threads)))


@cache
def _fastest_variant(threads: int) -> int:
    """Which way of reading gets most out of this machine: the best median, the variants taking turns."""
    library = _library()
    _wait_for_idle_cores(threads)
    cpus = _cpus(threads)
    variants = range(library.read_variants())
    rates = [[library.read_bandwidth(v, threads, cpus) for v in variants] for _ in range(VARIANT_REPEATS)]
    return max(variants, key=lambda v: statistics.median(turn[v] for turn in rates))


def _wait_for_idle_cores(threads: int) -> None:
    """Waits until this process rests: workers of torch's pool spin on for some 10 ms after their last work.

    A probe thread that shares its core with one of them gets half of it, and the limit comes out too low.
    """
    while threads > 1:
        before = time.process_time()
        time.sleep(0.01)  # the clock of a process advances with the kernel's tick, at 100 Hz or more
        if time.process_time() - before < 0.001:
            return


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads together read from memory."""
    variant = _fastest_variant(threads)
    _wait_for_idle_cores(threads)
    return _library().read_bandwidth(variant, threads, _cpus(threads))


def multiply_rate(instruction: str, threads: int) -> float | None:
    """Multiplications per second of ``threads`` threads that do nothing else.

    Returns:
        None where this CPU has no such instruction.
    """
    _wait_for_idle_cores(threads)
    return _library().multiply_rate(instruction.encode(), threads, _cpus(threads)) or None


def region_seconds(threads: int, rounds: int, parts: int, gap_seconds: float, asleep: bool) -> float:
    """Seconds of one parallel region of csrc/run/thread_pool.cpp, and nothing of PyTorch.

    Args:
        threads: at most so many take part.
        rounds: of work that only computes.
        parts: that it is cut into.
        gap_seconds: what the caller waits before.
        asleep: whether it sleeps meanwhile, or computes.
    """
    return _library().region_seconds(threads, rounds, parts, gap_seconds, asleep)
