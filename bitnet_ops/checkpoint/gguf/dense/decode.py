"""From the bytes of a dense tensor to floats: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K.

F32, F16 and BF16 are the numbers themselves. The others are blocks, of 32 numbers x or, with a K in the name,
of 256. The scales d and e and the least numbers are float16; q are integers::

    Q8_0    | d | 32 bytes |                        x[m] = d * byte m             as a signed integer

    Q4_0    | d | 16 bytes |                        x[m] = d * (q[m] - 8)
    Q4_1    | d | least | 16 bytes |                x[m] = d * q[m] + least
    Q5_0    | d | 4 bytes high | 16 bytes |         x[m] = d * (q[m] - 16)
    Q5_1    | d | least | 4 high | 16 bytes |       x[m] = d * q[m] + least

          byte m     | q[16 + m] | q[m] |           m = 0 .. 15; bits 0 to 3 of q
          bits          7 .. 4    3 .. 0
          bit 4 of q[m]  =  bit m mod 8 of byte m div 8 of the 4 high ones         (Q5_0, Q5_1)

    Q4_K    | d | e | 12 bytes a | 128 bytes |                 8 parts of 32 numbers
    Q5_K    | d | e | 12 bytes a | 32 bytes high | 128 bytes |

    x[32 i + m]  =  d * s[i] * q[32 i + m]  -  e * t[i]         i = 0 .. 7, m = 0 .. 31
    q[32 i + m]  =  (byte 32 (i div 2) + m  >>  4 (i mod 2)) & 15
                    + 16 * bit i of high byte m                 (Q5_K)
    s[i]  =  a[i] & 63                                          i < 4
             (a[4 + i] & 15) + 16 * (a[i - 4] >> 6)             i >= 4
    t[i]  =  a[4 + i] & 63                                      i < 4
             (a[4 + i] >> 4) + 16 * (a[i] >> 6)                 i >= 4

    Q6_K    | 128 bytes low | 64 bytes high | 16 bytes s, signed | d |

    x[j]  =  d * s[j div 16] * (q[j] - 32)
    q[128 g + 64 h + 32 k + m]  =  (low byte 64 g + 32 k + m  >>  4 h) & 15
                                   + 16 * ((high byte 32 g + m  >>  2 (2 h + k)) & 3)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..types import TensorType

CHUNK = 1 << 18
"""Numbers that are there in float32 at a time."""

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(type: TensorType, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers of a dense tensor.

    They are computed in float32, a chunk at a time, and rounded to ``dtype``. Whether they are finite is not
    looked at.

    Args:
        type: not a ternary one.
        data: uint8 [type.nbytes(shape)], the whole tensor as it lies in the file.
        shape: in PyTorch's order.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``dtype`` of that shape, in memory of its own.

    Raises:
        ValueError: the type is ternary or not read, or the size of ``data`` does not fit.

    Example:
        >>> Q8_0 = types_of(8)[0]
        >>> data = quantize(Q8_0, torch.linspace(0, 127, 32).view(1, 32))
        >>> dequantize(Q8_0, data, (1, 32), torch.float32)[0, -1]
        tensor(127.)
    """
    expected = type.nbytes(shape)
    if type.name not in FLOATS and type.name not in DECODERS:
        known = " or ".join((*FLOATS, *DECODERS))
        raise ValueError(f"expected {known}, got {type.name}")
    if data.dtype != torch.uint8 or data.shape != (expected,):
        raise ValueError(
            f"expected {expected} bytes for {type.name} {list(shape)}, got {data.dtype} {list(data.shape)}"
        )
    out = torch.empty(shape, dtype=dtype)
    blocks = CHUNK // type.block
    chunks = data.split(blocks * type.block_bytes)
    for part, numbers in zip(chunks, out.view(-1).split(blocks * type.block), strict=True):
        if type.name in FLOATS:
            numbers.copy_(_numbers(part, FLOATS[type.name]))
        else:
            numbers.copy_(DECODERS[type.name](part.view(-1, type.block_bytes)).view(-1))
    return out


def _numbers(data: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """The numbers in bytes [..., n], as [..., n / size of one]."""
    # A copy begins where a number may begin.
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def _bits(data: Tensor, width: int) -> Tensor:
    """The ``8 / width`` parts of each byte, low bits first: [..., n] to [..., 8 / width, n]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1)
    return (data.unsqueeze(-2) >> shifts).bitwise_and_((1 << width) - 1)


def _fifth_bits(high: Tensor) -> Tensor:
    """Bit 4 of the 32 q of Q5_0 and Q5_1 from four bytes: [blocks, 4] to [blocks, 32]."""
    return _bits(high.unsqueeze(-1), 1).flatten(1) << 4


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _numbers(blocks[:, :2]).float()


def _q4_0(blocks: Tensor) -> Tensor:
    q = _bits(blocks[:, 2:], 4).flatten(1)
    return q.float().sub_(8).mul_(_numbers(blocks[:, :2]).float())


def _q4_1(blocks: Tensor) -> Tensor:
    d, least = _numbers(blocks[:, :4]).float().split(1, 1)
    return _bits(blocks[:, 4:], 4).flatten(1).float().mul_(d).add_(least)


def _q5_0(blocks: Tensor) -> Tensor:
    q = _bits(blocks[:, 6:], 4).flatten(1).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    return q.float().sub_(16).mul_(_numbers(blocks[:, :2]).float())


def _q5_1(blocks: Tensor) -> Tensor:
    d, least = _numbers(blocks[:, :4]).float().split(1, 1)
    q = _bits(blocks[:, 8:], 4).flatten(1).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    return q.float().mul_(d).add_(least)


def _with_minima(head: Tensor, q: Tensor) -> Tensor:
    """Numbers of Q4_K and Q5_K from the first 16 bytes of the blocks and q, uint8 [blocks, 8, 32]."""
    d, e = _numbers(head[:, :4]).float().split(1, 1)
    first, second, third = head[:, 4:].split(4, 1)  # a[0 .. 3], a[4 .. 7], a[8 .. 11]
    s = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], 1).float().mul_(d)
    t = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], 1).float().mul_(e)
    return q.float().mul_(s.unsqueeze(-1)).sub_(t.unsqueeze(-1))


def _q4_k(blocks: Tensor) -> Tensor:
    q = _bits(blocks[:, 16:].unflatten(1, (4, 32)), 4)
    return _with_minima(blocks[:, :16], q.view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    q = _bits(blocks[:, 48:].unflatten(1, (4, 32)), 4).view(-1, 8, 32)
    return _with_minima(blocks[:, :16], q.bitwise_or_(_bits(blocks[:, 16:48], 1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].unflatten(1, (2, 64)), 4).view(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2)
    q = low.bitwise_or_(high << 4).view(-1, 16, 16).float().sub_(32)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_numbers(blocks[:, 208:]).float())
    return q.mul_(scale.unsqueeze(-1))


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""From blocks, uint8 [n, bytes of a block], to their numbers in float32, by `TensorType.name`."""
