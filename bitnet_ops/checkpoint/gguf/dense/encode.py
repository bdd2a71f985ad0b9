"""From floats to the bytes of a dense tensor: F32, F16, BF16, Q8_0, Q6_K. decode.py draws them."""

import torch
from torch import Tensor

from ..types import TensorType
from .decode import CHUNK, FLOATS
from .q6_k import encode_q6_k


def quantize(type: TensorType, matrix: Tensor) -> Tensor:
    """The bytes of a tensor.

    F16 and BF16 are rounded to the nearest number. Q8_0 has the scale that makes the largest of 32 numbers
    127; the bytes are those of llama.cpp. Q6_K searches for scales of small squared error.

    Args:
        type: F32, F16, BF16, Q8_0 or Q6_K.
        matrix: any float dtype, of any shape [..., K] that the blocks fit.

    Returns:
        uint8 [type.nbytes(matrix.shape)].

    Raises:
        ValueError: another type, K does not fit the blocks, or a number is a NaN, infinite, or too large for
            the type.
    """
    if type.name not in FLOATS and type.name not in ("Q8_0", "Q6_K"):
        raise ValueError(f"expected F32 or F16 or BF16 or Q8_0 or Q6_K, got {type.name}")
    if not matrix.is_floating_point():
        raise ValueError(f"expected a matrix of floats, got {matrix.dtype}")
    data = torch.empty(type.nbytes(tuple(matrix.shape)), dtype=torch.uint8)
    if data.numel() == 0:
        return data
    blocks = CHUNK // type.block
    chunks = matrix.detach().reshape(-1).split(blocks * type.block)
    for numbers, part in zip(chunks, data.split(blocks * type.block_bytes), strict=True):
        part.copy_(_encode(type, numbers.float()).view(-1))
    return data


def _encode(type: TensorType, numbers: Tensor) -> Tensor:
    size = numbers.abs().amax()  # a NaN wins
    if not size.isfinite():
        raise ValueError("expected finite numbers, got a NaN or an infinity")
    if type.name in FLOATS:
        stored = largest = numbers.to(FLOATS[type.name])
    elif type.name == "Q8_0":
        stored, largest = _q8_0(numbers.view(-1, 32))
    else:
        stored, largest = encode_q6_k(numbers.view(-1, 256))
    if not largest.abs().amax().isfinite():
        raise ValueError(f"expected numbers that {type.name} can hold, got {size.item()!r}")
    return stored.view(torch.uint8)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    d = blocks.abs().amax(1, keepdim=True) / 127
    inverse = 1 / d
    inverse[inverse.isinf()] = 0  # all numbers are 0, or too small for d in float16
    scaled = blocks * inverse
    # Half away from 0, as C rounds.
    size = scaled.abs()
    whole = size.floor()
    q = (whole + (2 * (size - whole)).floor()).copysign(scaled).to(torch.int8)
    stored = d.to(torch.float16)
    return torch.cat([stored.view(torch.uint8), q.view(torch.uint8)], 1), stored
