"""Packed ternary layers through torchao's ``quantize_``.

    quantize_(model, TernaryWeightInt8ActConfig())                         # every nn.Linear
    quantize_(model, TernaryWeightInt8ActConfig(), filter_fn=lambda module, name: name != "head")

    torch.save(model.state_dict(), "packed.pt")                           # tile16, whatever the layout
    model = Net()                                                          # elsewhere; may be on "meta"
    quantize_(model, TernaryWeightInt8ActConfig())
    model.load_state_dict(torch.load("packed.pt"), assign=True)

Only weights that were trained to be ternary (`bitnet_ops.BitLinearQAT`, masters of BitNet) keep their sense:
of others, three values a weight leave next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from ..layers.linear import BitLinear, BitLinearQAT, best_layout, refuse_a_part


@dataclass
class TernaryWeightInt8ActConfig(AOBaseConfig):  # type: ignore[misc]
    """For ``torchao.quantization.quantize_``: linear layers become `bitnet_ops.BitLinear`, for inference.

    Weights are ternary with one scale, quantised as in BitNet b1.58 (`bitnet_ops.reference.quantize_weight`),
    or as they are where they already are -s, 0 and s with one s for the layer or for each row. Activations
    are quantised to int8 for each token. It is for weights that were trained to be ternary; others lose
    their sense.

    Attributes:
        layout: how weights are stored, see `bitnet_ops.BitLinear`; None for the fastest on this machine.
        activation_bits: 8, or 16 for models that were not trained with 8-bit activations.

    Raises:
        ValueError: an option is unknown, from ``quantize_``.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> quantize_(model, TernaryWeightInt8ActConfig())
        >>> model[0]
        BitLinear(in_features=64, out_features=256, bias=True)
    """

    layout: str | None = None
    activation_bits: int = 8


@register_quantize_module_handler(TernaryWeightInt8ActConfig)  # type: ignore[untyped-decorator]
def _quantized(module: nn.Module, config: TernaryWeightInt8ActConfig) -> nn.Module:
    """What `quantize_` puts in the place of a module that its filter has chosen."""
    if isinstance(module, BitLinear):
        return module
    if type(module) not in (nn.Linear, BitLinearQAT):
        raise ValueError(
            f"TernaryWeightInt8ActConfig: expected a filter_fn that chooses nn.Linear layers, got one that "
            f"chooses {type(module).__name__}"
        )
    assert isinstance(module, nn.Linear)
    options = {"layout": config.layout or best_layout(), "activation_bits": config.activation_bits}
    if module.weight.is_meta:
        layer = BitLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            device="meta",
            **options,  # type: ignore[arg-type]
        )
        return layer.train(module.training)
    refuse_a_part(module)
    found = None if isinstance(module, BitLinearQAT) else _ternary_already(module.weight.detach())
    if found is None:
        return BitLinear.from_linear(module, **options)  # type: ignore[arg-type]
    return BitLinear.from_ternary(*found, module.bias, **options).train(module.training)  # type: ignore[arg-type]


def _ternary_already(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weights -s, 0 and s as int8 and s, for each row; None for others."""
    largest = weight.abs().amax(1, keepdim=True)
    if not bool(((weight == 0) | (weight.abs() == largest)).all()) or not bool(largest.isfinite().all()):
        return None
    # A row of zeros has the scale of the layer, which changes nothing.
    scale = torch.where(largest > 0, largest, largest.amax()).squeeze(1).float()
    return weight.sign().to(torch.int8), scale
