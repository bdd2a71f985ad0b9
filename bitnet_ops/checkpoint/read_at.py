"""Reads from a place in an open file, on every system."""

import os

from ..locks import Lock

_lock = Lock()


def read_at(descriptor: int, offset: int, out: memoryview) -> int:
    """Reads as many bytes as there is room for, or fewer, and returns how many; 0 is the end of the file.

    Threads may read the same file at once.

    Raises:
        OSError: the disk failed.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    with _lock:  # Windows: all who read share one place in the file
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, min(len(out), 1 << 30))  # more than an int can say is an error there
    out[: len(data)] = data
    return len(data)
