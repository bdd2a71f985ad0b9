"""GGUF files of random weights, written with our writer.

A block of a quantised type is random bytes with a sensible scale, in ternary types of codes that stand for a
weight; so files of types that we only read can be written too.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitnet_ops import DecoderConfig
from bitnet_ops.checkpoint.gguf.architectures import ARCHITECTURE_KEY, ARCHITECTURES
from bitnet_ops.checkpoint.gguf.names import OUTSIDE, PROJECTIONS, layer_names
from bitnet_ops.checkpoint.gguf.settings_out import settings_metadata
from bitnet_ops.checkpoint.gguf.types import TYPES, TensorType
from bitnet_ops.checkpoint.gguf.write import TensorToWrite, write_gguf

TYPE = {type_.name: type_ for type_ in TYPES}

SCALE_AT = {"Q4_0": 0, "Q2_0": 0, "Q2_0_128": 0, "PQ2_0": 0, "TQ2_0": 64, "Q6_K": 208}
"""Where a block has its float16 scale. IQ2_BN has a float32 one in front of each row."""

LARGEST = {"Q4_0": 8, "Q6_K": 32 * 127}
"""Times the scale: the largest weight of a block. 1 in ternary types."""

PATTERN_BLOCKS = 10_000
"""So many random blocks follow one another again and again."""


def write_random(
    file: Path, config: DecoderConfig, architecture: str, projections: str, matrices: str
) -> None:
    """Writes a model of random weights.

    Args:
        file: to write.
        config: its sizes, and the norms that it has.
        architecture: what the file says that it is.
        projections: type of the projections' blocks.
        matrices: type of the embedding, which is the head as well.
    """
    metadata = {
        ARCHITECTURE_KEY: architecture,
        "general.name": file.stem,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
        **settings_metadata(config, ARCHITECTURES[architecture]),
    }
    tensors = [_matrix("token_embd", TYPE[matrices], config.vocab_size, config.hidden_size)]
    for layer in range(config.num_hidden_layers):
        for module, name in layer_names(config.post_norms).items():
            name = f"blk.{layer}.{name}"
            if module in PROJECTIONS:
                tensors.append(_matrix(name, TYPE[projections], *_projection(config, module)))
            elif (size := _norm(config, module)) is not None:
                tensors.append(_ones(name, size))
    tensors.append(_ones(OUTSIDE["model.norm"], config.hidden_size))
    write_gguf(file, metadata, tensors)


def bytes_read(config: DecoderConfig, projections: str, matrices: str) -> int:
    """What a decoded token reads of such a file: all projections, and the head."""
    layer = sum(TYPE[projections].nbytes(_projection(config, module)) for module in PROJECTIONS)
    head = TYPE[matrices].nbytes((config.vocab_size, config.hidden_size))
    return config.num_hidden_layers * layer + head


def _projection(config: DecoderConfig, module: str) -> tuple[int, int]:
    """Rows and columns."""
    name = module.rpartition(".")[2]
    rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    rows |= {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    columns = {"o_proj": config.q_size, "down_proj": config.intermediate_size}
    return rows.get(name, config.hidden_size), columns.get(name, config.hidden_size)


def _norm(config: DecoderConfig, module: str) -> int | None:
    """The size of a norm; None where this model has none."""
    name = module.rpartition(".")[2]
    if name in ("q_norm", "k_norm"):
        return config.head_dim if config.qk_norm else None
    if name in ("attn_sub_norm", "ffn_sub_norm") and not config.sub_norms:
        return None
    return {"attn_sub_norm": config.q_size, "ffn_sub_norm": config.intermediate_size}.get(
        name, config.hidden_size
    )


def _matrix(name: str, type_: TensorType, rows: int, columns: int) -> TensorToWrite:
    shape = (rows, columns)
    return TensorToWrite(f"{name}.weight", type_, shape, lambda: _random(type_, shape))


def _ones(name: str, size: int) -> TensorToWrite:
    return TensorToWrite(f"{name}.weight", TYPE["F32"], (size,), torch.ones(size).view(torch.uint8))


def _random(type_: TensorType, shape: tuple[int, int]) -> Tensor:
    """The bytes of a matrix whose products keep the size of their input."""
    size = shape[1] ** -0.5
    pattern = _pattern(type_)
    if type_.name == "F16":
        return _repeated(pattern.mul(size).half().view(torch.uint8), type_.nbytes(shape))
    if type_.name in SCALE_AT:
        at = SCALE_AT[type_.name]
        # They differ: blocks that share one scale would be loaded as rows with one.
        spread = torch.rand(len(pattern), 1, generator=torch.Generator().manual_seed(1)) + 0.5
        scale = (spread * size / LARGEST.get(type_.name, 1)).half()
        pattern = pattern.clone()
        pattern[:, at : at + 2] = scale.view(torch.uint8)
    data = _repeated(pattern, type_.nbytes(shape) - shape[0] * type_.row_bytes)
    if not type_.row_bytes:
        return data
    scales = torch.full((shape[0], 1), size, dtype=torch.float32).view(torch.uint8)
    return torch.cat([scales, data.view(shape[0], -1)], 1).view(-1)


@cache
def _pattern(type_: TensorType) -> Tensor:
    """Random blocks, uint8 [blocks, bytes], their scales not set; of F16 float32 numbers."""
    generator = torch.Generator().manual_seed(0)
    if type_.name == "F16":
        return torch.randn(PATTERN_BLOCKS, generator=generator)
    size = (PATTERN_BLOCKS, type_.block_bytes)
    pattern = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    if not type_.ternary:
        return pattern
    four = torch.cartesian_prod(*[torch.arange(3)] * 4) << torch.tensor([0, 2, 4, 6])
    codes = four.sum(1).to(torch.uint8)
    return codes[pattern.long() % len(codes)]


def _repeated(pattern: Tensor, count: int) -> Tensor:
    flat = pattern.reshape(-1)
    return flat.repeat(-(-count // flat.numel()))[:count]
