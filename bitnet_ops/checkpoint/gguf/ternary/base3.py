"""Layouts with five weights a byte, as digits in base 3: TQ1_0, PTQ1_0, IQ1_BN.

The digit of a weight w is w + 1. Five digits, the first one the highest, make a number v = 0 .. 242. The byte
is not v itself but the fraction v / 243 in units of 1 / 256, rounded up::

    byte  =  ceil(256 v / 243)

so that a multiplication brings one digit after the other to the front, without a division: the lower eight
bits of ``byte * 3^n`` are a fraction that begins with digit n. Three times that has digit n above the point::

    digit n  =  (3 * ((byte * 3^n) & 255)) >> 8

A byte of four digits has them in front; the fifth is 0. Only 243 of the 256 bytes stand for digits. A byte b
is one of them if some v has 256 v / 243 <= b < 256 v / 243 + 1. Then a multiple of 256 is at most 243 b and
above 243 b - 243, so (243 b) mod 256 < 243. No writer makes the others, so they are an error.

TQ1_0 of llama.cpp, 54 bytes for 256 weights: bytes of 5, 5 and 4 digits, then the scale d, float16::

    | 32 bytes: w[0 .. 159] | 16 bytes: w[160 .. 239] | 4 bytes: w[240 .. 255] | d |

    w[      32 n + m]  =  digit n of byte m of the first 32       n = 0 .. 4
    w[160 + 16 n + m]  =  digit n of byte m of the next 16        n = 0 .. 4
    w[240 +  4 n + m]  =  digit n of byte m of the last 4         n = 0 .. 3

PTQ1_0 of Prism, 28 bytes for 128 weights, the same with 16, 8 and 2 bytes::

    | 16 bytes: w[0 .. 79] | 8 bytes: w[80 .. 119] | 2 bytes: w[120 .. 127] | d |

IQ1_BN of ik_llama.cpp, 13 bytes for 64 weights, and one float16 scale in front of each row. The order of
digits is the other one: the first weight is the lowest. The last byte has one weight of each 16::

    | 3 bytes: w[0 .. 14] | 3: w[16 .. 30] | 3: w[32 .. 46] | 3: w[48 .. 62] | 1: w[15], w[31], w[47], w[63] |

    w[16 g + 5 k + j]  =  digit 4 - j of byte 3 g + k     g = 0 .. 3, k = 0 .. 2, j = 0 .. 4
    w[16 g + 15]       =  digit 4 - g of byte 12
"""

from functools import partial

import torch
from torch import Tensor

from .layout import Layout

_DIGITS = 5
_POWERS = tuple(3**n for n in range(_DIGITS))
_TQ1_0 = ((32, 5), (16, 5), (4, 4))  # bytes, digits of each
_PTQ1_0 = ((16, 5), (8, 5), (2, 4))


def _first_digits(fractions: Tensor) -> Tensor:
    """Weights int8 from fractions uint8 (which are overwritten): the first digit of each, minus 1.

    3 f needs ten bits. But (3 f) >> 8 is (f + (f >> 1)) >> 7: both become 1 at f = 86 and 2 at f = 171. With
    h = f >> 1, half of that sum is h + ((f - h) >> 1), which eight bits hold. So words of eight bytes do.
    """
    flat = fractions.view(-1)
    words = flat.view(torch.int64)
    half = (words >> 1).bitwise_and_(0x7F7F_7F7F_7F7F_7F7F)
    words.sub_(half).bitwise_right_shift_(1).bitwise_and_(0x7F7F_7F7F_7F7F_7F7F).add_(half)
    words.bitwise_right_shift_(6).bitwise_and_(0x0303_0303_0303_0303)
    return fractions.view(torch.int8).sub_(1)


def _decode(data: Tensor, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """Weights int8 [blocks, weights] from uint8 [blocks, bytes]."""
    fractions = torch.empty(data.shape[0], sum(size * count for size, count in parts), dtype=torch.uint8)
    begin = at = 0
    for size, count in parts:
        part = data[:, begin : begin + size]
        for n in range(count):
            torch.mul(part, _POWERS[n], out=fractions[:, at : at + size])  # modulo 256
            at += size
        begin += size
    return _first_digits(fractions)


def _encode(weights: Tensor, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """Bytes uint8 [blocks, bytes] from int8 [blocks, weights]."""
    digits = (weights + 1).view(torch.uint8)
    place = torch.tensor(_POWERS[::-1], dtype=torch.uint8).view(_DIGITS, 1)
    bytes_of_parts = []
    at = 0
    for size, count in parts:
        part = digits[:, at : at + size * count].reshape(-1, count, size)
        v = (part * place[:count]).sum(1, dtype=torch.int32)
        bytes_of_parts.append(((256 * v + 242) // 243).to(torch.uint8))
        at += size * count
    return torch.cat(bytes_of_parts, 1)


def _decode_iq1_bn(data: Tensor) -> Tensor:
    places = [(3 * g + j // 5, 4 - j % 5) if j < 15 else (12, 4 - g) for g in range(4) for j in range(16)]
    fractions = data.index_select(1, torch.tensor([byte for byte, _ in places]))
    fractions.mul_(torch.tensor([_POWERS[n] for _, n in places], dtype=torch.uint8))  # modulo 256
    return _first_digits(fractions)


def _no_digits(data: Tensor) -> Tensor | None:
    remainders = data * 243  # modulo 256
    return remainders >= 243 if data.numel() and remainders.max() >= 243 else None


_WHAT = "bytes ceil(256 v / 243) of v = 0 .. 242, five digits in base 3"

TQ1_0 = Layout(
    codes=(0, 52),
    scale_of="block",
    scale_dtype=torch.float16,
    decode=partial(_decode, parts=_TQ1_0),
    damaged=_no_digits,
    what=_WHAT,
    encode=partial(_encode, parts=_TQ1_0),
)
PTQ1_0 = Layout(
    codes=(0, 26),
    scale_of="block",
    scale_dtype=torch.float16,
    decode=partial(_decode, parts=_PTQ1_0),
    damaged=_no_digits,
    what=_WHAT,
    encode=partial(_encode, parts=_PTQ1_0),
)
IQ1_BN = Layout(
    codes=(0, 13),
    scale_of="row",
    scale_dtype=torch.float16,
    decode=_decode_iq1_bn,
    damaged=_no_digits,
    what=_WHAT,
)
