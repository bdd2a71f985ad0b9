"""Checks of fields whose values may come from a file of unknown origin."""

from typing import Any


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError where one of these fields is not a positive int."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{type(config).__name__}.{name}: expected a positive int, got {value!r}")


def check_number(config: Any, name: str, low: float, high: float, *, above: bool = False) -> None:
    """Raises ValueError where a field is not a number in [low, high), or with ``above`` in (low, high)."""
    value = getattr(config, name)
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value < high or (above and value == low):
        expected = f"a number in {'(' if above else '['}{low}, {high})"
        raise ValueError(f"{type(config).__name__}.{name}: expected {expected}, got {value!r}")
