"""The norm of the architecture."""

import torch
from torch import Tensor, nn

from .. import ops, reference


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rms_norm = reference.rms_norm if self.training else ops.rms_norm
        return rms_norm(x, self.weight, self.eps)
