"""Causal attention, with and without a cache."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops import add_op_namespace_prefix
from ._registry import (
    OPS,
    batch_first,
    check_device,
    fake_kernel,
    one_by_one,
    use_on_accelerators,
    without_gradient,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """Causal self-attention with rotary positions, and several query heads to a key-value head.

    ``y[t] = softmax over s <= t of (rotate(q[t]) . rotate(k[s]) * scale) @ v[s]`` (arXiv:1706.03762,
    2104.09864, 2305.13245), where query head h reads key-value head ``h // (heads / kv_heads)``. With a
    window, over ``t - window < s <= t`` (arXiv:2004.05150). Needs no memory for the scores.

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
        scale: what the products of queries and keys are multiplied with, 1 / sqrt(head_dim) for None.
        window: how many positions a token sees, its own among them; 0 for all.

    Returns:
        float32 [B, T, heads * head_dim].

    Raises:
        RuntimeError: if dtypes, shapes or positions do not fit together, ``scale`` is not finite or
            ``window`` is negative.

    Example:
        >>> q, k, v = torch.randn(1, 10, 8 * 64), torch.randn(1, 10, 2 * 64), torch.randn(1, 10, 2 * 64)
        >>> cos, sin = reference.rotary_embedding(torch.arange(10), 64, 10000.0)
        >>> attention(q, k, v, cos, sin).shape
        torch.Size([1, 10, 512])
    """
    result: Tensor = OPS.attention.default(q.float(), k.float(), v.float(), cos, sin, start, scale, window)
    return result


@fake_kernel("attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
) -> Tensor:
    check_device("attention", q, k=k, v=v, cos=cos, sin=sin, start=start)
    return q.new_empty(q.shape)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cos, sin, start = ctx.saved_tensors
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        y = reference.attention(q, k, v, cos, sin, start, ctx.scale, ctx.window)
        gradients = torch.autograd.grad(y, (q, k, v), grad_y)
    return *gradients, None, None, None, None, None


torch.library.register_autograd(
    add_op_namespace_prefix("attention"), _attention_backward, setup_context=_attention_setup
)


def _attention_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    attend, size = OPS.attention.default, info.batch_size
    if in_dims[3] is not None or in_dims[4] is not None:  # cos and sin
        return one_by_one(attend, size, in_dims, arguments)
    # Sequences do not know of each other: those of all calls are one batch.
    dims = dict(enumerate(in_dims))
    q, k, v, cos, sin, start = (*arguments, None)[:6]
    q, k, v, start = (
        None if x is None else x.flatten(0, 1)
        for x in (batch_first(x, dims.get(place), size) for place, x in ((0, q), (1, k), (2, v), (5, start)))
    )
    y: Tensor = attend(q, k, v, cos, sin, start)
    return y.unflatten(0, (size, len(y) // size)), 0


torch.library.register_vmap(add_op_namespace_prefix("attention"), _attention_vmap)


use_on_accelerators("attention", reference.attention)


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
    *,
    scale: float | None = None,
    window: int = 0,
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
        scale: as for `attention`.
        window: likewise. What no token of the call sees is not read.

    Returns:
        float32 [B, T, heads * head_dim].

    Raises:
        RuntimeError: if dtypes, shapes or positions do not fit together, ``scale`` is not finite or
            ``window`` is negative.

    Example:
        >>> cache = KVCache(config, batch_size=1, capacity=64)
        >>> stored = cache.keys[0], cache.values[0]
        >>> y = cached_attention(q, k, v, cache.cos, cache.sin, torch.tensor([0]), *stored)
    """
    result: Tensor = without_gradient(
        OPS.cached_attention.default,
        q.float(),
        k.float(),
        v.float(),
        cos,
        sin,
        start,
        keys,
        values,
        key_scale,
        value_scale,
        scale,
        window,
    )
    return result


@fake_kernel("cached_attention")
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
    scale: float | None = None,
    window: int = 0,
) -> Tensor:
    check_device("cached_attention", q, k=k, v=v, cos=cos, sin=sin, start=start, keys=keys, values=values)
    return q.new_empty(q.shape)


use_on_accelerators("cached_attention", reference.cached_attention)
