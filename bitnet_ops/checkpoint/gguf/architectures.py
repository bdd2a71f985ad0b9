"""The architectures of GGUF that are known, and the keys of their settings, in tables to read and to write.

A key begins with the architecture, as in "llama.block_count". `KEYS` says which field of `DecoderConfig` each
one is; what no key says follows from the architecture, or from the tensors that a file has (settings.py).
"""

from dataclasses import dataclass, field
from typing import Any

from ...families import Family
from ...families.bitnet import BITNET
from ...families.gemma3 import GEMMA3
from ...families.llama import LLAMA
from ...families.one_bit_llm import ONE_BIT_LLM
from ...families.qwen3 import QWEN3

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
        Architecture("bitnet-b1.58", BITNET, _SQUARED_RELU, eight_bits=True),
        Architecture("bitnet-25", BITNET, _SQUARED_RELU, eight_bits=True),
        Architecture("bitnet", ONE_BIT_LLM, {"sub_norms": True}, eight_bits=True),
        Architecture("llama", LLAMA, permuted=True),
        Architecture("qwen3", QWEN3, {"qk_norm": True}),
        Architecture("gemma3", GEMMA3, _GEMMA, windows=True),
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
"""Keys that have to be head_dim where they are there."""

LOCAL_HEAD_DIM_KEYS = ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")
"""Likewise; nobody writes them for Gemma 3, whose layers all have heads of one size."""

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
"""Keys of Bonsai 2, whose weights are in a rotated basis: who ignores that gets fluent nonsense."""
