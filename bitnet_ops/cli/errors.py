"""Errors on the command line: what a user can cause is one line, not a traceback."""

import contextlib
from collections.abc import Iterator

import click


@contextlib.contextmanager
def expected_errors() -> Iterator[None]:
    """Turns errors that a user can cause into one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error
