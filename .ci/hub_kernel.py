#!/usr/bin/env python3
"""Writes the operators and layers of bitnet_ops as a kernel for the Hugging Face hub. It uploads nothing.

    pip install torch==2.13.0 setuptools ninja
    .ci/hub_kernel.py OUT                     the sources, and a build for this machine by its own compiler
    .ci/hub_kernel.py OUT linux-x86_64 ...    builds for these systems, by zig as those of .ci/wheels.py

OUT is then what a repository of kind "kernel" holds, and also what kernel-builder builds from:

    build.toml flake.nix CARD.md LICENSE      for kernel-builder
    csrc/                                     the C++ sources; what is of one system only says so itself
    torch-ext/bitnet_ops/                     the Python sources
    build/torch-stable-abi210-cpu-.../        what `kernels` loads: one folder for a system

    kernels.get_local_kernel(Path("OUT"))     loads it
    hf upload OWNER/bitnet-ops OUT --repo-type kernel --revision v0        publishes it, by hand

The Python sources are those of bitnet_ops that .ci/hub_kernel/ imports, and these. A build has a name of its
own, made of a digest of all sources, which is also the namespace of its operators: two versions, and an
installed bitnet_ops, run in one process. Errors are called bitnet_ops in all of them.
"""

import argparse
import ast
import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cross.build import TARGETS, build_extension  # noqa: E402
from cross.checks import check_extension  # noqa: E402
from sources import setup_py  # noqa: E402

SETUP = setup_py()
PACKAGE = ROOT / "bitnet_ops"
OVERLAY = ROOT / ".ci/hub_kernel"
NAME = "bitnet-ops"
"""Of the kernel. Python's is with an underscore."""
VERSION = 0
"""Of the interface, a whole number; 0 says that it may still change. Upload it as the branch v0."""
LICENSE = "MIT"
OLDEST_TORCH = ".".join(map(str, SETUP.MINIMUM_TORCH))
NAMESPACE_FLAG = "-DBITNET_OPS_NAMESPACE=TORCH_EXTENSION_NAME"
"""csrc/ops/library.cpp."""

SYSTEM_MACROS = {"Linux": "__linux__", "Darwin": "__APPLE__", "Windows": "_WIN32"}
MACHINE_MACROS = {"x86_64": "__x86_64__", "aarch64": "__aarch64__"}

OPS_PY = '''"""The operators of this build, and their namespace."""

import torch

from . import {name}  # noqa: F401  registers them

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name):
    """The full name of an operator, as torch.library takes it."""
    return f"{name}::{{op_name}}"
'''


class HubKernelError(Exception):
    """The sources cannot be a kernel."""


# ---- Python -----------------------------------------------------------------------------------------


def python_sources() -> dict[str, Path]:
    """The files of the package by their place in it: those of OVERLAY, and what they import.

    Raises:
        HubKernelError: something is imported that is not there on the hub.
    """
    found: dict[str, Path] = {}
    waiting = sorted(file.relative_to(OVERLAY).as_posix() for file in OVERLAY.rglob("*.py"))
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = OVERLAY / name if (OVERLAY / name).exists() else PACKAGE / name
        waiting += [other for other in imported_files(name, found[name]) if other not in found]
    return dict(sorted(found.items()))


def imported_files(name: str, file: Path) -> Iterator[str]:
    """The places of what a file imports, and of the packages they are in."""
    package = Path(name).parent
    for node in imports(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [(0, alias.name) for alias in node.names]
        else:
            modules = [(node.level, node.module or "")]
        for level, module in modules:
            if level == 0:
                first = module.split(".")[0]
                if first != "torch" and first not in sys.stdlib_module_names:
                    raise HubKernelError(
                        f"{file}:{node.lineno}: expected relative imports, the standard library or torch, "
                        f"got {module!r}"
                    )
                continue
            base = Path(*(".." for _ in range(level - 1)), *module.split("."))
            place = Path(os.path.normpath(package / base))
            named = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for candidate in (place, *(place / part for part in named)):
                yield from module_files(candidate)


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from imports(node)


def module_files(place: Path) -> Iterator[str]:
    """The file of a module and the __init__ of every package around it. Nothing where it is none."""
    for path in (Path(f"{place}.py"), place / "__init__.py"):
        name = path.as_posix()
        if name == "_ops.py":  # OPS_PY, or kernel-builder's, is there instead
            return
        if any((folder / name).exists() for folder in (OVERLAY, PACKAGE)):
            yield name
            for parent in path.parents:
                yield (parent / "__init__.py").as_posix()
            return


# ---- C++ --------------------------------------------------------------------------------------------


def conditions() -> dict[str, str]:
    """The condition of the preprocessor under which each torch-free file is wanted, "" for always."""
    wanted: dict[str, set[tuple[str, str]]] = {}
    everywhere = set(product(SYSTEM_MACROS, MACHINE_MACROS))
    for system, machine in everywhere:
        for name in SETUP.torch_free_sources(system, machine):
            wanted.setdefault(name, set()).add((system, machine))
    return {name: condition(places, everywhere) for name, places in sorted(wanted.items())}


def condition(places: set[tuple[str, str]], everywhere: set[tuple[str, str]]) -> str:
    """For one file."""
    parts = []
    for axis, macros in enumerate((SYSTEM_MACROS, MACHINE_MACROS)):
        some = {place[axis] for place in places}
        if some != {place[axis] for place in everywhere}:
            parts.append(" || ".join(f"defined({macros[one]})" for one in sorted(some)))
    return parts[0] if len(parts) == 1 else " && ".join(f"({part})" for part in parts)


def write_csrc(out: Path) -> tuple[list[str], list[str]]:
    """Copies the C++ sources, and returns the names of those that know torch and of the others."""
    only = conditions()
    headers = SETUP.files("**/*.h")
    of_torch = SETUP.files("ops/*.cpp")
    for name in (*headers, *of_torch, *only):
        text = (ROOT / name).read_text(encoding="utf-8")
        if only.get(name):
            text = f"#if {only[name]}  // .ci/hub_kernel.py: the builder compiles all files\n{text}#endif\n"
        write(out / name, text)
    in_ops = [name for name in headers if name.startswith("csrc/ops/")]
    others = [name for name in headers if name not in in_ops]
    return [*of_torch, *in_ops], [*only, *others]


def cxx_flags() -> list[str]:
    """Those of setup.py that change what is computed or how fast. The standard and the target are added."""
    return [flag for flag in SETUP.COMPILE_FLAGS if flag.startswith(("-f", "-O"))]


# ---- the sources for kernel-builder -------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Writes a file and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def toml(value: str | list[str]) -> str:
    """A value as build.toml has it; JSON's strings are TOML's."""
    if isinstance(value, str):
        return json.dumps(value)
    return "[\n" + "".join(f"    {json.dumps(item)},\n" for item in value) + "]"


def write_sources(out: Path, repo_id: str | None) -> list[str]:
    """Everything but build/. Returns the C++ files to compile."""
    for name, file in python_sources().items():
        write(out / "torch-ext/bitnet_ops" / name, file.read_text(encoding="utf-8"))
    for name in ("CARD.md", "flake.nix"):
        shutil.copyfile(OVERLAY / name, out / name)
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    of_torch, others = write_csrc(out)
    hub = f"\n[general.hub]\nrepo-id = {toml(repo_id)}\n" if repo_id else ""
    flags = cxx_flags()
    write(
        out / "build.toml",
        f"""[general]
name = {toml(NAME)}
version = {VERSION}
edition = 5
license = {toml(LICENSE)}
backends = ["cpu"]
{hub}
[torch]
include = ["csrc"]
cxx-flags = {toml([*flags, NAMESPACE_FLAG])}
src = {toml(of_torch)}

[torch.stable-abi]
cpu = {toml(OLDEST_TORCH)}

[kernel.bitnet_ops_cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {toml(flags)}
src = {toml(others)}
""",
    )
    return [name for name in (*of_torch, *others) if name.endswith(".cpp")]


def source_digest(out: Path) -> str:
    """Of all files but those of build/."""
    digest = hashlib.sha256()
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = file.relative_to(out).as_posix()
        if not name.startswith("build/"):
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


# ---- builds -------------------------------------------------------------------------------------------


def build_here(out: Path, sources: list[str], name: str, folder: Path) -> Path:
    """Compiles the copied sources with this machine's compiler, as kernel-builder would."""
    settings = folder / "settings.json"
    flags = [*cxx_flags(), *(flag for flag in SETUP.COMPILE_FLAGS if flag.startswith(("-std", "-g", "-D")))]
    settings.write_text(json.dumps({"name": name, "sources": sources, "flags": [*flags, NAMESPACE_FLAG]}))
    program = (
        "import json, sys; from pathlib import Path; from setuptools import setup\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from sources import setup_py\n"
        "tools, extension = setup_py().torch_build_tools()\n"
        f"settings = json.loads(Path({str(settings)!r}).read_text())\n"
        "setup(name='kernel', ext_modules=[extension(settings['name'], settings['sources'], include_dirs=["
        f"{str(out / 'csrc')!r}], extra_compile_args=settings['flags'], py_limited_api=True)],\n"
        "      cmdclass={'build_ext': tools.with_options(use_ninja=True)},\n"
        f"      script_args=['-q', 'build_ext', '-b', {str(folder)!r}, '-t', {str(folder / 'objects')!r}])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=out, capture_output=True, text=True)
    if result.returncode != 0:
        raise HubKernelError(f"the extension does not build:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    return next(path for path in folder.glob(f"{name}*") if path.suffix in (".so", ".pyd"))


def variant_name(system: str, machine: str) -> str:
    """As `kernels` looks for it."""
    machine = machine.lower()
    abi = OLDEST_TORCH.replace(".", "")
    return f"torch-stable-abi{abi}-cpu-{SETUP.ARCHITECTURE_ALIASES.get(machine, machine)}-{system.lower()}"


def write_variant(out: Path, variant: str, name: str, extension: Path) -> Path:
    """Puts a build together."""
    folder = out / "build" / variant
    shutil.copytree(out / "torch-ext/bitnet_ops", folder)
    write(folder / "_ops.py", OPS_PY.format(name=name))
    shutil.copyfile(extension, folder / extension.name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
    }
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    write(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    return folder


def write_hub_kernel(
    out: Path, systems: list[str], downloads: Path | None = None, repo_id: str | None = None
) -> list[Path]:
    """Writes a kernel into an empty folder.

    Args:
        out: the folder; made if it is not there.
        systems: of TARGETS, to build with zig; none for this machine, by its own compiler.
        downloads: a folder that keeps PyTorch's wheels, which builds for macOS and Windows link against.
        repo_id: for kernel-builder's upload.

    Returns:
        The folders of the builds.

    Raises:
        HubKernelError: the folder is not empty, an import is not there on the hub, or it does not build.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HubKernelError(f"{out}: expected an empty folder, or none")
    if unknown := set(systems) - set(TARGETS):
        raise HubKernelError(
            f"systems: expected some of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}"
        )
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    sources = write_sources(out, repo_id)
    name = f"_bitnet_ops_cpu_{source_digest(out)[:10]}"
    written = []
    with tempfile.TemporaryDirectory() as place:
        for system in systems:
            target, folder = TARGETS[system], Path(place) / system
            folder.mkdir()
            extension = build_extension(target, folder, downloads or Path(place), name, (NAMESPACE_FLAG,))
            check_extension(extension, target, name)
            written.append(write_variant(out, variant_name(target.system, target.machine), name, extension))
        if not systems:
            extension = build_here(out, sources, name, Path(place))
            variant = variant_name(platform.system(), platform.machine())
            written.append(write_variant(out, variant, name, extension))
    return written


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="an empty folder, or one to make")
    parser.add_argument(
        "systems", nargs="*", metavar="SYSTEM", help=f"of {', '.join(TARGETS)}; none: this machine"
    )
    parser.add_argument("--downloads", type=Path, help="folder that keeps PyTorch's wheels (macOS, Windows)")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="written into build.toml, for kernel-builder")
    arguments = parser.parse_args()
    try:
        written = write_hub_kernel(arguments.out, arguments.systems, arguments.downloads, arguments.repo_id)
    except HubKernelError as error:
        raise SystemExit(f"hub_kernel.py: {error}") from error
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
