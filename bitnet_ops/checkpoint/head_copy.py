"""The copy of the head's table by which `ScreenedHead` rules tokens out, stored beside the table.

Making it takes a fraction of a second and memory of its own; stored, it is mapped like the weights. It is
worth nothing beside another table than the one it was made from, so "quantization_config" of config.json has
a checksum of the table, against accidents, and the format of the copy. Where either differs, a copy is made
anew.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..decoder.head import FORMAT, ScreenedHead, copy_tensors
from .files import TORCH_DTYPE, TensorFiles

CODES, BOUNDS = "screened_head.codes", "screened_head.bounds"
FIELD = "screened_head"
CHUNK_ROWS = 1024
"""Rows that are looked at together; a few MB at 2560 columns."""


def checksum(table: Tensor, done: Callable[[Tensor], None] = lambda rows: None) -> int:
    """A number that another table hardly has: sums of chunks, folded in order.

    Args:
        table: [V, K] of any dtype.
        done: is called with rows that have been read.
    """
    total = 0
    for rows in table.split(CHUNK_ROWS):
        numbers = rows.contiguous().view(torch.int16) if rows.dtype.itemsize == 2 else rows.view(torch.int32)
        total = (total * 0x9E3779B97F4A7C15 + int(numbers.sum(dtype=torch.int64))) % 2**64
        done(rows)
    return total


def head_to_store(head: ScreenedHead | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to save with a model, and what to write into "quantization_config"."""
    if head is None:
        return {}, {}
    entry = {"format": FORMAT, "table": checksum(head.weight.detach())}
    return {CODES: head.codes, BOUNDS: head.bounds}, {FIELD: entry}


def stored_names(files: TensorFiles) -> list[str]:
    """The names of the copy's tensors, where the files have them."""
    return [name for name in (CODES, BOUNDS) if name in files.tensors]


def stored_head(
    files: TensorFiles, quantization: dict[str, Any], table: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The copy, if there is one and it is that of this table."""
    entry = quantization.get(FIELD)
    if len(stored_names(files)) != 2 or not isinstance(entry, dict) or entry.get("format") != FORMAT:
        return None
    for name, expected in zip((CODES, BOUNDS), copy_tensors(table), strict=True):
        stored = files.tensors[name]
        if (stored.shape, TORCH_DTYPE.get(stored.dtype)) != expected:
            return None
    if entry.get("table") != checksum(table, files.forget):
        return None
    return files.tensor(CODES), files.tensor(BOUNDS)
