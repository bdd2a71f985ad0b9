"""A lock that a forked child may take, whatever other threads of its parent were doing."""

import os
import threading
from types import TracebackType


class Lock:
    """Like `threading.RLock`, but free in a forked child: the thread that held it is not there."""

    def __init__(self) -> None:
        """Free. It is for module level: the system remembers it until the process ends."""
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
