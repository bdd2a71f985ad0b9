"""Ternary (1.58-bit) language models in PyTorch, on ordinary CPUs at the speed of the memory bus."""

from importlib.metadata import version

from bitnet_ops.isa import isa, known_isas, supported_isas, use_isa  # loads the kernels
from bitnet_ops.ops import (
    lm_head,
    pack_ternary,
    quantize_activations,
    rms_norm,
    ternary_linear,
    ternary_matmul,
    unpack_ternary,
)
from bitnet_ops.packing import packed_shape

__version__ = version("bitnet_ops")

__all__ = [
    "isa",
    "known_isas",
    "lm_head",
    "pack_ternary",
    "packed_shape",
    "quantize_activations",
    "rms_norm",
    "supported_isas",
    "ternary_linear",
    "ternary_matmul",
    "unpack_ternary",
    "use_isa",
]
