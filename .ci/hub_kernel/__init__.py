"""Ternary (1.58-bit) linear layers on CPUs: operators, a packed layer, and layers for ``kernelize``.

    kernel = get_kernel("owner/bitnet-ops", version=0, trust_remote_code=True)
    layer = kernel.BitLinear.from_linear(torch.nn.Linear(2560, 6912, bias=False))   # 2 bits a weight
    y = layer(torch.randn(4, 2560))

`layers` has the forward passes that ``kernels.kernelize`` puts into the layers of other packages. Everything
here is made of the sources of bitnet_ops, which runs whole models, and gives the same bits.
"""

from . import layers
from .isa import isa, known_isas, supported_isas, use_isa
from .layers.linear import BitLinear, best_layout
from .ops import (
    attention,
    cached_attention,
    embedding,
    glu,
    lm_head,
    lm_head_top_k,
    pack_ternary,
    quantize_activations,
    repack_ternary,
    rms_norm,
    screen_lm_head,
    ternary_linear,
    ternary_matmul,
    unpack_ternary,
)
from .packing import packed_shape

__all__ = [
    "BitLinear",
    "attention",
    "best_layout",
    "cached_attention",
    "embedding",
    "glu",
    "isa",
    "known_isas",
    "layers",
    "lm_head",
    "lm_head_top_k",
    "pack_ternary",
    "packed_shape",
    "quantize_activations",
    "repack_ternary",
    "rms_norm",
    "screen_lm_head",
    "supported_isas",
    "ternary_linear",
    "ternary_matmul",
    "unpack_ternary",
    "use_isa",
]
