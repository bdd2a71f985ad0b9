"""Runs models in turns, each in a process of its own, and takes their figures.

The speed of a shared machine moves from minute to minute. So each round measures everything once of every
model, and the figures are medians over rounds. Outside of its turn a process is stopped. Where memory does
not hold all models, the one that ran last is ended: it is the one whose next turn is farthest.

Slow models get less: after the first round the time that is left is shared out, and a model whose turn takes
longer than its share has none. What takes longer than `Plan.limit_seconds` is ended and said so, and a prompt
that would take longer is not begun.
"""

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitnet_ops

from .energy import EnergyMeter
from .rows import Row

BENCH = Path(__file__).parents[1]

WARM_UP = 16
"""Tokens of a prompt in front of each turn's figures, and of the prompt that stands for one too long."""

GIGABYTE = 1e9


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        threads: numbers of threads; the first has the long prompt, energy and memory.
        prompts: lengths, the short one first: tokens are written behind it.
        tokens: written behind it at most.
        decode_seconds: that writing them may take.
        limit_seconds: after which a prompt, or a token, is given up.
        ready_seconds: after which making a model, or its first tokens, is.
        rounds: at most.
        seconds: for everything, but that each model has a turn.
    """

    threads: tuple[int, ...]
    prompts: tuple[int, int] = (128, 512)
    tokens: int = 64
    decode_seconds: float = 4.0
    limit_seconds: float = 20.0
    ready_seconds: float = 180.0
    rounds: int = 5
    seconds: float = 780.0


@dataclass
class Figure:
    """One number of a model.

    Attributes:
        values: of the rounds.
        note: what differs from what the column says.
        given_up: after so many seconds; 0 where it was not.
    """

    values: list[float] = field(default_factory=list)
    note: str = ""
    given_up: float = 0.0

    def cell(self) -> float | str | None:
        """The median, or a text."""
        if not self.values:
            return f"over {self.given_up:g} s" if self.given_up else None
        median = statistics.median(self.values)
        return f"{median:.3g} ({self.note})" if self.note else median


@dataclass
class Results:
    """What was measured of a model.

    Attributes:
        rates: tokens per second, by threads and what: the length of a prompt, or 0 for writing.
        shares: of the read bandwidth that writing uses, by threads.
        joules: for a token written, with the first number of threads.
        read: bytes of weights that a token written reads.
        peak_bytes: of the process, making the model included.
        running_bytes: likewise, of the short prompt and the tokens behind it.
        failure: why it did not run, or stopped.
    """

    rates: dict[tuple[int, int], Figure] = field(default_factory=dict)
    shares: dict[int, list[float]] = field(default_factory=dict)
    joules: list[float] = field(default_factory=list)
    read: int | None = None
    peak_bytes: int = 0
    running_bytes: int = 0
    failure: str = ""

    def spread(self, threads: int) -> str:
        """The largest range over median of the rates, and the smallest number of rounds."""
        columns = [one.values for (of, _), one in self.rates.items() if of == threads and one.values]
        if not columns:
            return ""
        rounds = min(map(len, columns))
        if rounds < 2:
            return "one run"
        widest = max((max(one) - min(one)) / statistics.median(one) for one in columns)
        return f"{widest:.0%} of {rounds}"


class WorkerError(Exception):
    """A process ended by itself; the text has what it said last."""


class Worker:
    """The process of one model. It stands still but for `call`.

    Args:
        python: that runs it.
        options: for the engine.
        limit: seconds in which the model has to be made.

    Attributes:
        making_bytes: peak memory of making the model.
        read: bytes of weights that a decoded token reads; None where the engine does not know.
        threads: that the next call has; 0 at first.
    """

    def __init__(self, python: str, options: dict[str, Any], limit: float) -> None:
        paths = [str(BENCH)]
        if python == sys.executable:  # the package that this process has, installed or not
            paths.append(str(Path(bitnet_ops.__file__).parents[1]))
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (`end` closes it)
        self._process = subprocess.Popen(
            [python, "-m", "comparison.worker", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            ready = self._answer(limit)
        except BaseException:
            self.end()
            raise
        self.making_bytes: int = ready["peak"]
        self.read: int | None = ready["read"]
        self.threads = 0
        self._process.send_signal(signal.SIGSTOP)

    def call(self, method: str, limit: float, **arguments: Any) -> Any:
        """What a method of the engine gives.

        Raises:
            TimeoutError: no answer within ``limit`` seconds. The process is ended.
            WorkerError: it ended by itself.
        """
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # the answer will say why
            self._process.stdin.write(json.dumps({"call": method, "with": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer(limit)
        self._process.send_signal(signal.SIGSTOP)
        return answer["result"]

    def _answer(self, limit: float) -> dict[str, Any]:
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self.end()
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")[-2000:]
            raise WorkerError(f"{said}exit status {status}")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process; once is enough."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):
                stream.close()


class Comparison:
    """The workers and results of a run.

    Args:
        rows: models by their keys, in the order of their turns.
        plan: how much is measured.
        folder: for files of models.
        bandwidth: bytes per second that so many threads read from memory now.
    """

    def __init__(
        self, rows: dict[str, Row], plan: Plan, folder: Path, bandwidth: Callable[[int], float]
    ) -> None:
        self._rows, self._plan, self._folder, self._bandwidth = rows, plan, folder, bandwidth
        self._energy = EnergyMeter()
        self._workers: dict[str, Worker] = {}  # the one that ran last comes last
        self._starting = 0.0
        self.results = {key: Results() for key in rows}

    def run(self) -> dict[str, Results]:
        """All rounds."""
        end = time.monotonic() + self._plan.seconds
        cost = dict.fromkeys(self._rows, 0.0)
        try:
            for number in range(self._plan.rounds):
                rounds = self._plan.rounds - number
                running = [key for key in self._rows if not self.results[key].failure]
                share = fair_share(end - time.monotonic(), [cost[key] * rounds for key in running])
                for key in running:
                    if not number or cost[key] <= min(share, end - time.monotonic()):
                        cost[key] = self._turn(key)
        finally:
            for worker in self._workers.values():
                worker.end()
        return self.results

    def _turn(self, key: str) -> float:
        """Everything of one model once; gives the seconds that the next turn will take."""
        result, plan = self.results[key], self._plan
        short, long = plan.prompts
        begin, self._starting = time.monotonic(), 0.0
        if key in self._workers:
            self._workers[key] = self._workers.pop(key)
        try:
            for threads in plan.threads:
                first = threads == plan.threads[0]
                self._prompt(key, threads, short)
                self._decode(key, threads, first)
                if first and not result.running_bytes:
                    result.running_bytes = self._call(key, threads, "peak_bytes", plan.ready_seconds)
                    result.peak_bytes = max(self._workers[key].making_bytes, result.running_bytes)
                if first:
                    self._prompt(key, threads, long)
        except WorkerError as error:
            result.failure = str(error)
            if key in self._workers:
                self._workers.pop(key).end()
        seconds = time.monotonic() - begin
        return seconds - self._starting if key in self._workers else seconds

    def _prompt(self, key: str, threads: int, tokens: int) -> None:
        """Measures a prompt; in place of the short one a shorter one, where it takes too long."""
        figure = self.results[key].rates.setdefault((threads, tokens), Figure())
        if not figure.given_up and not self._expects_too_long(key, threads, tokens):
            with suppress(TimeoutError):
                seconds = self._call(key, threads, "prompt", self._plan.limit_seconds, tokens=tokens)
                figure.values.append(tokens / seconds)
                return
        figure.given_up = self._plan.limit_seconds
        if tokens == self._plan.prompts[0]:
            figure.note = f"prompt of {WARM_UP}"
            seconds = self._call(key, threads, "prompt", self._plan.ready_seconds, tokens=WARM_UP)
            figure.values.append(WARM_UP / seconds)

    def _expects_too_long(self, key: str, threads: int, tokens: int) -> bool:
        """Whether a prompt was given up that would not be slower: of more threads, or fewer tokens.

        A longer prompt has, token for token, about the speed of a shorter one.
        """
        for (of, measured), figure in self.results[key].rates.items():
            if 0 < measured <= tokens and of >= threads:
                too_slow = measured < tokens and figure.values and not figure.note
                if figure.given_up or (
                    too_slow and tokens / statistics.median(figure.values) > self._plan.limit_seconds
                ):
                    return True
        return False

    def _decode(self, key: str, threads: int, first: bool) -> None:
        """Measures writing behind the last prompt."""
        result, plan = self.results[key], self._plan
        figure = result.rates.setdefault((threads, 0), Figure())
        if figure.given_up:
            return
        figure.note = result.rates[threads, plan.prompts[0]].note
        limit = plan.limit_seconds + plan.decode_seconds
        bandwidth = self._bandwidth(threads)
        before = self._energy.read()
        try:
            tokens, seconds = self._call(
                key, threads, "decode", limit, tokens=plan.tokens, seconds=plan.decode_seconds
            )
        except TimeoutError:
            figure.given_up = limit
            return
        joules = self._energy.joules_since(before)
        figure.values.append(tokens / seconds)
        if result.read:
            result.shares.setdefault(threads, []).append(tokens / seconds * result.read / bandwidth)
        if first and joules is not None:
            result.joules.append(joules / tokens)

    def _call(self, key: str, threads: int, method: str, limit: float, **arguments: Any) -> Any:
        """Calls a model's worker, which is made, and warmed up with these threads, where it has to be.

        Raises:
            TimeoutError: no answer within ``limit`` seconds.
            WorkerError: it could not be made, or ended.
        """
        begin = time.monotonic()
        try:
            worker = self._workers.get(key) or self._start(key)
            if worker.threads != threads:
                # Pages, pools, caches and compilers that the first tokens find cold.
                ready, most = self._plan.ready_seconds, self._plan.decode_seconds
                worker.call("set_threads", ready, count=threads)
                worker.call("prompt", ready, tokens=WARM_UP)
                worker.call("decode", ready, tokens=2, seconds=most)
                worker.threads = threads
        except TimeoutError:
            self._workers.pop(key, None)
            raise WorkerError(f"not ready within {self._plan.ready_seconds:g} s") from None
        self._starting += time.monotonic() - begin
        try:
            return worker.call(method, limit, **arguments)
        except TimeoutError:
            del self._workers[key]
            raise

    def _start(self, key: str) -> Worker:
        row = self._rows[key]
        options = row.options(self._folder)
        while self._workers and available_gigabytes() < row.gigabytes:
            self._workers.popitem()[1].end()
        assert row.program.command is not None
        worker = Worker(row.program.command, options, self._plan.ready_seconds)
        self._workers[key] = worker
        self.results[key].read = worker.read or row.read
        return worker


def fair_share(seconds: float, wanted: list[float]) -> float:
    """What each may have at most, if those who want less leave the rest to the others."""
    wanted = sorted(wanted)
    for count, one in enumerate(wanted):
        equal = seconds / (len(wanted) - count)
        if one > equal:
            return equal
        seconds -= one
    return float("inf")


def available_gigabytes() -> float:
    """Memory that a new process can have."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / GIGABYTE
    return float("inf")
