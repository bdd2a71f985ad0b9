"""What differs between versions of transformers, in one place: the rest is written for 5.24.

Nothing here imports transformers before it is called.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

OLDEST = (5, 3)
"""The oldest version that `register_transformers` is tested with. 5.0 and 5.1 have its hooks, too, but load
another model than that of the file with them."""

THEIR_MODULE = "transformers.integrations.bitnet"


def numbers(version: str) -> tuple[int, ...]:
    """The first two of a version: 5 and 24 of "5.24.0.dev0"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def cache_name() -> str:
    """What arguments and outputs of a forward pass call a cache: "cache", before "past_key_values"."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def unpacked_weight(layer: Any) -> Tensor:
    """The weight of an offline ``AutoBitLinear``.

    Before 5.18, transformers leaves weights that it has unpacked in uint8, -1 as 255, which its own layers
    cannot multiply.
    """
    weight: Tensor = layer.weight
    unpacked = weight.dtype == torch.uint8 and weight.shape == (layer.out_features, layer.in_features)
    return weight.view(torch.int8) if unpacked else weight


def is_own_hook(hook: Any) -> bool:
    """Whether a hook of a ternary layer is its own: before 5.19, offline ones unpack what they load."""
    return getattr(hook, "__module__", None) == THEIR_MODULE


def free(layer: nn.Module) -> None:
    """Lets a layer that has been replaced go with its last reference, without the garbage collector.

    That own hook is a method, so the layer holds itself.
    """
    for key, hooks in vars(layer).items():
        if key.endswith("_hooks"):
            for name in [name for name, hook in hooks.items() if is_own_hook(hook)]:
                del hooks[name]


def only(tensors: Any) -> Tensor | None:
    """The tensor that a conversion of weights gets for a name: in a list of one, or bare before."""
    tensor: Tensor | None = tensors[0] if isinstance(tensors, list) else tensors
    return tensor


def casts_renamed() -> bool:
    """Whether tensors of a quantized checkpoint get the dtype that was asked for if their names change.

    They change where a body is loaded without its head (``AutoModel``). Before 5.19 such tensors keep the
    dtype of the file.
    """
    from transformers.quantizers.base import HfQuantizer

    return hasattr(HfQuantizer, "get_new_dtype")


def keep_recording(module: Any) -> None:
    """Keeps hidden states and attentions as outputs, which transformers registers by the class of a model."""
    from transformers import modeling_utils

    registry = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        key = module if type(registry) is not dict else str(type(module))
        registry[key] = module._can_record_outputs
