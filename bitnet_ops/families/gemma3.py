"""Gemma 3 (arXiv:2503.19786), the text model, and BitNet-embedding-270M, whose body it is.

Beside a Llama it has norms over each head of queries and keys, norms behind attention and feed-forward block,
and layers of two kinds: most see a window of the last tokens, with a rotary base of their own; some see all.

Modules have our names. Settings that follow from others:

    embedding_scale    sqrt(hidden_size), as in a float32 model of transformers. Its bfloat16 models round
                       this number to bfloat16, too (640: 25.25 for 25.298); here everything is float32.
    query_scale        query_pre_attn_scalar ** -0.5
    window             sliding_window, which counts the token itself in both
    local_layers       layer_types, or all but every sixth (sliding_window_pattern)
    rope_scaling       of the layers that see all

Norms are stored as w of (1 + w), but for those inside projections.

A folder of transformers 5 has rotary settings for each kind of layer, ``{"full_attention": {...},
"sliding_attention": {...}}`` in "rope_parameters"; before, there were "rope_theta", "rope_scaling" and
"rope_local_base_freq". Versions before 5.18 add "rope_theta" and "rope_type" beside the two where
all layers are of one kind, and do not look at them.
"""

from typing import Any

from ..decoder.config import DecoderConfig
from .family import SAME_NAMES, Family, SettingError

HEAD_DIM = QUERY_PRE_ATTN_SCALAR = 256
SLIDING_WINDOW = 4096
PATTERN = 6
THETA, LOCAL_THETA = 1e6, 1e4
"""What absent fields mean to transformers' Gemma3TextConfig."""

LOCAL, GLOBAL = "sliding_attention", "full_attention"

MOST_LAYERS = 10_000
"""So that a list of kinds stays small, whatever number a file has."""


def _normalize(data: dict[str, Any]) -> dict[str, Any]:
    """Moves "rope_parameters" of the two kinds of layers to the fields that were there before."""
    both = data.get("rope_parameters")
    if not isinstance(both, dict) or not both.keys() & {LOCAL, GLOBAL}:
        return data
    unknown = both.keys() - {LOCAL, GLOBAL, "rope_theta", "rope_type"}
    if unknown:
        raise SettingError("rope_parameters", f"{GLOBAL} and {LOCAL}", f"also {sorted(unknown)!r:.200}")
    moved = data | {"rope_parameters": both.get(GLOBAL)}
    local = both.get(LOCAL)
    if local is None:
        return moved
    where = f"rope_parameters.{LOCAL}"
    if not isinstance(local, dict):
        raise SettingError(where, "an object", f"{local!r:.200}")
    if local.get("rope_type", "default") != "default" or local.keys() - {"rope_type", "rope_theta"}:
        raise SettingError(where, "rope_type 'default' and a rope_theta", f"{local!r:.200}")
    base = local.get("rope_theta")
    if base is None:
        return moved
    if data.get("rope_local_base_freq") not in (None, base):
        raise SettingError(
            "rope_local_base_freq",
            f"{where}.rope_theta = {base!r:.80}",
            f"{data['rope_local_base_freq']!r:.80}",
        )
    return moved | {"rope_local_base_freq": base}


def _number(data: dict[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; the rest is for `DecoderConfig` to check."""
    value = data.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise SettingError(name, "a number in (0, 1e12)", f"{value!r:.200}")
    return value


def _local_layers(data: dict[str, Any]) -> tuple[int, ...]:
    """The numbers of the layers that see a window."""
    layers = data["num_hidden_layers"]
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise SettingError("num_hidden_layers", f"an int in [1, {MOST_LAYERS}]", f"{layers!r:.200}")
    kinds = data.get("layer_types")
    if kinds is None:
        pattern = data.get("sliding_window_pattern", PATTERN)
        if type(pattern) is not int or pattern < 1:
            raise SettingError("sliding_window_pattern", "a positive int", f"{pattern!r:.200}")
        return tuple(layer for layer in range(layers) if (layer + 1) % pattern)
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not all(kind in (LOCAL, GLOBAL) for kind in kinds)
    ):
        raise SettingError(
            "layer_types", f"{layers} times {LOCAL!r} or {GLOBAL!r}, one for each layer", f"{kinds!r:.200}"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == LOCAL)


def _read(data: dict[str, Any]) -> dict[str, Any]:
    local = _local_layers(data)
    scalar = _number(data, "query_pre_attn_scalar", QUERY_PRE_ATTN_SCALAR)
    window = data.get("sliding_window", SLIDING_WINDOW)
    if local and (type(window) is not int or window < 1):
        raise SettingError(
            "sliding_window", "a positive int, because some layers have one", f"{window!r:.200}"
        )
    return {
        "qk_norm": True,
        "post_norms": True,
        "embedding_scale": _number(data, "hidden_size") ** 0.5,
        "query_scale": None if scalar == data.get("head_dim", HEAD_DIM) else scalar**-0.5,
        "window": window if local else 0,
        "local_layers": local,
        "local_rope_theta": _number(data, "rope_local_base_freq", LOCAL_THETA) if local else None,
    }


def _write_more(config: DecoderConfig) -> dict[str, Any]:
    local, scale = set(config.local_layers), config.score_scale
    scalar = round(scale**-2) if 1e-6 < scale <= 1.0 else 0
    fields: dict[str, Any] = {
        # Where no whole number says it, query_scale is written beside the family's fields.
        "query_pre_attn_scalar": scalar if scalar and scalar**-0.5 == scale else config.head_dim,
        "layer_types": [LOCAL if layer in local else GLOBAL for layer in range(config.num_hidden_layers)],
    }
    if local:
        fields["sliding_window"] = config.window
    if config.local_rope_theta is not None:
        fields["rope_local_base_freq"] = config.local_rope_theta
    return fields


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    config=DecoderConfig,
    activations={"gelu_pytorch_tanh": "gelu_tanh"},
    activation_field="hidden_activation",
    defaults={
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": THETA,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    same=(*SAME_NAMES, "head_dim", "attention_bias"),  # attention_bias: in o_proj as well
    only=(
        ("attn_logit_softcapping", None, (None,)),
        ("final_logit_softcapping", None, (None,)),
        ("use_bidirectional_attention", None, (None, False)),
    ),
    rope_kinds=("linear",),
    projection_norms=True,
    published=(("_proj.linear", "_proj"), ("_proj.norm", "_proj.rms_norm")),
    norm_offset=1.0,
    normalize=_normalize,
    read=_read,
    write_more=_write_more,
)
