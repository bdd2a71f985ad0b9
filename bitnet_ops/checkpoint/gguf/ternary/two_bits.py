"""Layouts with two bits a weight: I2_S, TQ2_0, Q2_0, PQ2_0, IQ2_BN.

The code of a weight w is c = w + 1, so 0, 1, 2 stand for -1, 0, 1. No writer makes the code 3: an error.

I2_S of bitnet.cpp, 32 bytes for 128 weights. Blocks run over the ends of rows, as if the tensor were one row.
Behind the last block, at byte N * K / 4, is one float32 scale, then 28 bytes without meaning::

          byte m     | c[m]  | c[32 + m] | c[64 + m] | c[96 + m] |      m = 0 .. 31
          bits         7 6       5 4         3 2         1 0

    c[32 n + m]  =  (byte m >> (6 - 2 n)) & 3                           n = 0 .. 3

I2_S of builds of bitnet.cpp for ARM, the same with 16 bytes for 64 weights::

    c[16 n + m]  =  (byte m >> (6 - 2 n)) & 3                           m = 0 .. 15

(Builds for x86 that were compiled without ACT_PARALLEL write a third one, with four rows in a byte. It is not
read. Nothing in a file says which one it has.)

TQ2_0 of llama.cpp, 66 bytes for 256 weights: two times 32 bytes that hold 128 weights each, then the scale d,
float16. The order of bits is the other one::

    | 32 bytes: c[0 .. 127] | 32 bytes: c[128 .. 255] | d |

          byte m     | c[96 + m] | c[64 + m] | c[32 + m] | c[m]  |
          bits           7 6         5 4         3 2        1 0

    c[32 n + m]  =  (byte m >> 2 n) & 3

IQ2_BN of ik_llama.cpp, 16 bytes for 64 weights, and one float32 scale in front of each row::

    c[16 n + m]  =  (byte m >> 2 n) & 3                                  m = 0 .. 15

Q2_0 of llama.cpp, 18 bytes for 64 weights, and PQ2_0 of Prism, 34 bytes for 128 (Q2_0 in their older files):
the scale d, float16, then codes in sequence::

    | d | byte 0: c[3] c[2] c[1] c[0] | byte 1: c[7] c[6] c[5] c[4] | ...

    c[4 m + n]  =  (byte m >> 2 n) & 3

All are one formula, c[width * n + m] = (byte m >> shift n) & 3 in runs of ``width`` bytes: 32, 16 or 1.
One operator packs them as they are, `ops.pack_two_bits`; weights in bytes are for what is multiplied out.
"""

from functools import partial

import torch
from torch import Tensor

from .layout import Layout

_UP, _DOWN = (0, 2, 4, 6), (6, 4, 2, 0)
_LOW_BITS = 0x03_03_03_03_03_03_03_03
_WORD = 8


def _decode(data: Tensor, width: int, shifts: tuple[int, ...]) -> Tensor:
    """Weights int8 [blocks, 4 * bytes] from uint8 [blocks, bytes]; ``width`` is a multiple of 8."""
    weights = torch.empty(data.shape[0], data.shape[1] * 4, dtype=torch.int8)
    # Eight bytes at a time: what a shift brings over from a neighbour falls to the mask.
    words = data.view(torch.int64).view(-1, width // _WORD)
    out = weights.view(torch.int64).view(-1, 4, width // _WORD)
    for n, shift in enumerate(shifts):
        torch.bitwise_right_shift(words, shift, out=out[:, n])
    out.bitwise_and_(_LOW_BITS)
    return weights.sub_(1)


def _decode_sequence(data: Tensor) -> Tensor:
    """The same for codes in sequence: the four of a byte become a word of four bytes."""
    words = data.to(torch.int32)  # ........ ........ ........ ddccbbaa
    words.mul_(1 + (1 << 12)).bitwise_and_(0x000F_000F)  # ........ ....ddcc ........ ....bbaa
    words.mul_(1 + (1 << 6)).bitwise_and_(0x0303_0303)  # ......dd ......cc ......bb ......aa
    return words.view(torch.int8).sub_(1)


def _encode(weights: Tensor, width: int, shifts: tuple[int, ...]) -> Tensor:
    """Bytes uint8 [blocks, weights / 4] from int8 [blocks, weights]: the formula, backwards."""
    codes = (weights + 1).view(torch.uint8)
    # Of the runs of 4 * width codes, n counts the larger steps; with width 1 it is the place in a byte.
    runs = codes.view(codes.shape[0], -1, 4, width)
    place = torch.tensor([1 << shift for shift in shifts], dtype=torch.uint8).view(4, 1)
    return (runs * place).sum(2, dtype=torch.uint8).view(codes.shape[0], -1)


def _code_3(data: Tensor) -> Tensor | None:
    both_bits = data & (data >> 1) & 0b01010101
    return both_bits.bool() if both_bits.any() else None


_WHAT = "four 2-bit codes in {0, 1, 2} a byte"


def _sequence(code_bytes: int) -> Layout:
    return Layout(
        codes=(2, 2 + code_bytes),
        scale_of="block",
        scale_dtype=torch.float16,
        decode=_decode_sequence,
        two_bits=(1, False),
        damaged=_code_3,
        what=_WHAT,
        encode=partial(_encode, width=1, shifts=_UP),
    )


I2_S = Layout(
    codes=(0, 32),
    scale_of="tensor",
    scale_dtype=torch.float32,
    decode=partial(_decode, width=32, shifts=_DOWN),
    two_bits=(32, True),
    damaged=_code_3,
    what=_WHAT,
    encode=partial(_encode, width=32, shifts=_DOWN),
)
I2_S_ARM = Layout(
    codes=(0, 16),
    scale_of="tensor",
    scale_dtype=torch.float32,
    decode=partial(_decode, width=16, shifts=_DOWN),
    two_bits=(16, True),
    damaged=_code_3,
    what=_WHAT,
)
TQ2_0 = Layout(
    codes=(0, 64),
    scale_of="block",
    scale_dtype=torch.float16,
    decode=partial(_decode, width=32, shifts=_UP),
    two_bits=(32, False),
    damaged=_code_3,
    what=_WHAT,
    encode=partial(_encode, width=32, shifts=_UP),
)
IQ2_BN = Layout(
    codes=(0, 16),
    scale_of="row",
    scale_dtype=torch.float32,
    decode=partial(_decode, width=16, shifts=_UP),
    two_bits=(16, False),
    damaged=_code_3,
    what=_WHAT,
)
Q2_0 = _sequence(16)
PQ2_0 = _sequence(32)
