"""Memory for weights in 2 MB pages, where the system grants them.

A decoded token reads all weights once, and with 4 KB pages the processor loses about a tenth of the memory
bus to finding out where each page lies (bench/LOG.md). Most matrices are no larger than a page or two, so
those of a model lie next to one another in one region.
"""

import math
import mmap

import torch
from torch import Tensor

ALIGNMENT = 64  # a cache line: what every load of a kernel stays within


class HugePages:
    """One region of memory that tensors are cut from. It lives as long as one of them does."""

    def __init__(self, total_bytes: int, tensors: int) -> None:
        """Reserves room; pages that are never written cost nothing.

        Args:
            total_bytes: of all tensors together.
            tensors: how many there will be.
        """
        self._used = 0
        room = max(total_bytes + tensors * ALIGNMENT, 1)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Private, because huge pages for shared memory are a setting of their own, usually off.
            self._memory: mmap.mmap | bytearray = mmap.mmap(-1, room, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            self._memory = bytearray(room)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with a storage of its own, so that pickling it does not take the whole region along."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        offset = self._used
        self._used += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)
