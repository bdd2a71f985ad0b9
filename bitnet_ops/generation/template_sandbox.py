"""Jinja's sandbox with bounds on time and memory, for templates of unknown origin.

The sandbox keeps templates from Python's insides and from changing what they are given. Here they also end,
and make no text larger than `MOST_CHARACTERS` (template_bounds.py):

    loops, macros, blocks         `Rewriter` puts a call of `step` into each
    calls                         are steps, too
    + - * / // % **               measured in `call_binop`
    ~, slices, comparisons        have no hook in Jinja: `Rewriter` makes calls of them
    methods of texts, lists, ...  those of `METHODS`; some are measured before they run
    filters and tests             template_filters.py
    what is written               `written`

What is not known to be bounded is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

from .template_bounds import (
    CALL,
    MOST_CHARACTERS,
    check_bits,
    check_number,
    numbers_in,
    percent_size,
    product_size,
    replaced_size,
    size,
    step,
    take,
    take_joined,
    take_pieces,
    take_whole,
)
from .template_filters import bounded_filters, bounded_tests, compare, names
from .template_rewriter import GenerationBlocks, Rewriter

METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        names(
            "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii "
            "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust "
            "lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit "
            "rstrip split splitlines startswith strip swapcase title upper zfill"
        ),
    ),
    (dict, names("copy get items keys values")),
    (list, names("copy count index")),
    (tuple, names("count index")),
    (range, names("count index")),
    (int, names("bit_length")),
    (float, names("is_integer")),
    (type, names("")),  # such as dict.fromkeys
)
"""By the type that has them."""

PADDING = ("center", "ljust", "rjust", "zfill")

SCOPES = ("_loop_vars", "_block_vars")
"""What Jinja itself passes with a call."""

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


class Sandbox(ImmutableSandboxedEnvironment):
    """Where templates are compiled and run. `start` opens the budget of a rendering."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # These settings are what published chat templates are written against.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
        self.finalize = self.written
        del self.globals["lipsum"]
        self.filters, self.tests = bounded_filters(), bounded_tests()

    def compiled(self, template: str) -> jinja2.Template:
        """The template with the counters in it."""
        return self.from_string(Rewriter().visit(self.parse(template)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measures a result before it is made."""
        check_number(left)
        check_number(right)
        if operator == "%" and isinstance(left, str):
            take(percent_size(left, right))
        elif operator == "+":
            take(size(left) + size(right))
        elif operator == "*":
            take(product_size(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * max(right, 0))
        result = super().call_binop(context, operator, left, right)
        check_number(result)
        return self.held(result)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Counts a call, and measures those of methods."""
        owner = getattr(called, "__self__", None)
        if owner is self:  # of `Rewriter`
            return called(*args)
        step()
        passed = {name: value for name, value in kwargs.items() if name not in SCOPES}
        if isinstance(called, type) or isinstance(owner, LoopContext):  # dict(...), loop.changed(...)
            take_whole(*args, *passed.values())
        known = next((names for kind, names in METHODS if isinstance(owner, kind)), None)
        if known is None and not isinstance(called, BuiltinFunctionType):
            return super().call(context, called, *args, **kwargs)
        name = called.__name__
        if known is None or name not in known:
            raise SecurityError(f"expected a method that templates may use, got {name!r}")
        take(CALL + size(owner))
        take_whole(*args)
        if isinstance(owner, str):
            args = _measured_text_method(owner, name, args, passed)
            called = self.wrap_str_format(called) or called
        elif name in ("count", "index"):
            take_whole(owner)
        result = super().call(context, called, *args, **kwargs)
        take(size(result))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Measures a key: it is hashed, and written where it is missing."""
        take_whole(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``"...".format`` with measured fields."""
        if getattr(value, "__name__", None) not in ("format", "format_map"):
            return None
        text = getattr(value, "__self__", None)
        if not isinstance(text, str):
            return None
        formatter = (
            _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)
        )

        def call(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            return type(text)(formatter.vformat(text, args, kwargs))

        return call

    # Names that templates cannot use themselves

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The text of a macro, of a block that is set, or of all."""
        kept, total = [], 0
        for part in parts:
            total += len(part)
            if total > MOST_CHARACTERS:
                take(total)  # refuses it
            kept.append(part)
        take(total)
        return "".join(kept)

    def join(self, *values: Any) -> str:
        """``a ~ b ~ c``."""
        take_whole(*values)
        return self.concat(map(str, values))

    def step(self, nodes: int) -> None:
        """Counts a round of a loop with so many parts of the template inside."""
        step(nodes)

    def written(self, value: Any) -> Any:
        """A value that is about to be written into the text."""
        take_whole(value)
        check_number(value)
        return value

    def held(self, value: Any) -> Any:
        """A value that may become a key: hashing a tuple hashes all that it holds."""
        if isinstance(value, tuple):
            take_whole(value)
        return value

    def cut(self, value: Any, start: Any, stop: Any, by: Any) -> Any:
        """``value[start:stop:by]``."""
        take(size(value))
        return value[start:stop:by]

    def compare(self, left: Any, name: str, right: Any) -> Any:
        """One of `COMPARISONS`."""
        return compare(COMPARISONS[name], left, right)


def _measured_text_method(
    text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a text's method, which is about to run."""
    if name in PADDING:
        take(max((number for number in args if isinstance(number, int)), default=0))
    elif name == "replace":
        take(replaced_size(text, *args))
    elif name in ("split", "rsplit", "splitlines"):
        take_pieces(text, name, *args, **kwargs)
    elif name == "join":
        return (take_joined(text, *args),)
    return args


class _Measured:
    """Fields of a format, measured before they are written."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        """A value, with its width."""
        take_whole(value)
        take(numbers_in(format_spec) + size(value))
        check_number(value)
        return super().format_field(value, format_spec)  # type: ignore[misc]

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """A value's str or repr where the field asks for it."""
        take_whole(value)
        take(size(value))
        return super().convert_field(value, conversion)  # type: ignore[misc]


class _Formatter(_Measured, SandboxedFormatter):
    pass


class _EscapeFormatter(_Measured, SandboxedEscapeFormatter):
    pass
