"""How much time and memory the rendering of a template of unknown origin may take.

A rendering has a budget of steps (rounds of loops, calls) and one of characters that are read and made. Sizes
are measured before something is made, in characters; an element of a list counts as `LOOK` of them. A list
can hold the same list twice, and so on, sixty times: what writes, compares or hashes it calls `take_whole`,
which follows it and looks at each list once.
"""

import itertools
import re
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MOST_STEPS = 200_000
"""Rounds of loops and calls in a rendering, about a second; published templates take some a message."""

MOST_CHARACTERS = 1 << 24
"""Of a text or list that a template makes: four characters a token, 4 million tokens."""

MOST_WORK = 1 << 28
"""Characters that are read and made in all, about two seconds and at most as many bytes of ASCII: sixteen of
the largest texts."""

MOST_BITS = 1 << 16
"""Of an integer: one of this size is multiplied in microseconds."""

LOOK = 8
"""Characters that an element of a list counts as: copying or visiting one takes about as long."""

NEW_ELEMENT = 64
"""The same where each element is an object that is made for the list."""

CALL = 1024
"""Characters that the call of a filter, test or method counts as: it takes some microseconds."""

NODE = 32
"""Characters that a part of the template counts as whenever it runs: a name, an operator, a constant."""


SPACES = tuple(
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008"
    "\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
LINE_ENDS = tuple("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
"""Where ``str.split`` and ``str.splitlines`` cut a text."""


@dataclass
class Budget:
    """What a rendering has taken so far."""

    steps: int = 0
    work: int = 0


_budget: ContextVar[Budget] = ContextVar("_budget")


def start() -> None:
    """Opens the budget of a rendering."""
    _budget.set(Budget())


def step(nodes: int = 1) -> None:
    """Counts a round of a loop or a call, which runs ``nodes`` parts of the template.

    Raises:
        SecurityError: it was one too many.
    """
    take(NODE * nodes)
    budget = _budget.get()
    budget.steps += 1
    if budget.steps > MOST_STEPS:
        raise SecurityError(f"expected at most {MOST_STEPS} rounds of loops and calls")


def take(size: int) -> None:
    """Counts characters that are about to be read or made.

    Raises:
        SecurityError: they are more than one text may have, or the budget is used up.
    """
    if size > MOST_CHARACTERS:
        raise SecurityError(f"expected at most {MOST_CHARACTERS} characters of a text, got {size}")
    budget = _budget.get()
    budget.work += max(size, 0)
    if budget.work > MOST_WORK:
        raise SecurityError(f"expected at most {MOST_WORK} characters that are read and made in all")


def is_container(value: Any) -> bool:
    """Whether it holds other values, which are written and compared with it."""
    return isinstance(value, (list, tuple, dict, KeysView, ValuesView, ItemsView, Namespace))


def size(value: Any, element: int = LOOK) -> int:
    """Of the value itself, whatever is inside it."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, (list, tuple, dict, range)):
        return element * len(value)
    return 1


def check_bits(bits: int) -> None:
    """Refuses integers with which arithmetic takes long."""
    if bits > MOST_BITS:
        raise SecurityError(f"expected at most {MOST_BITS} bits of an integer, got {bits}")


def check_number(value: Any) -> None:
    """`check_bits` of what may be an integer."""
    if isinstance(value, int):
        check_bits(value.bit_length())


def take_whole(*values: Any) -> None:
    """Counts all that values hold, as often as it would be written."""
    for value in values:
        if is_container(value):
            take(_whole_size(value, {}))


def _whole_size(value: Any, known: dict[int, int]) -> int:
    """Characters of str(value), about; ``known`` has sizes of containers by id; all of these stay alive."""
    if not is_container(value):
        return size(value) if isinstance(value, (str, bytes)) else LOOK
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = 0  # a namespace may hold itself
    parts: Iterable[Any] = value
    if isinstance(value, dict):
        parts = itertools.chain(value.keys(), value.values())
    elif isinstance(value, ItemsView):  # its pairs do not stay alive
        parts = itertools.chain.from_iterable(value)
    elif isinstance(value, Namespace):
        parts = [getattr(value, "_Namespace__attrs")]  # noqa: B009, not this class's
    total = 0
    for part in parts:
        total += LOOK + _whole_size(part, known)
        if total > MOST_CHARACTERS:
            take(total)  # refuses it
    known[id(value)] = total
    return total


def numbers_in(text: str) -> int:
    """Sum of the numbers in a format, which may be widths."""
    return sum(int(digits) for digits in re.findall(r"\d+", text))


def percent_size(text: str, values: Any) -> int:
    """Of ``text % values``, at most."""
    parts = values if isinstance(values, tuple) else (values,)
    take_whole(*parts)
    largest = max((_whole_size(part, {}) for part in parts), default=0)
    widths = sum(abs(part) for part in parts if isinstance(part, int)) if "*" in text else 0
    return len(text) + numbers_in(text) + widths + text.count("%") * largest


def take_pieces(text: str, name: str, sep: Any = None, maxsplit: int = -1, **keepends: bool) -> None:
    """Counts what ``split``, ``rsplit`` or ``splitlines`` is about to make of a text."""
    separators = SPACES if sep is None else (sep,)
    if name == "splitlines":
        separators, maxsplit = LINE_ENDS, -1
    pieces = 1 + sum(map(text.count, separators))
    take(NEW_ELEMENT * (pieces if maxsplit < 0 else min(pieces, maxsplit + 1)))


def take_joined(separator: str, parts: Any) -> Any:
    """Counts what is about to be joined, and gives the parts back: those of an iterator come only once."""
    if isinstance(parts, str):
        take(NEW_ELEMENT * len(parts))
    else:
        parts = list(parts)
        take_whole(parts)
    take(len(parts) * (1 + len(separator)))
    return parts


def replaced_size(text: str, old: str, new: str, count: int | None = None) -> int:
    """Of a text after ``replace``, at most."""
    times = text.count(old)
    if count is not None and count >= 0:
        times = min(times, count)
    return len(text) + times * max(len(new) - len(old), 0)


def product_size(left: Any, right: Any) -> int:
    """Of ``left * right`` where one is a text or list."""
    number, value = (left, right) if isinstance(left, int) else (right, left)
    return size(value) * number if isinstance(number, int) and not isinstance(value, int) else 0
