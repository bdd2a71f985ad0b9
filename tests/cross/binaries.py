"""Reads extensions of whatever system."""

from pathlib import Path
from typing import Any


def parse(extension: Path) -> Any:
    """A binary of lief, which complains of every empty table of zig's Mach-O files and is told not to."""
    import lief

    lief.logging.disable()
    return lief.parse(str(extension))


def imports(extension: Path) -> tuple[set[str], set[str]]:
    """Names of symbols and of libraries that it asks others for, without Mach-O's underscore and paths."""
    import lief

    binary = parse(extension)
    if isinstance(binary, lief.PE.Binary):
        entries = {entry.name for library in binary.imports for entry in library.entries}
        return entries, {library.name.lower() for library in binary.imports}
    if isinstance(binary, lief.MachO.Binary):
        names = {symbol.name.removeprefix("_") for symbol in binary.imported_symbols}
        own_name = lief.MachO.LoadCommand.TYPE.ID_DYLIB
        return names, {of.name.split("/")[-1] for of in binary.libraries if of.command != own_name}
    # Not `imported_symbols`, which leaves out what lld writes without a type: all but functions of libc.
    undefined = {symbol.name for symbol in binary.dynamic_symbols if int(symbol.shndx) == 0 and symbol.name}
    return undefined, set(binary.libraries)


def exports(extension: Path) -> set[str]:
    """Names of the symbols that others can use, without Mach-O's underscore."""
    import lief

    binary = parse(extension)
    if isinstance(binary, lief.PE.Binary):
        return {entry.name for entry in binary.get_export().entries}
    prefix = "_" if isinstance(binary, lief.MachO.Binary) else ""
    return {symbol.name.removeprefix(prefix) for symbol in binary.exported_symbols}
