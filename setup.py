"""Builds the one extension, bitnet_ops._C; all metadata is in pyproject.toml.

The extension stands on CPython's limited API and on libtorch's stable ABI, so one wheel serves every
CPython >= 3.10 and every torch >= 2.10. No flag depends on the machine that builds: kernel files raise
their own target (docs/architecture.md), and the CPU is asked at run time.
"""

import os
import platform
from pathlib import Path

from setuptools import setup

MINIMUM_TORCH = (2, 10)
STABLE_ABI_VERSION = "0x020a000000000000"  # torch 2.10: the oldest libtorch that the wheel may meet

# Python's own flags may say -g: 15 MB of symbols that nobody reads. CFLAGS=-g asks for them, for perf or gdb.
DEBUGGING = "-g" if "-g" in os.environ.get("CFLAGS", "").split() else "-g0"

FOLDERS = ("ops", "run", "layouts")
PLATFORM = ("cpu_features.cpp", f"{platform.system().lower()}.cpp")
KERNELS = {"x86_64": ("scalar", "avx"), "aarch64": ("scalar", "neon")}  # beginnings of file names
ARCHITECTURE_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


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


def extension(CppExtension):
    machine = platform.machine().lower()
    architecture = ARCHITECTURE_ALIASES.get(machine, machine)
    root = Path(__file__).parent

    def files(pattern):
        return sorted(path.relative_to(root).as_posix() for path in (root / "csrc").glob(pattern))

    return CppExtension(
        "bitnet_ops._C",
        [
            *(file for folder in FOLDERS for file in files(f"{folder}/*.cpp")),
            *(file for name in PLATFORM for file in files(f"platform/{name}")),
            *(
                file
                for name in KERNELS.get(architecture, ("scalar",))
                for file in files(f"kernels/{name}*.cpp")
            ),
        ],
        # Headers are no objects of their own; named here, a change to one rebuilds.
        depends=files("**/*.h"),
        extra_compile_args=[
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
        ],
        include_dirs=[str(root / "csrc")],
        py_limited_api=True,
    )


os.environ.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
BuildExtension, CppExtension = torch_build_tools()
setup(
    ext_modules=[extension(CppExtension)],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
