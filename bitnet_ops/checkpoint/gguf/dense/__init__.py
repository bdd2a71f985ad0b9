"""Dense matrices in GGUF files, those of embeddings, heads and norms.

- decode.py: bytes to floats, every layout drawn
- encode.py: floats to bytes
- q6_k.py: the search for good scales of Q6_K
"""

from .decode import dequantize
from .encode import quantize

__all__ = ["dequantize", "quantize"]
