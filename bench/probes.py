"""What the machine can do at best, measured in the same run as what is compared with it."""

import os
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path

MEGABYTES = 512
"""Size of the buffer that is read: many times the last-level cache of any common CPU."""

REPEATS = 5


@cache
def _program() -> Path:
    """Compiles the probe once per process; it is too small to be worth keeping."""
    program = Path(tempfile.mkdtemp(prefix="bitnet-probe-")) / "read_bandwidth"
    source = Path(__file__).with_name("read_bandwidth.cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++17", "-O3", "-pthread", source, "-o", program], check=True)
    return program


def read_bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads together read from memory: the median of some repeats."""
    command = [_program(), str(threads), str(MEGABYTES), str(REPEATS)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return statistics.median(float(line) for line in run.stdout.split()) * 1e9
