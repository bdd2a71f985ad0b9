"""What a GGUF file says about a model's sizes and parts.

Keys and architectures are in architectures.py. What no key says, tensors do: the vocabulary is as large as
the embedding, the head is tied where there is no "output", and biases and norms inside projections are there
where they have tensors.

Numbers are float32 in a file; `floats.decimal` turns them into what config.json would have.
"""

import math
from typing import Any

from ...decoder.config import DecoderConfig
from ..errors import CheckpointError
from .architectures import (
    ACTIVATION_BITS_KEY,
    ARCHITECTURE_KEY,
    ARCHITECTURES,
    EIGHT_BIT_TYPES,
    GLOBAL_EVERY,
    HARMLESS,
    HEAD_DIM_KEYS,
    HIDDEN_ACTIVATION_KEY,
    HIDDEN_ACTIVATIONS,
    KEYS,
    LOCAL_HEAD_DIM_KEYS,
    LOCAL_ROPE_THETA,
    PATTERN_KEY,
    REFUSED_ARCHITECTURES,
    ROPE_THETA,
    ROTATED_PREFIX,
    Architecture,
)
from .floats import decimal
from .header import GgufFile
from .names import OUTSIDE
from .rope import read_rope_scaling
from .text import token_ids


def architecture_of(files: GgufFile) -> Architecture:
    """The architecture that a file names.

    Raises:
        CheckpointError: it is not known, or the file has what is not supported with any architecture.
    """
    for key in files.metadata:
        if key.startswith(ROTATED_PREFIX):
            raise _error(files, key, "no such key: weights in a rotated basis are not supported", "it")
    name = files.metadata.get(ARCHITECTURE_KEY)
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    given = f"{name!r:.200}"
    if isinstance(name, str) and name in REFUSED_ARCHITECTURES:
        given += f", which has {REFUSED_ARCHITECTURES[name]}"
    raise _error(files, ARCHITECTURE_KEY, " or ".join(map(repr, ARCHITECTURES)), given)


def read_settings(files: GgufFile) -> DecoderConfig:
    """The configuration of a file's model, of the class of its family.

    ``group_size`` is for `WeightReader.complete` to find out.

    Raises:
        CheckpointError: a key is missing, out of range, or asks for something that is not supported.
    """
    architecture = architecture_of(files)
    reader = _Reader(files, architecture)
    reader.refuse_the_unsupported()
    fields: dict[str, Any] = {
        "tie_word_embeddings": f"{OUTSIDE['lm_head']}.weight" not in files.tensors,
        "activation_bits": reader.activation_bits(),
        "rope_theta": ROPE_THETA,
        **architecture.fields,
        **reader.biases_and_norms(),
    }
    for key in KEYS:
        if key.windows and not architecture.windows:
            continue
        value = reader.number(key.name, key.kind, required=key.required)
        if value is not None:
            fields[key.field] = value
    fields["vocab_size"] = reader.vocab_size(fields["hidden_size"])
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if fields.get("query_scale") == 0.0:  # as good as absent
        del fields["query_scale"]
    activation = reader.activation()
    if activation is not None:
        fields["activation"] = activation
    if architecture.windows:
        _complete_gemma(reader, fields)
    fields |= token_ids(files, fields["vocab_size"])
    try:
        config = architecture.family.config(**fields)
        reader.check_head_dim(config)
        scaling = read_rope_scaling(files, architecture.name, config)
        return config.replace(rope_scaling=scaling)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{files.file}: {error}") from None


def _complete_gemma(reader: "_Reader", fields: dict[str, Any]) -> None:
    """What llama.cpp takes for granted about Gemma 3."""
    fields["embedding_scale"] = float(fields["hidden_size"]) ** 0.5
    if (
        "query_scale" not in fields and fields["num_hidden_layers"] == 62
    ):  # the 27B; others have head_dim^-0.5
        fields["query_scale"] = (fields["hidden_size"] / fields["num_attention_heads"]) ** -0.5
    if fields.get("window", 0) == 0:
        fields.pop("local_rope_theta", None)
        return
    fields["local_layers"] = reader.local_layers(fields["num_hidden_layers"])
    fields.setdefault("local_rope_theta", LOCAL_ROPE_THETA)
    if not fields["local_layers"]:
        fields["window"] = 0


class _Reader:
    """Reads and checks single keys of a file."""

    def __init__(self, files: GgufFile, architecture: Architecture) -> None:
        self.files, self.architecture = files, architecture

    def get(self, name: str) -> Any:
        """The value of a key of the architecture, or None."""
        return self.files.metadata.get(f"{self.architecture.name}.{name}")

    def error(self, name: str, expected: str, given: Any) -> CheckpointError:
        """The error to raise about a key of the architecture."""
        return _error(self.files, f"{self.architecture.name}.{name}", expected, f"{given!r:.200}")

    def number(self, name: str, kind: type, *, required: bool = False) -> Any:
        """A number that is the same for all layers, where a list has one for each."""
        value = self.get(name)
        if value is None:
            if required:
                raise _error(self.files, f"{self.architecture.name}.{name}", "this key", "nothing")
            return None
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise self.error(name, "the same number for all layers", value[:20])
            value = value[0]
        if kind is int:
            if type(value) is not int or not 0 <= value < 2**31:
                raise self.error(name, "an int in [0, 2^31)", value)
            return value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(name, "a finite number", value)
        return decimal(value)

    def refuse_the_unsupported(self) -> None:
        """Raises for a key that changes what the model computes in a way that it cannot here."""
        for name, harmless in HARMLESS.items():
            value = self.get(name)
            if value is not None and value not in harmless:
                expected = " or ".join(map(repr, harmless)) or "no such key"
                raise self.error(name, f"{expected}, because more is not supported", value)
        window, context = self.get("attention.sliding_window"), self.get("context_length")
        if not self.architecture.windows and type(window) is int and 0 < window < (context or 0):
            raise self.error("attention.sliding_window", "no window below context_length", window)

    def vocab_size(self, hidden_size: int) -> int:
        """The rows of the embedding, which has ``hidden_size`` columns."""
        name = f"{OUTSIDE['model.embed_tokens']}.weight"
        stored = self.files.tensors.get(name)
        if stored is None or len(stored.shape) != 2 or stored.shape[1] != hidden_size:
            given = "no such tensor" if stored is None else f"shape {list(stored.shape)}"
            raise CheckpointError.at(
                self.files.file, f"tensor {name!r}", f"an embedding of shape [V, {hidden_size}]", given
            )
        return stored.shape[0]

    def activation_bits(self) -> int:
        """Ours where the key is there, else by what is known of architecture and types."""
        bits = self.files.metadata.get(ACTIVATION_BITS_KEY)
        if bits is not None:
            if type(bits) is not int or bits not in (8, 16):
                raise _error(self.files, ACTIVATION_BITS_KEY, "8 or 16", f"{bits!r:.200}")
            return bits
        eight = any(stored.dtype in EIGHT_BIT_TYPES for stored in self.files.tensors.values())
        return 8 if eight or self.architecture.eight_bits or self._has("attn_q_norm_in.weight") else 16

    def biases_and_norms(self) -> dict[str, bool]:
        """Parts that are there where they have tensors."""
        return {
            "attention_bias": self._has("attn_q.bias"),
            "attention_output_bias": self._has("attn_output.bias"),
            "mlp_bias": self._has("ffn_gate.bias"),
            "projection_norms": self._has("attn_q_norm_in.weight"),
        }

    def _has(self, name: str) -> bool:
        return f"blk.0.{name}" in self.files.tensors

    def activation(self) -> str | None:
        """What "hidden_activation" names, or None."""
        name = self.get(HIDDEN_ACTIVATION_KEY)
        if name is None:
            return None
        if not isinstance(name, str) or name not in HIDDEN_ACTIVATIONS:
            raise self.error(HIDDEN_ACTIVATION_KEY, " or ".join(map(repr, HIDDEN_ACTIVATIONS)), name)
        return HIDDEN_ACTIVATIONS[name]

    def local_layers(self, layers: int) -> tuple[int, ...]:
        """The local layers: all but every n-th, or those that a list of truths names."""
        if layers > len(self.files.tensors):
            raise self.error("block_count", "layers that have tensors", layers)
        pattern = self.get(PATTERN_KEY)
        if isinstance(pattern, list):
            if len(pattern) != layers or not all(isinstance(local, bool) for local in pattern):
                raise self.error(PATTERN_KEY, f"{layers} bools, one for each layer", pattern[:20])
            return tuple(layer for layer, local in enumerate(pattern) if local)
        period = GLOBAL_EVERY if pattern is None else pattern
        if type(period) is not int or not 0 <= period < 2**31:
            raise self.error(PATTERN_KEY, "how many layers one global layer is among", pattern)
        return tuple(layer for layer in range(layers) if period == 0 or layer % period < period - 1)

    def check_head_dim(self, config: DecoderConfig) -> None:
        """Raises where heads have parts that are not rotated, or keys and values of different sizes."""
        for name in (*HEAD_DIM_KEYS, *LOCAL_HEAD_DIM_KEYS):
            value = self.get(name)
            if value is not None and value != config.head_dim:
                raise self.error(name, f"head_dim = {config.head_dim}, like the other keys of heads", value)


def _error(files: GgufFile, key: str, expected: str, given: str) -> CheckpointError:
    return CheckpointError.at(files.file, f"key {key!r:.200}", expected, given)
