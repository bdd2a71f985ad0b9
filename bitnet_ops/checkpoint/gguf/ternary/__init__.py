"""Ternary weights in GGUF files.

- layout.py: what a layout consists of
- two_bits.py: layouts with two bits a weight, drawn
- base3.py: layouts with five weights a byte, drawn
- matrix.py: rows and scales of a tensor, and back
"""

from .matrix import decode_rows, encode, group_size, pack_codes, scales

__all__ = ["decode_rows", "encode", "group_size", "pack_codes", "scales"]
