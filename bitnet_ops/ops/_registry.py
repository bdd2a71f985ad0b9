"""What the families of operators share: the namespace, and how a shape or another device is registered."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _ops
from .._ops import add_op_namespace_prefix

OPS = _ops.ops

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def fake_kernel(operator: str) -> Callable[[_Kernel], _Kernel]:
    """Registers an operator's shapes and dtypes without data, for torch.compile and meta tensors."""
    decorator: Callable[[_Kernel], _Kernel] = torch.library.register_fake(add_op_namespace_prefix(operator))
    return decorator


def check_device(operator: str, first: Tensor, **others: Tensor | None) -> None:
    """Refuses a meta tensor beside a real one: the result would be memory that nobody wrote."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"bitnet_ops::{operator}: argument '{name}': expected a tensor on {first.device}, "
                f"got one on {tensor.device}"
            )


def use_on_accelerators(operator: str, reference: Callable[..., Any]) -> None:
    """Registers the reference for GPUs, where there are no kernels, so that a model trains there too."""
    for backend in ("CUDA", "MPS", "XPU"):
        torch.library.impl(add_op_namespace_prefix(operator), backend)(reference)


def batch_rows(operator: str, *more: int) -> None:
    """Registers how torch.func.vmap runs an operator that works row by row: with one more leading axis.

    Where tensors without rows are batched, weights for instance, it runs once for each of the batch.

    Args:
        operator: its first argument has rows.
        *more: positions of other arguments with as many rows.
    """
    call = getattr(OPS, operator).default
    with_rows = {0, *more}

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        if any(_is_batched(dims) for place, dims in enumerate(in_dims) if place not in with_rows):
            return one_by_one(call, info.batch_size, in_dims, arguments)
        result = call(
            *(
                batch_first(x, dim, info.batch_size) if place in with_rows else x
                for place, (x, dim) in enumerate(zip(arguments, in_dims, strict=True))
            )
        )
        return result, _each(lambda _: 0, result)

    torch.library.register_vmap(add_op_namespace_prefix(operator), rule)


def batch_first(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """A tensor with its batch axis in front, repeated along it where it has none."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def one_by_one(
    call: Callable[..., Any], size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A batching rule that calls the operator for each of the batch."""

    def of(i: int, item: Any, dims: Any) -> Any:
        return _each(lambda x, dim: x if dim is None else x.select(dim, i), item, dims)

    results = [
        call(
            *(
                of(i, item, dims) if _is_batched(dims) else item
                for item, dims in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    stacked = _each(lambda *parts: torch.stack(parts), *results)
    return stacked, _each(lambda _: 0, stacked)


def _is_batched(dims: Any) -> bool:
    """Of an argument, a list of tensors perhaps, by the entry of ``in_dims`` for it."""
    return any(dim is not None for dim in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _each(function: Callable[..., Any], *items: Any) -> Any:
    """Applies a function to single things, or to each of several lists' elements."""
    if isinstance(items[0], (list, tuple)):
        return type(items[0])(map(function, *items))
    return function(*items)


class _WithoutGradient(torch.autograd.Function):
    """Hands a result on. Who asks for gradients through it gets an error, not None."""

    @staticmethod
    def forward(ctx: Any, operator: str, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.operator = operator
        return result

    @staticmethod
    def backward(ctx: Any, grad_result: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.operator} has no gradient. A BitNet model has one in calls without a cache; "
            "elsewhere compose rms_norm, ternary_linear and attention, or detach the result"
        )


def without_gradient(operator: Any, *arguments: Any) -> Any:
    """Calls an operator for inference only. PyTorch by itself would give None as its gradients."""
    if not torch.is_grad_enabled():
        return operator(*arguments)
    flat = [x for item in arguments for x in (item if isinstance(item, (list, tuple)) else [item])]
    inputs = [x for x in flat if isinstance(x, Tensor) and x.requires_grad]
    if not inputs:
        return operator(*arguments)
    with torch.no_grad():
        results = operator(*arguments)
    name = str(operator).removesuffix(".default").replace(".", "::")

    def guard(result: Tensor) -> Any:
        if not result.is_floating_point():
            return result
        return _WithoutGradient.apply(name, result, *inputs)  # type: ignore[no-untyped-call]

    return guard(results) if isinstance(results, Tensor) else type(results)(map(guard, results))
