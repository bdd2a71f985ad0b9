"""What the process of a model does for the comparison, whatever program runs the model.

Imported in the Pythons of other programs: nothing but the standard library.
"""

import ctypes
import random
import re
import signal
import time
from abc import ABC, abstractmethod
from pathlib import Path

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """The system kills this process when its parent ends: a stopped one sees nothing of that."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Engine(ABC):
    """A model that reads a prompt and then writes tokens, both timed; a program's own figures will do."""

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """Threads of everything that follows."""

    @abstractmethod
    def prompt(self, tokens: int) -> float:
        """Seconds of reading a prompt; the next token included."""

    @abstractmethod
    def decode(self, tokens: int, seconds: float) -> tuple[int, float]:
        """Writes tokens behind the last prompt; ends early, behind a token, after so many seconds.

        Returns:
            Tokens written, and their seconds.
        """

    def peak_bytes(self) -> int:
        """Peak resident memory so far.

        Not getrusage: its figure begins with that of the process that started this one.
        """
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def forget_peak(self) -> None:
        """The peak begins anew."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class SteppedEngine(Engine):
    """A model behind a prompt and single tokens, which are timed here.

    Attributes:
        vocab_size: ids of a prompt are below it.
    """

    vocab_size: int

    @abstractmethod
    def prefill(self, ids: list[int]) -> None:
        """Reads a prompt with an empty cache, and chooses the next token."""

    @abstractmethod
    def step(self) -> None:
        """Reads the token that was chosen last, and chooses the next one, the best-scored."""

    def prompt(self, tokens: int) -> float:
        ids = random.Random(0).choices(range(self.vocab_size), k=tokens)
        start = time.perf_counter()
        self.prefill(ids)
        return time.perf_counter() - start

    def decode(self, tokens: int, seconds: float) -> tuple[int, float]:
        start = time.perf_counter()
        written, taken = 0, 0.0
        while written < tokens and taken <= seconds:
            self.step()
            written += 1
            taken = time.perf_counter() - start
        return written, taken
