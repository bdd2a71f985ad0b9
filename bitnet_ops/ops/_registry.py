"""What the families of operators share: the namespace, and how a shape or another device is registered."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

import bitnet_ops.isa  # noqa: F401  loads the library, which registers the operators

OPS = torch.ops.bitnet_ops

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def fake_kernel(operator: str) -> Callable[[_Kernel], _Kernel]:
    """Registers an operator's shapes and dtypes without data, for torch.compile and meta tensors."""
    decorator: Callable[[_Kernel], _Kernel] = torch.library.register_fake(f"bitnet_ops::{operator}")
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
        torch.library.impl(f"bitnet_ops::{operator}", backend)(reference)


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
