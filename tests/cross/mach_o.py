"""What an extension for macOS needs beyond its linker's work: names of its own, and the seal of its pages.

Zig links its C++ library into the extension. It also has dyld replace some parts of that (virtual tables of
streams, the identities of number facets) by those of the first library in the process that has the same
names: "weak binding", although the linker made the names local. macOS's own C++ library has them. Facets of
one library numbered by the other may share a place in a locale, and the first error message with a number in
it may crash. So `keep_names_local` takes that list away. What it would have replaced has a value already,
which is checked.

An Apple CPU runs nothing without a signature. That of a linker ("ad hoc") is a hash of each page, no more.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cross.binaries import parse

# mach-o/loader.h
WEAK_DEFINES, BINDS_TO_WEAK = 0x8000, 0x10000
FLAGS_AT = 24
WEAK_BIND_AT = 24
"""Offset and size in the command LC_DYLD_INFO_ONLY."""

# cs_blobs.h of XNU; the numbers have their highest byte first.
SUPER_BLOB, CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02
SHA256 = 2


@dataclass(frozen=True)
class Seal:
    """Where the hashes of pages are in a file."""

    hashes_at: int
    pages: int
    covered_bytes: int
    page_bytes: int

    def page(self, data: bytes | bytearray, number: int) -> bytes:
        """The hash of a page as it is."""
        begin = number * self.page_bytes
        return hashlib.sha256(data[begin : min(begin + self.page_bytes, self.covered_bytes)]).digest()

    def place(self, number: int) -> slice:
        """Of the hash of a page as it was."""
        begin = self.hashes_at + 32 * number
        return slice(begin, begin + 32)


def keep_names_local(extension: Path) -> None:
    """Has dyld bind nothing weakly, and seals the file again.

    Raises:
        ValueError: something that is bound weakly has no value without that.
    """
    binary = parse(extension)
    with_value = {relocation.address for relocation in binary.relocations}
    if missing := [name for address, name in weak_bindings(binary) if address not in with_value]:
        raise ValueError(f"{extension}: bound weakly, and without a value: {missing}")
    data = bytearray(extension.read_bytes())
    (flags,) = struct.unpack_from("<I", data, FLAGS_AT)
    struct.pack_into("<I", data, FLAGS_AT, flags & ~(WEAK_DEFINES | BINDS_TO_WEAK))
    struct.pack_into("<II", data, binary.dyld_info.command_offset + WEAK_BIND_AT, 0, 0)
    seal = seal_of(extension, data)
    for number in range(seal.pages):
        data[seal.place(number)] = seal.page(data, number)
    extension.write_bytes(data)


def weak_bindings(binary: Any) -> list[tuple[int, str]]:
    """Addresses and names of what dyld may replace by a namesake in another library."""
    weak = [binding for binding in binary.bindings if "WEAK" in str(getattr(binding, "binding_class", ""))]
    return [(binding.address, binding.symbol.name) for binding in weak]


def broken_pages(extension: Path) -> list[int]:
    """Numbers of pages that are not as they were sealed.

    Raises:
        ValueError: there is no seal, or another than a linker's.
    """
    data = extension.read_bytes()
    seal = seal_of(extension, data)
    return [number for number in range(seal.pages) if seal.page(data, number) != data[seal.place(number)]]


def seal_of(extension: Path, data: bytes | bytearray) -> Seal:
    """The only code directory of a file.

    Raises:
        ValueError: there is none, or another than a linker's.
    """
    binary = parse(extension)
    if not binary.has_code_signature:
        raise ValueError(f"{extension} is not signed")
    begin = binary.code_signature.data_offset
    magic, _, blobs = struct.unpack_from(">III", data, begin)
    offsets = [struct.unpack_from(">II", data, begin + 12 + 8 * i)[1] for i in range(blobs)]
    at = [
        begin + offset
        for offset in offsets
        if struct.unpack_from(">I", data, begin + offset)[0] == CODE_DIRECTORY
    ]
    if magic != SUPER_BLOB or len(at) != 1:
        raise ValueError(f"{extension}: a signature of another form, with {len(at)} code directories")
    hashes, _, _, pages, covered = struct.unpack_from(">IIIII", data, at[0] + 16)
    hash_bytes, kind, _, page_bits = struct.unpack_from(">BBBB", data, at[0] + 36)
    if (hash_bytes, kind) != (32, SHA256) or pages << page_bits < covered or covered != begin:
        raise ValueError(f"{extension}: {pages} hashes of kind {kind} for {covered} of {begin} bytes")
    return Seal(at[0] + hashes, pages, covered, 1 << page_bits)
