"""Layers of any model, replaced in place: float ones by ternary, trained by packed, one layout by another."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from .linear import BitLinear, BitLinearQAT, best_layout, refuse_a_part
from .memory import HugePages

LayerFilter = Callable[[str, nn.Module], bool]
"""Chooses layers by their qualified name ("" for the model itself) and the module."""


def replace_linear(
    model: nn.Module,
    target: type[BitLinear] | type[BitLinearQAT],
    filter: LayerFilter | None = None,
    **options: Any,
) -> nn.Module:
    """Puts ternary layers in the place of a model's linear ones, in place.

    To train, replace by `BitLinearQAT`: the new layers hold the same parameters, so optimisers and tied
    weights go on as before. To quantise a trained model without training it again, or to make a model that a
    packed ``state_dict`` fits, replace by `BitLinear`, which holds a packed copy. Either way the model
    computes something new: ternary weights, eight-bit activations.

    Layers that stand in several places stay shared. If something is wrong, nothing has been replaced.

    Left as they are, with a warning if the filter chose them: subclasses of `nn.Linear`, which may compute
    something else. One is ``out_proj`` of `nn.MultiheadAttention`, whose weights torch reads without calling
    it, as it does ``in_proj_weight``: only attention that is written with `nn.Linear` can become ternary.
    `nn.TransformerEncoderLayer` is told not to take the shortcut that reads the weights of its linear layers.

    Args:
        model: any module.
        target: `BitLinearQAT` or `BitLinear`.
        filter: called with name and layer for every `nn.Linear`; true for those to replace. None for all.
            First and last layers often stay float: ``lambda name, _: name != "head"``.
        **options: of ``target.from_linear``; for `BitLinear` ``layout`` and ``activation_bits``.

    Returns:
        The model, or the new layer where ``model`` itself was replaced.

    Raises:
        TypeError: ``target`` is another class.
        ValueError: no layer was chosen, or one has hooks or parametrizations, which would be lost, or is
            spread over processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> replace_linear(model, BitLinearQAT, filter=lambda name, layer: layer.out_features > 10)
        Sequential(
          (0): BitLinearQAT(in_features=64, out_features=256, bias=True)
          (1): ReLU()
          (2): Linear(in_features=256, out_features=10, bias=True)
        )
    """
    if not (isinstance(target, type) and issubclass(target, (BitLinear, BitLinearQAT))):
        raise TypeError(f"replace_linear: target: expected BitLinear or BitLinearQAT, got {target!r}")
    chosen = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
        and not isinstance(module, target)
        and (filter is None or filter(name, module))
    }
    for name, module in chosen.items():
        _refuse_what_would_be_lost(name, module)
    foreign = [name for name, module in chosen.items() if not _is_known(module)]
    if foreign:
        warnings.warn(
            "replace_linear leaves subclasses of nn.Linear as they are: "
            + ", ".join(f"{name or 'the model'} ({type(chosen.pop(name)).__name__})" for name in foreign),
            stacklevel=2,
        )
    if not chosen:
        raise ValueError("replace_linear: filter: expected one that chooses at least one nn.Linear, got none")
    return _replace(model, chosen, target, options)


def pack(model: nn.Module) -> nn.Module:
    """Turns every `BitLinearQAT` of a trained model into a packed `BitLinear`, in place.

    Returns:
        The model (a new layer, if ``model`` itself is a `BitLinearQAT`), with the same outputs and the
        float master weights gone. A layer that is used in several places stays one layer.

    Raises:
        ValueError: a layer has hooks or parametrizations, or its weight is spread over processes.
    """
    trained: dict[str, nn.Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BitLinearQAT):
            _refuse_what_would_be_lost(name, module)
            trained[name] = module
    return _replace(model, trained, BitLinear, {})


def repack(model: nn.Module, layout: str | None = None) -> nn.Module:
    """Stores the weights of every `BitLinear` of a model in another layout, in place.

    A `TernaryEmbedding` keeps its only layout.

    Args:
        model: any module.
        layout: one of `packing.LAYOUTS`; None for `best_layout`. Layers with group scales keep ``tile16``.

    Returns:
        The model, with the same outputs.
    """
    memory = HugePages()
    for module in model.modules():
        if isinstance(module, BitLinear) and module.group_size == 0:
            before = module.packed_weight
            module.repack(layout or best_layout())
            if module.packed_weight is not before and before.device.type == "cpu":
                module.packed_weight = memory.copy(module.packed_weight)
    return model


def _replace(
    model: nn.Module,
    chosen: dict[str, nn.Linear],
    target: type[BitLinear] | type[BitLinearQAT],
    options: dict[str, Any],
) -> nn.Module:
    new = {layer: target.from_linear(layer, **options) for layer in set(chosen.values())}
    for name, layer in chosen.items():
        if name == "":
            return new[layer]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new[layer])
    _close_shortcuts(model)
    return model


def _is_known(module: nn.Linear) -> bool:
    return type(module) is nn.Linear or isinstance(module, BitLinearQAT)


def _refuse_what_would_be_lost(name: str, module: nn.Linear) -> None:
    refuse_a_part(module)
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    if nn.utils.parametrize.is_parametrized(module):
        has = "parametrizations (torch.nn.utils.parametrize.remove_parametrizations folds them in)"
    elif any(hooks):
        has = "hooks"
    else:
        return
    raise ValueError(
        f"layer {name!r}: expected one without hooks or parametrizations, which would be lost when it is "
        f"replaced, got one with {has}"
    )


def _close_shortcuts(model: nn.Module) -> None:
    # In eval mode torch's encoder computes from linear1.weight and linear2.weight itself, unless it does not
    # know the activation; this number says which one it would fuse, and the activation stays what it is.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_ternary(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _has_ternary(module):
            module.use_nested_tensor = False


def _has_ternary(module: nn.Module) -> bool:
    return any(isinstance(child, (BitLinear, BitLinearQAT)) for child in module.modules())
