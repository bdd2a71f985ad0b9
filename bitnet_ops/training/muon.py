"""Muon where bfloat16 is slow.

torch.optim.Muon orthogonalises in bfloat16, for tensor cores. A CPU without instructions for it takes twenty
times as long as in float32, and torch 2.13 has no option for the dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float32Muon(torch.optim.Muon):
    """torch.optim.Muon with its products in float32; the iteration, the schedule and the state are torch's.

    What a step rounds to bfloat16 is widened again at once, by a public hook around torch's own code. That
    takes no copy of the iteration and no name from the inside of torch, and if a later version computes in
    float32 by itself, the hook has nothing to do.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch.optim.Muon has it."""
        with _WidenBfloat16():
            return super().step(closure)  # type: ignore[no-untyped-call]


class _WidenBfloat16(TorchFunctionMode):
    """Makes every function give float32 where it would give bfloat16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bfloat16:
            return result.float()
        return result
