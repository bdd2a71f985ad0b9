"""Named tensors in files: what their headers say, and their data, mapped or read.

Nothing in here trusts a file. A header is checked in full before any data is looked at, and every way to
fail ends in a `CheckpointError`.
"""

import ctypes
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from ..layers.memory import HugePages
from .errors import CheckpointError
from .mapped_file import MappedFile
from .pieces import for_each_piece
from .read_at import read_at

PIECE_BYTES = 8 << 20
"""What a thread reads at a time of a large tensor: whole pages of 2 MB, so that few are waited for by two."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
"""The float types that a checkpoint may use, by their safetensors names."""

TORCH_DTYPE = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U32": torch.uint32,
}
"""The dtypes of the formats that are read here."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without NumPy, which is not a dependency."""
    if tensor.nbytes == 0:  # its address may be null
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says about it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorSource(AbstractContextManager["TensorSource"]):
    """Tensors by name, in one file or several. `TensorFiles` is that of safetensors.

    Use it as a context manager; the files stay open inside, and mapped as long as one of their tensors lives.

    Attributes:
        tensors: what the headers say, by tensor name.
        total_bytes: size of all the files.
        map_all: give mapped tensors, if any, also for those that every token reads.
    """

    def __init__(self, *, mmap: bool) -> None:
        """Has no files yet; a subclass opens them.

        Args:
            mmap: give tensors whose memory is the file, where the system can; otherwise read them.
        """
        self.tensors: dict[str, StoredTensor] = {}
        self.total_bytes = 0
        self._mmap = mmap
        self.map_all = False
        self._descriptors: dict[Path, int] = {}
        self._mappings: dict[Path, MappedFile] = {}
        self._stack = ExitStack()

    def _add_file(self, file: Path, handle: BinaryIO) -> None:
        """Takes over an open file, whose header says where tensors lie in it."""
        self._stack.enter_context(handle)
        self.total_bytes += os.fstat(handle.fileno()).st_size
        self._descriptors[file] = handle.fileno()
        if self._mmap:
            with suppress(OSError, ValueError):  # a file system without mapping: read instead
                self._mappings[file] = MappedFile(handle.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mappings.clear()
        self._stack.close()

    @property
    def file_names(self) -> str:
        """The files, for an error that is about all of them."""
        return ", ".join(sorted(map(str, self._descriptors)))

    def expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """Checks that the headers have a tensor with one of the dtypes and one of the shapes.

        Raises:
            CheckpointError: it is missing, or has another dtype or shape.
        """
        expected = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}"
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(
                f"{self.file_names}: tensor {name!r}: expected {expected}, got no such tensor"
            )
        if stored.dtype not in dtypes or stored.shape not in shapes:
            raise self.error(name, expected, f"{stored.dtype} {list(stored.shape)}")
        return stored

    def tensor(self, name: str, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        """A tensor's data: mapped, or read into memory that ``empty(shape, dtype=...)`` gives."""
        stored, dtype = self.tensors[name], self._dtype(name)
        mapping = self._mappings.get(stored.file)
        count = math.prod(stored.shape)
        # A header may place a tensor at any byte; a number across two places of its size is read instead.
        if mapping is None or count == 0 or stored.offset % dtype.itemsize:
            return self.read(name, empty)
        try:
            return mapping.tensor(dtype, count, stored.offset).view(stored.shape)
        except ValueError as error:  # the file shrank since its header was checked
            raise self.error(name, "readable data", f"{error}") from None

    def tensor_of_every_token(self, name: str, memory: HugePages) -> Tensor:
        """A tensor's data, for one that every token reads as a whole: in 2 MB pages, unless mapped.

        A file's pages are mostly small ones, and reading from them takes longer (bench/LOG.md). So it is
        mapped only where somebody asked for that.
        """
        return self.tensor(name) if self.map_all else self.read(name, memory.empty)

    def forget(self, tensor: Tensor) -> None:
        """Takes an unchanged tensor's pages out of memory until they are needed; see `MappedFile`."""
        for mapping in self._mappings.values():
            if mapping.holds(tensor):
                mapping.forget(tensor)

    def read(self, name: str, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        """A tensor's data, in memory that belongs to the caller."""
        out = empty(self.tensors[name].shape, dtype=self._dtype(name))
        self._fill(out, name, 0)
        return out

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a matrix: mapped, or read. Those before them are not looked at."""
        stored, dtype = self.tensors[name], self._dtype(name)
        if stored.file in self._mappings and stored.offset % dtype.itemsize == 0:
            return self.tensor(name)[begin:end]
        out = torch.empty((end - begin, *stored.shape[1:]), dtype=dtype)
        self._fill(out, name, begin * stored.nbytes // max(stored.shape[0], 1))
        return out

    def _fill(self, out: Tensor, name: str, begin: int) -> None:
        """Reads a tensor's bytes from ``begin`` on until ``out`` is full."""
        stored, room = self.tensors[name], tensor_bytes(out)
        descriptor, offset = self._descriptors[stored.file], stored.offset + begin

        def fill(done: int) -> None:
            end = min(done + PIECE_BYTES, len(room))
            while done < end:
                count = read_at(descriptor, offset + done, room[done:end])
                if count == 0:
                    raise OSError("the file ends before the tensor does")
                done += count

        pieces = range(0, len(room), PIECE_BYTES)
        try:
            if len(pieces) > 1:
                # One thread alone is slower than the memory: most of its time it clears and copies pages.
                for_each_piece(fill, pieces)
            else:
                fill(0)
        except OSError as error:  # the file shrank, or the disk failed, since it was opened
            raise self.error(name, "readable data", f"{error}") from None

    def part(self, name: str, begin: int, count: int) -> bytes:
        """Bytes of a tensor from ``begin`` on: ``count``, or fewer at its end. They are read, not mapped."""
        stored = self.tensors[name]
        count = min(count, stored.nbytes - begin)
        try:
            data = bytearray(count)
            done = read_at(self._descriptors[stored.file], stored.offset + begin, memoryview(data))
        except OSError as error:
            raise self.error(name, "readable data", f"{error}") from None
        if done < count:
            raise self.error(name, "readable data", "a file that ends before the tensor does")
        return bytes(data)

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.tensors[name].dtype
        if dtype not in TORCH_DTYPE:
            raise self.error(name, f"dtype {' or '.join(TORCH_DTYPE)}", dtype)
        return TORCH_DTYPE[dtype]

    def error(self, name: str, expected: str, given: str) -> CheckpointError:
        """The error to raise when a tensor's content is wrong."""
        return CheckpointError.at(self.tensors[name].file, f"tensor {name!r}", expected, given)
