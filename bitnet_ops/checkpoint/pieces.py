"""Loops over pieces of tensors that stay in a core's cache.

Such a piece takes a fraction of a millisecond, and many follow one another. Shared out by torch, every
operation waits for all threads: loading a GGUF file of 2B4T took 8 s of processor time with one thread of
torch's, and 45 s with two on a busy machine. So an operation runs in one thread, and pieces are shared out.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

Piece = TypeVar("Piece")

_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("_pool", default=None)
"""The threads of `one_thread`: one pool for all matrices, because new threads take new memory."""


class _Thread(threading.local):
    """What a thread knows about itself.

    Attributes:
        is_ours: it is one of `one_thread`, which must not wait for others of its pool.
    """

    is_ours = False

    def become_ours(self) -> None:
        """Marks the thread that calls this."""
        self.is_ours = True


_thread = _Thread()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations inside run in one thread.

    Example:
        >>> with one_thread():
        ...     w = decode_rows(...)
    """
    if _pool.get() is not None or _thread.is_ours:  # inside already
        yield
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=_thread.become_ours) as pool:
            token = _pool.set(pool)
            try:
                yield
            finally:
                _pool.reset(token)
    finally:
        torch.set_num_threads(count)


def for_each_piece(function: Callable[[Piece], None], pieces: Iterable[Piece]) -> None:
    """Calls a function with each piece, in as many threads as torch has outside of `one_thread`.

    Inside of a piece, smaller pieces are done one after another.

    Args:
        function: does a piece; releases Python's lock in its operations, and writes nothing that another
            piece reads or writes.
        pieces: what there is to do.

    Raises:
        Exception: the first that ``function`` raised, in the order of the pieces.
    """
    if _thread.is_ours:
        for piece in pieces:
            function(piece)
        return
    with one_thread():
        pool = _pool.get()
        assert pool is not None, "one_thread sets it"
        for _ in pool.map(function, pieces):
            pass
