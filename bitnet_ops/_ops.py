"""The operators that the extension registers, and their namespace.

A kernel for the Hugging Face hub has another file of this name with the same two names in it: there the
namespace is its own, so that kernels and an installed bitnet_ops run in one process (.ci/hub_kernel.py).
"""

import torch

from . import isa  # noqa: F401  loads the library, which registers the operators

ops = torch.ops.bitnet_ops


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator, as ``torch.library`` takes it."""
    return f"bitnet_ops::{op_name}"
