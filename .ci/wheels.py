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
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cross.build import TARGETS, Target, build_extension, run_python  # noqa: E402
from cross.checks import check_extension, check_wheel, model_bytes  # noqa: E402


def pure_wheel(folder: Path) -> Path:
    """A wheel of everything but the extension."""
    source = folder / "source"
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    shutil.copytree(ROOT / "bitnet_ops", source / "bitnet_ops", ignore=built)
    for name in ("pyproject.toml", "README.md"):  # not setup.py, which would compile
        shutil.copyfile(ROOT / name, source / name)
    for path in ROOT.glob("LICENSE*"):
        shutil.copyfile(path, source / path.name)
    build = ["-c", "import setuptools; setuptools.setup()", "-q", "bdist_wheel"]
    run_python(*build, "--dist-dir", folder / "pure", folder=source)
    return next((folder / "pure").glob("*.whl"))


def add_extension(pure: Path, extension: Path, target: Target, folder: Path, out: Path) -> Path:
    """The wheel of one system."""
    run_python("-m", "wheel", "unpack", "--dest", folder, pure)
    tree = next(path for path in folder.glob("bitnet_ops-*") if path.is_dir())
    shutil.copyfile(extension, tree / "bitnet_ops" / extension.name)
    about = next(tree.glob("*.dist-info/WHEEL"))
    text = about.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    about.write_text(text.replace("Tag: py3-none-any", f"Tag: cp310-abi3-{target.wheel}"))
    run_python("-m", "wheel", "pack", "--dest-dir", out, tree)
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
        wheel = add_extension(pure_wheel(folder), extension, TARGETS[name], folder / "tree", out)
        check_wheel(wheel, TARGETS[name])
        return wheel


def sizes(wheel: Path) -> str:
    """In bytes, for the log of a release."""
    with zipfile.ZipFile(wheel) as archive:
        files = {file.filename: file.compress_size for file in archive.infolist()}
        extension = next(f for f in archive.infolist() if f.filename.endswith((".so", ".pyd")))
    return (
        f"{wheel.name}: {wheel.stat().st_size} bytes, {model_bytes(files)} of them the default model, "
        f"{extension.compress_size} the extension, which has {extension.file_size}"
    )


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description="Builds and checks the wheels of a release.")
    parser.add_argument("out", type=Path, help="folder for the wheels")
    parser.add_argument(
        "names", nargs="*", metavar="SYSTEM", help=f"of {', '.join(TARGETS)}; all if none is named"
    )
    parser.add_argument(
        "--downloads",
        type=Path,
        default=os.environ.get("BITNET_OPS_DOWNLOADS"),
        help="folder that keeps PyTorch's wheels; or the environment variable BITNET_OPS_DOWNLOADS",
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for name in arguments.names or TARGETS:
            print(sizes(build_wheel(name, arguments.out, arguments.downloads or Path(place))))


if __name__ == "__main__":
    main()
