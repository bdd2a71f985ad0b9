"""From a `DecoderConfig` to the metadata of a GGUF file: what settings.py and rope.py read, written.

A file holds a model if what it says reads back as the same model. So the metadata is read here as a file's
would be (`check_expressible`), and a model that would come back as another one is refused.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...decoder.config import DecoderConfig, RopeScaling
from ...decoder.pooling import EmbeddingSettings
from ..tensor_source import StoredTensor, TensorSource
from .architectures import (
    ACTIVATION_BITS_KEY,
    ARCHITECTURES,
    GLOBAL_EVERY,
    HEAD_DIM_KEYS,
    KEYS,
    PATTERN_KEY,
    Architecture,
)
from .header import GgufFile
from .names import ROPE_FACTORS
from .rope import CONTEXT_KEY, HIGH_KEY, LLAMA3_CONTEXT, LLAMA3_HIGH, LLAMA3_LOW, LOW_KEY, llama3_factors
from .settings import read_settings
from .text import BOS_KEY, END_KEYS, PAD_KEY, POOLINGS

ADD_EOS_KEY = "tokenizer.ggml.add_eos_token"

FOUND = (
    "group_size",
    "ternary_embedding",
    "ternary_head",
    "initializer_range",
    "dropout",
)
"""Fields that weights say, or that only training needs."""

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that are not compared: the ids in a file are those of configuration, defaults of generation
and tokenizer together."""

BIASED = ("llama",)
"""Architectures whose programs know all biases."""

NORMED = ("qwen3", "gemma3")
"""Architectures whose programs know norms inside projections."""


def architecture_for(config: DecoderConfig) -> Architecture:
    """The architecture whose programs compute what the model does.

    Raises:
        ValueError: none does; the text says which part is too much.
    """
    if config.sub_norms:
        name = "bitnet-b1.58" if config.activation == "relu2" else "bitnet"
    elif config.qk_norm:
        name = "gemma3" if config.post_norms else "qwen3"
    else:
        name = "llama"
    architecture = ARCHITECTURES[name]
    biases = config.attention_bias or config.attention_output_bias or config.mlp_bias
    for part, there, known in (
        ("biases", biases, BIASED),
        ("projection_norms", config.projection_norms, NORMED),
        ("rope_scaling " + (config.rope_scaling.kind if config.rope_scaling else ""),
         config.rope_scaling is not None and config.rope_scaling.kind in ("llama3", "factors"), ("llama",)),
        ("head of its own", name == "bitnet" and not config.tie_word_embeddings, ()),
    ):  # fmt: skip
        if there and name not in known:
            where = f"only of {' and '.join(map(repr, known))}" if known else "not"
            raise ValueError(f"GGUF architecture {name!r} has no {part.strip()} ({where})")
    return architecture


def settings_metadata(config: DecoderConfig, architecture: Architecture) -> dict[str, Any]:
    """The keys of the architecture, and ours."""
    values: dict[str, Any] = {"vocab_size": config.vocab_size}
    for key in KEYS:
        value = getattr(config, key.field)
        # No program looks at "attention.scale" in these architectures; the check refuses another one.
        known = key.field != "query_scale" and (not key.windows or (architecture.windows and config.window))
        if value is not None and known:
            values[key.name] = float(value) if key.kind is float else value
    values |= dict.fromkeys(HEAD_DIM_KEYS, config.head_dim)
    if architecture.windows and config.window:
        every_sixth = tuple(n for n in range(config.num_hidden_layers) if (n + 1) % GLOBAL_EVERY)
        if config.local_layers != every_sixth:
            values[PATTERN_KEY] = [n in config.local_layers for n in range(config.num_hidden_layers)]
    scaling = config.rope_scaling
    if scaling is not None:
        values |= _scaling_values(scaling)
    metadata = {f"{architecture.name}.{name}": value for name, value in values.items()}
    metadata[ACTIVATION_BITS_KEY] = config.activation_bits
    if scaling is not None and scaling.kind == "llama3":
        if scaling.low_freq_factor != LLAMA3_LOW:
            metadata[LOW_KEY] = float(scaling.low_freq_factor)
        if scaling.high_freq_factor != LLAMA3_HIGH:
            metadata[HIGH_KEY] = float(scaling.high_freq_factor)
    return metadata


def _scaling_values(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        context = scaling.original_max_position_embeddings
        return {} if context == LLAMA3_CONTEXT else {CONTEXT_KEY: context}
    if scaling.kind == "factors":
        return {}
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        CONTEXT_KEY: scaling.original_max_position_embeddings,
    }
    default = RopeScaling("yarn", scaling.factor)
    for name in ("beta_fast", "beta_slow"):
        if getattr(scaling, name) != getattr(default, name):
            values[f"rope.scaling.yarn_{name}"] = float(getattr(scaling, name))
    if scaling.rotation_scale != default.rotation_scale:
        values["rope.scaling.attn_factor"] = scaling.rotation_scale / default.rotation_scale
    return values


def rope_factors(config: DecoderConfig) -> Tensor | None:
    """What the tensor "rope_freqs.weight" holds, float32 [head_dim / 2], or None where a file has none."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "factors"):
        return None
    if scaling.kind == "factors":
        return torch.tensor(scaling.factors, dtype=torch.float32)
    return llama3_factors(config, scaling)


def with_all_ends(
    config: DecoderConfig, generation_config: dict[str, Any], settings: EmbeddingSettings | None
) -> DecoderConfig:
    """The configuration with all ids that end a text, for a file has no defaults of generation.

    The first one is that of embeddings, where they have one: a tokenizer appends no other.

    Raises:
        ValueError: they are more than GGUF has keys for.
    """
    more = generation_config.get("eos_token_id")
    more = more if isinstance(more, (list, tuple)) else [more]
    first = None if settings is None else settings.eos_token_id
    ends = tuple(dict.fromkeys(end for end in (first, *config.eos_token_ids, *more) if end is not None))
    if len(ends) > len(END_KEYS):
        raise ValueError(f"GGUF has keys for {len(END_KEYS)} ids that end a text, got {list(ends)}")
    return config.replace(eos_token_id=ends or None)


def token_metadata(config: DecoderConfig) -> dict[str, Any]:
    """The keys of special tokens."""
    metadata: dict[str, Any] = dict(zip(END_KEYS, config.eos_token_ids, strict=False))
    for key, token in ((BOS_KEY, config.bos_token_id), (PAD_KEY, config.pad_token_id)):
        if token is not None:
            metadata[key] = token
    return metadata


def embedding_metadata(settings: EmbeddingSettings | None, architecture: Architecture) -> dict[str, Any]:
    """The keys of how vectors are made of texts. Prompts and a longest text have none, and are left out.

    Raises:
        ValueError: there is no key for something that changes every vector.
    """
    if settings is None:
        return {}
    for name, wanted in (("normalize", True), ("default_prompt_name", None)):
        value = getattr(settings, name)
        if value != wanted:
            raise ValueError(f"GGUF has no key for embedding_settings.{name}={value!r}")
    metadata: dict[str, Any] = {}
    for number, pooling in POOLINGS.items():
        if pooling == settings.pooling:
            metadata[f"{architecture.name}.pooling_type"] = number
    if settings.eos_token_id is not None:
        metadata |= {ADD_EOS_KEY: True, END_KEYS[0]: settings.eos_token_id}
    return metadata


def check_expressible(
    config: DecoderConfig,
    architecture: Architecture,
    metadata: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Checks that a file of this metadata is read as a model of this configuration.

    Args:
        config: of the model.
        architecture: of the file.
        metadata: of the file.
        shapes: of its tensors, by GGUF's names.

    Raises:
        ValueError: it is read as another one, or not at all.
    """
    try:
        again = read_settings(_Planned(metadata, shapes, rope_factors(config)))
    except ValueError as error:
        raise ValueError(f"GGUF architecture {architecture.name!r} cannot say it: {error}") from None
    lost = []
    for field in vars(config):
        ours, theirs = getattr(config, field), getattr(again, field)
        if field == "query_scale":
            ours, theirs = config.score_scale, again.score_scale
        if field in FOUND or field in TOKENS or ours == theirs:
            continue
        if field == "rope_scaling" and _same_rotation(config, again):
            continue
        if isinstance(ours, float) and isinstance(theirs, float) and _float32(ours) == _float32(theirs):
            continue  # all that the kernels see
        lost.append(f"{field}={ours!r}")
    if lost:
        raise ValueError(f"GGUF architecture {architecture.name!r} has no key for {', '.join(lost)}")


def _same_rotation(config: DecoderConfig, again: DecoderConfig) -> bool:
    frequencies = [
        reference.rotary_frequencies(one.head_dim, one.rope_theta, one.rope_scaling)
        for one in (config, again)
    ]
    scales = [1.0 if one.rope_scaling is None else one.rope_scaling.rotation_scale for one in (config, again)]
    return torch.equal(*frequencies) and _float32(scales[0]) == _float32(scales[1])


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


class _Planned(GgufFile):
    """The header of a file that is not there yet, as `GgufFile` would have read it."""

    def __init__(
        self, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], factors: Tensor | None
    ) -> None:
        TensorSource.__init__(self, mmap=False)
        self.file = Path("the file")
        self.metadata = {
            key: _float32(value) if isinstance(value, float) else value for key, value in metadata.items()
        }
        self.tensors = {name: StoredTensor(self.file, "F32", shape, 0, 0) for name, shape in shapes.items()}
        self._factors = factors

    def read(self, name: str, empty: Any = torch.empty) -> Tensor:
        """The factors, the only tensor that is read for settings."""
        assert name == ROPE_FACTORS
        assert self._factors is not None
        return self._factors
