"""A GGUF file in the llama-bench of a fork of llama.cpp, a process for each measurement."""

import json
import os
import subprocess
import tempfile

from .engine import Engine, end_with_parent

COMMON = ("-r", "2", "-o", "json")
"""Its own warm-up is one token, so the first of two repeats stands for it."""


def make(program: str, file: str) -> "LlamaBench":
    """Takes the path of llama-bench and that of a model."""
    return LlamaBench(program, file)


class LlamaBench(Engine):
    """Its figures are its own."""

    def __init__(self, program: str, file: str) -> None:
        self._command = [program, "-m", file, *COMMON]
        self._peak = 0
        self._last_prompt = 1

    def set_threads(self, count: int) -> None:
        self._threads = count

    def prompt(self, tokens: int) -> float:
        self._last_prompt = tokens
        return tokens / self._rate("-p", str(tokens), "-n", "0")

    def decode(self, tokens: int, seconds: float) -> tuple[int, float]:
        # "-gp": tokens written behind a prompt, whose time does not count.
        rate = self._rate("-p", "0", "-n", "0", "-gp", f"{self._last_prompt},{tokens}")
        return tokens, tokens / rate

    def peak_bytes(self) -> int:
        """That of the largest process so far."""
        return self._peak

    def forget_peak(self) -> None:
        self._peak = 0

    def _rate(self, *arguments: str) -> float:
        """Tokens per second."""
        with tempfile.TemporaryFile("w+") as output:
            command = [*self._command, "-t", str(self._threads), *arguments]
            process = subprocess.Popen(command, stdout=output, preexec_fn=end_with_parent)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"{self._command[0]}: exit status {process.returncode}")
            output.seek(0)
            (result,) = json.load(output)
        self._peak = max(self._peak, usage.ru_maxrss * 1024)
        return float(result["samples_ts"][-1])
