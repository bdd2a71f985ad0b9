"""Writes a GGUF file, version 3, little-endian.

The file::

    "GGUF"  u32 version = 3  u64 number of tensors  u64 number of metadata values
    metadata    string key, u32 type, value                                     one after another
    tensors     string name, u32 n, u64 n sizes, u32 type, u64 offset           one after another
    padding     up to a multiple of 32
    data        tensor after tensor, each padded to a multiple of 32; offsets count from here

A string is a u64 length and so many bytes of UTF-8. An array is the u32 type of its elements, a u64 length,
and the elements. Sizes of a tensor come in the opposite order of PyTorch's: of a matrix [N, K] first K,
then N.
"""

import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..tensor_source import tensor_bytes
from .types import TensorType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""That of readers where the file does not say it."""

LONGEST_NAME = 63
"""ggml keeps 64 bytes for the name of a tensor, with a zero behind it."""

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
"""Numbers of the types of values, of those that are written here."""

_STRUCT = {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", UINT64: "Q"}
_TENSORS = {torch.float32: FLOAT32, torch.int32: INT32}


class TensorToWrite(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: as GGUF calls it.
        type: of its blocks.
        shape: in PyTorch's order.
        data: uint8 [type.nbytes(shape)], or a function that gives it when its turn comes.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: Tensor | Callable[[], Tensor]


def write_gguf(file: Path, metadata: dict[str, Any], tensors: Iterable[TensorToWrite]) -> None:
    """Writes a file under a temporary name in its folder, and gives it its name when it is whole.

    Where that fails, a file of that name is what it was. No more than one tensor's data is in memory.

    Args:
        file: is made, or replaced; so is its folder where there is none.
        metadata: values by their keys: bool, int (written as u32, in arrays as i32), float (f32), str, lists
            of one of these (an empty one as an array of strings), and tensors [n] of float32 or int32.
        tensors: in the order of the file.

    Raises:
        ValueError: a value, name or tensor that the format does not have.
        OSError: the disk is full, or the file cannot be written.
    """
    entries = list(tensors)
    head = _header(metadata, entries)
    if file.is_dir():
        raise IsADirectoryError(f"{file}: expected the name of a file, got a folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Next to the file, because a rename is atomic only within one file system.
    draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=file.parent))
    try:
        with (draft / file.name).open("wb") as handle:
            handle.write(head)
            # disable=None: a bar on a terminal, silence elsewhere.
            for entry in tqdm(entries, desc="writing", unit="tensor", disable=None, leave=False):
                _write_data(handle, entry)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft / file.name, file)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_data(handle: BinaryIO, entry: TensorToWrite) -> None:
    data = entry.data if isinstance(entry.data, Tensor) else entry.data()
    size = entry.type.nbytes(entry.shape)
    if data.dtype != torch.uint8 or data.shape != (size,):
        raise ValueError(
            f"write_gguf: tensor {entry.name!r}: expected uint8 [{size}], got {data.dtype} {list(data.shape)}"
        )
    handle.write(tensor_bytes(data.contiguous()))
    handle.write(bytes(-size % ALIGNMENT))


def _header(metadata: dict[str, Any], entries: list[TensorToWrite]) -> bytes:
    """All that comes in front of the data, with its padding."""
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(metadata)))
    for key, value in metadata.items():
        out += _string(key)
        try:
            out += _value(value)
        except struct.error as error:  # whose words differ between Pythons
            raise ValueError(f"write_gguf: metadata {key!r}: out of the range of its type: {error}") from None
        except (ValueError, OverflowError) as error:
            raise ValueError(f"write_gguf: metadata {key!r}: {error}") from None
    offset = 0
    seen: set[str] = set()
    for name, kind, shape, _ in entries:
        encoded = name.encode()
        if not encoded or len(encoded) > LONGEST_NAME or name in seen:
            raise ValueError(
                f"write_gguf: tensor {name!r}: expected a name of 1 to {LONGEST_NAME} bytes, and once only"
            )
        if not 1 <= len(shape) <= 4 or min(shape) < 1:
            raise ValueError(f"write_gguf: tensor {name!r}: expected 1 to 4 sizes above 0, got {list(shape)}")
        seen.add(name)
        out += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        out += struct.pack("<IQ", kind.number, offset)
        offset += -(-kind.nbytes(shape) // ALIGNMENT) * ALIGNMENT
    return bytes(out) + bytes(-len(out) % ALIGNMENT)


def _string(text: str) -> bytes:
    encoded = text.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """A value behind its type."""
    if isinstance(value, Tensor):
        if value.dtype not in _TENSORS or value.dim() != 1:
            raise ValueError(f"expected float32 or int32 [n], got {value.dtype} {list(value.shape)}")
        data = bytes(tensor_bytes(value.contiguous())) if len(value) else b""
        return struct.pack("<IIQ", ARRAY, _TENSORS[value.dtype], len(value)) + data
    if not isinstance(value, (list, tuple)):
        kind = _type(value, in_array=False)
        return struct.pack("<I", kind) + _bare(kind, value)
    kinds = {_type(element, in_array=True) for element in value} or {STRING}
    if kinds == {INT32, UINT32}:
        kinds = {INT32}  # fails below where a number does not fit
    if len(kinds) != 1:
        raise ValueError("expected elements of one type")
    (kind,) = kinds
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    if kind == STRING:
        return head + b"".join(_string(element) for element in value)
    return head + struct.pack(f"<{len(value)}{_STRUCT[kind]}", *value)


def _type(value: object, in_array: bool) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        if -(2**31) <= value < (2**31 if in_array else 0):
            return INT32
        return UINT32 if 0 <= value < 2**32 else UINT64
    if isinstance(value, float):
        return FLOAT32
    if isinstance(value, str):
        return STRING
    raise ValueError(f"expected bool, int, float, str, or a list of one of these, got {type(value).__name__}")


def _bare(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else struct.pack(f"<{_STRUCT[kind]}", value)
