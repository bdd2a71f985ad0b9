"""The matrices of BitNet b1.58 2B4T, with random weights, and the operator on them."""

import mmap
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from bitnet_ops import BitNetConfig, ops, packing

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


def on_large_pages(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that lie one after another in 2 MB pages, where the system grants them."""
    sizes = [tensor.nbytes for tensor in tensors]
    memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pieces = torch.frombuffer(memory, dtype=torch.uint8).split(sizes)
    return [piece.view(tensor.shape).copy_(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


@lru_cache(maxsize=2)  # the layouts of one size of pages: tests that need them take turns
def all_layers(layout: str, large_pages: bool) -> list[tuple[Shape, Tensor]]:
    """Every matrix of the model, in the order in which a token meets them."""
    packed = {shape: random_packed(shape, layout) for shape in SHAPES.values()}
    shapes = LAYER * CONFIG.num_hidden_layers
    weights = [packed[shape] for shape in shapes]
    copies = on_large_pages(weights) if large_pages else [w.clone() for w in weights]
    return list(zip(shapes, copies, strict=True))


def linear(
    shape: Shape, layout: str = "tile16", bits: int = 8, group: int = 0, active: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """`ops.ternary_linear` as a function of x and packed weights."""
    out_features, in_features = shape
    scales = (-(-in_features // group), out_features) if group else (out_features,)
    weight_scale = torch.full(scales, in_features**-0.5)
    if group:
        weight_scale = packing.pack_scales(weight_scale)
    return lambda x, packed: ops.ternary_linear(
        x, packed, weight_scale, None, out_features, layout, bits, group, active
    )
