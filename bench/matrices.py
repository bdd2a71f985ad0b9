"""The matrices of BitNet b1.58 2B4T, with random weights, and the operator on them."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_ops import BitNetConfig, ops

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

STREAM_BYTES = 256 << 20
"""Many times the last-level cache: weights that are visited in turn and come from memory every time."""


def random_packed(shape: Shape, layout: str = "tile16") -> Tensor:
    """Random ternary weights."""
    return ops.pack_ternary(torch.randint(-1, 2, shape, dtype=torch.int8), layout)


def more_than_caches_hold(shape: Shape, layout: str = "tile16") -> list[Tensor]:
    """Copies of one packed matrix."""
    packed = random_packed(shape, layout)
    return [packed.clone() for _ in range(-(-STREAM_BYTES // packed.nbytes))]


def linear(
    shape: Shape, layout: str = "tile16", bits: int = 8, group: int = 0, active: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """`ops.ternary_linear` as a function of x and packed weights."""
    out_features, in_features = shape
    scales = (-(-in_features // group), out_features) if group else (out_features,)
    weight_scale = torch.full(scales, in_features**-0.5)
    return lambda x, packed: ops.ternary_linear(
        x, packed, weight_scale, None, out_features, layout, bits, group, active
    )
