"""Ternary matrices to packed ones and back, in the layouts of ``bitnet_ops.packing``."""

import torch
from torch import Tensor

from .. import packing
from ._registry import OPS, fake_kernel


def pack_ternary(w: Tensor, layout: str = "tile16") -> Tensor:
    """Packs a ternary matrix, in a layout that ``bitnet_ops.packing`` draws.

    Args:
        w: int8 [N, K], values -1, 0 and 1, on the CPU; K at most 2^18, with layout "column" 2^16.
        layout: "tile16" (2 bits a weight), "tile16_base3" (1.6 bits), "row" or "column" (2 bits; they skip
            what is not needed, see ``ternary_linear``).

    Returns:
        uint8 of shape ``packing.packed_shape(N, K, layout)``, for tile16 [ceil(N / 16), ceil(K / 16), 64].

    Raises:
        RuntimeError: if ``w`` is no such tensor or holds another value, or for an unknown layout.

    Example:
        >>> pack_ternary(torch.zeros(32, 64, dtype=torch.int8)).shape
        torch.Size([2, 4, 64])
    """
    result: Tensor = OPS.pack_ternary.default(w, layout)
    return result


@fake_kernel("pack_ternary")
def _(w: Tensor, layout: str = "tile16") -> Tensor:
    return w.new_empty(packing.packed_shape(w.shape[0], w.shape[1], layout), dtype=torch.uint8)


def pack_two_bits(codes: Tensor, width: int, high_first: bool = False, layout: str = "tile16") -> Tensor:
    """Packs a matrix of 2-bit codes as files have them, without a byte for each weight in between.

    Code c stands for weight c - 1. A row consists of parts, and a part of runs of ``width`` bytes with
    ``4 * width`` codes::

        c[width * n + m]  =  (byte m >> shift(n)) & 3        shift(n) = 2n, with high_first 6 - 2n

    Args:
        codes: uint8 [N, G, B], on the CPU: G parts of B bytes in a row, 4 * G * B weights. ``width`` and 4
            divide B. What lies between parts, such as scales, may stay where it is: only the bytes of a part
            have to lie together.
        width: 1, 16 or 32.
        high_first: see the formula; not with ``width=1``.
        layout: as in ``pack_ternary``.

    Returns:
        uint8 of shape ``packing.packed_shape(N, 4 * G * B, layout)``: what ``pack_ternary`` makes of the
        weights.

    Raises:
        RuntimeError: if an argument is none of these, or a code is 3.

    Example:
        >>> codes = torch.tensor([[[0b10_01_01_00] * 4]], dtype=torch.uint8)
        >>> unpack_ternary(pack_two_bits(codes, 1), 1, 16)[0, :4]
        tensor([-1,  0,  0,  1], dtype=torch.int8)
    """
    result: Tensor = OPS.pack_two_bits.default(codes, width, high_first, layout)
    return result


@fake_kernel("pack_two_bits")
def _(codes: Tensor, width: int, high_first: bool = False, layout: str = "tile16") -> Tensor:
    in_features = 4 * codes.shape[1] * codes.shape[2]
    return codes.new_empty(packing.packed_shape(codes.shape[0], in_features, layout))


def unpack_ternary(packed: Tensor, out_features: int, in_features: int, layout: str = "tile16") -> Tensor:
    """Inverse of ``pack_ternary``.

    Args:
        packed: uint8 of shape ``packing.packed_shape(N, K, layout)``, on the CPU.
        out_features: N.
        in_features: K.
        layout: as in ``pack_ternary``.

    Returns:
        int8 [N, K], values -1, 0 and 1.

    Raises:
        RuntimeError: if the shape does not fit, or a byte holds a code that stands for no weight.

    Example:
        >>> w = torch.tensor([[-1, 0, 1]], dtype=torch.int8)
        >>> unpack_ternary(pack_ternary(w), 1, 3)
        tensor([[-1,  0,  1]], dtype=torch.int8)
    """
    result: Tensor = OPS.unpack_ternary.default(packed, out_features, in_features, layout)
    return result


@fake_kernel("unpack_ternary")
def _(packed: Tensor, out_features: int, in_features: int, layout: str = "tile16") -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=torch.int8)


def repack_ternary(packed: Tensor, out_features: int, in_features: int, layout: str, wanted: str) -> Tensor:
    """Brings packed weights from one layout into another.

    Args:
        packed: uint8 of shape ``packing.packed_shape(N, K, layout)``, on the CPU.
        out_features: N.
        in_features: K.
        layout: of ``packed``, as in ``pack_ternary``.
        wanted: of the result.

    Returns:
        uint8 of shape ``packing.packed_shape(N, K, wanted)``: what ``pack_ternary(w, wanted)`` gives for
        ``w = unpack_ternary(packed, N, K, layout)``, without that matrix in between and without its check of
        the codes.

    Raises:
        RuntimeError: if the shape does not fit, or for an unknown layout.

    Example:
        >>> w = torch.tensor([[-1, 0, 1]], dtype=torch.int8)
        >>> repack_ternary(pack_ternary(w), 1, 3, "tile16", "row").shape
        torch.Size([1, 1, 64])
    """
    result: Tensor = OPS.repack_ternary.default(packed, out_features, in_features, layout, wanted)
    return result


@fake_kernel("repack_ternary")
def _(packed: Tensor, out_features: int, in_features: int, layout: str, wanted: str) -> Tensor:
    return packed.new_empty(packing.packed_shape(out_features, in_features, wanted))


def find_bad_byte(packed: Tensor, layout: str = "tile16") -> Tensor:
    """The first byte that no packed weights have: in base 3 one above 242, else one with a 2-bit code 3.

    Padding is not looked at as such.

    Args:
        packed: uint8 of any shape, on the CPU.
        layout: as in ``pack_ternary``.

    Returns:
        int64 []: the place of the byte in ``packed.view(-1)``, -1 where there is none.

    Raises:
        RuntimeError: if ``packed`` is no such tensor, or for an unknown layout.

    Example:
        >>> find_bad_byte(torch.tensor([85, 3], dtype=torch.uint8))
        tensor(1)
    """
    result: Tensor = OPS.find_bad_byte.default(packed, layout)
    return result


@fake_kernel("find_bad_byte")
def _(packed: Tensor, layout: str = "tile16") -> Tensor:
    return packed.new_empty((), dtype=torch.int64)
