"""Loops over pieces: every piece once, torch's threads as before, errors as they came."""

import threading

import pytest
import torch

from bitnet_ops.checkpoint.pieces import for_each_piece, one_thread


@pytest.fixture(autouse=True)
def two_threads(threads: None) -> None:
    torch.set_num_threads(2)


def test_every_piece_is_done_once_with_one_thread_of_torch() -> None:
    done: list[int] = []
    counts: set[int] = set()

    def do(piece: int) -> None:
        done.append(piece)
        counts.add(torch.get_num_threads())

    for_each_piece(do, range(100))
    assert sorted(done) == list(range(100))
    assert counts == {1}
    assert torch.get_num_threads() == 2


def test_pieces_run_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=30)
    met: list[int] = []

    def meet(piece: int) -> None:
        meeting.wait()  # alone, the first would wait for the second in vain
        met.append(piece)

    with one_thread():
        for_each_piece(meet, range(2))
    assert sorted(met) == [0, 1]


def test_pieces_of_pieces_are_done_where_they_come_up() -> None:
    threads: dict[int, set[int]] = {}

    def do(piece: int) -> None:
        inner: set[int] = set()
        for_each_piece(lambda _: inner.add(threading.get_ident()), range(5))
        threads[piece] = inner | {threading.get_ident()}

    for_each_piece(do, range(10))  # in one pool, all its threads would wait for others
    assert [len(threads[piece]) for piece in range(10)] == [1] * 10


def test_an_error_comes_out_and_threads_are_as_before() -> None:
    def do(piece: int) -> None:
        if piece >= 3:
            raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 3"):
        for_each_piece(do, range(10))
    assert torch.get_num_threads() == 2


def test_inside_one_another_the_outer_one_counts() -> None:
    with one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
