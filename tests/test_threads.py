"""The pool of threads: shared by Python threads, rebuilt after a fork, sized by torch.set_num_threads."""

import os
import threading

import pytest
import torch
from torch import Tensor

from bitnet_ops import ops


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_has_threads_of_its_own(threads: None) -> None:
    torch.set_num_threads(3)
    work = some_linear()
    expected = run(*work)  # the parent's workers exist now, and the child does not inherit them
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(run(*work), expected) for _ in range(5)) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(run(*work), expected)
