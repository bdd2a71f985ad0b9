"""Jinja's filters and tests, measured: none takes long or makes a large text unseen (template_bounds.py).

Before a filter runs, its arguments are counted, and by `MEASURES` its result where that may be larger. What
writes, compares or hashes lists is given only lists that are small as a whole.
"""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from .template_bounds import (
    CALL,
    LOOK,
    MOST_CHARACTERS,
    NEW_ELEMENT,
    check_number,
    is_container,
    percent_size,
    replaced_size,
    size,
    take,
    take_joined,
    take_whole,
)


def names(text: str) -> frozenset[str]:
    """Words as a set."""
    return frozenset(text.split())


LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that no chat needs and whose time or result is hard to bound."""

LOOK_INSIDE = names(
    "attr batch count d default first items join last length list map reject rejectattr reverse select "
    "selectattr slice sum tojson"
)
"""Filters that do not write, compare or hash what the containers that they are given hold."""

AT_ONCE = names("attr count d default first items last length")
"""Filters that take as long for a long list as for a short one."""

COMPARING = names("groupby max min sort unique")

CUTTING = COMPARING | names("batch list map reject rejectattr select selectattr slice")
"""Filters that take a text for a list of characters."""

MOST_INDENT = 1000

MOST_DECIMALS = 300
"""A float has no more."""


def bounded_filters() -> dict[str, Any]:
    """Filters by name, for an environment."""
    kept = {name: _bounded(name, function) for name, function in FILTERS.items() if name not in LEFT_OUT}
    return kept | {"tojson": to_json}


def bounded_tests() -> dict[str, Any]:
    """Tests by name, for an environment."""
    return {name: _bounded_test(name, test) for name, test in TESTS.items()}


def compare(comparison: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """A comparison of two values, or whether one is in the other."""
    if isinstance(right, Iterator):
        right = list(right)
    if isinstance(left, str) and isinstance(right, str):
        take(len(right))
    elif is_container(left) or (is_container(right) and not isinstance(right, dict)):
        take_whole(left, right)
    return comparison(left, right)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with measured arguments and results."""
    skip = int(hasattr(function, "jinja_pass_arg"))  # a context or environment comes first
    measure = MEASURES.get(name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        passed, value, values = args[:skip], args[skip], args[skip + 1 :]
        if name in COMPARING and isinstance(value, Iterator):
            value = list(value)
        take(CALL if name in AT_ONCE else CALL + size(value))
        if name in CUTTING and isinstance(value, str):
            take(NEW_ELEMENT * len(value))
        if name not in LOOK_INSIDE:
            take_whole(value, *values, *kwargs.values())
        if measure is not None:
            value = measure(value, *values, **kwargs)
        result = function(*passed, value, *values, **kwargs)
        check_number(result)
        take(size(result))
        return result

    return call


def _measure_batch(value: Any, linecount: int, fill_with: Any = None) -> Any:
    take(LOOK * linecount)
    return value


def _measure_center(value: Any, width: int = 80) -> Any:
    take(width)
    return value


def _measure_format(value: Any, *args: Any, **kwargs: Any) -> Any:
    take(percent_size(str(value), kwargs or args))
    return value


def _measure_indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    lines = str(s).count("\n") + 1
    take(len(str(s)) + lines * (len(width) if isinstance(width, str) else width))
    return s


def _measure_join(value: Any, d: Any = "", attribute: Any = None) -> Any:
    take_whole(d)
    return take_joined(str(d), value)


def _measure_replace(s: Any, old: Any, new: Any, count: int | None = None) -> Any:
    take(replaced_size(str(s), str(old), str(new), count))
    return s


def _measure_round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > MOST_DECIMALS:
        raise SecurityError(f"expected at most {MOST_DECIMALS} decimals, got {precision}")
    return value


def _measure_slice(value: Any, slices: int, fill_with: Any = None) -> Any:
    take(NEW_ELEMENT * slices)
    return value


def _measure_sum(iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):  # adding lists one by one copies them again and again
        raise SecurityError(f"expected a number to start a sum with, got a {type(start).__name__}")
    return iterable


MEASURES: dict[str, Callable[..., Any]] = {
    "batch": _measure_batch,
    "center": _measure_center,
    "format": _measure_format,
    "indent": _measure_indent,
    "join": _measure_join,
    "replace": _measure_replace,
    "round": _measure_round,
    "slice": _measure_slice,
    "sum": _measure_sum,
}
"""Of filters whose result may be larger than what they are given. They give the first argument back."""


def _bounded_test(name: str, test: Any) -> Callable[..., Any]:
    """The test with measured arguments."""

    @functools.wraps(test)
    def call(*args: Any, **kwargs: Any) -> Any:
        take(CALL)
        if name in ("odd", "even", "divisibleby") and not all(isinstance(n, (int, float)) for n in args):
            raise SecurityError(f"expected numbers to test with {name!r}, got others")  # % of a text
        if name in ("lower", "upper"):
            take_whole(*args)
        return compare(test, *args) if len(args) == 2 and not kwargs else test(*args, **kwargs)

    return call


def to_json(value: Any, indent: int | str | None = None, ensure_ascii: bool = False) -> str:
    """Jinja's own filter escapes < and > for HTML, which is not what a model was trained on."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > MOST_INDENT:
        raise SecurityError(f"expected an indent of at most {MOST_INDENT}")
    take_whole(value)
    pieces, total = [], 0
    for piece in json.JSONEncoder(indent=indent, ensure_ascii=ensure_ascii).iterencode(value):
        total += len(piece)
        if total > MOST_CHARACTERS:
            break
        pieces.append(piece)
    take(total)
    return "".join(pieces)
