"""Builds the one extension, bitnet_ops._C; all metadata is in pyproject.toml.

The extension stands on CPython's limited API and on libtorch's stable ABI, so one wheel serves every
CPython >= 3.10 and every torch >= 2.10. No flag depends on the machine that builds: kernel files raise
their own target (docs/architecture.md), and the CPU is asked at run time.
"""

import os
import platform
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

# Pythons without a global lock have no limited API (3.13, 3.14): a wheel for each version of them.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

MINIMUM_TORCH = (2, 10)
STABLE_ABI_VERSION = "0x020a000000000000"  # torch 2.10: the oldest libtorch that the wheel may meet

# Python's own flags may say -g: 15 MB of symbols that nobody reads. CFLAGS=-g asks for them, for perf or gdb.
DEBUGGING = "-g" if "-g" in os.environ.get("CFLAGS", "").split() else "-g0"

PLATFORM_FILES = {  # of csrc/platform, by platform.system()
    "Linux": ("cpu_features", "posix", "linux", "sleep_by_futex"),
    "Darwin": ("cpu_features", "posix", "macos", "sleep_by_condition"),
    "Windows": ("cpu_features", "windows"),
}
KERNELS = {"x86_64": ("scalar", "avx", "amx"), "aarch64": ("scalar", "neon")}  # beginnings of file names
ARCHITECTURE_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}

# On top of these come torch's own. Also what tests/cross/build.py compiles with.
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    DEBUGGING,
    "-fno-math-errno",  # sqrt is one instruction; nothing reads errno
    "-fno-trapping-math",  # nor floating-point flags: both sides of a choice may be computed
    "-ffp-contract=off",  # an FMA only where the source says so: docs/numerics.md
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12's own AVX-512 headers, hundreds of lines of it
    "-Wno-maybe-uninitialized",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI_VERSION}",
]


def torch_build_tools():
    """Imports torch's extension builder, or says what is missing."""
    wanted = ".".join(map(str, MINIMUM_TORCH))
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"bitnet_ops is built against PyTorch >= {wanted}, which this environment lacks ({error}). "
            "Run `pip install .` with build isolation (it brings its own PyTorch), or install torch first "
            "and run `pip install . --no-build-isolation`."
        ) from error
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        raise SystemExit(f"bitnet_ops is built against PyTorch >= {wanted}; found {torch.__version__}.")
    return BuildExtension, CppExtension


def files(pattern):
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def torch_free_sources(system=None, machine=None):
    """The files that know neither torch nor Python, for a system and machine as `platform` names them."""
    machine = (machine or platform.machine()).lower()
    kernels = KERNELS.get(ARCHITECTURE_ALIASES.get(machine, machine), ("scalar",))
    return [
        *files("run/*.cpp"),
        *files("layouts/*.cpp"),
        *(f"csrc/platform/{name}.cpp" for name in PLATFORM_FILES[system or platform.system()]),
        *(file for name in kernels for file in files(f"kernels/{name}*.cpp")),
    ]


def extension(CppExtension):
    return CppExtension(
        "bitnet_ops._C",
        [*files("ops/*.cpp"), *torch_free_sources()],
        # Headers are no objects of their own; named here, a change to one rebuilds.
        depends=files("**/*.h"),
        extra_compile_args=COMPILE_FLAGS,
        include_dirs=[str(ROOT / "csrc")],
        py_limited_api=LIMITED_API,
    )


def main():
    os.environ.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
    BuildExtension, CppExtension = torch_build_tools()
    setup(
        ext_modules=[extension(CppExtension)],
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
    )


if __name__ == "__main__":
    main()
