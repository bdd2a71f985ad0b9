"""The scales of a projection as a tensor type of GGUF has them."""

import torch
from torch import Tensor

from ...layers.matrix import TernaryMatrix
from .ternary import group_size
from .types import TensorType


def scales_for(type: TensorType, layer: TernaryMatrix) -> Tensor:
    """The scales of a layer, in the groups of a type.

    Args:
        type: I2_S, TQ1_0, TQ2_0 or Q2_0.
        layer: any projection.

    Returns:
        float32 [G, N], with G = 1 where the layer has one scale a row, or the type one for the tensor.

    Raises:
        ValueError: the type does not hold them; the text says why.
    """
    scales = layer.scales().detach().float().cpu()  # those of groups may be float16
    if not layer.group_size:
        scales = scales.unsqueeze(0)
    block = group_size(type)
    if block == 0:
        if scales.numel() and not bool((scales == scales[0, 0]).all()):
            kind = f"groups of {layer.group_size} inputs" if layer.group_size else "rows"
            raise ValueError(f"{type.name} has one scale for a matrix, and the model has scales of {kind}")
        return scales[:1]
    if layer.group_size > block:
        first = torch.arange(layer.in_features // block) * block
        return scales[first // layer.group_size]
    if 0 < layer.group_size < block:
        # [blocks, groups in a block, N]; K is a multiple of the block.
        parts = scales.view(-1, block // layer.group_size, layer.out_features)
        if not bool((parts == parts[:, :1]).all()):
            raise ValueError(
                f"{type.name} has scales of {block} inputs, and the model has scales of groups of "
                f"{layer.group_size}"
            )
        return parts[:, 0]
    return scales


def stored_scales(type: TensorType, scales: Tensor) -> Tensor:
    """The scales [G, N] rounded to what the type stores, float32.

    Raises:
        ValueError: one is 0 or infinite there.
    """
    if group_size(type) == 0:
        return scales  # float32
    stored = scales.half().float()
    wrong = ((stored == 0) & (scales != 0)) | ~stored.isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"{type.name} has scales in float16, from 6e-8 to 65504, and the model has "
            f"{scales[wrong][0].item():.4g}"
        )
    return stored
