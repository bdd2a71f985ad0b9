"""The pool of threads: shared by Python threads, rebuilt after a fork, sized by torch.set_num_threads."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tools import need
from torch import Tensor

import bitnet_ops
from bitnet_ops import ops
from bitnet_ops.decoder.head import ScreenedHead
from bitnet_ops.locks import Lock

ROOT = Path(__file__).parent.parent
BUILDS = {
    "g++": ["g++", "-O2"],
    "clang++": ["clang++", "-O2"],
    "conditions": ["g++", "-O2"],
    "races": ["g++", "-O1", "-g", "-fsanitize=thread"],
    "races, conditions": ["g++", "-O1", "-g", "-fsanitize=thread"],
    "memory": ["g++", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
"""Those with "conditions" sleep as threads do on macOS."""
CHECKS = [
    "one caller",
    "four callers",
    "nested calls",
    "stealing",
    "one CPU",
    "busy CPUs",
    "rounding",
    "fork",
    "short memory",
    "fork during work",
]
"""What pool_test.cpp says of itself."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def some_linear() -> tuple[Tensor, Tensor, Tensor]:
    """Large enough to be shared out among three threads."""
    w = torch.randint(-1, 2, (3000, 1000), dtype=torch.int8)
    return torch.randn(5, 1000), ops.pack_ternary(w), torch.rand(3000)


def run(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return ops.ternary_linear(x, packed, scale, None, 3000)


def test_several_python_threads_at_once(threads: None) -> None:
    torch.set_num_threads(3)
    work = [some_linear() for _ in range(4)]
    expected = [run(*one) for one in work]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        torch.set_num_threads(1 + i % 3)
        if not all(torch.equal(run(*work[i]), expected[i]) for _ in range(50)):
            wrong.append(i)

    python_threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in python_threads:
        thread.start()
    for thread in python_threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong


def test_more_and_fewer_threads(threads: None) -> None:
    work = some_linear()
    torch.set_num_threads(1)
    expected = run(*work)
    for count in (4, 2, 1, 7, 3):
        torch.set_num_threads(count)
        for _ in range(20):
            assert torch.equal(run(*work), expected)


def denormal_results() -> dict[str, Callable[[], Tensor]]:
    """Operators in whose results nearly every element is a denormal number, large enough for two threads."""
    tiny = 1e-39
    x, norm_weight = torch.randn(400, 2560), torch.full((2560,), tiny)
    hidden, table = torch.randn(4, 256), torch.randn(20000, 256) * tiny
    q, cos, sin = torch.randn(1, 200, 512), torch.ones(200, 32), torch.zeros(200, 32)
    v = torch.full((1, 200, 512), tiny)
    return {
        "rms_norm": lambda: ops.rms_norm(x, norm_weight, 1e-5),
        "lm_head": lambda: ops.lm_head(hidden, table),
        "attention": lambda: ops.attention(q, q, v, cos, sin),
    }


def test_denormal_numbers_are_the_same_on_every_thread(threads: None) -> None:
    """Workers flush them when their caller does, also workers that exist already, and no longer than it."""
    for name, result in denormal_results().items():
        for flush in (False, True, False):
            torch.set_flush_denormal(flush)
            try:
                torch.set_num_threads(1)
                alone = result()
                torch.set_num_threads(2)
                together = [result() for _ in range(20)]
            finally:
                torch.set_flush_denormal(False)
            # A comparison may itself take denormal numbers for zeros, hence only now.
            assert (alone == 0).float().mean() == 1.0 if flush else (alone == 0).float().mean() < 0.01, name
            assert all(torch.equal(one, alone) for one in together), (name, flush)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_has_threads_of_its_own(threads: None) -> None:
    torch.set_num_threads(3)
    work = some_linear()
    expected = run(*work)  # the parent's workers exist now, and the child does not inherit them
    child = os.fork()
    if child == 0:
        torch.set_num_threads(3)
        os._exit(0 if all(torch.equal(run(*work), expected) for _ in range(5)) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(run(*work), expected)


@pytest.mark.parametrize(
    "build",
    [pytest.param(name, marks=[] if name == "g++" else pytest.mark.slow) for name in BUILDS],
)
def test_the_pool_alone(build: str, tmp_path: Path) -> None:
    """A C++ program counts what ran."""
    compiler, *flags = BUILDS[build]
    need(compiler, package="clang" if compiler == "clang++" else compiler)
    program = tmp_path / "pool_test"
    sleep = "sleep_by_condition" if "conditions" in build else "sleep_by_futex"
    parts = ["run/thread_pool.cpp", *(f"platform/{part}.cpp" for part in ("posix", "linux", sleep))]
    sources = [ROOT / "tests/threads/pool_test.cpp", *(ROOT / "csrc" / part for part in parts)]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    flags += ["-std=c++17", *warnings, "-pthread", f"-I{ROOT / 'csrc'}"]
    compiled = subprocess.run([compiler, *flags, "-o", program, *sources], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    # The sanitizer's own threads do not survive a fork with others, which is no fault of the pool.
    environment = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
    calls = "400" if "-g" in flags else "4000"
    result = subprocess.run([program, calls], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    # GCC's thread sanitizer takes new threads of a child for threads of the parent that were at work.
    assert result.stdout.splitlines() == [
        c for c in CHECKS if "races" not in build or c != "fork during work"
    ]


def first_uses(model: bitnet_ops.BitNet) -> list[Callable[[], Tensor]]:
    """Ways to use a model, each of which makes something that stays with it."""
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(5, model.config.vocab_size, (4, 1, 70), generator=generator)
    padding = torch.ones(2, 70, dtype=torch.int64)
    padding[0, :20] = 0
    options = {"max_new_tokens": 12, "eos_token_id": ()}
    return [
        lambda: model.generate(prompts[0], do_sample=True, seed=3, **options),
        lambda: model.generate(prompts[1], do_sample=False, prompt_lookup_num_tokens=10, **options),
        lambda: model.generate(prompts[2], do_sample=False, cache_dtype=torch.int8, **options),
        lambda: model.generate(
            torch.cat([prompts[3]] * 2), attention_mask=padding, do_sample=False, **options
        ),
        lambda: model(torch.cat([prompts[2], prompts[3]])),
        lambda: model.generate(
            prompts[0], do_sample=True, seed=7, top_k=9, repetition_penalty=1.3, **options
        ),
    ]


@pytest.mark.parametrize("round_", range(4))
def test_python_threads_share_a_new_model(round_: int, threads: None) -> None:
    """Without a global lock they truly meet; with one they are switched as often as Python can."""
    torch.set_num_threads(1)
    expected = [use() for use in first_uses(bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL))]
    shared = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    shared.certified_head = True
    uses = first_uses(shared)
    together = threading.Barrier(len(uses), timeout=60)
    between = sys.getswitchinterval()

    def use_it(i: int) -> list[bool]:
        torch.set_num_threads(1 + i % 3)
        together.wait()
        same = []
        for turn in range(3):
            same.append(torch.equal(uses[i](), expected[i]))
            if i == round_ and turn == 0:
                shared.model.plan().drop()  # as a change of the model does
        return same

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(uses)) as pool:
            assert list(pool.map(use_it, range(len(uses)), timeout=120)) == [[True] * 3] * len(uses)
    finally:
        sys.setswitchinterval(between)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("count", [2, 7])
def test_a_process_with_one_cpu(threads: None, count: int) -> None:
    work = some_linear()
    torch.set_num_threads(1)
    expected = run(*work)
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(count)
        os._exit(0 if all(torch.equal(run(*work), expected) for _ in range(50)) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_python_threads_share_one_head(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    model.certified_head = True
    made: list[ScreenedHead] = []
    all_there = threading.Barrier(3)

    class Counted(ScreenedHead):
        def __init__(self, *arguments: object) -> None:
            made.append(self)
            time.sleep(0.1)  # time for another thread to ask, too
            super().__init__(*arguments)

    monkeypatch.setattr("bitnet_ops.decoder.model.ScreenedHead", Counted)

    def ask() -> None:
        all_there.wait(timeout=60)
        assert model.screened_head() is not None

    with ThreadPoolExecutor(3) as pool:
        for one in [pool.submit(ask) for _ in range(3)]:
            one.result(timeout=60)
    assert len(made) == 1


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_does_not_wait_for_locks_of_its_parent() -> None:
    lock = Lock()
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            over.wait(timeout=60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(timeout=60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs dies
        with lock:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    over.set()
    holder.join()
    assert os.waitstatus_to_exitcode(status) == 0
