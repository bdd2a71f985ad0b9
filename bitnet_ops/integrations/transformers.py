"""Loaded transformers models on the kernels of bitnet_ops: `accelerate` swaps their ternary layers in place.

transformers has two of them (transformers/integrations/bitnet.py), which differ in more than their storage.
With ``acc`` the sum of products of int8 activations and ternary weights, as in docs/numerics.md:

    AutoBitLinear, offline   weight float [N, K] in {-1, 0, 1}     y = (acc * x_scale + bias) * weight_scale
    AutoBitLinear, online    weight float [N, K], master weights   y = acc * x_scale * mean(|weight|) + bias
    BitLinear                weight uint8 [N / 4, K], packed       y = acc * x_scale / weight_scale + bias

Each may have an RMSNorm of its own in front (``use_rms_norm``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import reference
from ..checkpoint.hf import unpack_quarters
from ..layers.linear import BitLinear, best_layout
from ..layers.memory import HugePages, give_back_freed_memory

ModelT = TypeVar("ModelT", bound=nn.Module)

LAYER_TYPES = ("AutoBitLinear", "BitLinear")
THEIR_MODULE = "transformers.integrations.bitnet"


class NormedBitLinear(BitLinear):
    """A `BitLinear` behind the norm that transformers' layers have with ``use_rms_norm``.

    Attributes:
        rms_norm: their module, as it was.
    """

    rms_norm: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the dtype of ``x``."""
        return super().forward(self.rms_norm(x))


def accelerate(model: ModelT) -> ModelT:
    """Replaces the ternary layers of a loaded transformers model by `BitLinear`, in place.

    For BitNetForCausalLM and Llama-class models with a ``quantization_config`` of "bitnet" (``linear_class``
    "autobitlinear", offline or online, and "bitlinear"). Everything else stays theirs, so ``generate``,
    pipelines, streamers, padded batches, assisted generation and lm-eval's ``HFLM`` work as before. One
    layer after the other is packed and its old weights are freed, so the peak of memory is that of the
    loaded model.

    In float32 every layer gives what it gave, up to the rounding of sums: the integers inside are the same.
    In bfloat16 and float16 it is more exact than it was: activations are quantised in float32 and the result
    is rounded once.

    The model is for inference from then on: online weights do not train any more. It cannot be saved in
    transformers' format; `bitnet_ops.from_pretrained` and its ``save_pretrained`` make packed folders.

    Args:
        model: with all its weights on the CPU. Layers of classes derived from theirs are left alone, for
            their forward pass may be another.

    Returns:
        The model itself; a new layer if ``model`` is one.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is nothing to replace; or a layer is not on the CPU, has hooks, which a replacement
            would lose, or weights that are not ternary. Only the last can leave some layers replaced; these
            work together with the others.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("bitnet-b1.58-2B-4T", dtype=torch.bfloat16)
        >>> bitnet_ops.accelerate(model).generate(**tokenizer("The sea", return_tensors="pt"))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: model: expected a loaded transformers model, got {type(model).__name__}"
        )
    places = _places(model)
    if not places:
        raise ValueError(_nothing_to_replace(model))
    memory = HugePages()
    # disable=None: a bar on a terminal, silence elsewhere.
    for names in tqdm(places, desc="accelerating", unit="layer", disable=None, leave=False):
        layer = _converted(names[0], model.get_submodule(names[0]), memory)
        if names[0] == "":
            return layer  # type: ignore[return-value]
        for name in names:
            model.set_submodule(name, layer)
    give_back_freed_memory()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return model


def _places(model: nn.Module) -> list[list[str]]:
    """The names of every layer to replace, and no reference to it that would keep it alive."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_theirs(module):
            _check(name, module)
            names.setdefault(id(module), []).append(name)
    return list(names.values())


def _is_theirs(module: nn.Module) -> bool:
    # Whoever has made such a layer has imported its module: nothing is imported for others.
    theirs: Any = sys.modules.get(THEIR_MODULE)
    return theirs is not None and type(module) in {getattr(theirs, name) for name in LAYER_TYPES}


def _nothing_to_replace(model: nn.Module) -> str:
    text = (
        f"accelerate: model: expected layers of the types {' or '.join(LAYER_TYPES)} of {THEIR_MODULE}, got "
        f"none in {type(model).__name__}"
    )
    if any(isinstance(module, BitLinear) for module in model.modules()):
        text += ", whose ternary layers are those of bitnet_ops already"
    return text


def _check(name: str, module: nn.Module) -> None:
    """Everything that can be said before the first layer is touched."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu":
            hint = "load its weights first" if tensor.is_meta else 'call model.to("cpu") first'
            raise ValueError(
                f"accelerate: {name}: expected a layer on the CPU, got one on the device "
                f"{str(tensor.device)!r}; {hint}"
            )
    # accelerate's hook, which moves weights from other devices or the disk, replaces the forward method.
    if "forward" in vars(module) or any(
        hooks for key, hooks in vars(module).items() if key.endswith("_hooks")
    ):
        raise ValueError(
            f"accelerate: {name}: expected a layer without hooks, got one whose hooks would be lost; "
            "remove them first, and register them again afterwards"
        )


def _converted(name: str, module: Any, memory: HugePages) -> BitLinear:
    def error(expected: str, got: str) -> ValueError:
        return ValueError(f"accelerate: {name}: expected {expected}, got {got}")

    read = _read_packed if type(module).__name__ == "BitLinear" else _read_float
    w, weight_scale, bias = read(module, error)
    if not bool(weight_scale.isfinite().all()):
        raise error("a finite weight scale", f"{weight_scale.tolist()}")
    layer_type = BitLinear if module.rms_norm is None else NormedBitLinear
    layer = layer_type.from_ternary(w, weight_scale, bias, layout=best_layout())
    layer.packed_weight = memory.copy(layer.packed_weight)
    if isinstance(layer, NormedBitLinear):
        layer.rms_norm = module.rms_norm
    return layer.train(module.training)


def _read_packed(
    module: Any, error: Callable[[str, str], ValueError]
) -> tuple[Tensor, Tensor, Tensor | None]:
    w = unpack_quarters(module.weight)
    if w.shape != (module.out_features, module.in_features):
        raise error(f"weights [{module.out_features}, {module.in_features}]", f"{list(w.shape)}")
    if w.numel() and w.max() > 1:
        raise error("packed weights with 2-bit codes 0, 1 and 2", "a code 3")
    return w, 1.0 / module.weight_scale.float(), module.bias


def _read_float(module: Any, error: Callable[[str, str], ValueError]) -> tuple[Tensor, Tensor, Tensor | None]:
    weight, bias = module.weight.detach(), module.bias
    if not module.online_quant:
        w = weight.to(torch.int8)
        if not bool((w == weight).all()) or (w.numel() and w.abs().max() > 1):
            raise error("weights in {-1, 0, 1}, because it has a weight_scale", "other numbers")
        weight_scale = module.weight_scale.detach().float()
        return w, weight_scale, None if bias is None else bias * weight_scale
    # Like `reference.quantize_weight`, but by way of the reciprocal, as their layer does it: a weight next to
    # half the mean may be rounded otherwise. And in their dtype, to which it rounds what it multiplies with.
    reciprocal = 1.0 / weight.float().abs().mean().clamp(min=reference.ABSMAX_FLOOR)
    w = (weight.float() * reciprocal).round().clamp(-1, 1).to(torch.int8)
    return w, (1.0 / reciprocal).to(weight.dtype).float(), bias


def _refuse_to_save(*arguments: Any, **options: Any) -> NoReturn:
    raise NotImplementedError(
        "save_pretrained: expected a model as transformers loads it, got one that bitnet_ops.accelerate has "
        "changed; save before, or make a packed folder: bitnet_ops.from_pretrained(folder).save_pretrained"
    )
