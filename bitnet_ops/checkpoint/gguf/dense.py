"""Stub until h-gblocks has it."""

import torch
from torch import Tensor

from .types import TensorType


def dequantize(type: TensorType, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    import gguf
    import numpy as np

    q = gguf.GGMLQuantizationType(type.number)
    return (
        torch.from_numpy(np.array(gguf.quants.dequantize(data.numpy().reshape(shape[0], -1), q)))
        .view(shape)
        .to(dtype)
    )
