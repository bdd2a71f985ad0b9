"""The pool of threads: shared by Python threads, rebuilt after a fork, sized by torch.set_num_threads."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitnet_ops
from bitnet_ops import ops

ROOT = Path(__file__).parent.parent
BUILDS = {
    "g++": ["g++", "-O2"],
    "clang++": ["clang++", "-O2"],
    "races": ["g++", "-O1", "-g", "-fsanitize=thread"],
    "memory": ["g++", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}

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


@pytest.mark.parametrize("build", BUILDS)
def test_the_pool_alone(build: str, tmp_path: Path) -> None:
    """A C++ program counts what ran: several callers, exceptions, nesting, one CPU, busy CPUs, a fork."""
    compiler, *flags = BUILDS[build]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program = tmp_path / "pool_test"
    files = ["tests/threads/pool_test.cpp", "csrc/run/thread_pool.cpp", "csrc/platform/linux.cpp"]
    sources = [ROOT / file for file in files]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    flags += ["-std=c++17", *warnings, "-pthread", f"-I{ROOT / 'csrc'}"]
    compiled = subprocess.run([compiler, *flags, "-o", program, *sources], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    # The sanitizer's own threads do not survive a fork with others, which is no fault of the pool.
    environment = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
    calls = "400" if "-g" in flags else "4000"
    result = subprocess.run([program, calls], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    checks = ["one caller", "four callers", "nested calls", "one CPU", "busy CPUs", "fork"]
    assert result.stdout.splitlines() == checks


def test_several_python_threads_generate_at_once(threads: None) -> None:
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    prompts = torch.randint(5, model.config.vocab_size, (3, 1, 150))

    def text(i: int) -> Tensor:
        return model.generate(prompts[i], max_new_tokens=12, do_sample=True, eos_token_id=(), seed=i)

    torch.set_num_threads(1)
    expected = [text(i) for i in range(len(prompts))]
    found: dict[int, Tensor] = {}

    def write(i: int) -> None:
        torch.set_num_threads(2 + i)
        found[i] = text(i)

    python_threads = [threading.Thread(target=write, args=(i,)) for i in range(len(prompts))]
    for thread in python_threads:
        thread.start()
    for thread in python_threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert all(torch.equal(found[i], alone) for i, alone in enumerate(expected))


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
