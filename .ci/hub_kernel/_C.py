"""The extension. Every build names it anew, as the namespace in `_ops`, which the builder writes."""

from . import _ops


def __getattr__(name):
    return getattr(getattr(_ops, _ops.ops.name), name)
