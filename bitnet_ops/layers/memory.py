"""Memory for weights in 2 MB pages, where the system grants them.

A decoded token reads all weights once, and with 4 KB pages the processor loses about a tenth of the memory
bus to finding out where each page lies (bench/LOG.md). Most matrices are no larger than a page or two, so
many share a region.
"""

import contextlib
import ctypes
import math
import mmap
import os
import threading

import torch
from torch import Tensor

ALIGNMENT = 64  # a cache line: what every load of a kernel stays within
REGION_BYTES = 128 << 20  # pages that are never written cost nothing, so the last region may stay half empty


class HugePages:
    """Cuts tensors from regions of memory. A region lives as long as one of its tensors does.

    Several threads may cut at the same time.
    """

    def __init__(self) -> None:
        """Reserves nothing yet."""
        self._region: mmap.mmap | bytearray = bytearray()
        self._used = 0
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with a storage of its own, so that pickling it does not take the whole region along."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        room = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if self._used + room > len(self._region):
                self._region, self._used = _region(max(room, REGION_BYTES)), 0
            region, offset = self._region, self._used
            self._used += room
        return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).view(shape)

    def reuse(self) -> None:
        """Cuts from the beginning of the present region again: its tensors must not be in use any more."""
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def give_back_freed_memory() -> None:
    """Hands memory that was freed, and that the C library keeps for later, back to the system.

    Tensors of some megabytes come from the C library's heap once larger ones have been freed; what they leave
    there counts as the program's until then.
    """
    if os.name != "posix":  # Windows has no name for "what is loaded"
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl and macOS have not
    if trim is not None:
        trim(ctypes.c_size_t(0))


def ask_for_huge_pages(memory: mmap.mmap) -> None:
    """Wishes for 2 MB pages. Small ones do as well, so nothing happens where the system has no others."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them, or without them for files
            memory.madvise(mmap.MADV_HUGEPAGE)


def _region(room: int) -> mmap.mmap | bytearray:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(room)
    # Private, because huge pages for shared memory are a setting of their own, usually off.
    region = mmap.mmap(-1, room, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_for_huge_pages(region)
    return region
