"""The copy of the head's table by which `ScreenedHead` rules tokens out, stored beside the table.

Making it takes a fraction of a second, memory of its own, and a look at the whole table; stored, it is mapped
like the weights. It is worth nothing beside another table than the one it was made from: wrong bounds would
give wrong tokens without a word. So it is used only in a file that we wrote and nobody changed since, and
made anew wherever that is in doubt. "quantization_config" of config.json has a digest of

    the header of the file   every byte. Its metadata holds a hash of table, codes and bounds in full, made
                             while writing, and its text is spaced as no other writer spaces it (`write`)
    the bounds               every byte
    table and codes          `SAMPLES` pieces each, at places that follow from what was digested before

which reads about 2 MB of 2B4T's 910. What it notices, certainly: a file that any other program wrote, with
our metadata or without, whatever was changed in it (rows of the table in other places, numbers, codes,
bounds); tensors or a config.json from another model's folder; another format of the copy; any byte of the
bounds changed in place. What it notices likely: table or codes changed in place in many places. What it does
not: single bytes of table or codes changed in place under an unchanged header, as a broken disk might do.

Not random numbers but the hash tells models apart, so that a model saved twice gives the same files.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decoder.config import DecoderConfig
from ..decoder.head import FORMAT, ScreenedHead, copy_tensors
from ..layers.memory import HugePages
from .files import TensorFiles
from .tensor_source import TORCH_DTYPE, TensorSource, tensor_bytes

CODES, BOUNDS = "screened_head.codes", "screened_head.bounds"
FIELD = "screened_head"
CHUNK_ROWS = 1024
"""Rows that are looked at together; a few MB at 2560 columns."""

SAMPLES = 64
SAMPLE_BYTES = 4096  # a page: less is not read from a disk
"""Of a tenth of the pages changed, 64 samples miss all one time in 850."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def table_name(config: DecoderConfig) -> str:
    """The name of the tensor that makes scores."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def head_to_store(head: ScreenedHead | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to save with a model, and the metadata of the file that they go into.

    None where the table holds a NaN or an infinity, which `from_pretrained` looks for in other tables only.
    """
    if head is None or not all(is_finite(rows) for rows in head.weight.detach().split(CHUNK_ROWS)):
        return {}, {}
    # Made anew, because `ScreenedHead.is_current` does not see what was changed by way of ``weight.data``.
    head = ScreenedHead(head.weight.detach())
    content = hashlib.sha256()
    for tensor in (head.weight, head.codes, head.bounds):
        for rows in tensor.split(CHUNK_ROWS):
            content.update(tensor_bytes(rows.contiguous()))
    return {CODES: head.codes, BOUNDS: head.bounds}, {FIELD: content.hexdigest()}


def binding(folder: Path, table: str) -> dict[str, Any]:
    """What to write into "quantization_config" about the files just written to a folder."""
    files = TensorFiles(folder, mmap=False)
    with files:
        return {FIELD: {"format": FORMAT, "digest": _digest(files, table)}} if stored_names(files) else {}


def stored_names(files: TensorSource) -> list[str]:
    """The names of the copy's tensors, where the files have them."""
    return [name for name in (CODES, BOUNDS) if name in files.tensors]


def is_bound(files: TensorFiles, quantization: Any, table: str) -> bool:
    """Whether the files are, as far as it can be told, those that we wrote: a finite table and its copy."""
    entry = quantization.get(FIELD) if isinstance(quantization, dict) else None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        return False
    stored = [files.tensors.get(name) for name in (table, CODES, BOUNDS)]
    if any(one is None or one.dtype not in TORCH_DTYPE or one.nbytes == 0 for one in stored):
        return False
    return entry.get("digest") == _digest(files, table)


def stored_head(files: TensorSource, table: Tensor) -> tuple[Tensor, Tensor] | None:
    """The copy out of files that `is_bound` has passed, if its shapes are those of this version's."""
    for name, expected in zip((CODES, BOUNDS), copy_tensors(table), strict=True):
        stored = files.tensors[name]
        if (stored.shape, TORCH_DTYPE[stored.dtype]) != expected:
            return None
    memory = HugePages()
    return files.tensor_of_every_token(CODES, memory), files.tensor_of_every_token(BOUNDS, memory)


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    # The extremes are NaN where a number is.
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _digest(files: TensorFiles, table: str) -> str:
    digest = hashlib.sha256()
    for name in (table, CODES, BOUNDS):  # all in one file, as we write them, or the digest is another
        digest.update(files.header_digest(name))
    for name in (BOUNDS, table, CODES):
        pieces = -(-files.tensors[name].nbytes // SAMPLE_BYTES)
        whole = name == BOUNDS or pieces <= SAMPLES
        for sample in range(pieces if whole else SAMPLES):
            piece = sample if whole else int.from_bytes(digest.digest()[:8], "little") % pieces
            digest.update(files.part(name, piece * SAMPLE_BYTES, SAMPLE_BYTES))
    return digest.hexdigest()
