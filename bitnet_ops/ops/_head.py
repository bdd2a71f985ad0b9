"""The language-model head: logits, and the best tokens without all logits."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops import add_op_namespace_prefix
from ._registry import OPS, batch_rows, check_device, fake_kernel, use_on_accelerators, without_gradient


def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of the language-model head: float32 sums whatever the storage dtype of ``weight``.

    ``logits[..., v] = sum_k x[..., k] * weight[v, k]``, summed in the fixed order of docs/numerics.md,
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
    result: Tensor = OPS.lm_head.default(x, weight)
    return result


@fake_kernel("lm_head")
def _(x: Tensor, weight: Tensor) -> Tensor:
    check_device("lm_head", x, weight=weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


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


torch.library.register_autograd(
    add_op_namespace_prefix("lm_head"), _lm_head_backward, setup_context=_lm_head_setup
)


batch_rows("lm_head")


use_on_accelerators("lm_head", reference.lm_head)


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
    result: tuple[Tensor, Tensor] = OPS.screen_lm_head.default(weight)
    return result


@fake_kernel("screen_lm_head")
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    vocabulary, in_features = weight.shape
    tiles, groups = (vocabulary + 15) // 16, (in_features + 63) // 64
    tile_bytes = (16 * groups + 63) // 64 * 64 + 768 * groups
    codes = weight.new_empty((tiles, tile_bytes), dtype=torch.uint8)
    return codes, weight.new_empty((3, tiles * 16), dtype=torch.float32)


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
    result: tuple[Tensor, Tensor, Tensor] = without_gradient(
        OPS.lm_head_top_k.default, x, weight, k, codes, bounds, temperature, noise
    )
    return result


@fake_kernel("lm_head_top_k")
def _(
    x: Tensor,
    weight: Tensor,
    k: int,
    codes: Tensor | None = None,
    bounds: Tensor | None = None,
    temperature: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_device("lm_head_top_k", x, weight=weight, codes=codes, bounds=bounds, noise=noise)
    shape = (*x.shape[:-1], min(k, weight.shape[0]))
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
    )


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
    result: Tensor = OPS.gumbel_noise.default(seed, size)
    return result


@fake_kernel("gumbel_noise")
def _(seed: Tensor, size: int) -> Tensor:
    return seed.new_empty((*seed.shape, size), dtype=torch.float32)
