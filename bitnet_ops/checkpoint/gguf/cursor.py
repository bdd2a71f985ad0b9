"""What a GGUF header consists of, read one after another: numbers, strings, arrays, entries of tensors.

header.py has the drawing. Every count and length is compared with what is left of the file before anything of
that size is made, so memory stays within a small multiple of the file's size.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", BOOL: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""Value types of one number, and how `struct` calls them."""

MOST_DIMENSIONS = 4  # of ggml
MOST_NAME_BYTES = 65535
"""The specification's limit for keys; tensor names have 64 bytes at most."""

MOST_STRING_BYTES = 1 << 28
"""A tokenizer.json as a string has 35 MB."""

MOST_ELEMENTS = 1 << 23
"""Of all arrays together: an element costs 40 bytes of memory. Tokens, their types and scores, and merges of
Gemma's 262144 tokens are below 1.4 million."""


@dataclass(frozen=True)
class TensorEntry:
    """What the header says about a tensor.

    Attributes:
        name: unique in a good file.
        shape: in PyTorch's order.
        number: of its type.
        offset: from where the data begins.
    """

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int

    @property
    def what(self) -> str:
        """Names it in errors."""
        return f"tensor {self.name!r:.200}"


class Cursor:
    """Reads a file from its beginning on and knows how much is left of it.

    Attributes:
        size: of the file.
        position: what has been read of it.
    """

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self.file = file
        self._handle = handle
        self.size = os.fstat(handle.fileno()).st_size
        self.position = 0
        self._elements = 0

    def error(self, what: str, expected: str, given: str) -> CheckpointError:
        """The error to raise about something in the header."""
        return CheckpointError.at(self.file, what, expected, given)

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        left = self.size - self.position
        data = self._handle.read(count) if count <= left else b""
        if len(data) < count:
            raise self.error(what, f"{count} bytes", f"the end of the file after {left}")
        self.position += count
        return data

    def number(self, kind: str, what: str) -> Any:
        """The next number, of a kind of `struct`."""
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """The next u64, a number of things of at least so many bytes each."""
        count: int = self.number("<Q", what)
        most = min(most, (self.size - self.position) // least_bytes)
        if count > most:
            raise self.error(what, f"at most {most} in a file of {self.size} bytes", f"{count}")
        return count

    def string(self, what: str) -> str:
        """The next string."""
        text = self.take(self.count(f"{what}, length of its text", MOST_STRING_BYTES, 1), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(what, "UTF-8 text", f"{error!s:.200}") from None

    def name(self, what: str) -> str:
        """The next string, which has to be short."""
        (length,) = struct.unpack("<Q", self.take(8, what))
        if not 0 < length <= MOST_NAME_BYTES:
            raise self.error(what, f"a name of 1 to {MOST_NAME_BYTES} bytes", f"{length}")
        text = self.take(length, what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(what, "a name in UTF-8", f"{error!s:.200}") from None

    def value(self, what: str) -> Any:
        """The next type of a value, and the value."""
        kind = self.number("<I", what)
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self._array(what)
        if kind not in NUMBERS:
            raise self.error(what, "a type of value from 0 to 12", f"{kind}")
        value = self.number(NUMBERS[kind], what)
        return self._truth(value, what) if kind == BOOL else value

    def _array(self, what: str) -> list[Any]:
        kind = self.number("<I", what)
        if kind == STRING:
            return self._strings(self._elements_of(what, 8), what)
        if kind not in NUMBERS:
            given = "arrays" if kind == ARRAY else f"type of value {kind}"
            raise self.error(what, "an array of numbers or strings", f"one of {given}")
        letter = NUMBERS[kind][1]
        size = struct.calcsize(NUMBERS[kind])
        count = self._elements_of(what, size)
        values = list(struct.unpack(f"<{count}{letter}", self.take(count * size, what)))
        return [self._truth(value, what) for value in values] if kind == BOOL else values

    def _strings(self, count: int, what: str) -> list[str]:
        """As many strings; a vocabulary has half a million with its merges, so the loop is a tight one."""
        read, integer, left = self._handle.read, int.from_bytes, self.size - self.position
        texts: list[str] = []
        try:
            for _ in range(count):
                length = integer(read(8), "little")
                left -= 8 + length
                if left < 0:
                    break
                texts.append(read(length).decode())
        except UnicodeDecodeError as error:
            raise self.error(f"{what}, element {len(texts)}", "UTF-8 text", f"{error!s:.200}") from None
        if left < 0:
            raise self.error(
                f"{what}, element {len(texts)}", "a string within the file", "one that ends behind it"
            )
        self.position = self.size - left
        return texts

    def _elements_of(self, what: str, least_bytes: int) -> int:
        count = self.count(f"{what}, length of its array", MOST_ELEMENTS - self._elements, least_bytes)
        self._elements += count
        return count

    def _truth(self, value: int, what: str) -> bool:
        if value not in (0, 1):
            raise self.error(what, "a bool, 0 or 1", f"{value}")
        return value == 1

    def tensor(self) -> TensorEntry:
        """The next tensor's entry."""
        name = self.name("name of a tensor")
        what = f"tensor {name!r:.200}"
        dimensions = self.number("<I", what)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.error(what, f"1 to {MOST_DIMENSIONS} dimensions", f"{dimensions}")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, what))[::-1]
        # No type has less than a bit for a weight.
        if 0 in shape or math.prod(shape) > 8 * self.size:
            raise self.error(what, f"a shape that fits into {self.size} bytes", f"{list(shape)}")
        number, offset = struct.unpack("<IQ", self.take(12, what))
        if offset > self.size:
            raise self.error(what, f"an offset within the file's {self.size} bytes", f"{offset}")
        return TensorEntry(name, shape, number, offset)
