"""Loaded transformers models on the kernels of bitnet_ops: `accelerate` swaps their layers in place."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from ..decoder.head import LEAST_BYTES
from ..layers.linear import BitLinear, best_layout
from ..layers.memory import HugePages, give_back_freed_memory
from . import transformers_versions as versions
from .transformers_versions import THEIR_MODULE
from .transformers_weights import NormedBitLinear, ternary_weights

ModelT = TypeVar("ModelT", bound=nn.Module)

LAYER_TYPES = ("AutoBitLinear", "BitLinear")


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

    The model is for inference from then on: online weights do not train any more, and no parameter asks for
    gradients until ``requires_grad_`` is called, as for adapters. It cannot be saved in
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
        old = model.get_submodule(names[0])
        layer = _converted(names[0], old, memory)
        if names[0] == "":
            return layer  # type: ignore[return-value]
        for name in names:
            model.set_submodule(name, layer)
        versions.free(old)
    _move_head(model, memory)
    give_back_freed_memory()
    return finish(model)


def _move_head(model: Any, memory: HugePages) -> None:
    """Puts the table of a head into 2 MB pages, where a token's scores take half as long as from the file."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_cpu and weight.nbytes >= LEAST_BYTES:
        weight.data = memory.copy(weight.data)


def finish(model: ModelT) -> ModelT:
    """What is left to do when the layers of a model are ours."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
        # Plain `model(ids)` would otherwise keep what gradients need, of embedding, norms and head.
        model.requires_grad_(False)
        decoder = fast_decoder()
        if decoder is not None:
            decoder.install(model)
    return model


_has_warned = False


def fast_decoder() -> Any:
    """The module `transformers_decoder`, which imports transformers, as the model did.

    Returns:
        None, and once a warning, where this version of transformers has not all names that it builds on, some
        of which are private: layers then run as modules.
    """
    global _has_warned
    try:
        from . import transformers_decoder
    except (ImportError, AttributeError) as error:
        if not _has_warned:
            _has_warned = True
            import transformers

            warnings.warn(
                f"bitnet_ops: transformers {transformers.__version__} lacks what others have ({error}): "
                "packed layers run one by one in its own decoder, which gives the same but takes longer",
                stacklevel=3,
            )
        return None
    return transformers_decoder


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
        not versions.is_own_hook(hook)
        for key, hooks in vars(module).items()
        if key.endswith("_hooks")
        for hook in hooks.values()
    ):
        raise ValueError(
            f"accelerate: {name}: expected a layer without hooks, got one whose hooks would be lost; "
            "remove them first, and register them again afterwards"
        )


def _converted(name: str, module: Any, memory: HugePages) -> BitLinear:
    def error(expected: str, got: str) -> ValueError:
        return ValueError(f"accelerate: {name}: expected {expected}, got {got}")

    if type(module).__name__ == "BitLinear":
        kind = "bitlinear"
    else:
        kind = "online" if module.online_quant else "offline"
    shape = (module.out_features, module.in_features)
    scale = None if kind == "online" else module.weight_scale
    weight = versions.unpacked_weight(module) if kind == "offline" else module.weight
    weights = ternary_weights(kind, shape, weight, scale, module.bias, error)
    layer_type = BitLinear if module.rms_norm is None else NormedBitLinear
    layer = layer_type.from_ternary(*weights, layout=best_layout())
    layer.packed_weight = memory.copy(layer.packed_weight)
    if isinstance(layer, NormedBitLinear):
        layer.rms_norm = module.rms_norm
    return layer.train(module.training)


def _refuse_to_save(*arguments: Any, **options: Any) -> NoReturn:
    raise NotImplementedError(
        "save_pretrained: expected a model as transformers loads it, got one with the layers of bitnet_ops; "
        "save before, or make a packed folder: bitnet_ops.from_pretrained(folder).save_pretrained"
    )
