"""Builds the extension, and the C++ tests, for other systems with zig's clang (PyPI's `ziglang`).

Zig brings the headers and C libraries of these systems. What of PyTorch is linked against comes from its own
wheel for the system; of Python's library the names are enough. Zig keeps what it has compiled in its cache.
At most MAX_JOBS files are compiled at once, as in setup.py. Used by tests/test_cross.py,
tests/test_wheels.py and .ci/wheels.py.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cross.mach_o import keep_names_local
from sources import ROOT, setup_py

TORCH = "2.13.0"
"""Whose wheels are linked against. The extension asks for no more than 2.10 has (setup.py)."""


@dataclass(frozen=True)
class Target:
    """A system, an architecture, and how others call them."""

    zig: str
    system: str
    """As `platform.system()` has it there."""
    machine: str
    wheel: str
    """The platform's tag in names of wheels."""
    torch_files: tuple[str, ...]
    """Of torch/lib, to link against."""
    extension: str = "_C.abi3.so"
    suffix: str = ""
    """Of programs."""


TORCH_ON_LINUX = ("libc10.so", "libtorch.so", "libtorch_cpu.so")

TARGETS = {
    "linux-x86_64": Target(
        "x86_64-linux-gnu.2.28", "Linux", "x86_64", "manylinux_2_28_x86_64", TORCH_ON_LINUX
    ),
    "linux-aarch64": Target(
        "aarch64-linux-gnu.2.28", "Linux", "aarch64", "manylinux_2_28_aarch64", TORCH_ON_LINUX
    ),
    "macos-arm64": Target(
        "aarch64-macos.14.0",
        "Darwin",
        "arm64",
        "macosx_14_0_arm64",
        ("libc10.dylib", "libtorch.dylib", "libtorch_cpu.dylib"),
    ),
    "windows-x86_64": Target(
        "x86_64-windows-gnu", "Windows", "AMD64", "win_amd64", ("c10.lib", "torch_cpu.lib"), "_C.pyd", ".exe"
    ),
}

# What Python's limited API asks of its configuration. The host's own may be that of another system.
PYCONFIG = """
#include <stddef.h>
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_LONG_LONG 8
#define SIZEOF_WCHAR_T __SIZEOF_WCHAR_T__
#define SIZEOF_INT 4
#define SIZEOF_SHORT 2
#define ALIGNOF_SIZE_T 8
#ifndef __APPLE__  // where pymacconfig.h says it
#define SIZEOF_LONG __SIZEOF_LONG__
#define ALIGNOF_LONG __SIZEOF_LONG__
#endif
#define HAVE_STDINT_H 1
#define HAVE_INTTYPES_H 1
#define HAVE_WCHAR_H 1
#if defined(_WIN32)
#define MS_WINDOWS 1
#define MS_WIN64 1
#define HAVE_DECLSPEC_DLL 1
#define Py_ENABLE_SHARED 1
typedef ptrdiff_t Py_ssize_t;
#else
#define HAVE_SSIZE_T 1
#define HAVE_UNISTD_H 1
#endif
"""


def run_python(*arguments: str | Path, folder: Path | None = None) -> None:
    """Runs this Python.

    Raises:
        RuntimeError: with what it wrote, where it failed.
    """
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-6000:]}")


def zig(*arguments: str | Path) -> None:
    """Runs zig."""
    run_python("-m", "ziglang", *arguments)


def compile_all(target: Target, sources: list[str], flags: list[str], objects: Path) -> list[Path]:
    """Compiles files, named from the root, and returns the objects. Those that are there already are kept."""
    named = {source: objects / f"{source.replace('/', '-')}.o" for source in sources}
    objects.mkdir(parents=True, exist_ok=True)
    fixed = [
        "-target",
        target.zig,
        "-fPIC",
        *setup_py().COMPILE_FLAGS,
        "-Wno-unknown-warning-option",
        "-Werror",
    ]

    def one(source: str) -> None:
        zig("c++", *fixed, f"-I{ROOT / 'csrc'}", *flags, "-c", ROOT / source, "-o", named[source])

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        missing = [source for source in sources if not named[source].exists()]
        list(pool.map(one, sorted(missing, key=lambda source: -(ROOT / source).stat().st_size)))
    return list(named.values())


def build_program(target: Target, sources: list[str], folder: Path, name: str) -> Path:
    """Builds a program of files that need neither torch nor Python."""
    program = folder / f"{name}{target.suffix}"
    objects = compile_all(target, sources, [], folder / "objects")
    zig("c++", "-target", target.zig, *objects, *system_libraries(target), "-o", program)
    return program


def build_kernel_test(target: Target, folder: Path) -> Path:
    """Builds the program of tests/kernels, of the same objects as the extension."""
    tests = [file.relative_to(ROOT).as_posix() for file in (ROOT / "tests/kernels").glob("*.cpp")]
    sources = [*tests, *setup_py().torch_free_sources(target.system, target.machine)]
    return build_program(target, sources, folder, "kernel_test")


def build_extension(
    target: Target, folder: Path, downloads: Path, module: str = "_C", defines: tuple[str, ...] = ()
) -> Path:
    """Builds the extension for a target.

    Args:
        target: the system.
        folder: for what is made.
        downloads: keeps PyTorch's wheels.
        module: what Python calls it.
        defines: more flags for the files that know torch.

    Returns:
        The extension. What it leaves unresolved is for the system to find: see `unresolved`.
    """
    python, torch = python_headers(folder), torch_headers()
    headers = [f"-isystem{torch}", f"-isystem{torch / 'torch/csrc/api/include'}", f"-I{python}"]
    defines = ("-DPy_LIMITED_API=0x030A0000", f"-DTORCH_EXTENSION_NAME={module}", *defines)
    setup = setup_py()
    objects = [
        *compile_all(target, setup.files("ops/*.cpp"), [*headers, *defines], folder / "objects"),
        *compile_all(target, setup.torch_free_sources(target.system, target.machine), [], folder / "objects"),
    ]
    extension = folder / target.extension.replace("_C", module, 1)
    libraries = torch_libraries(target, folder, downloads)
    link = ["-shared", *objects, *libraries, *system_libraries(target), *python_library(target, folder)]
    strip = ["-s"]
    if target.system == "Darwin":
        strip = []  # it would take the names of what is imported, too, which tests read
        link += ["-Wl,-undefined,dynamic_lookup", f"-Wl,-install_name,@rpath/{extension.name}"]
    zig("c++", "-target", target.zig, *strip, *link, "-o", extension)
    if target.system == "Darwin":
        keep_names_local(extension)
    return extension


def system_libraries(target: Target) -> list[str]:
    """Flags for what csrc/platform needs."""
    return {"Windows": ["-lapi-ms-win-core-synch-l1-2-0"], "Linux": ["-pthread"]}.get(target.system, [])


def python_headers(folder: Path) -> Path:
    """A copy of this Python's headers with a configuration that suits every target."""
    headers = folder / "python"
    shutil.copytree(sysconfig.get_paths()["include"], headers, dirs_exist_ok=True)
    (headers / "pyconfig.h").write_text(PYCONFIG)
    return headers


def python_library(target: Target, folder: Path) -> list[Path]:
    """On Windows an import library for python3.dll, with the names of the stable ABI of Python 3.10."""
    if target.system != "Windows":
        return []
    from abi3info import DATAS, FUNCTIONS

    def names(symbols: dict) -> list[str]:
        return sorted(s.name for s, of in symbols.items() if (of.added.major, of.added.minor) <= (3, 10))

    lines = ["LIBRARY python3.dll", "EXPORTS", *names(FUNCTIONS), *(f"{name} DATA" for name in names(DATAS))]
    definition, library = folder / "python3.def", folder / "python3.lib"
    definition.write_text("\n".join(lines) + "\n")
    zig("dlltool", "-m", "i386:x86-64", "-d", definition, "-l", library)
    return [library]


def torch_headers() -> Path:
    """The installed PyTorch's: those of the stable ABI are the same on every system."""
    import torch

    return Path(torch.__file__).parent / "include"


def torch_libraries(target: Target, folder: Path, downloads: Path) -> list[str | Path]:
    """What to name for the linker."""
    libraries = folder / "torch"
    libraries.mkdir(exist_ok=True)
    paths = [libraries / name for name in target.torch_files]
    if target.system == "Linux":
        # Wheels for ARM64 have gigabytes of CUDA beside them. Libraries of the same names without any content
        # are enough: ELF leaves it to the loader which of them has a symbol.
        (libraries / "empty.c").write_text("")
        for path in paths:
            command = ["cc", "-target", target.zig, "-shared", f"-Wl,-soname,{path.name}"]
            zig(*command, libraries / "empty.c", "-o", path)
        return ["-Wl,--no-as-needed", *paths, "-Wl,-z,undefs", "-Wl,--as-needed"]
    with zipfile.ZipFile(torch_wheel(target, downloads)) as wheel:
        for path in paths:
            if not path.exists():
                with wheel.open(f"torch/lib/{path.name}") as packed, path.open("wb") as file:
                    shutil.copyfileobj(packed, file)
    return list(paths)


def torch_wheel(target: Target, downloads: Path) -> Path:
    """PyTorch's wheel for a target, from PyPI, once."""
    found = sorted(downloads.glob(f"torch-{TORCH}-*-{target.wheel}.whl"))
    if not found:
        where = ["--platform", target.wheel, "--python-version", "3.11", "--only-binary=:all:"]
        run_python(
            "-m", "pip", "download", "--quiet", "--no-deps", *where, "-d", downloads, f"torch=={TORCH}"
        )
        found = sorted(downloads.glob(f"torch-{TORCH}-*-{target.wheel}.whl"))
    return found[0]
