"""Which instruction set the kernels use: what there is, what this CPU supports, what is chosen.

The best supported one is chosen by itself. The environment variable ``BITNET_OPS_ISA`` forces one for
the whole process; ``use_isa`` switches for the length of a ``with`` block. Every instruction set gives
the same bits, so a switch only changes the time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch  # noqa: F401  brings libtorch, which the extension links against, into the process

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "bitnet_ops is not built: its extension module bitnet_ops._C does not load from "
        f"{Path(__file__).parent} ({error}). If that is a source tree: start Python elsewhere to use the "
        "installed package, or run `pip install -e . --no-build-isolation` to build here."
    ) from error

ENVIRONMENT_VARIABLE = "BITNET_OPS_ISA"


def known_isas() -> tuple[str, ...]:
    """Names of every instruction set that has kernels on this architecture, best first.

    Example:
        >>> known_isas()
        ('avx512_vbmi', 'avx512_vnni', 'avx_vnni', 'avx2', 'scalar')
    """
    return tuple(name for name, _ in _C.isas())


def supported_isas() -> tuple[str, ...]:
    """Names of the instruction sets that this CPU and operating system can execute, best first."""
    return tuple(name for name, supported in _C.isas() if supported)


def isa() -> str:
    """Name of the instruction set in use."""
    return _C.isa()


def _select(name: str, error: type[Exception], source: str) -> None:
    if not _C.select_isa(name):
        reason = "is not supported by this CPU" if name in known_isas() else "is unknown"
        raise error(f"{source}: instruction set {name!r} {reason}; supported: {', '.join(supported_isas())}")


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Uses one instruction set inside a ``with`` block, in all threads of the process.

    Args:
        name: one of ``supported_isas()``.

    Raises:
        ValueError: if the name is unknown or not supported; the text lists those that are.

    Example:
        >>> with use_isa("scalar"):
        ...     isa()
        'scalar'
    """
    before = isa()
    _select(name, ValueError, "use_isa")
    try:
        yield
    finally:
        _C.select_isa(before)


def _honour_environment() -> None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        _select(name, ImportError, ENVIRONMENT_VARIABLE)


_honour_environment()
