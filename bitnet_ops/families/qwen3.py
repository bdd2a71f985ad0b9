"""Qwen3-class models with ternary projections: a Llama with norms over each head of queries and keys.

Checkpoints: prism-ml/Ternary-Bonsai-1.7B, -4B, -8B (float weights that are ternary already, or MLX's two
bits). head_dim is a field of its own, so that queries may be wider than the hidden state. Modules have our
names but for the norms inside projections, as in llama.py.
"""

from typing import Any

from ..decoder.config import DecoderConfig
from .family import SAME_NAMES, Family, SettingError
from .llama import LLAMA


def _read(data: dict[str, Any]) -> dict[str, Any]:
    """Checks that no layer has a window; published models have the fields of one and leave it off."""
    window, first = data.get("sliding_window"), data.get("max_window_layers", 28)
    on = data.get("use_sliding_window") not in (False, None) and window is not None
    if on and not (type(first) is int and first >= data["num_hidden_layers"]):
        raise SettingError("use_sliding_window", "false", f"{data['use_sliding_window']!r:.200}")
    kinds = data.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise SettingError("layer_types", "'full_attention' in all layers", f"{kinds!r:.200}")
    return {"qk_norm": True}


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    config=DecoderConfig,
    activations={"silu": "silu"},
    defaults={"rms_norm_eps": 1e-6, "head_dim": 128},
    same=(*SAME_NAMES, "head_dim", "attention_bias"),  # attention_bias: in o_proj as well
    only=(("partial_rotary_factor", None, (None, 1.0, 1)),),
    rope_kinds=LLAMA.rope_kinds,
    projection_norms=True,
    published=LLAMA.published,
    read=_read,
)
