"""Loops over small pieces without torch's threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations inside run in one thread.

    Pieces that stay in a core's cache are a fraction of a millisecond each, and many follow one another. Two
    threads gain little there, and on a busy machine each operation waits for both: loading a GGUF file of
    2B4T took 8 s of processor time with one thread and 45 s with two.

    Example:
        >>> with one_thread():
        ...     w = decode_rows(...)
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
