"""What an extension, and a wheel, for a release must and must not have, of whatever system it is."""

import base64
import csv
import hashlib
import zipfile
from email.parser import Parser
from pathlib import Path

from cross.binaries import exports, imports, parse
from cross.build import TORCH_ON_LINUX, Target
from cross.mach_o import broken_pages, weak_bindings
from sources import ROOT

MOST_BYTES = 3_000_000
"""Of an extension; and of a wheel without the default model, which has 2.6 MB in a wheel."""
OLDEST_TORCH = (2, 10)
OLDEST_GLIBC = (2, 28)
"""Of manylinux_2_28."""
OLDEST_MACOS = [14, 0]
LIBRARIES = {
    "Linux": {
        *TORCH_ON_LINUX,
        *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"),  # one library since glibc 2.34
        *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
    },
    "Darwin": {"libc10.dylib", "libtorch.dylib", "libtorch_cpu.dylib", "libSystem.B.dylib"},
    "Windows": {"torch_cpu.dll", "python3.dll", "kernel32.dll"},
}
"""That may be linked, by system. No OpenMP: a second one beside PyTorch's crashes on macOS, and waits badly
everywhere. No C++ library: PyTorch's and a machine's differ."""
SYSTEM_SETS = "api-ms-win-"
"""What begins so is a name for a part of Windows."""


def check_extension(extension: Path, target: Target, module: str = "_C") -> None:
    """Checks an extension as torch-abi-audit does, which reads no files of Windows and macOS here, and more.

    Args:
        extension: the file.
        target: what it is for.
        module: what Python imports it as.

    Raises:
        ValueError: with what is wrong.
    """
    from torch_abi_audit import cpython_abi, torch_abi

    symbols, libraries = imports(extension)
    of_torch = torch_abi.classify_symbols(sorted(symbols))
    of_python = cpython_abi.classify_symbols(sorted(symbols), "_C.abi3.so")
    wrong = []
    if not of_torch.stable or of_torch.unknown_shim_symbols:
        foreign = of_torch.unstable_symbols or of_torch.unknown_shim_symbols
        wrong.append(f"outside libtorch's stable ABI: {foreign}")
    elif tuple(map(int, of_torch.min_torch_version.split(".")[:2])) > OLDEST_TORCH:
        wrong.append(f"needs torch {of_torch.min_torch_version}: {of_torch.version_defining_symbols}")
    if not of_python.compliant:
        wrong.append(f"outside Python's stable ABI: {of_python.violations}")
    if f"PyInit_{module}" not in exports(extension):
        wrong.append(f"no module {module} of Python")
    foreign = {name for name in libraries - LIBRARIES[target.system] if not name.startswith(SYSTEM_SETS)}
    if foreign:
        wrong.append(f"linked against {sorted(foreign)}")
    if extension.stat().st_size >= MOST_BYTES:
        wrong.append(f"{extension.stat().st_size} bytes, {MOST_BYTES} or more")
    if target.system == "Linux" and (newest := newest_glibc(extension)) > OLDEST_GLIBC:
        wrong.append(f"needs glibc {newest}")
    if target.system == "Darwin":
        wrong += problems_on_macos(extension)
    if wrong:
        raise ValueError(f"{extension}: " + "; ".join(wrong))


def newest_glibc(extension: Path) -> tuple[int, ...]:
    """The newest version of glibc that an ELF file asks for."""
    required = parse(extension).symbols_version_requirement
    names = [version.name for library in required for version in library.get_auxiliary_symbols()]
    numbers = [name.removeprefix("GLIBC_") for name in names if name.startswith("GLIBC_2")]
    return max((tuple(map(int, number.split("."))) for number in numbers), default=(0,))


def problems_on_macos(extension: Path) -> list[str]:
    """What dyld would stumble over."""
    binary = parse(extension)
    # Each symbol has the number of the library that it comes from; 0: whichever has it when it is loaded.
    anyone = {symbol.name for symbol in binary.imported_symbols if symbol.library_ordinal == 0}
    unresolved = sorted(name for name in anyone if not name.startswith(("_Py", "__Py")))
    wrong = [f"unresolved: {unresolved}"] if unresolved else []
    if weak := [name for _, name in weak_bindings(binary)]:
        wrong.append(f"another library may replace {weak}")
    if binary.build_version.minos[:2] > OLDEST_MACOS:
        wrong.append(f"needs macOS {binary.build_version.minos}")
    if binary.has_rpath:
        wrong.append(f"looks for libraries in {binary.rpath.path}")
    if broken := broken_pages(extension):
        wrong.append(f"pages {broken} are not as they were signed")
    return wrong


def check_wheel(wheel: Path, target: Target) -> None:
    """Checks what a wheel says of itself, and what is in it beside the extension.

    Raises:
        ValueError: with what is wrong.
    """
    tag = f"cp310-abi3-{target.wheel}"
    wrong = []
    with zipfile.ZipFile(wheel) as archive:
        files = {file.filename: file.compress_size for file in archive.infolist() if not file.is_dir()}
        [about] = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
        described = Parser().parsestr(archive.read(f"{about}/WHEEL").decode())
        if (described.get_all("Tag"), described["Root-Is-Purelib"]) != ([tag], "false"):
            wrong.append(f"is for {described.get_all('Tag')}, purely Python: {described['Root-Is-Purelib']}")
        if not wheel.name.endswith(f"-{tag}.whl"):
            wrong.append(f"is not called {tag}")
        ours = {name for name in files if not name.startswith(f"{about}/")}
        of_package = {path.relative_to(ROOT).as_posix() for path in package_files()}
        if odd := ours ^ of_package ^ {f"bitnet_ops/{target.extension}"}:
            wrong.append(f"files: {sorted(odd)}")
        for name, digest, _ in csv.reader(archive.read(f"{about}/RECORD").decode().splitlines()):
            kind, _, expected = digest.partition("=")
            if name == f"{about}/RECORD" or name not in files:
                continue
            found = base64.urlsafe_b64encode(hashlib.new(kind, archive.read(name)).digest()).rstrip(b"=")
            if found.decode() != expected:
                wrong.append(f"{name} is not what RECORD says")
    if (code := wheel.stat().st_size - model_bytes(files)) >= MOST_BYTES:
        wrong.append(f"{code} bytes without the model, {MOST_BYTES} or more")
    if wrong:
        raise ValueError(f"{wheel}: " + "; ".join(wrong))


def model_bytes(files: dict[str, int]) -> int:
    """What the default model takes in a wheel, of the sizes of all files there."""
    return sum(size for name, size in files.items() if name.startswith("bitnet_ops/default_model/"))


def package_files() -> list[Path]:
    """The package without what a build leaves in it."""
    every = (path for path in (ROOT / "bitnet_ops").rglob("*") if path.is_file())
    return [path for path in every if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyd")]
