"""Writes a model as a GGUF file: its metadata and its tensors.

Projections, and a ternary embedding and head, are written in one of four types. What is in a block of each is
drawn in ternary/.

    type     bits    scales                     K              read by
    i2_s     2       one float32 a matrix       any [1]        bitnet.cpp, bitnet_ops
    tq1_0    1.69    float16 of 256 inputs      256 divides    llama.cpp, bitnet_ops
    tq2_0    2.06    float16 of 256 inputs      256 divides    llama.cpp, bitnet_ops
    q2_0     2.25    float16 of 64 inputs       64 divides     llama.cpp since July 2026, bitnet_ops

[1] 128 divides the number of weights. Where float16 does not hold a scale exactly, other programs have it
rounded; ours finds it in the key "bitnet_ops.weight_scale.NAME" (matrix.py).
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...layers.matrix import TernaryMatrix
from ...layers.norm import RMSNorm
from ..pieces import one_thread
from ..saveable import check_saveable
from ..weights import may_have_ternary_tables, tables
from .architectures import ARCHITECTURE_KEY, Architecture
from .dense import quantize
from .matrix import WEIGHT_SCALE_PREFIX
from .names import ROPE_FACTORS, attention_part, gguf_name
from .scales_out import scales_for, stored_scales
from .settings_out import (
    architecture_for,
    check_expressible,
    embedding_metadata,
    rope_factors,
    settings_metadata,
    token_metadata,
    with_all_ends,
)
from .ternary import encode
from .text import MODEL_KEY, TEMPLATE_KEY
from .tokenizer import tokenizer_metadata
from .types import TYPES, TensorType
from .write import TensorToWrite, write_gguf

if TYPE_CHECKING:
    from ...decoder.model import LanguageModel

_TYPE = {type_.name: type_ for type_ in TYPES}

GGUF_TYPES = {name.lower(): _TYPE[name] for name in ("I2_S", "TQ1_0", "TQ2_0", "Q2_0")}
"""Of ternary matrices, by the names that users give."""

GGUF_HEADS = {name.lower(): _TYPE[name] for name in ("F16", "Q8_0", "Q6_K", "BF16", "F32")}
"""Of embedding and head, likewise."""

DEFAULT_HEAD = "f16"

FILE_TYPES = {"I2_S": 40, "TQ1_0": 36, "TQ2_0": 37, "Q2_0": 41}
"""Values of "general.file_type" in bitnet.cpp (the first) and llama.cpp."""

QUANTIZATION_VERSION = 2
"""Of ggml's blocks."""


def save_gguf(
    model: "LanguageModel",
    file: str | os.PathLike[str],
    *,
    type: str | None = None,
    head: str | None = None,
    name: str | None = None,
) -> str:
    """Writes a packed model as a GGUF file, with its tokenizer and its chat template.

    `from_pretrained` gives the same ternary weights and scales again, bit for bit. A file of that name is
    replaced when the new one is whole.

    Args:
        model: with `BitLinear` projections.
        file: name of the file, mostly ending in ".gguf".
        type: of projections. "i2_s" is that of bitnet.cpp, with one scale for each matrix. "tq1_0" and
            "tq2_0" are those of llama.cpp, for inner sizes that 256 divides. "q2_0", of llama.cpp since July
            2026, has a scale for each 64 inputs. None takes the first that holds the model: for BitNet
            architectures in the order i2_s, tq2_0, q2_0; for others tq2_0, q2_0, i2_s.
        head: of embedding and head: "f16", "q8_0" (inner size a multiple of 32), "q6_k" (256), "bf16" or
            "f32". All but a wider float format round. None is "f16" for dense ones; ternary ones have the
            type of the projections then.
        name: the model's, for people; None for that of the file.

    Returns:
        The type of projections.

    Raises:
        ValueError: the model has something that a GGUF file cannot say, or not in this type; the text says
            what, and which types hold the model.
        OSError: the disk is full, or the file cannot be written.

    Example:
        >>> bitnet_ops.save_gguf(model, "model.gguf", type="tq2_0", head="q6_k")
        'tq2_0'
    """
    for option, value, known in (("type", type, GGUF_TYPES), ("head", head, GGUF_HEADS)):
        if value is not None and value not in known:
            raise ValueError(
                f"save_gguf: {option}: expected {' or '.join(map(repr, known))}, got {value!r:.80}"
            )
    path = Path(file)
    projections = check_saveable(model, "save_gguf")
    try:
        architecture = architecture_for(model.config)
        packed_tables = set() if head is not None else projections.keys() & set(tables(model.config).values())
        if packed_tables and not may_have_ternary_tables(model.config):
            raise ValueError(
                "a ternary embedding or head beside 8-bit activations of one scale a token would be read as "
                "floats"
            )
        written = {
            name: layer
            for name, layer in projections.items()
            if name in packed_tables or name not in tables(model.config).values()
        }
        chosen = _choose_type(written, architecture, type)
        metadata = {
            ARCHITECTURE_KEY: architecture.name,
            "general.type": "model",
            "general.name": path.stem if name is None else name,
            "general.file_type": FILE_TYPES[chosen.name],
            "general.quantization_version": QUANTIZATION_VERSION,
            **settings_metadata(model.config, architecture),
            **_text_metadata(model),
            **embedding_metadata(model.embedding_settings, architecture),
        }
        dense = GGUF_HEADS[head or DEFAULT_HEAD]
        tensors = list(_tensors(model, architecture, chosen, dense, packed_tables, metadata))
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        check_expressible(model.config, architecture, metadata, shapes)
    except ValueError as error:
        raise ValueError(f"save_gguf: {error}; save_pretrained writes any model") from None
    with one_thread():
        write_gguf(path, metadata, tensors)
    return chosen.name.lower()


def _choose_type(
    projections: dict[str, TernaryMatrix], architecture: Architecture, wanted: str | None
) -> TensorType:
    reasons = {name: _misfit(projections, type_) for name, type_ in GGUF_TYPES.items()}
    fitting = [name for name, reason in reasons.items() if not reason]
    usual = ("i2_s", "tq2_0", "q2_0") if architecture.eight_bits else ("tq2_0", "q2_0", "i2_s")
    for name in usual if wanted is None else (wanted,):
        if not reasons[name]:
            return GGUF_TYPES[name]
    if wanted is not None and fitting:
        raise ValueError(f"{reasons[wanted]}; {' and '.join(fitting)} would hold this model")
    raise ValueError("no type holds this model: " + ". ".join(reasons[name] for name in usual))


def _misfit(projections: dict[str, TernaryMatrix], type_: TensorType) -> str:
    """Why a type does not hold the projections; empty where it does."""
    for name, layer in projections.items():
        try:
            type_.nbytes((layer.out_features, layer.in_features))
            stored_scales(type_, scales_for(type_, layer))
        except ValueError as error:
            return f"{name}: {error}"
    return ""


def _text_metadata(model: "LanguageModel") -> dict[str, Any]:
    """Tokenizer, special tokens and template."""
    config = with_all_ends(model.config, model.generation_config or {}, model.embedding_settings)
    if model.tokenizer is None:
        metadata: dict[str, Any] = {MODEL_KEY: "none", **token_metadata(config)}
    else:
        metadata = tokenizer_metadata(model.tokenizer, config, config.vocab_size)
    if model.chat_template is not None:
        metadata[TEMPLATE_KEY] = model.chat_template
    return metadata


def _tensors(
    model: "LanguageModel",
    architecture: Architecture,
    chosen: TensorType,
    head: TensorType,
    packed_tables: set[str],
    metadata: dict[str, Any],
) -> Iterator[TensorToWrite]:
    """All tensors; scales that the type does not hold exactly go into ``metadata``.

    Embedding and head have the type ``head``, but for those that ``packed_tables`` names.
    """
    config = model.config
    factors = rope_factors(config)
    if factors is not None:
        yield _floats(ROPE_FACTORS, factors)
    for name, module in model.named_modules():
        stored = gguf_name(name, config.post_norms)
        part = attention_part(stored) if architecture.permuted else None
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(part or "", 0)
        if (
            isinstance(module, TernaryMatrix)
            and name in tables(config).values()
            and name not in packed_tables
        ):
            yield _matrix(f"{stored}.weight", module.dense(), head)
        elif isinstance(module, TernaryMatrix):
            order = _file_order(heads, module.out_features) if heads else None
            scales = scales_for(chosen, module)
            scales = scales if order is None else scales[:, order]
            rounded = stored_scales(chosen, scales)
            if not torch.equal(rounded, scales):
                metadata[f"{WEIGHT_SCALE_PREFIX}{stored}.weight"] = _shortest(scales).tolist()
            shape = (module.out_features, module.in_features)
            yield TensorToWrite(
                f"{stored}.weight", chosen, shape, partial(_encoded, chosen, module, rounded, order)
            )
            if module.bias is not None:
                yield _floats(f"{stored}.bias", module.bias if order is None else module.bias[order])
        elif isinstance(module, RMSNorm):
            yield _floats(f"{stored}.weight", module.weight)
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            yield _matrix(f"{stored}.weight", module.weight.detach(), head)


def _matrix(name: str, weight: Tensor, type_: TensorType) -> TensorToWrite:
    """Embedding or head."""
    shape = (weight.shape[0], weight.shape[1])
    try:
        type_.nbytes(shape)
    except ValueError as error:
        raise ValueError(f"head={type_.name.lower()!r}: {error}; 'f16' and 'q8_0' need less") from None
    return TensorToWrite(name, type_, shape, lambda: quantize(type_, weight.cpu()))


def _floats(name: str, values: Tensor) -> TensorToWrite:
    """A norm, a bias, or factors, in float32."""
    values = values.detach().float().cpu().contiguous()
    return TensorToWrite(name, _TYPE["F32"], tuple(values.shape), values.view(torch.uint8))


def _encoded(type_: TensorType, layer: TernaryMatrix, scales: Tensor, order: Tensor | None) -> Tensor:
    w = layer.unpack().cpu()
    return encode(type_, w if order is None else w[order], scales.contiguous())


def _file_order(heads: int, rows: int) -> Tensor:
    """Our row of each row of a file whose q or k are permuted; drawn in weights.py."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _shortest(scales: Tensor) -> Tensor:
    """Scales [G, N] as the key has them: one where all are equal, N where all groups are, or all."""
    if bool((scales == scales[:1]).all()):
        scales = scales[:1]
        if bool((scales == scales[0, 0]).all()):
            return scales[0, :1]
    return scales.flatten()
