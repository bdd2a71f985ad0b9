#!/usr/bin/env python3
"""Builds and checks the wheels of a release, for every system, on one Linux machine.

    pip install torch==2.13.0 -e ".[release]" --no-build-isolation
    .ci/wheels.py dist                    all of them
    .ci/wheels.py dist linux-x86_64       one

The extension is compiled by zig (tests/cross/build.py); the rest of a wheel is the same everywhere. Who has
machines of each system can use cibuildwheel: pyproject.toml has its settings, .github/workflows/release.yml
runs it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cross.build import TARGETS, Target, build_extension  # noqa: E402
from cross.checks import check_extension  # noqa: E402


def pure_wheel(folder: Path) -> Path:
    """A wheel of everything but the extension."""
    source = folder / "source"
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    shutil.copytree(ROOT / "bitnet_ops", source / "bitnet_ops", ignore=built)
    for name in ("pyproject.toml", "README.md"):  # not setup.py, which would compile
        shutil.copyfile(ROOT / name, source / name)
    for path in ROOT.glob("LICENSE*"):
        shutil.copyfile(path, source / path.name)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "bdist_wheel"]
    subprocess.run([*build, "--dist-dir", str(folder / "pure")], cwd=source, check=True)
    return next((folder / "pure").glob("*.whl"))


def add_extension(pure: Path, extension: Path, target: Target, folder: Path, out: Path) -> Path:
    """The wheel of one system."""
    subprocess.run([sys.executable, "-m", "wheel", "unpack", "--dest", str(folder), str(pure)], check=True)
    tree = next(path for path in folder.glob("bitnet_ops-*") if path.is_dir())
    shutil.copyfile(extension, tree / "bitnet_ops" / extension.name)
    about = next(tree.glob("*.dist-info/WHEEL"))
    text = about.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    about.write_text(text.replace("Tag: py3-none-any", f"Tag: cp310-abi3-{target.wheel}"))
    subprocess.run([sys.executable, "-m", "wheel", "pack", "--dest-dir", str(out), str(tree)], check=True)
    return next(out.glob(f"*-cp310-abi3-{target.wheel}.whl"))


def build_wheel(name: str, out: Path, downloads: Path) -> Path:
    """Builds and checks the wheel for one of TARGETS.

    Raises:
        ValueError: it is not what a release promises.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "tree").mkdir()
        extension = build_extension(TARGETS[name], folder, downloads)
        check_extension(extension, TARGETS[name])
        return add_extension(pure_wheel(folder), extension, TARGETS[name], folder / "tree", out)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description="Builds and checks the wheels of a release.")
    parser.add_argument("out", type=Path, help="folder for the wheels")
    parser.add_argument(
        "names", nargs="*", metavar="SYSTEM", help=f"of {', '.join(TARGETS)}; all if none is named"
    )
    parser.add_argument("--downloads", type=Path, help="folder that keeps PyTorch's wheels")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for name in arguments.names or TARGETS:
            print(build_wheel(name, arguments.out, arguments.downloads or Path(place)))


if __name__ == "__main__":
    main()
