"""The operators: typed functions over ``torch.ops.bitnet_ops``, with fake kernels and gradients.

Each one equals its namesake in ``bitnet_ops.reference``: integers bit for bit, floats to rounding.
Results do not depend on the instruction set, the number of threads or the batch (DESIGN.md section 3).
All of them work under ``torch.compile(fullgraph=True)``.

The kernels run on the CPU. All operators without packed weights also accept tensors on a
GPU, where the reference runs, so that the same model trains there.

A wrong argument raises a ``RuntimeError`` that names the operator, the argument, what was expected and
what was given.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import bitnet_ops.isa  # noqa: F401  loads the library, which registers the operators
from bitnet_ops import packing, reference

_OPS = torch.ops.bitnet_ops


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Rounds activations to integers, absmax per row of the last axis (arXiv:2402.17764, section 2).

    ``s = 127 / max(|x|)`` (32639 with 16 bits), ``q = round_half_to_even(x * s)``, ``x_scale = 1 / s``;
    ``x`` is about ``q * x_scale``. Float32 arithmetic whatever the dtype of ``x``. A row that holds a NaN
    or an infinity gets ``q = 0`` and ``x_scale = NaN``.

    Args:
        x: float32, bfloat16 or float16 [..., K], K at most 2^18.
        bits: 8 or 16.

    Returns:
        ``(q, x_scale)``: int8 or int16 [..., K] and float32 [...].

    Raises:
        RuntimeError: if ``x`` is no such tensor, or for other bits.

    Example:
        >>> quantize_activations(torch.tensor([[0.5, -1.0, 0.25]]))
        (tensor([[  64, -127,   32]], dtype=torch.int8), tensor([0.0079]))
    """
    return _OPS.quantize_activations.default(x, bits)


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
    return _OPS.pack_ternary.default(w, layout)


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
    return _OPS.unpack_ternary.default(packed, out_features, in_features, layout)


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
    return _OPS.repack_ternary.default(packed, out_features, in_features, layout, wanted)


def ternary_matmul(q: Tensor, packed: Tensor, out_features: int, layout: str = "tile16") -> Tensor:
    """Exact integer product ``acc[m, n] = sum_k q[m, k] * w[n, k]``.

    Args:
        q: int8 [M, K], on the CPU; K at most 2^18, so that int32 cannot overflow.
        packed: uint8, from ``pack_ternary(w, layout)``.
        out_features: N.
        layout: as in ``pack_ternary``.

    Returns:
        int32 [M, N].

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.

    Example:
        >>> w = torch.tensor([[-1, 0, 1], [1, 1, 1]], dtype=torch.int8)
        >>> ternary_matmul(torch.tensor([[2, 3, 4]], dtype=torch.int8), pack_ternary(w), 2)
        tensor([[2, 9]], dtype=torch.int32)
    """
    return _OPS.ternary_matmul.default(q, packed, out_features, layout)


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: str = "tile16",
    activation_bits: int = 8,
    group_size: int = 0,
    active: Tensor | None = None,
) -> Tensor:
    """BitLinear: quantised activations times packed ternary weights (arXiv:2402.17764).

    ``y = acc * (x_scale * weight_scale) + bias`` with ``q, x_scale = quantize_activations(x)`` and
    ``acc = ternary_matmul(q, packed)``, rounded once to the dtype of ``x``. A row of ``x`` that holds a
    NaN or an infinity gives a row of NaN. Every layout gives the same bits.

    Up to four rows of ``x`` (two with 16-bit activations), layout "row" reads only rows of the matrix that
    are ``active`` for one of them, and layout "column" only columns whose quantised activation is not 0.

    Gradients are straight-through: with respect to ``x``, rounding counts as the identity, so
    ``grad_x = grad_y @ (w * weight_scale)``; ``bias`` gets the sum of ``grad_y``; packed weights and
    their scale get none.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU; K at most 2^18, with layout "column" 2^16.
        packed: uint8, from ``pack_ternary(w, layout)``.
        weight_scale: float32 [N], the multiplier that turns ternary weights back into real ones; with
            ``group_size`` [ceil(K / group_size), N], see ``reference.ternary_linear``.
        bias: float32 [N] or None.
        out_features: N.
        layout: as in ``pack_ternary``.
        activation_bits: 8 or 16; 16 for models that were not trained with 8-bit activations.
        group_size: 0, or how many inputs share a scale: 64, 128 or 256, with layout "tile16".
        active: bool [..., N] or None, with layout "row": the results that are wanted; the others are 0.

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        RuntimeError: if dtypes, shapes or options do not fit together.

    Example:
        >>> w = torch.tensor([[-1, 0, 1]], dtype=torch.int8)
        >>> ternary_linear(torch.tensor([1.0, 2.0, 4.0]), pack_ternary(w), torch.ones(1), None, 1)
        tensor([2.9921])
    """
    return _OPS.ternary_linear.default(
        x, packed, weight_scale, bias, out_features, layout, activation_bits, group_size, active
    )


def norm_linears(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    out_features: list[int],
    layout: str = "tile16",
) -> list[Tensor]:
    """``rms_norm``, then ``ternary_linear`` with each of several matrices: the same bits in one call.

    Inference only: it has no gradient.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU.
        norm_weight: float32 [K].
        eps: as in ``rms_norm``.
        packed: matrices from ``pack_ternary(w, layout)``, [N_i, K] each.
        weight_scale: float32 [N_i] each.
        out_features: N_i.
        layout: as in ``pack_ternary``.

    Returns:
        One [..., N_i] a matrix, in the dtype of ``x``.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.
    """
    return _OPS.norm_linears.default(x, norm_weight, eps, packed, weight_scale, out_features, layout)


def norm_linear_add(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    weight_scale: Tensor,
    layout: str,
    residual: Tensor,
) -> Tensor:
    """``residual + ternary_linear(rms_norm(x))``: the same bits in one call. Inference only.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU.
        norm_weight: float32 [K].
        eps: as in ``rms_norm``.
        packed: from ``pack_ternary(w, layout)``, [N, K].
        weight_scale: float32 [N].
        layout: as in ``pack_ternary``.
        residual: [..., N] in the dtype of ``x``.

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.
    """
    return _OPS.norm_linear_add.default(x, norm_weight, eps, packed, weight_scale, layout, residual)


def norm_squared_relu_glu(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    gate_scale: Tensor,
    gate_layout: str,
    up: Tensor,
    up_scale: Tensor,
    up_layout: str,
) -> Tensor:
    """``relu(gate(n))^2 * up(n)`` with ``n = rms_norm(x)``: the same values in one call. Inference only.

    With ``up_layout="row"`` and up to four tokens, rows of ``up`` whose gate is closed are not read.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU.
        norm_weight: float32 [K].
        eps: as in ``rms_norm``.
        gate: from ``pack_ternary(w, gate_layout)``, [N, K].
        gate_scale: float32 [N].
        gate_layout: as in ``pack_ternary``.
        up: from ``pack_ternary(w, up_layout)``, [N, K].
        up_scale: float32 [N].
        up_layout: as in ``pack_ternary``.

    Returns:
        [..., N] in the dtype of ``x``. Where the gate is closed it is +0, where the parts may give -0.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.
    """
    return _OPS.norm_squared_relu_glu.default(
        x, norm_weight, eps, gate, gate_scale, gate_layout, up, up_scale, up_layout
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis (arXiv:1910.07467), rounded once to the dtype of ``x``.

    ``y = x / sqrt(mean(x^2) + eps) * weight``, in float32 arithmetic.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: float32, bfloat16 or float16 [K].
        eps: added to the mean square, at least 0.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together, or ``eps`` is negative or NaN.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0)
        tensor([0.8485, 1.1314])
    """
    return _OPS.rms_norm.default(x, weight, eps)


def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of the language-model head: float32 sums whatever the storage dtype of ``weight``.

    ``logits[..., v] = sum_k x[..., k] * weight[v, k]``, summed in the fixed order of DESIGN.md section 3,
    so the logits of a token are the same bits in any batch.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: float32, bfloat16 or float16 [V, K], row by row; the tied embedding table.

    Returns:
        float32 [..., V].

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.

    Example:
        >>> lm_head(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0], [0.0, -1.0]], dtype=torch.bfloat16))
        tensor([ 3., -2.])
    """
    return _OPS.lm_head.default(x, weight)


def screen_lm_head(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Makes the copy of the head's table, in six bits, by which ``lm_head_top_k`` rules tokens out.

    Inputs 64 g .. 64 g + 63 of row v are about ``scale[v] * factor[v, g] * q``, ``|q| <= 31``;
    csrc/kernels/screen.h draws the layout and proves the bounds.

    Args:
        weight: float32, bfloat16 or float16 [V, K], on the CPU; K at most 2^16.

    Returns:
        ``(codes, bounds)``: uint8 [ceil(V / 16), bytes of 16 rows], for K = 2560 0.77 bytes an element; and
        float32 [3, V rounded up to 16]: the scale of each row, a bound of its norm, and one of the norm of
        what the copy loses (infinite for a row that holds a NaN or an infinity).

    Raises:
        RuntimeError: if ``weight`` is no such tensor.

    Example:
        >>> codes, bounds = screen_lm_head(torch.randn(1000, 64))
        >>> codes.shape
        torch.Size([63, 832])
    """
    return _OPS.screen_lm_head.default(weight)


def lm_head_top_k(
    x: Tensor,
    weight: Tensor,
    k: int,
    codes: Tensor | None = None,
    bounds: Tensor | None = None,
    temperature: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best-scored tokens: what ``lm_head`` and a stable sort would give, bit for bit.

    A token's score is its logit or, with ``noise``, ``logit / temperature + noise`` in float64. Of equals
    the one with the smaller id comes first; NaN comes before everything.

    With ``codes`` and ``bounds`` of ``screen_lm_head(weight)``, only rows that can be among the best are read
    from the table: an upper bound of every logit comes from the copy, of three eighths the size for bfloat16.
    The result is the same; a table that changed since needs a new copy.

    Args:
        x: float32, bfloat16 or float16 [..., K], on the CPU.
        weight: float32, bfloat16 or float16 [V, K].
        k: at least 1; V stands for anything larger.
        codes: from ``screen_lm_head``, or None to compute all logits.
        bounds: the same.
        temperature: above 0.
        noise: float32 [..., V] or None. With ``gumbel_noise`` the best token is a draw from
            ``softmax(logits / temperature)``.

    Returns:
        ``(logits, ids, rescored)``: float32 and int64 [..., min(k, V)], best first; and int64 [...], how many
        rows of the table were needed.

    Raises:
        RuntimeError: if dtypes or shapes do not fit together.

    Example:
        >>> weight = torch.tensor([[1.0, 1.0], [0.0, -1.0], [2.0, 0.5]])
        >>> lm_head_top_k(torch.tensor([1.0, 2.0]), weight, 2)
        (tensor([3., 3.]), tensor([0, 2]), tensor(3))
    """
    return _OPS.lm_head_top_k.default(x, weight, k, codes, bounds, temperature, noise)


def gumbel_noise(seed: Tensor, size: int) -> Tensor:
    """Gumbel-distributed random numbers, ``-ln(-ln(u))`` with u uniform in (0, 1), a stream for each seed.

    The argmax of ``logits / temperature + noise`` is a draw from ``softmax(logits / temperature)``
    (Gumbel 1954; Maddison et al., arXiv:1411.0030). The same seed gives the same bits on every CPU.

    Args:
        seed: int64 [...], on the CPU.
        size: how many numbers for each.

    Returns:
        float32 [..., size].

    Example:
        >>> gumbel_noise(torch.tensor([7]), 128256).shape
        torch.Size([1, 128256])
    """
    return _OPS.gumbel_noise.default(seed, size)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, start: Tensor | None = None
) -> Tensor:
    """Causal self-attention with rotary positions, and several query heads to a key-value head.

    ``y[t] = softmax over s <= t of (rotate(q[t]) . rotate(k[s]) / sqrt(head_dim)) @ v[s]`` (arXiv:1706.03762,
    2104.09864, 2305.13245), where query head h reads key-value head ``h // (heads / kv_heads)``. Needs no
    memory for the scores.

    The result of a token is the same bits with and without padding before its sequence, and the same that
    `cached_attention` gives with a float32 cache, however the tokens are cut into calls. Scores that are NaN
    or plus infinity make a NaN of the tokens that see them, and of no other.

    Gradients with respect to ``q``, ``k`` and ``v`` are those of ``reference.attention``.

    Args:
        q: float [B, T, heads * head_dim].
        k: float [B, T, kv_heads * head_dim].
        v: like ``k``.
        cos: float32 [positions, head_dim / 2], at least T rows; see ``reference.rotary_embedding``.
        sin: likewise.
        start: int64 [B], at most 0: the position of each sequence's first token. Tokens at negative positions
            are padding: no token sees them, and their result is 0. None for a batch without padding.

    Returns:
        float32 [B, T, heads * head_dim].

    Raises:
        RuntimeError: if dtypes, shapes or positions do not fit together.

    Example:
        >>> q, k, v = torch.randn(1, 10, 8 * 64), torch.randn(1, 10, 2 * 64), torch.randn(1, 10, 2 * 64)
        >>> cos, sin = reference.rotary_embedding(torch.arange(10), 64, 10000.0)
        >>> attention(q, k, v, cos, sin).shape
        torch.Size([1, 10, 512])
    """
    return _OPS.attention.default(q.float(), k.float(), v.float(), cos, sin, start)


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
) -> Tensor:
    """`attention` to the tokens of a cache as well, which the new ones are written to first.

    Has no gradients. `bitnet_ops.KVCache` makes the tensors and keeps count.

    Args:
        q: as for `attention`.
        k: as for `attention`; stored rotated, in the dtype of ``keys``.
        v: as for `attention`.
        cos: as for `attention`, with a row for every position.
        sin: likewise.
        start: int64 [B], the position of each sequence's first new token; the cache holds those before it.
            Tokens at negative positions are padding, and are not stored.
        keys: float32 or bfloat16 [B, kv_heads, blocks, head_dim, 64], changed in place: position p is column
            p % 64 of block p // 64. Or int8 [B, kv_heads, spans, 256 * width], where width is head_dim
            rounded up to 16; csrc/kernels/attention_int8.h draws a span of 256 positions.
        values: same dtype, [B, kv_heads, blocks * 64, width], and for int8 as ``keys``; changed in place.
        key_scale: float32 [B, kv_heads, spans * 256] where the cache is int8, else None; changed in place.
            Each head's vector is rounded as by `quantize_activations`, queries and weights to 16 bits.
        value_scale: likewise.

    Returns:
        float32 [B, T, heads * head_dim].

    Raises:
        RuntimeError: if dtypes, shapes or positions do not fit together.

    Example:
        >>> cache = KVCache(config, batch_size=1, capacity=64)
        >>> stored = cache.keys[0], cache.values[0]
        >>> y = cached_attention(q, k, v, cache.cos, cache.sin, torch.tensor([0]), *stored)
    """
    return _OPS.cached_attention.default(
        q.float(), k.float(), v.float(), cos, sin, start, keys, values, key_scale, value_scale
    )


def decoder_layers(
    x: Tensor,
    norm_weight: Sequence[Tensor],
    eps: float,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    layouts: Sequence[str],
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_scale: Sequence[Tensor] = (),
    value_scale: Sequence[Tensor] = (),
) -> Tensor:
    """The layers of a BitNet decoder over a cache, one after another.

    For each layer, with its part of every list::

        q, k, v = norm_linears(x, norm_weight[0], eps, [q_proj, k_proj, v_proj])
        y = cached_attention(q, k, v, cos, sin, start, keys, values, key_scale, value_scale)
        x = norm_linear_add(y, norm_weight[1], eps, o_proj, x)
        y = norm_squared_relu_glu(x, norm_weight[2], eps, gate_proj, up_proj)
        x = norm_linear_add(y, norm_weight[3], eps, down_proj, x)

    Has no gradients.

    Args:
        x: float32 [B, T, hidden_size].
        norm_weight: float32, four a layer: input, attn_sub, post_attention, ffn_sub.
        eps: of all norms.
        packed: seven a layer: q, k, v, o, gate, up, down; each as in `ternary_linear`.
        weight_scale: float32 [out_features], seven a layer.
        layouts: seven a layer.
        cos: as in `cached_attention`, like the following; the lists have one tensor a layer.
        sin: likewise.
        start: likewise.
        keys: likewise; changed in place.
        values: likewise; changed in place.
        key_scale: likewise, empty where the cache is not int8; changed in place.
        value_scale: likewise; changed in place.

    Returns:
        float32 [B, T, hidden_size].

    Raises:
        RuntimeError: if numbers of tensors, dtypes or shapes do not fit together.
    """
    return _OPS.decoder_layers.default(
        x,
        norm_weight,
        eps,
        packed,
        weight_scale,
        layouts,
        cos,
        sin,
        start,
        keys,
        values,
        key_scale,
        value_scale,
    )


# ---- shapes and dtypes without data, for torch.compile and meta tensors ------------------------------


def _check_device(operator: str, first: Tensor, **others: Tensor | None) -> None:
    """Refuses a meta tensor beside a real one: the result would be memory that nobody wrote."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"bitnet_ops::{operator}: argument '{name}': expected a tensor on {first.device}, "
                f"got one on {tensor.device}"
            )


@torch.library.register_fake("bitnet_ops::quantize_activations")
def _(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    dtype = torch.int16 if bits == 16 else torch.int8
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("bitnet_ops::pack_ternary")
def _(w: Tensor, layout: str = "tile16") -> Tensor:
    return w.new_empty(packing.packed_shape(w.shape[0], w.shape[1], layout), dtype=torch.uint8)


@torch.library.register_fake("bitnet_ops::unpack_ternary")
def _(packed: Tensor, out_features: int, in_features: int, layout: str = "tile16") -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=torch.int8)


@torch.library.register_fake("bitnet_ops::repack_ternary")
def _(packed: Tensor, out_features: int, in_features: int, layout: str, wanted: str) -> Tensor:
    return packed.new_empty(packing.packed_shape(out_features, in_features, wanted))


@torch.library.register_fake("bitnet_ops::ternary_matmul")
def _(q: Tensor, packed: Tensor, out_features: int, layout: str = "tile16") -> Tensor:
    _check_device("ternary_matmul", q, packed=packed)
    return q.new_empty((q.shape[0], out_features), dtype=torch.int32)


@torch.library.register_fake("bitnet_ops::ternary_linear")
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    layout: str = "tile16",
    activation_bits: int = 8,
    group_size: int = 0,
    active: Tensor | None = None,
) -> Tensor:
    _check_device("ternary_linear", x, packed=packed, weight_scale=weight_scale, bias=bias, active=active)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("bitnet_ops::norm_linears")
def _(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    out_features: list[int],
    layout: str = "tile16",
) -> list[Tensor]:
    for matrix, scale in zip(packed, weight_scale, strict=True):
        _check_device("norm_linears", x, norm_weight=norm_weight, packed=matrix, weight_scale=scale)
    return [x.new_empty((*x.shape[:-1], size)) for size in out_features]


@torch.library.register_fake("bitnet_ops::norm_linear_add")
def _(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    packed: Tensor,
    weight_scale: Tensor,
    layout: str,
    residual: Tensor,
) -> Tensor:
    _check_device(
        "norm_linear_add",
        x,
        norm_weight=norm_weight,
        packed=packed,
        weight_scale=weight_scale,
        residual=residual,
    )
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@torch.library.register_fake("bitnet_ops::norm_squared_relu_glu")
def _(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    gate_scale: Tensor,
    gate_layout: str,
    up: Tensor,
    up_scale: Tensor,
    up_layout: str,
) -> Tensor:
    _check_device(
        "norm_squared_relu_glu",
        x,
        norm_weight=norm_weight,
        gate=gate,
        gate_scale=gate_scale,
        up=up,
        up_scale=up_scale,
    )
    return x.new_empty((*x.shape[:-1], gate_scale.shape[0]))


@torch.library.register_fake("bitnet_ops::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_device("rms_norm", x, weight=weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("bitnet_ops::lm_head")
def _(x: Tensor, weight: Tensor) -> Tensor:
    _check_device("lm_head", x, weight=weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.register_fake("bitnet_ops::screen_lm_head")
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    vocabulary, in_features = weight.shape
    tiles, groups = (vocabulary + 15) // 16, (in_features + 63) // 64
    tile_bytes = (16 * groups + 63) // 64 * 64 + 768 * groups
    codes = weight.new_empty((tiles, tile_bytes), dtype=torch.uint8)
    return codes, weight.new_empty((3, tiles * 16), dtype=torch.float32)


@torch.library.register_fake("bitnet_ops::lm_head_top_k")
def _(
    x: Tensor,
    weight: Tensor,
    k: int,
    codes: Tensor | None = None,
    bounds: Tensor | None = None,
    temperature: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device("lm_head_top_k", x, weight=weight, codes=codes, bounds=bounds, noise=noise)
    shape = (*x.shape[:-1], min(k, weight.shape[0]))
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
    )


@torch.library.register_fake("bitnet_ops::gumbel_noise")
def _(seed: Tensor, size: int) -> Tensor:
    return seed.new_empty((*seed.shape, size), dtype=torch.float32)


@torch.library.register_fake("bitnet_ops::attention")
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, start: Tensor | None = None) -> Tensor:
    _check_device("attention", q, k=k, v=v, cos=cos, sin=sin, start=start)
    return q.new_empty(q.shape)


@torch.library.register_fake("bitnet_ops::cached_attention")
def _(
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
) -> Tensor:
    _check_device("cached_attention", q, k=k, v=v, cos=cos, sin=sin, start=start, keys=keys, values=values)
    return q.new_empty(q.shape)


@torch.library.register_fake("bitnet_ops::decoder_layers")
def _(
    x: Tensor,
    norm_weight: list[Tensor],
    eps: float,
    packed: list[Tensor],
    weight_scale: list[Tensor],
    layouts: list[str],
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    key_scale: list[Tensor],
    value_scale: list[Tensor],
) -> Tensor:
    return x.new_empty(x.shape)


# ---- gradients, in plain PyTorch -----------------------------------------------------------------


def _ternary_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, weight_scale, _, ctx.out_features, ctx.layout, _, ctx.group_size, active = inputs
    ctx.save_for_backward(packed, weight_scale, active)
    ctx.in_features = x.shape[-1]
    ctx.x_dtype = x.dtype


def _ternary_linear_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    packed, weight_scale, active = ctx.saved_tensors
    needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
    grad_y = grad_y.float()
    if active is not None:
        grad_y = torch.where(active, grad_y, 0.0)
    grad_x = grad_bias = None
    if needs_x:
        w = unpack_ternary(packed, ctx.out_features, ctx.in_features, ctx.layout).float()
        if ctx.group_size == 0:
            grad_x = (grad_y * weight_scale) @ w
        else:
            scale = weight_scale.repeat_interleave(ctx.group_size, dim=0)[: ctx.in_features]
            grad_x = grad_y @ (w * scale.T)
        grad_x = grad_x.to(ctx.x_dtype)
    if needs_bias:
        grad_bias = grad_y.reshape(-1, ctx.out_features).sum(0)
    return grad_x, None, None, grad_bias, None, None, None, None, None


torch.library.register_autograd(
    "bitnet_ops::ternary_linear", _ternary_linear_backward, setup_context=_ternary_linear_setup
)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    # With r = 1 / sqrt(mean(x^2) + eps) and u = grad_y * weight:
    # grad_x = r * u - x * r^3 * mean(u * x),  grad_weight = sum over rows of grad_y * x * r.
    x, weight = ctx.saved_tensors
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + ctx.eps)
    normalised = wide * inverse_rms
    grad_y = grad_y.float()
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        u = grad_y * weight.float()
        grad_x = (inverse_rms * (u - normalised * (u * normalised).mean(dim=-1, keepdim=True))).to(x.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = (grad_y * normalised).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x, grad_weight, None


torch.library.register_autograd("bitnet_ops::rms_norm", _rms_norm_backward, setup_context=_rms_norm_setup)


def _lm_head_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _lm_head_backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad_logits @ weight.float()).to(x.dtype)
    if ctx.needs_input_grad[1]:
        rows = grad_logits.reshape(-1, weight.shape[0])
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
    return grad_x, grad_weight


torch.library.register_autograd("bitnet_ops::lm_head", _lm_head_backward, setup_context=_lm_head_setup)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _attention_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *constants = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        y = reference.attention(*leaves, *constants)
        gradients = torch.autograd.grad(y, leaves, grad_y)
    return *gradients, None, None, None


torch.library.register_autograd("bitnet_ops::attention", _attention_backward, setup_context=_attention_setup)


# ---- other devices: the reference -----------------------------------------------------------------

for _backend in ("CUDA", "MPS", "XPU"):
    torch.library.impl("bitnet_ops::quantize_activations", _backend)(reference.quantize_activations)
    torch.library.impl("bitnet_ops::rms_norm", _backend)(reference.rms_norm)
    torch.library.impl("bitnet_ops::lm_head", _backend)(reference.lm_head)
    torch.library.impl("bitnet_ops::attention", _backend)(reference.attention)
    torch.library.impl("bitnet_ops::cached_attention", _backend)(reference.cached_attention)
