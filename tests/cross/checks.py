"""What an extension for a release must and must not use, of whatever system it is."""

from pathlib import Path

from cross.build import Target

MOST_BYTES = 3_000_000
OLDEST_TORCH = (2, 10)
OLDEST_GLIBC = (2, 28)
"""Of manylinux_2_28."""
OPENMP = ("gomp", "iomp", "libomp", "vcomp")
"""In names of libraries: a second OpenMP beside PyTorch's crashes on macOS, and waits badly everywhere."""


def imports(extension: Path) -> tuple[set[str], set[str]]:
    """Names of the symbols and of the libraries that it asks others for, without Mach-O's underscore."""
    import lief

    binary = lief.parse(str(extension))
    if isinstance(binary, lief.PE.Binary):
        entries = {entry.name for library in binary.imports for entry in library.entries}
        return entries, {library.name for library in binary.imports}
    if isinstance(binary, lief.MachO.Binary):
        names = {symbol.name.removeprefix("_") for symbol in binary.imported_symbols}
        return names, {library.name for library in binary.libraries}
    # Not `imported_symbols`, which leaves out what lld writes without a type: all but functions of libc.
    undefined = {symbol.name for symbol in binary.dynamic_symbols if int(symbol.shndx) == 0 and symbol.name}
    return undefined, set(binary.libraries)


def check_extension(extension: Path, target: Target) -> None:
    """Checks an extension as torch-abi-audit does, which reads no files of Windows and macOS here, and more.

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
    if openmp := {library for library in libraries if any(name in library.lower() for name in OPENMP)}:
        wrong.append(f"linked against OpenMP: {openmp}")
    if extension.stat().st_size >= MOST_BYTES:
        wrong.append(f"{extension.stat().st_size} bytes, {MOST_BYTES} or more")
    if target.system == "Linux" and (newest := newest_glibc(extension)) > OLDEST_GLIBC:
        wrong.append(f"needs glibc {newest}")
    if wrong:
        raise ValueError(f"{extension}: " + "; ".join(wrong))


def newest_glibc(extension: Path) -> tuple[int, ...]:
    """The newest version of glibc that an ELF file asks for."""
    import lief

    required = lief.ELF.parse(str(extension)).symbols_version_requirement
    names = [version.name for library in required for version in library.get_auxiliary_symbols()]
    numbers = [name.removeprefix("GLIBC_") for name in names if name.startswith("GLIBC_2")]
    return max(tuple(map(int, number.split("."))) for number in numbers)
