"""The check that every 2-bit format shares: four codes a byte, of which 3 stands for no weight."""

import torch
from torch import Tensor

from .files import TensorFiles

CHUNK_BYTES = 1 << 20
"""Bytes that are checked at a time, so that the temporaries stay in the second-level cache."""


def check_codes(files: TensorFiles, name: str, packed: Tensor) -> None:
    """Raises CheckpointError when a byte of the uint8 tensor ``packed`` holds the code 3."""
    for start, chunk in enumerate(torch.split(packed.view(-1), CHUNK_BYTES)):
        both_bits = chunk & (chunk >> 1) & 0b01010101
        if both_bits.any():
            at = int(both_bits.nonzero()[0])
            raise files.error(
                name,
                "four 2-bit codes in {0, 1, 2} a byte",
                f"a code 3 in byte {start * CHUNK_BYTES + at} (0x{int(chunk[at]):02x})",
            )
