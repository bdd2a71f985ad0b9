"""Finds the scales of Q6_K: those of 16 numbers each, integers, and that of the block, float16.

The numbers of a part are d * s * (q - 32), with -128 <= s < 128 and 0 <= q < 64. With the plain choice of
d * s the largest number of the part is 32 steps. Somewhat smaller or larger steps are often better: they move
the other numbers nearer to steps, at the cost of the largest. So some s are tried, and the one of least
squared error is taken.
"""

import torch
from torch import Tensor

PART = 16
PARTS = 16

LARGEST = 117
"""Of the plain s: 8 % more fit into eight bits, too."""

STEPS = tuple(step for step in range(-8, 9) if step)
"""What is tried: the plain s and so many hundredths of it, but at least one more or less."""


def encode_q6_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of blocks, drawn in decode.py.

    Args:
        blocks: float32 [n, 256].

    Returns:
        uint8 [n, 210], and d in float16 [n, 1], which is infinite where the numbers are too large.
    """
    x = blocks.view(-1, PART).T.contiguous()  # sums over the first axis are the fast ones
    least, most = x.amin(0), x.amax(0)
    # The side of -32 has one step more than the other, so the largest number is there.
    plain = torch.where(most > -least, most, least) / -32
    largest = plain.view(-1, PARTS).abs().amax(1, keepdim=True)
    d = (largest / LARGEST).to(torch.float16)
    # Numbers below those of full precision may be rounded down by so much that s would not fit.
    d = torch.where(largest > 127 * d.float(), d.view(torch.int16) + 1, d.view(torch.int16)).view(
        torch.float16
    )
    unit = d.float().expand(-1, PARTS).reshape(-1)
    s0 = (plain * _inverse(unit)).round_()
    best, least_error = s0, _squared_error(x, s0 * unit)
    for step in STEPS:
        s = s0 + (s0 * (step / 100)).round_()
        s = torch.where(s == s0, s0 + (1 if step > 0 else -1), s).clamp_(-128, 127)
        error = _squared_error(x, s * unit)
        best = torch.where(error < least_error, s, best)
        least_error = torch.minimum(error, least_error)
    q = _steps(x, best * unit).add_(32).to(torch.uint8).T.reshape(-1, 2, 2, 2, 32)  # [n, g, h, k, m]
    low = (q[:, :, 0] & 15) | (q[:, :, 1] << 4)  # uint8 drops the bits above 7
    high = q >> 4
    high = high[:, :, 0, 0] | high[:, :, 0, 1] << 2 | high[:, :, 1, 0] << 4 | high[:, :, 1, 1] << 6
    scales = best.view(-1, PARTS).to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), scales, d.view(torch.uint8)], 1), d


def _inverse(numbers: Tensor) -> Tensor:
    return torch.where(numbers == 0, 0, 1 / numbers)


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """The best q - 32 for the scales [parts] of ``x`` [PART, parts]; float32 like ``x``."""
    return (x * _inverse(scale)).round_().clamp_(-32, 31)


def _squared_error(x: Tensor, scale: Tensor) -> Tensor:
    return _steps(x, scale).mul_(scale).sub_(x).square_().sum(0)
