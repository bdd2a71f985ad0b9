"""What a model will take in memory, from the headers of its files.

Nothing is loaded. Weights are read only where a format leaves the size of groups to them.

The figures are those of a process that generates text with one row. Weights that are mapped files
count as well: they are resident while they are used, though the system may take them back.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import packing
from ..decoder.config import DecoderConfig
from ..decoder.head import LEAST_BYTES, copy_tensors
from ..layers.linear import best_layout, native_layouts
from .folder import open_folder
from .gguf.open import open_gguf
from .location import locate
from .opened import OpenCheckpoint
from .packed import PackedWeights
from .tensor_source import TORCH_DTYPE
from .weights import projection_shapes

PREFILL_TOKENS = 256
"""Of a pass over a prompt, as `bitnet_ops.generation.loop` cuts it."""

CACHE_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.int8: 1}


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by what takes them.

    Attributes:
        context: tokens that the cache is for.
        weights: packed projections with scales, and norms.
        table: embedding and head, where they are in memory as a whole; 0 where rows are read from the file.
        table_in_file: embedding and head where rows are read from the file. Not part of the total.
        head_copy: the copy by which the certified head rules tokens out.
        cache: keys and values of ``context`` tokens.
        activations: of a pass over a prompt, and of the head's scores.
        tokenizer: `TOKENIZER_FACTOR` times its file.
        program: Python with torch and this package, as resident in this process before.
    """

    context: int
    weights: int
    table: int
    table_in_file: int
    head_copy: int
    cache: int
    activations: int
    tokenizer: int
    program: int

    @property
    def total(self) -> int:
        """What a process takes at its peak."""
        parts = (self.weights, self.table, self.head_copy, self.cache, self.activations)
        return sum(parts) + self.tokenizer + self.program


def memory_report(
    model: str | os.PathLike[str], context: int | None = None, cache_dtype: torch.dtype = torch.float32
) -> MemoryReport:
    """Predicts what generating with a model takes.

    Args:
        model: as for `bitnet_ops.from_pretrained`.
        context: tokens of prompt and text together; the default is 512, or less where the model ends before.
        cache_dtype: of keys and values: torch.float32, bfloat16 or int8.

    Raises:
        CheckpointError: as `from_pretrained`, for what headers and settings say.
        ValueError: ``context`` is more than the model can hold, or less than 1.
    """
    program = _resident_bytes()  # before anything of the model is read
    path = locate(model)
    if path.is_file():
        opened = open_gguf(path, dense=False, mmap=None)
        tokenizer = 0
    else:
        opened = open_folder(path, dense=False, mmap=None)
        file = path / "tokenizer.json"
        tokenizer = file.stat().st_size if file.exists() else 0
    with opened as checkpoint:
        config = checkpoint.weights.complete(checkpoint.config, checkpoint.files)
        most = config.max_position_embeddings
        context = min(512, most) if context is None else context
        if not 1 <= context <= most:
            raise ValueError(f"context: expected 1 to {most}, the model's own limit, got {context}")
        table, in_file, copy = _table_bytes(checkpoint, config)
        width = -(-config.head_dim // 16) * 16
        room = -(-context // 64) * 64
        rows = 2 * config.num_hidden_layers * config.num_key_value_heads * room
        cache = rows * (width * CACHE_BYTES[cache_dtype] + (4 if cache_dtype == torch.int8 else 0))
        return MemoryReport(
            context,
            _weight_bytes(checkpoint, config),
            table,
            in_file,
            copy,
            cache,
            _activation_bytes(config, min(context, PREFILL_TOKENS)),
            TOKENIZER_FACTOR * tokenizer,
            program,
        )


TOKENIZER_FACTOR = 12
"""Bytes in memory for a byte of tokenizer.json: each token is kept twice, in hash tables (measured)."""


def _weight_bytes(checkpoint: OpenCheckpoint, config: DecoderConfig) -> int:
    """Projections in the layout that they will have here, their scales, and norms in float32."""
    files, weights = checkpoint.files, checkpoint.weights
    total = 0
    for name, (outputs, inputs) in projection_shapes(config).items():
        layout = best_layout()
        if isinstance(weights, PackedWeights):
            stored = weights.layout_of(name)
            layout = stored if stored in native_layouts() else layout
        total += _ternary_bytes(outputs, inputs, "tile16" if config.group_size else layout, config.group_size)
    norms = sum(
        stored.shape[0] for name, stored in files.tensors.items() if len(stored.shape) == 1 and "norm" in name
    )
    return total + 4 * norms


def _ternary_bytes(outputs: int, inputs: int, layout: str, group_size: int) -> int:
    """Of a packed matrix and its scales: float32 for rows, mostly float16 for groups."""
    rows, blocks, block = packing.packed_shape(outputs, inputs, layout)
    scales = 2 * -(-inputs // group_size) if group_size else 4
    return rows * blocks * block + scales * outputs


def _table_bytes(checkpoint: OpenCheckpoint, config: DecoderConfig) -> tuple[int, int, int]:
    """Of embedding and head: in memory, in the file, and the copy for the certified head."""
    files, weights = checkpoint.files, checkpoint.weights
    shape = (config.vocab_size, config.hidden_size)
    in_memory = in_file = copy = 0
    tables = [("model.embed_tokens", config.ternary_embedding)]
    if not config.tie_word_embeddings:
        tables.append(("lm_head", config.ternary_head))
    for name, ternary in tables:
        if ternary:
            in_memory += _ternary_bytes(*shape, "tile16", config.group_size)
            continue
        stored = files.tensors.get(f"{weights.stored_name(name)}.weight")
        known = stored is not None and stored.dtype in TORCH_DTYPE
        size = shape[0] * shape[1] * (TORCH_DTYPE[stored.dtype].itemsize if stored and known else 2)
        if isinstance(weights, PackedWeights):  # mapped
            in_file += size
        else:
            in_memory += size
        if name == tables[-1][0] and size >= LEAST_BYTES:
            shapes = copy_tensors(torch.empty(shape, device="meta"))
            copy = sum(torch.Size(sizes).numel() * dtype.itemsize for sizes, dtype in shapes)
    return in_memory, in_file, copy


def _activation_bytes(config: DecoderConfig, tokens: int) -> int:
    """A pass over ``tokens`` of a prompt: the residual stream and its like, q k v, gate and up."""
    row = 2 * config.hidden_size + config.q_size + 2 * config.kv_size + 2 * config.intermediate_size
    # Scores and bounds of one token are kept by the head.
    return 4 * tokens * row + 2 * 4 * config.vocab_size


def _resident_bytes() -> int:
    """Resident memory of this program, 0 where the system has no /proc."""
    file = Path("/proc/self/status")
    if not file.exists():
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", file.read_text(encoding="ascii"))
    return int(found[1]) * 1024 if found else 0
