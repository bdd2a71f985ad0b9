"""A file as memory: tensors of a mapped file cost no copy and share their pages with other processes.

Where the system keeps a file in 2 MB pages the weights are read as fast from here as from memory of our own
(bench/LOG.md), and they are there in milliseconds. The price: when a file shrinks while it is in use, the
system ends the process (SIGBUS). So only files that are replaced, never rewritten, should be mapped.
"""

import mmap
import os

import torch
from torch import Tensor

from .. import _C
from ..layers.memory import ask_for_huge_pages


class _Mapping(mmap.mmap):
    """A mapping that operators know: they read single rows from the file (csrc/run/file_memory.h)."""

    _begin = 0
    _remove = staticmethod(_C.remove_file_memory)  # at the end of a program the module is emptied first

    def tell_operators(self, begin: int, descriptor: int, sparing: bool) -> None:
        """Says where it lies, and whether scores of all tokens shall leave most of it out of memory."""
        self._begin = begin
        _C.add_file_memory(begin, len(self), os.dup(descriptor), sparing)

    def __del__(self) -> None:
        # Before the base class unmaps: afterwards something else may lie there.
        if self._begin:
            self._remove(self._begin)


class MappedFile:
    """The bytes of an open file. The mapping lives as long as a tensor that `tensor` gave."""

    def __init__(self, descriptor: int, *, sparing: bool = False) -> None:
        """Maps the whole file, privately: what is written to a tensor stays in this process.

        Args:
            descriptor: of the file.
            sparing: the head's operators leave most of a table out of this process' memory, also where they
                need all of it. That takes longer (csrc/run/file_memory.cpp).

        Raises:
            OSError, ValueError: the file system cannot map files, or the file is empty.
        """
        if not hasattr(mmap, "MAP_PRIVATE"):
            raise OSError("on Windows a mapped file cannot be replaced, so files are read")
        self._memory = _Mapping(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self._begin = torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr()
        self._memory.tell_operators(self._begin, descriptor, sparing)
        self._end = self._begin + len(self._memory)
        ask_for_huge_pages(self._memory)

    def tensor(self, dtype: torch.dtype, count: int, offset: int) -> Tensor:
        """``count`` numbers from byte ``offset`` on, one-dimensional.

        Raises:
            ValueError: they reach beyond the end of the file.
        """
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is this file."""
        return self._begin <= tensor.data_ptr() < self._end

    def forget(self, tensor: Tensor) -> None:
        """Takes the tensor's whole pages out of this process' memory; the next access gets them back.

        What was written to the tensor since it was mapped is lost.
        """
        begin = tensor.data_ptr() - self._begin
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
