"""What a model has to be to be written, in any format."""

from typing import TYPE_CHECKING

import torch

from ..layers.linear import BitLinearQAT
from ..layers.matrix import TernaryMatrix
from .tensor_source import FLOAT_DTYPES, TORCH_DTYPE
from .weights import tables

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.model import LanguageModel

FLOATS = tuple(TORCH_DTYPE[name] for name in FLOAT_DTYPES)


def check_saveable(model: "LanguageModel", caller: str) -> dict[str, TernaryMatrix]:
    """Checks that a model is packed, and everywhere as its configuration says.

    Args:
        model: any.
        caller: the function that writes, for errors.

    Returns:
        The projections, and ternary embedding and head, by the names of their modules.

    Raises:
        ValueError: the model has `BitLinearQAT` or other float projections, or a dtype that no checkpoint
            has, or a projection that is not as ``model.config`` says.
    """
    _check_tables(model, caller)
    projections = {}
    for name, module in model.named_modules():
        if name != "lm_head" and isinstance(module, torch.nn.Linear):
            hint = "; call bitnet_ops.pack(model) first" if isinstance(module, BitLinearQAT) else ""
            raise ValueError(
                f"{caller}: model: expected BitLinear projections, got {type(module).__name__} at "
                f"{name!r}{hint}"
            )
        if isinstance(module, TernaryMatrix):
            _check_is_as_configured(model.config, name, module, caller)
            projections[name] = module
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(
                f"{caller}: model: expected {', '.join(map(str, FLOATS))}, got {tensor.dtype} at {name!r}; "
                "call model.float() first"
            )
    return projections


def _check_tables(model: "LanguageModel", caller: str) -> None:
    for field, name in tables(model.config).items():
        ternary, expected = isinstance(model.get_submodule(name), TernaryMatrix), getattr(model.config, field)
        if ternary != expected:
            kinds = {True: "ternary numbers", False: "floats"}
            raise ValueError(
                f"{caller}: model: expected {kinds[expected]} at {name!r}, as model.config.{field} says, "
                f"got {kinds[ternary]}"
            )


def _check_is_as_configured(config: "DecoderConfig", name: str, layer: TernaryMatrix, caller: str) -> None:
    """A file says it once for all projections, so that one of another kind would be lost."""
    part = name.removesuffix(".linear").rpartition(".")[2]
    bias: bool | None
    if name in tables(config).values():
        bias = False
    elif part == "o_proj":
        bias = config.attention_output_bias
    else:
        bias = config.attention_bias if part in ("q_proj", "k_proj", "v_proj") else config.mlp_bias
    expected = (bias, config.activation_bits, config.group_size)
    if (layer.bias is not None, layer.activation_bits, layer.group_size) != expected:
        raise ValueError(
            f"{caller}: model: expected projections {'with' if bias else 'without'} bias and with "
            f"activation_bits={config.activation_bits}, group_size={config.group_size}, as model.config "
            f"says, got another at {name!r}: {layer}"
        )
