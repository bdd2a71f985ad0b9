"""What sees a change of a model: dictionaries compared by identity, and no crash from wrong arguments."""

import threading
from array import array
from collections import OrderedDict
from typing import Any

import pytest

from bitnet_ops import _C


def same_values(dicts: list[Any], counts: list[int], values: list[Any]) -> bool:
    return _C.same_values(tuple(dicts), array("I", counts).tobytes(), tuple(values))


def same_items(dicts: list[Any], keys: tuple[Any, ...], values: list[Any]) -> bool:
    return _C.same_items(tuple(dicts), keys, tuple(values))


def test_values() -> None:
    a, b = [1], [1]
    dicts: list[dict[str, Any]] = [{"x": a, "y": b}, {}, OrderedDict(z=a)]
    assert same_values(dicts, [2, 0, 1], [a, b, a])
    assert not same_values(dicts, [2, 0, 1], [b, b, a])  # equal, another object
    assert not same_values(dicts, [1, 1, 1], [a, b, a])  # the same values, another dictionary
    dicts[1]["w"] = a
    assert not same_values(dicts, [2, 0, 1], [a, b, a])
    del dicts[1]["w"], dicts[0]["x"]
    assert not same_values(dicts, [2, 0, 1], [a, b, a])
    assert same_values([], [], [])


def test_items() -> None:
    a, b = [1], [1]
    dicts: list[dict[str, Any]] = [{"x": a, "y": b}, {"x": b}]
    assert same_items(dicts, ("x", "y"), [a, b, b, None])
    assert not same_items(dicts, ("x", "y"), [b, b, b, None])
    dicts[1]["y"] = a
    assert not same_items(dicts, ("x", "y"), [a, b, b, None])
    assert same_items([], ("x",), [])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="counts: expected 4 bytes for each of 1 dictionaries, got 0"):
        same_values([{}], [], [])
    with pytest.raises(ValueError, match="values: expected as many as counts add up to, got 0"):
        same_values([{"x": 1}], [1], [])
    with pytest.raises(TypeError, match="dicts: expected dictionaries, got <class 'list'> at 0"):
        same_values([[]], [0], [])
    with pytest.raises(TypeError, match="dicts: expected dictionaries, got <class 'int'> at 1"):
        same_items([{}, 1], ("x",), [None, None])
    with pytest.raises(ValueError, match="values: expected 2 for each of 1 dictionaries, got 1"):
        same_items([{}], ("x", "y"), [None])
    with pytest.raises(TypeError, match="unhashable"):
        same_items([{}], ([],), [None])
    with pytest.raises(TypeError):
        _C.same_values([], b"", ())  # type: ignore[arg-type]


def test_dictionaries_that_another_thread_changes() -> None:
    """Either answer is right; without a global lock an error or a crash would show that no lock is held."""
    value = [1]
    dicts = [{i: value for i in range(1 + j % 3)} for j in range(60)]
    counts = list(map(len, dicts))
    values = [value] * sum(counts)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for changed in dicts:
                changed.update({key: [2] for key in range(10, 40)})
                for key in range(10, 40):
                    del changed[key]

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(100):
            assert same_values(dicts, counts, values) in (True, False)
            assert same_items(dicts, (0, 10), [value, None] * len(dicts)) in (True, False)
    finally:
        done.set()
        changer.join(timeout=60)
    assert same_values(dicts, counts, values)
