"""The header of a GGUF file, read and checked; nothing in it is trusted.

All numbers are little-endian. A string is its length in bytes (u64) and UTF-8::

    "GGUF" | version u32: 2 or 3 | number of tensors u64 | number of keys u64
    for each key:     name string | type of value u32 | value
    for each tensor:  name string | dimensions u32 | size of each, the inner one first, u64 ... |
                      type of tensor u32 | offset u64
    padding up to the next multiple of "general.alignment" (32 where it is absent)
    data: a tensor begins at its offset from here, a multiple of the alignment

    value types   0 u8   1 i8   2 u16   3 i16   4 u32   5 i32   6 f32   7 bool (one byte, 0 or 1)   8 string
                  9 array: type of its values u32 | how many u64 | values      10 u64   11 i64   12 f64

How many bytes a tensor has follows from its type (types.py), except that some numbers stand for several
types: those are told apart by the room up to the next tensor.

Reading a header takes one pass (cursor.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tensor_source import StoredTensor, TensorSource
from .cursor import Cursor, TensorEntry
from .types import I2_S_ARM, REFUSED, TensorType, types_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32

MOST_TENSORS = 1 << 16
MOST_KEYS = 1 << 16
"""A 405-billion-weight model has about 1100 tensors, and files have below 100 keys."""

LEAST_KEY_BYTES = 8 + 4 + 1
LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
BUFFER_BYTES = 1 << 20


class GgufFile(TensorSource):
    """The metadata and the tensors of a GGUF file.

    `StoredTensor.dtype` is the name of a `TensorType`; shapes are in PyTorch's order, the inner size last.

    Attributes:
        file: its path.
        metadata: values by key: int, float, bool, str, or a list of these.
    """

    def __init__(self, file: Path, *, mmap: bool = True) -> None:
        """Opens a file and reads its header.

        Args:
            file: a path.
            mmap: give tensors whose memory is the file, where the system can; otherwise read them.

        Raises:
            CheckpointError: it is no GGUF file, damaged, or of a kind that is not supported.
        """
        super().__init__(mmap=mmap)
        self.file = file
        self.metadata: dict[str, Any] = {}
        self._types: dict[str, TensorType] = {}
        # is_file comes first: opening a named pipe would wait for ever.
        if not file.is_file():
            raise CheckpointError.at(
                file, "file", "a GGUF file", "something else" if file.exists() else "no such file"
            )
        try:
            handle = file.open("rb", buffering=BUFFER_BYTES)
            self._add_file(file, handle)
            self._read_header(Cursor(file, handle))
        except OSError as error:
            self._stack.close()
            raise CheckpointError.at(file, "file", "a readable file", f"{error}") from None
        except BaseException:
            self._stack.close()
            raise

    def type_of(self, name: str) -> TensorType:
        """The type of a tensor."""
        return self._types[name]

    def take_i2_s_for_arm(self) -> None:
        """Reads tensors of type I2_S as bitnet.cpp writes them on ARM; see `I2_S_ARM`."""
        for name, type_ in self._types.items():
            if type_.number == I2_S_ARM.number:
                self._types[name] = I2_S_ARM

    def data(self, name: str, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        """A tensor's bytes as they lie in the file: uint8 [nbytes], mapped or read.

        Args:
            name: of the tensor.
            empty: gives memory, as in `tensor`.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        stored = self.tensors[name]
        mapping = self._mappings.get(stored.file)
        if mapping is not None:
            try:
                return mapping.tensor(torch.uint8, stored.nbytes, stored.offset)
            except ValueError as error:  # the file shrank since its header was checked
                raise self.error(name, "readable data", f"{error}") from None
        out = empty((stored.nbytes,), dtype=torch.uint8)
        self._fill(out, name, 0)
        return out

    def _read_header(self, cursor: Cursor) -> None:
        _check_beginning(cursor)
        tensors = cursor.count("number of tensors", MOST_TENSORS, LEAST_TENSOR_BYTES)
        keys = cursor.count("number of keys", MOST_KEYS, LEAST_KEY_BYTES)
        for number in range(keys):
            key = cursor.name(f"key {number}")
            if key in self.metadata:
                raise cursor.error(f"key {key!r:.200}", "each key once", "it a second time")
            self.metadata[key] = cursor.value(f"key {key!r:.200}")
        alignment = self.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise cursor.error(f"key {ALIGNMENT_KEY!r}", "a power of two", f"{alignment!r:.200}")
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise cursor.error(
                "key 'split.count'",
                "a model in one file (llama.cpp joins parts: llama-gguf-split --merge FIRST_PART JOINED)",
                f"one of {self.metadata['split.count']!r:.200} parts",
            )
        placed = [cursor.tensor() for _ in range(tensors)]
        self._place(placed, cursor, alignment)

    def _place(self, placed: list[TensorEntry], cursor: Cursor, alignment: int) -> None:
        """Finds out types and sizes of the tensors, and checks where they lie."""
        if not placed:
            return
        begin = _align(cursor.position, alignment)
        placed.sort(key=lambda one: one.offset)
        ends = [begin + one.offset for one in placed[1:]] + [cursor.size]
        rooms = [end - begin - one.offset for one, end in zip(placed, ends, strict=True)]
        meanings: dict[int, list[TensorType]] = {}
        for one, room in zip(placed, rooms, strict=True):
            if one.name in self.tensors:
                raise cursor.error(one.what, "each tensor once", "it a second time")
            if one.offset % alignment:
                raise cursor.error(one.what, f"an offset that {alignment} divides", f"{one.offset}")
            fitting = _fitting_types(one, room, alignment, cursor)
            known = meanings.setdefault(one.number, fitting)
            # Who wrote the file gave the number one meaning, so where one tensor fits two, others decide.
            meanings[one.number] = [type_ for type_ in known if type_ in fitting]
            if not meanings[one.number]:
                raise cursor.error(
                    one.what,
                    f"type {known[0].name}, as others of number {one.number} have it",
                    f"the bytes of {fitting[0].name}",
                )
            self.tensors[one.name] = StoredTensor(self.file, "", one.shape, begin + one.offset, 0)
        for one in placed:
            type_ = self._types[one.name] = meanings[one.number][0]
            if type_.refused:
                raise cursor.error(one.what, "a type that is supported", type_.refused)
            nbytes = type_.nbytes(one.shape)
            self.tensors[one.name] = StoredTensor(
                self.file, type_.name, one.shape, begin + one.offset, nbytes
            )


def _check_beginning(cursor: Cursor) -> None:
    magic = cursor.take(4, "file")
    if magic != MAGIC:
        raise cursor.error("file", "a GGUF file, which begins with 'GGUF'", f"{magic!r}")
    version = cursor.number("<I", "version")
    if version in VERSIONS:
        return
    given = f"version {version}"
    if version and version % 65536 == 0:
        given = "a big-endian file (llama.cpp converts it: gguf-py's gguf_convert_endian.py)"
    elif version == 1:
        given = "version 1, which llama.cpp gave up in 2023"
    raise cursor.error("version", "2 or 3, little-endian", given)


def _fitting_types(one: TensorEntry, room: int, alignment: int, cursor: Cursor) -> list[TensorType]:
    """The types that a tensor's number may stand for, by the ``room`` up to the next tensor."""
    candidates = types_of(one.number)
    if one.number in REFUSED:
        raise cursor.error(one.what, "a type that is supported", REFUSED[one.number])
    if not candidates:
        raise cursor.error(one.what, "a type that is known", f"number {one.number}")
    sizes: dict[TensorType, int] = {}
    why = ""
    for type_ in candidates:
        try:
            sizes[type_] = type_.nbytes(one.shape)
        except ValueError as error:
            why = f"{error}"
    if not sizes:
        raise cursor.error(one.what, f"a shape that type {candidates[0].name} can have", why)
    if len(candidates) > 1:
        sizes = {type_: size for type_, size in sizes.items() if _fills(size, room, alignment)} or sizes
    fitting = [type_ for type_, size in sizes.items() if size <= room]
    if not fitting:
        type_, size = next(iter(sizes.items()))
        raise cursor.error(
            one.what,
            f"{size} bytes of {type_.name} {list(one.shape)} up to the next tensor or the end of the file",
            f"{room}",
        )
    return fitting


def _fills(size: int, room: int, alignment: int) -> bool:
    """Whether nothing but padding is left in the room; the last tensor of a file may have none."""
    return size <= room < size + alignment


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
