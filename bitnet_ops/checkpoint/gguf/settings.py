"""What a GGUF file says about a model's sizes and parts, and which architectures are known.

Keys begin with the architecture, as in "llama.block_count". `KEYS` says which field of `DecoderConfig` each one
is. What no key says follows from the architecture (`ARCHITECTURES`) or from the tensors: the vocabulary is as
large as the embedding, the head is tied where there is no "output", and biases and norms inside projections
are there where they have tensors.

Numbers are float32 in a file. They become the shortest decimal that rounds to the same float32, so that the
1e-05 of config.json comes back as 1e-05.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from ...decoder.config import DecoderConfig
from ...families import FAMILIES, Family
from ..errors import CheckpointError
from .floats import decimal
from .header import GgufFile
from .names import OUTSIDE
from .rope import read_rope_scaling
from .text import token_ids

ARCHITECTURE_KEY = "general.architecture"
ACTIVATION_BITS_KEY = "bitnet_ops.activation_bits"
"""A key of ours: what GGUF takes for granted."""

EIGHT_BIT_TYPES = ("I2_S", "IQ1_BN", "IQ2_BN")
"""Types of programs that compute with 8-bit activations only, so of models that were trained with them."""


@dataclass(frozen=True)
class Architecture:
    """What the value of "general.architecture" stands for.

    Attributes:
        name: that value.
        family: of its models.
        fields: of `DecoderConfig` that it implies.
        permuted: whether the rows of q and k are in another order (weights.py).
        windows: whether layers may be local.
        eight_bits: whether its models were trained with 8-bit activations.
    """

    name: str
    family: Family
    fields: dict[str, Any] = field(default_factory=dict)
    permuted: bool = False
    windows: bool = False
    eight_bits: bool = False


_SQUARED_RELU = {"activation": "relu2", "sub_norms": True}
_GEMMA = {"activation": "gelu_tanh", "qk_norm": True, "post_norms": True}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("bitnet-b1.58", FAMILIES["bitnet"], _SQUARED_RELU, eight_bits=True),
        Architecture("bitnet-25", FAMILIES["bitnet"], _SQUARED_RELU, eight_bits=True),
        Architecture("bitnet", FAMILIES["llama"], {"sub_norms": True}, eight_bits=True),
        Architecture("llama", FAMILIES["llama"], permuted=True),
        Architecture("qwen3", FAMILIES.get("qwen3", FAMILIES["llama"]), {"qk_norm": True}),
        Architecture("gemma3", FAMILIES.get("gemma3_text", FAMILIES["llama"]), _GEMMA, windows=True),
    )
}

REFUSED_ARCHITECTURES = {
    "qwen35": "layers of linear attention",
    "qwen35moe": "layers of linear attention, and experts",
    "qwen3next": "layers of linear attention, and experts",
    "qwen3moe": "experts",
    "hunyuan-dense": "norms behind the rotary embedding, and no published ternary weights",
    "hunyuan-moe": "experts",
    "gemma-embedding": "attention in both directions",
    "gemma3n": "layers that are not a decoder's of this package",
}


@dataclass(frozen=True)
class Key:
    """A key and what it says.

    Attributes:
        name: behind the architecture and a dot.
        field: of `DecoderConfig`.
        kind: int (positive) or float.
        required: whether a file has to have it; otherwise the field has its default.
        windows: whether only architectures with local layers have it.
    """

    name: str
    field: str
    kind: type
    required: bool = False
    windows: bool = False


KEYS = (
    Key("block_count", "num_hidden_layers", int, required=True),
    Key("context_length", "max_position_embeddings", int, required=True),
    Key("embedding_length", "hidden_size", int, required=True),
    Key("feed_forward_length", "intermediate_size", int, required=True),
    Key("attention.head_count", "num_attention_heads", int, required=True),
    Key("attention.head_count_kv", "num_key_value_heads", int),
    Key("attention.key_length", "head_dim", int),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float, required=True),
    Key("attention.scale", "query_scale", float),
    Key("rope.freq_base", "rope_theta", float),
    Key("rope.freq_base_swa", "local_rope_theta", float, windows=True),
    Key("attention.sliding_window", "window", int, windows=True),
)

HEAD_DIM_KEYS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys that have to be head_dim where they are there; files of models with hidden_size / head_count lack them."""

PATTERN_KEY = "attention.sliding_window_pattern"
GLOBAL_EVERY = 6
"""Every sixth layer of Gemma 3 sees the whole context; its files do not say it."""

LOCAL_ROPE_THETA = 10000.0
"""Likewise."""

ROPE_THETA = 10000.0
"""Where a file does not say it."""

HIDDEN_ACTIVATION_KEY = "hidden_activation"
HIDDEN_ACTIVATIONS = {
    "relu2": "relu2",
    "relu_sqr": "relu2",
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
"""A key that llama.cpp has for other architectures, and what its values mean."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "rope.dimension_sections": (),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "nextn_predict_layers": (0,),
}
"""Keys of what is not supported, and the values with which they ask for nothing."""

ROTATED_PREFIX = "prism.hadamard."
"""Keys of Bonsai 2: its weights are in a rotated basis, and without the rotation of activations, fluent nonsense."""


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
        "vocab_size": reader.vocab_size(),
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
    if "query_scale" not in fields and fields["num_hidden_layers"] == 62:  # the 27B; others have head_dim^-0.5
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

    def vocab_size(self) -> int:
        """The rows of the embedding."""
        name = f"{OUTSIDE['model.embed_tokens']}.weight"
        stored = self.files.tensors.get(name)
        if stored is None or len(stored.shape) != 2:
            given = "no such tensor" if stored is None else f"shape {list(stored.shape)}"
            raise CheckpointError.at(self.files.file, f"tensor {name!r}", "an embedding [V, K]", given)
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
        for name in HEAD_DIM_KEYS:
            value = self.get(name)
            if value is not None and value != config.head_dim:
                raise self.error(name, f"head_dim = {config.head_dim}, like the other keys of heads", value)


def _error(files: GgufFile, key: str, expected: str, given: str) -> CheckpointError:
    return CheckpointError.at(files.file, f"key {key!r:.200}", expected, given)
