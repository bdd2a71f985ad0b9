"""The matrices of BitNet b1.58 2B4T."""

from bitnet_ops import BitNetConfig

CONFIG = BitNetConfig()
_HIDDEN, _INNER = CONFIG.hidden_size, CONFIG.intermediate_size
_KEYS = _HIDDEN // CONFIG.num_attention_heads * CONFIG.num_key_value_heads

Shape = tuple[int, int]
"""out_features, in_features."""

SHAPES: dict[str, Shape] = {
    "q_proj, o_proj": (_HIDDEN, _HIDDEN),
    "k_proj, v_proj": (_KEYS, _HIDDEN),
    "gate_proj, up_proj": (_INNER, _HIDDEN),
    "down_proj": (_HIDDEN, _INNER),
}

LAYER = [
    SHAPES[name]
    for name in (
        "q_proj, o_proj",
        "k_proj, v_proj",
        "k_proj, v_proj",
        "q_proj, o_proj",
        "gate_proj, up_proj",
        "gate_proj, up_proj",
        "down_proj",
    )
]
"""The seven of a layer, in the order in which a token meets them."""
