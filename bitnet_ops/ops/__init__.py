"""The operators: typed functions over ``torch.ops.bitnet_ops``, with fake kernels and gradients.

Each one equals its namesake in ``bitnet_ops.reference``: integers bit for bit, floats to rounding.
Results do not depend on the instruction set, the number of threads or the batch (docs/numerics.md).
All of them work under ``torch.compile(fullgraph=True)``.

The kernels run on the CPU. All operators without packed weights also accept tensors on a
GPU, where the reference runs, so that the same model trains there.

A wrong argument raises a ``RuntimeError`` that names the operator, the argument, what was expected and
what was given.
"""

from ._attention import attention, cached_attention
from ._decoder import decoder_layers
from ._embedding import embedding
from ._glu import glu
from ._head import gumbel_noise, lm_head, lm_head_top_k, screen_lm_head
from ._norm import rms_norm
from ._packing import find_bad_byte, pack_ternary, pack_two_bits, repack_ternary, unpack_ternary
from ._ternary import quantize_activations, ternary_linear, ternary_matmul

__all__ = [
    "attention",
    "cached_attention",
    "decoder_layers",
    "embedding",
    "find_bad_byte",
    "glu",
    "gumbel_noise",
    "lm_head",
    "lm_head_top_k",
    "pack_ternary",
    "pack_two_bits",
    "quantize_activations",
    "repack_ternary",
    "rms_norm",
    "screen_lm_head",
    "ternary_linear",
    "ternary_matmul",
    "unpack_ternary",
]
