"""Writes a model in the published layout of Hugging Face checkpoints, which transformers loads.

There are two forms; what the model has decides, and nothing is rounded in either.

*Ternary*, drawn in hf.py, for models that were trained with 8-bit activations and one scale a matrix: two
bits a weight, and "quantization_config". Matrices whose rows cannot be packed by four have float weights of
-1, 0, 1. The linear class is "autobitlinear", which stores the scale itself. That class multiplies biases by
the scale; where a model has biases that are no such products, it is "bitlinear", which stores the reciprocal
of the scale.

*Unpacked*, for models of float activations, whose scales may be those of rows or groups: float weights of
-s, 0 and s in an ordinary checkpoint of the family. It has no field for the width of activations, so that a
model loads with 16 bits again, whatever it was loaded with here.

All floats have the dtype of the model's embedding if that holds all numbers exactly, otherwise float32. A
ternary embedding has none: then it is the first of bfloat16, float16 and float32 that does. Only scales of
their own are float32 always.
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import families
from ..families import Family
from ..layers.matrix import TernaryMatrix
from ..layers.norm import RMSNorm
from .config_json import published_json
from .draft import folder_draft
from .files import SINGLE_FILE
from .packed import CONFIG_FILE
from .pooling import save_embedding_settings
from .quarters import WEIGHTS_PER_BYTE, pack_quarters
from .saveable import check_saveable
from .tensor_source import TORCH_DTYPE
from .text_files import TOKEN_FIELDS, TOKENIZER_CONFIG_FILE, save_text_files
from .write import write_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..decoder.model import LanguageModel

_NAME = {TORCH_DTYPE[short]: name for short, name in
         (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"))}  # fmt: skip
"""Dtypes as config.json names them."""


class _Lazy(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def save_published(model: "LanguageModel", folder: str | os.PathLike[str]) -> str:
    """Writes a packed model as a Hugging Face checkpoint that transformers loads, and `from_pretrained` too.

    Where the model was trained with 8-bit activations and each matrix has one scale, it has packed weights
    and the quantisation "bitnet"; models of float activations become an ordinary checkpoint whose weights are
    -s, 0 or s. `from_pretrained` gives the same weights and scales again, bit for bit.

    Files: config.json, model.safetensors, generation_config.json, and where the model has them
    tokenizer.json with tokenizer_config.json, chat_template.jinja, and those of sentence-transformers. Files
    of the same names are replaced, others are left alone; a write that fails leaves the folder as it was.

    Args:
        model: with `BitLinear` projections.
        folder: made where it does not exist.

    Returns:
        The form of the weights, for people: such as "packed weights, autobitlinear" or "float16 weights".

    Raises:
        ValueError: the model has something that the layout cannot say; the text says what. GGUF
            (`save_gguf`) or our own folder (`save_pretrained`) may hold it.
        OSError: the disk is full, or the folder cannot be written.

    Example:
        >>> bitnet_ops.save_published(model, "for-transformers")
        >>> transformers.AutoModelForCausalLM.from_pretrained("for-transformers")
    """
    projections = check_saveable(model, "save_published")
    try:
        if model.config.activation_bits == 8 and model.config.group_size == 0:
            quantization, dtype, tensors = _ternary(model, projections)
        else:
            quantization, dtype, tensors = _unpacked(model, projections)
        config = published_json(model.config, quantization)
    except ValueError as error:
        raise ValueError(
            f"save_published: {error}; save_pretrained writes any model, and save_gguf may write this one"
        ) from None
    config["torch_dtype"] = _NAME[dtype]
    generation_config = {name: config[name] for name in TOKEN_FIELDS} | dict(model.generation_config or {})
    with folder_draft(Path(folder), CONFIG_FILE) as draft:
        # disable=None: a bar on a terminal, silence elsewhere.
        with tqdm(total=len(tensors), desc="writing", unit="tensor", disable=None, leave=False) as bar:

            def make(name: str) -> Tensor:
                bar.update()
                return tensors[name].make().detach().cpu()

            shapes = {
                name: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta")
                for name, lazy in tensors.items()
            }
            write_tensors(draft / SINGLE_FILE, shapes, {}, make)
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_text_files(draft, model.tokenizer, model.chat_template, generation_config)
        save_embedding_settings(draft, model.embedding_settings, model.config.hidden_size)
        if model.tokenizer is not None:
            settings = _tokenizer_config(
                model.tokenizer, generation_config, config["max_position_embeddings"]
            )
            (draft / TOKENIZER_CONFIG_FILE).write_text(
                json.dumps(settings, indent=2) + "\n", encoding="utf-8"
            )
    if quantization is None:
        return f"{_NAME[dtype]} weights"
    return f"packed weights, {quantization['linear_class']}"


_Form = tuple[dict[str, Any] | None, torch.dtype, dict[str, _Lazy]]
"""What "quantization_config" says, the dtype of the model, and its tensors."""


def _ternary(model: "LanguageModel", projections: dict[str, TernaryMatrix]) -> _Form:
    family = families.family_to_write(model.config)
    scales = {name: _one_scale(name, layer) for name, layer in projections.items()}
    linear_class, numbers = _linear_class(projections, scales)
    dtype = _dtype_of(model, [bias for _, bias in numbers.values() if bias is not None])
    tensors = dict(_others(model, family, dtype))
    for name, layer in projections.items():
        stored = family.stored_name(name)
        scale, bias = numbers[name]
        tensors[f"{stored}.weight"] = _ternary_weight(layer, dtype, linear_class, name)
        tensors[f"{stored}.weight_scale"] = _constant(scale)
        if bias is not None:
            tensors[f"{stored}.bias"] = _constant(bias.to(dtype))
    mode = {"linear_class": linear_class, "quantization_mode": "offline"}
    return {"quant_method": "bitnet", **mode, "modules_to_not_convert": ["lm_head"]}, dtype, tensors


def _ternary_weight(layer: TernaryMatrix, dtype: torch.dtype, linear_class: str, name: str) -> _Lazy:
    rows, inputs = layer.out_features, layer.in_features
    if rows % WEIGHTS_PER_BYTE == 0:
        return _Lazy(
            (rows // WEIGHTS_PER_BYTE, inputs), torch.uint8, lambda: pack_quarters(layer.unpack().cpu())
        )
    if linear_class == "bitlinear":
        raise ValueError(
            f"{name}: expected a multiple of {WEIGHTS_PER_BYTE} rows, for the linear class 'bitlinear', "
            f"which this model's biases need, has packed weights only, got {rows}"
        )
    return _Lazy((rows, inputs), dtype, lambda: layer.unpack().to(dtype))


def _one_scale(name: str, layer: TernaryMatrix) -> Tensor:
    """The scale of the whole matrix, float32 [1]."""
    scale = layer.weight_scale.reshape(-1)
    if layer.group_size or not bool((scale == scale[0]).all()):
        kind = f"groups of {layer.group_size} inputs" if layer.group_size else "rows"
        raise ValueError(
            f"{name}: expected one scale for the matrix, for the layout with 8-bit activations has no more, "
            f"got scales of {kind}"
        )
    return scale[:1].clone()


def _linear_class(
    projections: dict[str, TernaryMatrix], scales: dict[str, Tensor]
) -> tuple[str, dict[str, tuple[Tensor, Tensor | None]]]:
    """The linear class that holds scales and biases exactly, with the numbers to store."""
    numbers: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, layer in projections.items():
        bias, scale = layer.bias, scales[name]
        if bias is not None:
            bias = _solve(bias / scale, partial(torch.mul, scale), bias)
            if bias is None:
                break
        numbers[name] = scale, bias
    else:
        return "autobitlinear", numbers
    for name, layer in projections.items():
        reciprocal = _solve(1 / scales[name], torch.reciprocal, scales[name])
        if reciprocal is None:
            raise ValueError(
                f"{name}: expected biases and scales that one of the linear classes of transformers holds "
                f"exactly, got a bias that is no multiple of the scale {scales[name].item()!r}, which is no "
                "reciprocal"
            )
        numbers[name] = reciprocal, layer.bias
    return "bitlinear", numbers


def _solve(first: Tensor, f: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor | None:
    """Numbers x near a first guess with f(x) == wanted in float32; None where one of them has none."""
    found = first.clone()
    for direction in (torch.inf, -torch.inf):
        x = first
        for _ in range(2):
            x = torch.nextafter(x, torch.full_like(x, direction))
            better = (f(found) != wanted) & (f(x) == wanted)
            found = torch.where(better, x, found)
    return found if torch.equal(f(found), wanted) else None


def _unpacked(model: "LanguageModel", projections: dict[str, TernaryMatrix]) -> _Form:
    if model.config.projection_norms:
        raise ValueError("float weights with norms inside the projections: no class in transformers has them")
    family = families.family_to_write(model.config)
    if family.all_ternary:
        raise ValueError(
            f"expected activation_bits=8, for float weights of model_type {family.model_type!r} are taken "
            f"for masters of 8-bit models, got {model.config.activation_bits}"
        )
    dtype = _dtype_of(model, [buffer for layer in projections.values() for buffer in _numbers(layer)])
    tensors = dict(_others(model, family, dtype))
    for name, layer in projections.items():
        stored = family.stored_name(name)
        shape = (layer.out_features, layer.in_features)
        tensors[f"{stored}.weight"] = _Lazy(shape, dtype, partial(_unpacked_weight, layer, dtype))
        if layer.bias is not None:
            tensors[f"{stored}.bias"] = _constant(layer.bias.to(dtype))
    return None, dtype, tensors


def _unpacked_weight(layer: TernaryMatrix, dtype: torch.dtype) -> Tensor:
    """-s, 0 and s, [N, K]."""
    return layer.dense().to(dtype)


def _numbers(layer: TernaryMatrix) -> list[Tensor]:
    return [layer.weight_scale] if layer.bias is None else [layer.weight_scale, layer.bias]


def _dtype_of(model: "LanguageModel", more: list[Tensor]) -> torch.dtype:
    """The one dtype of a file's floats, as the top of this page says.

    One for all, because transformers leaves tensors beside quantised ones in the dtypes of the file, and a
    model of several does not run.
    """
    weight = getattr(model.model.embed_tokens, "weight", None)
    numbers = (*model.parameters(), *more)
    for dtype in (torch.bfloat16, torch.float16) if weight is None else (weight.dtype,):
        if all(bool((tensor.to(dtype) == tensor).all()) for tensor in numbers):
            return dtype
    return torch.float32


def _others(model: "LanguageModel", family: Family, dtype: torch.dtype) -> Iterator[tuple[str, _Lazy]]:
    """Embedding, head and norms, in a dtype that is known to hold the numbers of the model."""
    for name, module in model.named_modules():
        stored = f"{family.stored_name(name)}.weight"
        if isinstance(module, RMSNorm):
            weight = module.weight.detach()
            if family.norm_offset and "_proj." not in name:
                weight = weight - family.norm_offset
                if not torch.equal(weight.to(dtype).float() + family.norm_offset, module.weight):
                    raise ValueError(f"{name}: a factor is not the sum of {family.norm_offset} and a {dtype}")
            yield stored, _constant(weight, dtype)
        elif isinstance(module, (torch.nn.Embedding, torch.nn.Linear)):
            yield stored, _constant(module.weight.detach(), dtype)


def _constant(tensor: Tensor, dtype: torch.dtype | None = None) -> _Lazy:
    dtype = dtype or tensor.dtype
    return _Lazy(tuple(tensor.shape), dtype, lambda: tensor.to(dtype))


def _tokenizer_config(
    tokenizer: "Tokenizer", generation_config: dict[str, Any], length: int
) -> dict[str, Any]:
    """What transformers' AutoTokenizer wants to know beside tokenizer.json."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    settings["clean_up_tokenization_spaces"] = False
    for name in TOKEN_FIELDS:
        ids = generation_config.get(name)
        token = ids[0] if isinstance(ids, (list, tuple)) and ids else ids
        text = tokenizer.id_to_token(token) if isinstance(token, int) else None
        if text is not None:
            settings[name.removesuffix("_id")] = text
    return settings
