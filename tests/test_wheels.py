"""The wheels of a release for every system, as .ci/wheels.py builds and checks them; this machine's one runs.

Zig keeps what it has compiled; with an empty cache it takes seven minutes of one core's time. For macOS and
Windows PyTorch's wheels, 110 MB each, come from PyPI, unless the environment variable BITNET_OPS_DOWNLOADS
names a folder that has them.
"""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from cross.build import TARGETS, build_kernel_test, zig
from cross.checks import check_extension, check_wheel
from cross.mach_o import broken_pages
from sources import ROOT
from test_kernels import DECODER_SIGNATURE, EMULATED_CPUS
from tools import need, need_package

import bitnet_ops

pytestmark = pytest.mark.slow

HANGS_AFTER = 900
"""Seconds."""

Wheels = Callable[[str], Path]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Builds the wheel for one of TARGETS, each only once."""
    for name in ("ziglang", "lief", "torch_abi_audit", "abi3info", "wheel"):
        need_package(name)

    @cache
    def build(name: str) -> Path:
        out = tmp_path_factory.mktemp(name)
        command = [sys.executable, ROOT / ".ci/wheels.py", out, name]
        built = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER)
        assert built.returncode == 0, built.stderr[-6000:]
        [wheel] = out.glob("*.whl")
        assert built.stdout.startswith(f"{wheel.name}: {wheel.stat().st_size} bytes")
        return wheel

    return build


def extension_of(wheel: Path, name: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"bitnet_ops/{TARGETS[name].extension}", folder))


@pytest.mark.parametrize("name", TARGETS)
def test_a_wheel_is_what_a_release_promises(name: str, wheels: Wheels, tmp_path: Path) -> None:
    """The program has checked it; here the same checks find what is put wrong."""
    wheel, target = wheels(name), TARGETS[name]
    check_wheel(wheel, target)
    extension = extension_of(wheel, name, tmp_path)
    check_extension(extension, target)

    unlike = next(other for other in TARGETS.values() if other.wheel != target.wheel)
    with pytest.raises(ValueError, match=f"is not called cp310-abi3-{unlike.wheel}"):
        check_wheel(wheel, unlike)
    damaged = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as part:
        for file in whole.namelist():
            if file != "bitnet_ops/py.typed":
                part.writestr(file, whole.read(file) + (b"#" if file == "bitnet_ops/isa.py" else b""))
    message = r": files: \['bitnet_ops/py.typed'\]; bitnet_ops/isa.py is not what RECORD says$"
    with pytest.raises(ValueError, match=message):
        check_wheel(damaged, target)
    if target.system == "Darwin":
        data = bytearray(extension.read_bytes())
        data[20_000] ^= 1
        extension.write_bytes(data)
        assert broken_pages(extension) == [20_000 // 16384]
        with pytest.raises(ValueError, match=r"pages \[1\] are not as they were signed"):
            check_extension(extension, target)


CALLS = "int {0}(); int f() {{ return {0}(); }}"


@pytest.mark.parametrize(
    ("code", "flags", "message"),
    [
        ("", ["-lgomp"], r"linked against \['libgomp.so.1'\]"),
        (CALLS.format("_ZN2at5emptyEv"), [], "outside libtorch's stable ABI"),
        (CALLS.format("torch_of_some_day"), [], "outside libtorch's stable ABI"),
        (CALLS.format("_PyErr_Occurred"), [], "outside Python's stable ABI"),
        ('int f() __asm__("fmod@GLIBC_2.38"); int g() { return f(); }', ["-lm"], "needs glibc"),
        ("char much[3000000] = {1};", [], "or more"),
    ],
    ids=["OpenMP", "C++ of libtorch", "later torch", "inside Python", "later glibc", "large"],
)
def test_what_a_release_must_not_have_is_found(
    code: str, flags: list[str], message: str, tmp_path: Path
) -> None:
    for name in ("ziglang", "lief", "torch_abi_audit"):
        need_package(name)
    target = TARGETS["linux-x86_64"]
    (tmp_path / "code.c").write_text(code + "\nvoid PyInit__C() {}\n")
    (tmp_path / "empty.c").write_text("")
    for_target = ["-target", target.zig.replace(".2.28", ".2.41"), "-shared"]
    openmp = tmp_path / "libgomp.so"
    zig("cc", *for_target, "-Wl,-soname,libgomp.so.1", tmp_path / "empty.c", "-o", openmp)
    extension = tmp_path / target.extension
    link = ["-Wl,--no-as-needed", "-Wl,-z,undefs", f"-L{tmp_path}", *flags]
    zig("cc", *for_target, tmp_path / "code.c", *link, "-o", extension)
    with pytest.raises(ValueError, match=message):
        check_extension(extension, target)


@pytest.fixture(scope="module")
def installed(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """This machine's wheel in a folder of its own: the environment of a program that finds it there."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if (name := f"{platform.system().lower()}-{machine}") not in TARGETS or platform.system() != "Linux":
        pytest.skip("wheels are built on Linux")
    folder = tmp_path_factory.mktemp("installed")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheels(name)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def generated_by(python: str, installed: dict[str, str], folder: Path) -> str:
    """What the default model of the installed wheel writes."""
    command = Path(installed["PYTHONPATH"]) / "bin/bitnet-ops"
    generate = [command, "generate", "--temperature", "0", "--max-new-tokens", "40", "Mr. Darcy"]
    result = subprocess.run(
        [python, *generate], env=installed, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{python}: {result.stderr[-4000:]}"
    return result.stdout


def test_the_installed_wheel_runs_the_default_model(installed: dict[str, str], tmp_path: Path) -> None:
    """Clang made it, and GCC what this process has."""
    where = subprocess.run(
        [sys.executable, "-c", "import bitnet_ops; print(bitnet_ops.__file__, *bitnet_ops.supported_isas())"],
        env=installed, cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert Path(where[0]).is_relative_to(installed["PYTHONPATH"])
    assert tuple(where[1:]) == bitnet_ops.supported_isas()
    text = generated_by(sys.executable, installed, tmp_path)
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    prompt = torch.tensor([model.tokenizer.encode("Mr. Darcy").ids])
    ids = model.generate(prompt, max_new_tokens=40, do_sample=False)
    assert text.strip() == model.tokenizer.decode(ids[0].tolist()).strip()


def test_the_same_wheel_in_other_pythons(installed: dict[str, str], tmp_path: Path) -> None:
    """It is for CPython 3.10 and later. Those that the variable names have what the wheel needs."""
    pythons = list(filter(None, os.environ.get("BITNET_OPS_PYTHONS", "").split(os.pathsep)))
    if not pythons:
        pytest.skip("BITNET_OPS_PYTHONS names no other Python (docs/development.md)")
    expected = generated_by(sys.executable, installed, tmp_path)
    for python in pythons:
        assert generated_by(python, installed, tmp_path) == expected, python


def test_the_installed_wheel_computes_the_same_bits(installed: dict[str, str], tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    for path in (ROOT / "tests").glob("*.py"):  # conftest.py imports some
        shutil.copyfile(path, tests / path.name)
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        tests / "test_signature.py",
    ]
    result = subprocess.run(run, env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:]


def test_the_kernels_of_the_wheel_for_arm64(tmp_path: Path) -> None:
    """Compiled as for the wheel, and run by QEMU."""
    need_package("ziglang")
    emulator = need("qemu-aarch64-static", "qemu-aarch64", package="qemu-user-static")
    need("aarch64-linux-gnu-g++", package="g++-aarch64-linux-gnu")  # for its C library
    target = TARGETS["linux-aarch64"]
    result = subprocess.run(
        [emulator, "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", build_kernel_test(target, tmp_path)],
        capture_output=True, text=True, timeout=HANGS_AFTER,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    outcome = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert outcome.pop("signature") == DECODER_SIGNATURE
    assert outcome.pop("chosen") == EMULATED_CPUS["max"][0]
    assert all("comparisons, 0 differences" in outcome[name] for name in EMULATED_CPUS["max"])
