"""How much of the feed-forward weights a token needs, and the layouts that make use of it.

The squared ReLU makes most of its results zero in a trained model. A row of up_proj whose gate is closed and
a column of down_proj whose quantised input is zero change no bit of the result, so the layouts ``row`` and
``column`` skip them (see `bitnet_ops.packing`). That pays where few are needed: skipping means many
short reads, which memory delivers more slowly than one long one.

Other activations close no gates: all rows of up_proj count, and only inputs that are small against the
largest are quantised to zero.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import reference
from ..layers.linear import BitLinear, NormedLinear, best_layout
from ..model import BitNet

ROW_PAYS_BELOW = 0.45
COLUMN_PAYS_BELOW = 0.3
"""Needed shares from which on a whole matrix in `best_layout` is read as fast; measured, see bench/LOG.md. A
little below the break-even, because a prompt has to turn these layouts into ``tile16`` first."""


@dataclass(frozen=True)
class LayerSparsity:
    """What a token needs of a decoder layer, on average.

    Attributes:
        open_gates: share of gates above zero, the rows of up_proj that count; 1 where the activation is not
            the squared ReLU.
        used_inputs: share of quantised inputs of down_proj that are not zero, the columns that count.
    """

    open_gates: float
    used_inputs: float


@torch.no_grad()
def measure_sparsity(model: BitNet, input_ids: Tensor) -> list[LayerSparsity]:
    """Runs a model over a text and counts, layer by layer.

    Args:
        model: in eval mode.
        input_ids: int64 [B, T]; a few hundred tokens tell the shares to about a hundredth.

    Returns:
        One entry a layer.

    Raises:
        ValueError: ``input_ids`` holds no token.
    """
    if input_ids.numel() == 0:
        raise ValueError("measure_sparsity: input_ids: expected at least one token, got none")
    counts: list[dict[str, float]] = [{} for _ in model.model.layers]
    handles = []
    for layer, count in zip(model.model.layers, counts, strict=True):
        # A hook also makes the model take the steps one by one, so that these values exist.
        gate, down = (layer.get_submodule(f"mlp.{name}") for name in ("gate_proj", "down_proj"))
        if isinstance(down, NormedLinear):
            down = down.linear
        count["open_gates"] = 1.0
        if model.config.activation == "relu2":
            handles.append(gate.register_forward_hook(partial(_count_open, count)))
        handles.append(down.register_forward_pre_hook(partial(_count_used, count)))
    try:
        model.hidden_states(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return [LayerSparsity(**count) for count in counts]


def _count_open(count: dict[str, float], module: nn.Module, inputs: tuple[Tensor], gate: Tensor) -> None:
    count["open_gates"] = float((gate > 0).float().mean())


def _count_used(count: dict[str, float], module: nn.Module, inputs: tuple[Tensor]) -> None:
    q, _ = reference.quantize_activations(inputs[0])
    count["used_inputs"] = float((q != 0).float().mean())


def layouts_for(model: BitNet, sparsity: list[LayerSparsity]) -> dict[str, str]:
    """The layouts in which this machine decodes single tokens of such a sparsity fastest.

    Args:
        model: with packed projections.
        sparsity: of its layers, from `measure_sparsity`.

    Returns:
        A layout for the name of every `BitLinear`, a ternary head included.
    """
    if model.config.group_size != 0:
        best = "tile16"  # the only one that has group scales
        sparsity = []
    else:
        best = best_layout()
    names = [name for name, module in model.named_modules() if isinstance(module, BitLinear)]
    layouts = dict.fromkeys(names, best)
    inner = ".linear" if model.config.projection_norms else ""
    for index, layer in enumerate(sparsity):
        # Rows are not skipped where a norm of its own stands in front of up_proj (csrc/run/decoder.cpp).
        if layer.open_gates < ROW_PAYS_BELOW and not model.config.projection_norms:
            layouts[f"model.layers.{index}.mlp.up_proj"] = "row"
        if layer.used_inputs < COLUMN_PAYS_BELOW:
            layouts[f"model.layers.{index}.mlp.down_proj{inner}"] = "column"
    return layouts
