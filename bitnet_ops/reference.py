"""Every operator in plain PyTorch: the specification.

Each function here is short enough to check against the formula it cites, and every kernel is tested
against it. Integers agree bit for bit; float reductions agree within a bound that the tests derive,
because the kernels sum in a fixed order of their own (64 lanes, fused multiply-add).

The quantisers follow "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits"
(arXiv:2402.17764): absmean for weights (section 2), absmax per token to 8 bits for activations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packing

if TYPE_CHECKING:
    from .decoder.config import RopeScaling

ABSMAX_FLOOR = 1e-5
"""Smallest absolute maximum (activations) or mean (weights) that is divided by."""


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a float weight matrix to ternary: absmean, one scale per tensor.

    ``scale = mean(|W|)``, ``w = round(W / scale)`` clamped to {-1, 0, 1}; ``W`` is about ``w * scale``.

    Args:
        weight: float tensor of any shape.

    Returns:
        ``(w, scale)``: int8 of the same shape, and a float32 scalar tensor.
    """
    weight = weight.float()
    scale = weight.abs().mean().clamp(min=ABSMAX_FLOOR)
    return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale


LARGEST_Q = {8: 127, 16: 127 * 256 + 127}
"""What absmax becomes, by activation bits. 32639 is the largest q = 256 * hi + lo of two signed bytes."""


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Rounds activations to integers: absmax per row of the last axis, in float32 arithmetic.

    ``s = LARGEST_Q[bits] / max(|x|)``, ``q = round_half_to_even(x * s)``, ``x_scale = 1 / s``; ``x`` is about
    ``q * x_scale``. A row that holds a NaN or an infinity gets ``q = 0`` and ``x_scale = NaN``, which
    makes every product with it NaN.

    Args:
        x: float tensor [..., K].
        bits: 8 or 16.

    Returns:
        ``(q, x_scale)``: int8 or int16 [..., K] and float32 [...].
    """
    x = x.float()
    absmax = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = absmax.isfinite()
    # Two roundings, not one: that is how PyTorch evaluates 127 / tensor, here and in transformers.
    scale = float(LARGEST_Q[bits]) * absmax.clamp(min=ABSMAX_FLOOR).reciprocal()
    q = torch.where(finite, (x * scale).round().clamp(-LARGEST_Q[bits] - 1, LARGEST_Q[bits]), 0.0)
    dtype = torch.int16 if bits == 16 else torch.int8
    return q.to(dtype), torch.where(finite, 1.0 / scale, torch.nan).squeeze(-1)


def pack_two_bits(codes: Tensor, width: int, high_first: bool = False, layout: str = "tile16") -> Tensor:
    """Packs 2-bit codes: ``c[width * n + m] = (byte m >> 2n) & 3`` in runs of ``width`` bytes.

    Args:
        codes: uint8 [N, G, B].
        width: bytes of a run.
        high_first: the shift is ``6 - 2n`` instead.
        layout: of the result.

    Returns:
        uint8 of shape ``packing.packed_shape(N, 4 * G * B, layout)``.
    """
    shifts = torch.tensor([6, 4, 2, 0] if high_first else [0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    weights = (codes.unflatten(2, (-1, 1, width)) >> shifts & 3).to(torch.int8) - 1
    return packing.pack(weights.flatten(1), layout)


def ternary_matmul(q: Tensor, w: Tensor) -> Tensor:
    """Exact integer product ``acc[m, n] = sum_k q[m, k] * w[n, k]``.

    Args:
        q: int8 [M, K].
        w: int8 [N, K], ternary.

    Returns:
        int32 [M, N].
    """
    return (q.to(torch.int32) @ w.to(torch.int32).T).to(torch.int32)


def ternary_linear(
    x: Tensor,
    w: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation_bits: int = 8,
    group_size: int = 0,
    active: Tensor | None = None,
) -> Tensor:
    """BitLinear: ``y = acc * (x_scale * weight_scale) + bias``, rounded once to the dtype of ``x``.

    With a scale for every ``group_size`` inputs the sum goes through the groups in order, each product and
    each addition rounded to float32. 16-bit activations have one scale a row,
    ``y = x_scale * sum_g acc_g * weight_scale[g] + bias``. 8-bit ones have one for each group, so that a
    large activation makes only its own group coarser,
    ``y = sum_g acc_g * (x_scale[g] * weight_scale[g]) + bias``.

    Args:
        x: float [..., K].
        w: int8 [N, K], ternary.
        weight_scale: float32 [N], the multiplier that turns ``w`` back into weights, or float32 or float16
            [ceil(K / group_size), N].
        bias: float32 [N] or None.
        activation_bits: 8 or 16.
        group_size: inputs that share a scale; 0 for one scale a row.
        active: bool [..., N] or None: results that are wanted; the others are 0.

    Returns:
        [..., N] in the dtype of ``x``.
    """

    def product(q: Tensor, w: Tensor) -> Tensor:  # in int64: 16-bit activations can exceed int32
        return (q.to(torch.int64) @ w.to(torch.int64).T).float()

    if group_size == 0:
        q, x_scale = quantize_activations(x, activation_bits)
        y = product(q, w) * (x_scale.unsqueeze(-1) * weight_scale)
    else:
        y = torch.zeros(*x.shape[:-1], w.shape[0], device=x.device)
        q, x_scale = quantize_activations(x, activation_bits)
        for g, scale in enumerate(weight_scale.float()):
            k = slice(g * group_size, (g + 1) * group_size)
            if activation_bits == 8:
                q_group, group_scale = quantize_activations(x[..., k])
                y = y + product(q_group, w[:, k]) * (group_scale.unsqueeze(-1) * scale)
            else:
                y = y + product(q[..., k], w[:, k]) * scale
        if activation_bits == 16:
            y = y * x_scale.unsqueeze(-1)
    if bias is not None:
        y = y + bias
    if active is not None:
        y = torch.where(active, y, 0.0)
    return y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis (arXiv:1910.07467), rounded once to the dtype of ``x``.

    ``y = x / sqrt(mean(x^2) + eps) * weight``

    Args:
        x: float [..., K].
        weight: float [K].
        eps: added to the mean square.
    """
    wide = x.float()
    inverse_rms = 1.0 / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight.float()).to(x.dtype)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The elementwise half of a gated linear unit (arXiv:2002.05202): ``y = activation(gate) * up``.

    ``relu2`` is ``relu(gate)^2`` (arXiv:2109.08668), with +0 where the gate is closed, whatever ``up`` holds
    there; ``silu`` is ``gate * sigmoid(gate)`` (arXiv:1702.03118); ``gelu_tanh`` is
    ``0.5 * gate * (1 + tanh(u))`` with ``u = sqrt(2 / pi) * (gate + 0.044715 * gate^3)`` (arXiv:1606.08415),
    written as ``gate * sigmoid(2 u)``, which is the same without the cancellation for negative gates. In
    float32 arithmetic, rounded once to the dtype of ``gate``.

    Args:
        gate: float [..., N].
        up: like ``gate``.
        activation: ``"relu2"``, ``"silu"`` or ``"gelu_tanh"``.

    Returns:
        Shape and dtype of ``gate``.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    dtype, gate, up = gate.dtype, gate.to(wide), up.to(wide)
    if activation == "relu2":
        closed = gate <= 0
        gate, up = gate.masked_fill(closed, 0.0), up.masked_fill(closed, 0.0)
        y = gate * gate * up
    elif activation == "silu":
        y = gate * torch.sigmoid(gate) * up
    elif activation == "gelu_tanh":
        twice_u = 2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate * gate * gate)
        y = gate * torch.sigmoid(twice_u) * up
    else:
        raise ValueError(f"activation: expected 'relu2', 'silu' or 'gelu_tanh', got {activation!r}")
    return y.to(dtype)


def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of the language-model head, in float32 whatever the storage dtype of ``weight``.

    ``logits[..., v] = sum_k x[..., k] * weight[v, k]``

    Args:
        x: float [..., K].
        weight: float32, bfloat16 or float16 [V, K].

    Returns:
        float32 [..., V].
    """
    return x.float() @ weight.float().T


def screen_lm_head(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a table in six bits, and bounds of what it loses (csrc/kernels/screen.h has the proof).

    A row has a ``scale`` of 16 significant bits, 64 of its inputs a ``factor`` from 0 to 127, and each input
    a ``q = round(input / (scale * factor))`` from -31 to 31. A row of elements below 2^-100 becomes zeros; so
    does one that is not finite, with infinite bounds.

    Args:
        weight: float [V, K].

    Returns:
        ``(codes, bounds)``: uint8 [ceil(V / 16), bytes of 16 rows], the factors and then ``q + 32``; and
        float32 [3, 16 * ceil(V / 16)], of each row ``scale``, ``|Q| + |residual|`` and ``|residual| + gamma *
        (|Q| + |residual|)``, where ``Q = scale * factor * q`` and gamma is the relative error of two float32
        sums and of a bound's evaluation.
    """
    vocabulary, in_features = weight.shape
    wide = torch.nn.functional.pad(weight.float(), (0, -in_features % 64, 0, -vocabulary % 16))
    grouped = wide.unflatten(1, (-1, 64))  # [row, group, input]
    group_absmax = grouped.abs().amax(dim=2)
    absmax = group_absmax.amax(dim=1) if in_features else wide.new_zeros(wide.shape[0])
    finite = absmax.isfinite()
    quantized = finite & (absmax >= 2.0**-100)
    usual = torch.where(quantized, absmax, 1.0)

    # Rounded up to 16 bits, so that products with factors are exact; then until the largest q reaches absmax.
    bits = ((usual / torch.full_like(usual, 31 * 127.0)).view(torch.int32) + 0xFF) & ~0xFF
    bits += 0x100 * (bits.view(torch.float32).double() * (31 * 127) < usual)
    scale = bits.view(torch.float32)
    reach = scale.double()[:, None] * 31
    factor = (group_absmax / (scale * 31)[:, None]).nan_to_num(0, 0, 0).trunc()
    factor += reach * factor < group_absmax
    factor = torch.where(quantized[:, None], factor, 0.0)
    scale = torch.where(quantized, scale, 0.0)
    step = scale[:, None] * factor
    inverse = torch.where(step == 0, 0.0, 1.0 / step)
    q = torch.where(quantized[:, None, None], (grouped * inverse[:, :, None]).round(), 0.0)

    norm = (step.double()[:, :, None] * q).flatten(1).norm(dim=1)
    residual = (grouped.double() - step.double()[:, :, None] * q).flatten(1).norm(dim=1)
    additions = 2 * step.shape[1] + 7
    gamma = additions * 2.0**-24 / (1 - additions * 2.0**-24) + 2.0**-22
    bounds = torch.stack((norm + residual, residual + gamma * (norm + residual) + 2.0**-100))
    bounds = torch.where(finite & (bounds[0] < 2.0**60), bounds, torch.inf).float()

    # [tile, group * 16 + row]
    factors = factor.to(torch.uint8).unflatten(0, (-1, 16)).transpose(1, 2).flatten(1)
    factors = torch.nn.functional.pad(factors, (0, -factors.shape[1] % 64))
    code = (q + 32).to(torch.uint8).unflatten(0, (-1, 16)).unflatten(3, (4, 4, 4))
    code = code.permute(0, 2, 3, 4, 1, 5).flatten(4)  # [tile, group, block, four, row * 4 + j]
    upper = torch.stack([code[..., 3, :] >> 2 * line & 3 for line in range(3)], dim=3)
    lines = (code[..., :3, :] | upper << 6).flatten(1)
    return torch.cat((factors, lines), dim=1), torch.cat((scale[None], bounds))


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table.

    Args:
        ids: int64 [...].
        weight: float [V, K].

    Returns:
        [..., K] in the dtype of ``weight``.
    """
    return weight[ids]


def lm_head_top_k(
    x: Tensor, weight: Tensor, k: int, temperature: float = 1.0, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best-scored tokens; of equals the smaller id first, and NaN before everything.

    Args:
        x: float [..., K].
        weight: float [V, K].
        k: how many.
        temperature: with ``noise``, the score is ``logit / temperature + noise`` in float64.
        noise: float32 [..., V] or None.

    Returns:
        ``(logits, ids)``: float32 and int64 [..., min(k, V)], best first.
    """
    return top_k(lm_head(x, weight), k, temperature, noise)


def top_k(
    logits: Tensor, k: int, temperature: float = 1.0, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The second half of ``lm_head_top_k``, for logits that are there.

    Args:
        logits: float32 [..., V].
        k: how many.
        temperature: as for ``lm_head_top_k``.
        noise: likewise.

    Returns:
        ``(logits, ids)``: float32 and int64 [..., min(k, V)], best first.
    """
    scores = logits if noise is None else logits.double() / temperature + noise
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return logits.gather(-1, ids), ids


def gumbel_noise(seed: Tensor, size: int) -> Tensor:
    """Gumbel-distributed numbers ``-ln(-ln(u))``; u is made of SplitMix64's number i of the stream of a seed.

    Args:
        seed: int64 [...].
        size: how many numbers for each.

    Returns:
        float32 [..., size].
    """

    def shifted(z: Tensor, bits: int) -> Tensor:  # logically, not arithmetically
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    def signed(constant: int) -> int:
        return constant - (1 << 64)

    index = torch.arange(1, size + 1, dtype=torch.int64)
    z = seed.unsqueeze(-1) + index * signed(0x9E3779B97F4A7C15)  # int64 wraps around
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    z = z ^ shifted(z, 31)
    one_minus_u = (shifted(z, 24).double() + 0.5) * 2.0**-40
    return -(-torch.log1p(-one_minus_u)).log().float()


KEYS_IN_BLOCK = 64
"""Keys of a cache stand in blocks of so many, transposed: see `cached_attention`."""
KEYS_IN_SPAN = 256
"""Keys and values of an int8 cache stand in spans of so many: see `int8_spans`."""


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angles by which RoPE (arXiv:2104.09864) turns the pairs of a head from one position to the next.

    ``f[i] = theta^(-2i / head_dim)``; with scaling "linear" ``f[i] / factor``. With "llama3" (Llama 3.1,
    arXiv:2407.21783), of ``turns = original_max_position_embeddings * f[i] / (2 pi)`` that a pair makes in
    the context the model was trained with::

        low = low_freq_factor, high = high_freq_factor
        s = (turns - low) / (high - low)
        f[i]                                      where turns > high
        f[i] / factor                             where turns < low
        (1 - s) * f[i] / factor + s * f[i]        between

    With "yarn" (arXiv:2309.00071) the share that is kept falls with the number of the pair, from 1 where
    pairs make ``beta_fast`` turns in that context to 0 where they make ``beta_slow``. ``truncate`` rounds
    ``low`` down and ``high`` up::

        pair(turns) = head_dim * log(original_max_position_embeddings / (2 pi turns)) / (2 log(theta))
        low = max(pair(beta_fast), 0), high = min(pair(beta_slow), head_dim - 1)
        s = 1 - clamp((i - low) / (high - low), 0, 1)
        (1 - s) * f[i] / factor + s * f[i]

    With "factors" ``f[i] / factors[i]``.

    Args:
        head_dim: even.
        theta: base of the wavelengths.
        scaling: how they are stretched, or None.

    Returns:
        float32 [head_dim / 2].
    """
    # Libraries disagree about the last bit of a power; rounded from float64 it is the same.
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)).float()
    if scaling is None:
        return frequencies
    if scaling.kind == "factors":
        return (frequencies.double() / torch.tensor(scaling.factors, dtype=torch.float64)).float()
    if scaling.kind == "yarn":
        kept = _yarn_kept(head_dim, theta, scaling)
        return (frequencies.double() * ((1 - kept) / scaling.factor + kept)).float()
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelength
    s = (turns - low) / (high - low)
    between = (1 - s) * stretched + s * frequencies
    return torch.where(turns > high, frequencies, torch.where(turns < low, stretched, between))


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The share of each frequency that "yarn" keeps, float64 [head_dim / 2]."""
    context = scaling.original_max_position_embeddings
    low, high = (
        head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step from one pair to the next
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def rotary_embedding(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE: position p turns pair i by the angle ``p * rotary_frequencies(...)[i]``.

    Both times ``scaling.rotation_scale``, so that it multiplies queries and keys.

    Args:
        positions: int64 of any shape.
        head_dim: as in `rotary_frequencies`, like the next two.
        theta: likewise.
        scaling: likewise.

    Returns:
        ``(cos, sin)``: float32 [..., head_dim / 2].
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling).to(positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    # Libraries and torch.compile disagree about the last bit of a sine; rounded from float64 it is the same.
    angles = angles.double()
    scale = 1.0 if scaling is None else scaling.rotation_scale
    return (scale * angles.cos()).float(), (scale * angles.sin()).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) in the rotate-half convention.

    Turns the pair (i, i + head_dim / 2) of a head by the i-th angle of its position.

    Args:
        x: float [..., head_dim].
        cos: float [..., head_dim / 2], broadcast against the pairs of ``x``.
        sin: likewise.
    """
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """Causal self-attention with rotary positions, and several query heads to a key-value head.

    ``y[t] = softmax over s <= t of (rotate(q[t]) . rotate(k[s]) * scale) @ v[s]``, where query head h reads
    key-value head ``h // (heads / kv_heads)``. With a window, over ``t - window < s <= t``
    (arXiv:2004.05150).

    Args:
        q: float [B, T, heads * head_dim].
        k: float [B, T, kv_heads * head_dim].
        v: like ``k``.
        cos: float32 [positions, head_dim / 2], a row for each position from 0.
        sin: likewise.
        start: int64 [B], at most 0: the position of each sequence's first token. Tokens at negative positions
            are padding: no token sees them, and their result is 0. None for a batch without padding.
        scale: what the products of queries and keys are multiplied with, 1 / sqrt(head_dim) for None.
        window: how many positions a token sees, its own among them; 0 for all.

    Returns:
        [B, T, heads * head_dim] in the dtype of ``q``.
    """
    q, k, v = (x.unflatten(-1, (-1, 2 * cos.shape[-1])).transpose(1, 2) for x in (q, k, v))
    token = torch.arange(q.shape[2], device=q.device)
    positions = token.unsqueeze(0) if start is None else start.unsqueeze(1) + token
    rows = positions.clamp(min=0).unsqueeze(1)
    q, k = (rotate(x, cos[rows], sin[rows]).to(v.dtype) for x in (q, k))
    mask = real = None
    if start is not None or window > 0:
        real = positions >= 0
        # Padding sees itself, so that no row of the softmax is empty; its result is dropped.
        sees = real.unsqueeze(1) | torch.eye(len(token), dtype=torch.bool, device=q.device)
        distance = token.unsqueeze(1) - token
        near = (distance >= 0) & ((distance < window) if window > 0 else True)
        mask = (sees & near).unsqueeze(1)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    y = y.transpose(1, 2).flatten(2)
    return y if real is None else torch.where(real.unsqueeze(-1), y, 0.0)


def int8_spans(x: Tensor, transposed: bool = False) -> Tensor:
    """Vectors of an int8 cache as `cached_attention` keeps them.

    256 vectors are a span, a matrix [256, width] or its transpose. It is cut into tiles of 16 rows, a tile
    into 16 x 4 elements, all of them in row-major order.

    Args:
        x: int8 [..., 256 * spans, width], width a multiple of 16.
        transposed: whether a span's rows are elements of vectors rather than vectors.

    Returns:
        int8 [..., spans, 256 * width].
    """
    spans: Tensor = x.unflatten(-2, (-1, KEYS_IN_SPAN))
    spans = spans.mT if transposed else spans
    tiles: Tensor = spans.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 16)).transpose(-3, -2)
    return tiles.flatten(-4)


def int8_rows(spans: Tensor, transposed: bool = False) -> Tensor:
    """The inverse of `int8_spans`.

    Args:
        spans: int8 [..., spans, 256 * width].
        transposed: as for `int8_spans`.

    Returns:
        int8 [..., 256 * spans, width].
    """
    columns = KEYS_IN_SPAN if transposed else spans.shape[-1] // KEYS_IN_SPAN
    tiles = spans.unflatten(-1, (-1, columns // 4, 16, 4)).transpose(-3, -2)  # [..., tile, row, four, j]
    rows: Tensor = tiles.flatten(-2).flatten(-3, -2)
    return (rows.mT if transposed else rows).flatten(-3, -2)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """`attention` to the tokens of a cache as well, which the new ones are written to first.

    Args:
        q: as for `attention`.
        k: as for `attention`; stored rotated, in the dtype of ``keys``.
        v: as for `attention`.
        cos: as for `attention`.
        sin: as for `attention`.
        start: int64 [B], the position of each sequence's first new token; the cache holds those before it.
            Tokens at negative positions are padding, and are not stored.
        keys: float32 or bfloat16 [B, kv_heads, blocks, head_dim, 64], changed in place: position p is
            column p % 64 of block p // 64. Or int8 as from `int8_spans`, with the inputs of keys as columns.
        values: same dtype, [B, kv_heads, blocks * 64, head_dim rounded up to 16], or int8 as from
            `int8_spans` with keys as columns; changed in place.
        key_scale: float32 [B, kv_heads, spans * 256] where the cache is int8, changed in place. Each head's
            vector is rounded by `quantize_activations`.
        value_scale: likewise.
        scale: as for `attention`.
        window: as for `attention`.

    Returns:
        float32 [B, T, heads * head_dim].
    """
    head_dim = 2 * cos.shape[-1]
    positions = start.unsqueeze(1) + torch.arange(q.shape[1], device=q.device)
    real = positions >= 0
    rows = positions.clamp(min=0).unsqueeze(2)
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))  # [B, T, heads, head_dim]
    q, k = rotate(q, cos[rows], sin[rows]), rotate(k, cos[rows], sin[rows])

    sequence, token = real.nonzero(as_tuple=True)
    place = positions[sequence, token]
    new_keys, new_values = k[sequence, token], v[sequence, token]  # [new, kv_heads, head_dim]
    longest = int(positions.max()) + 1 if positions.numel() else 0
    if key_scale is None or value_scale is None:
        keys[sequence, :, place // KEYS_IN_BLOCK, :, place % KEYS_IN_BLOCK] = new_keys.to(keys.dtype)
        values[sequence, :, place, :head_dim] = new_values.to(values.dtype)
        values[sequence, :, place, head_dim:] = 0
        k = keys.transpose(3, 4).flatten(2, 3)[:, :, :longest].float()  # [B, kv_heads, S, head_dim]
        v = values[:, :, :longest, :head_dim].float()
    else:
        k, v = int8_rows(keys), int8_rows(values, transposed=True)
        k[sequence, :, place, :head_dim], key_scale[sequence, :, place] = quantize_activations(new_keys)
        v[sequence, :, place, :head_dim], value_scale[sequence, :, place] = quantize_activations(new_values)
        keys.copy_(int8_spans(k))
        values.copy_(int8_spans(v, transposed=True))
        k = k[:, :, :longest, :head_dim] * key_scale[:, :, :longest, None]
        v = v[:, :, :longest, :head_dim] * value_scale[:, :, :longest, None]
    group = q.shape[2] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    distance = positions.unsqueeze(-1) - torch.arange(longest, device=q.device)  # [B, T, S]
    seen = (distance >= 0) & ((distance < window) if window > 0 else True)
    # Places that no row has written may hold anything, even NaN, which a weight of 0 does not remove.
    v = torch.where(seen.any(1)[:, None, :, None], v, 0.0)
    scores = q.transpose(1, 2).float() @ k.transpose(2, 3) * (head_dim**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return torch.where(real.unsqueeze(-1), y, 0.0)
