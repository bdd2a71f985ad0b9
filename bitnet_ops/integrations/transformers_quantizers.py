"""How transformers loads ternary checkpoints once `bitnet_ops.register_transformers` was called.

transformers asks a quantizer for the modules that stand in the place of `nn.Linear` and for the operations
that turn a file's tensors into theirs. Those here put `BitLinear` there and pack one layer after another, so
that a model never is in memory in another form than the packed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import families, ops, packing
from ..checkpoint.codes import check_packed
from ..checkpoint.config_json import EXTRAS, QUANT_METHOD, THEIR_EPS
from ..checkpoint.head_copy import BOUNDS, CODES
from ..checkpoint.pieces import one_thread
from ..checkpoint.weights import pack_rows
from ..layers.embedding import TernaryEmbedding
from ..layers.linear import BitLinear, best_layout, native_layouts
from ..layers.matrix import TernaryMatrix
from ..layers.memory import HugePages, give_back_freed_memory
from . import transformers_versions as versions
from .transformers import fast_decoder, finish
from .transformers_tables import Tables, TernaryHead, TiedTernaryHead, forget_file_pages
from .transformers_weights import Complaints, NormedBitLinear, ternary_weights

PARTS = ("packed_weight", "weight_scale", "bias")
"""Tensors of a `BitLinear`."""


class OwnConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What "quantization_config" is in folders that bitnet_ops saves: bitnet_ops/checkpoint/packed.py."""

    def __init__(
        self,
        layout: str = "tile16",
        layouts: dict[str, str] | None = None,
        activation_bits: int = 8,
        group_size: int = 0,
        use_rms_norm: bool = False,
        rms_norm_eps: float | None = None,
        ternary_embedding: bool = False,
        ternary_head: bool | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.layout = layout
        self.layouts = dict(layouts or {})
        self.activation_bits = activation_bits
        self.group_size = group_size
        self.use_rms_norm = use_rms_norm
        self.rms_norm_eps = THEIR_EPS if rms_norm_eps is None else rms_norm_eps
        self.ternary_embedding = bool(ternary_embedding)
        self.ternary_head = ternary_head
        for name, layout in {"layout": self.layout, **self.layouts}.items():
            if layout not in packing.LAYOUTS:
                known = " or ".join(map(repr, packing.LAYOUTS))
                raise ValueError(f"quantization_config: {name}: expected {known}, got {layout!r:.200}")

    def layout_of(self, name: str) -> str:
        """The layout of a projection in the files, by the name of its module there."""
        of_base_model = self.layouts.get(
            f"model.{name}", self.layout
        )  # as AutoModel loads it, without a head
        return self.layouts.get(name, of_base_model)


class _PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """What both quantizers have in common.

    Attributes:
        filling: the layers to fill while a model is being loaded.
    """

    requires_calibration = True
    filling: _Filling | None = None

    def is_serializable(self, *arguments: Any, **options: Any) -> bool:
        """False: `save_pretrained` of bitnet_ops saves packed models."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: packed weights do not train; adapters beside them do."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: the operators have fake kernels."""
        return True

    def _replace(self, model: nn.Module, kept: list[str], options: dict[str, Any], from_files: bool) -> None:
        """Puts empty `BitLinear` layers in the place of `nn.Linear`, but those called as in ``kept``."""
        chosen = {
            name: module
            for name, module in model.named_modules()
            if type(module) is nn.Linear and should_convert_module(name, kept)
        }
        if not chosen:
            raise ValueError(
                f"{type(model).__name__}: expected nn.Linear layers to be ternary, got none but {kept}"
            )
        for name, linear in chosen.items():
            model.set_submodule(name, self._empty_layer(name, linear, options))
        self.filling = _Filling(set(chosen), from_files, _dtypes(model))

    def _empty_layer(self, name: str, linear: nn.Linear, options: dict[str, Any]) -> BitLinear:
        config = self.quantization_config
        layer_type = NormedBitLinear if config.use_rms_norm else BitLinear
        layer = layer_type(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            layout=self._layout(name),
            device="meta",
            **options,
        )
        if isinstance(layer, NormedBitLinear):
            with torch.device("meta"):
                layer.rms_norm = LlamaRMSNorm(linear.in_features, eps=config.rms_norm_eps or THEIR_EPS)
            layer.rms_norm.to(linear.weight.dtype)
        return layer.requires_grad_(False)

    def _layout(self, name: str) -> str:
        return best_layout()

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        filling, self.filling = self.filling, None
        if filling is None:
            return super()._process_model_after_weight_loading(model, **options)
        if filling.missing:
            first, *others = sorted(filling.missing)
            raise ValueError(
                f"{first}: expected its weights in the checkpoint, got none for it and {len(others)} more"
            )
        give_back_freed_memory()
        if not versions.casts_renamed():
            _cast(model, filling.dtypes)
        finish(model)
        if filling.from_files:
            # Now, while nobody has written to the tables.
            tables = Tables()
            tables.map_anew(model)
            decoder = fast_decoder()
            if decoder is not None:
                decoder.prepare_heads(model, tables.forget)
            tables.forget_all()
        return model


class BitNetQuantizer(_PackedQuantizer, BitNetHfQuantizer):  # type: ignore[misc]
    """For checkpoints whose ``quant_method`` is "bitnet".

    Models for other devices than the CPU are loaded as transformers loads them.
    """

    _theirs = False

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        """Asks for nothing where the model stays on the CPU."""
        if not _on_cpu(options.get("device_map")):
            super().validate_environment(*arguments, **options)

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        if not _on_cpu(options.get("device_map")):
            self._theirs = True
            super()._process_model_before_weight_loading(model, **options)
            return
        config = self.quantization_config
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        self._replace(
            model, self.modules_to_not_convert, {}, from_files=options.get("checkpoint_files") is not None
        )

    def get_weight_conversions(self) -> list[Any]:
        """One for all three tensors of a layer."""
        if self._theirs:
            return list(super().get_weight_conversions())
        return [_converter(["weight_scale", "weight", "bias"], PackPublished(self))]

    def is_serializable(self, *arguments: Any, **options: Any) -> bool:
        """Whether transformers can save the model: not with our layers."""
        return self._theirs

    @property
    def is_trainable(self) -> bool:
        """Whether weights train: not packed ones."""
        return self._theirs and bool(BitNetHfQuantizer.is_trainable.fget(self))


class OwnQuantizer(_PackedQuantizer):
    """For the folders that bitnet_ops saves."""

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        """Raises ValueError for other devices."""
        if not _on_cpu(options.get("device_map")):
            raise ValueError(
                f"device_map: expected the CPU, for which bitnet_ops has packed this checkpoint, "
                f"got {options['device_map']!r}"
            )

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        config = self.quantization_config
        extras = getattr(model.config, EXTRAS, None)
        if extras:
            raise ValueError(
                f"config.json: {EXTRAS}: expected nothing, for transformers' {type(model).__name__} does not "
                f"have such parts, got {sorted(extras)}; bitnet_ops.from_pretrained loads this folder"
            )
        kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        layer_options = {"activation_bits": config.activation_bits, "group_size": config.group_size}
        self._replace(model, kept, layer_options, from_files=options.get("checkpoint_files") is not None)
        self._replace_tables(model, layer_options)
        # The head's copy, which only bitnet_ops.from_pretrained reads.
        ignored = model._keys_to_ignore_on_load_unexpected
        patterns = [*(ignored or ()), f"^{CODES}$", f"^{BOUNDS}$"]
        model._keys_to_ignore_on_load_unexpected = set(patterns) if isinstance(ignored, set) else patterns
        self.norm_offset = families.family_of({"model_type": model.config.model_type}).norm_offset

    def _replace_tables(self, model: Any, options: dict[str, Any]) -> None:
        """Puts ternary matrices in the place of embedding and head, where the folder has such."""
        assert self.filling is not None, "called when projections have been replaced"
        config = self.quantization_config
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        ternary_head = (
            config.ternary_embedding and tied if config.ternary_head is None else config.ternary_head
        )
        if tied and bool(ternary_head) != config.ternary_embedding:
            raise ValueError(
                "quantization_config: ternary_head: expected the same as ternary_embedding, for "
                f"tie_word_embeddings makes them one, got {ternary_head} and {config.ternary_embedding}"
            )
        for wanted, module, expected in (
            (config.ternary_embedding, embedding, nn.Embedding),
            (ternary_head, head, nn.Linear),
        ):
            if (
                wanted
                and module is not None
                and (type(module) is not expected or getattr(module, "bias", None) is not None)
            ):
                raise ValueError(
                    f"{type(model).__name__}: expected an nn.{expected.__name__} without bias, whose place "
                    f"a ternary table takes, got {type(module).__name__}; bitnet_ops.from_pretrained loads "
                    "this folder"
                )
        if config.ternary_embedding:
            table = TernaryEmbedding(
                embedding.embedding_dim, embedding.num_embeddings, device="meta", **options
            )
            self._put(model, embedding, table)
            if tied and head is not None:
                model.set_submodule(_name_of(model, head), TiedTernaryHead(table))
                # On this model only; there is nothing left to tie, or to miss.
                model._tied_weights_keys = model.all_tied_weights_keys = {}
        if ternary_head and not tied and head is not None:
            layout = self._layout(_name_of(model, head))
            self._put(
                model,
                head,
                TernaryHead(head.in_features, head.out_features, layout=layout, device="meta", **options),
            )

    def _put(self, model: Any, old: nn.Module, new: nn.Module) -> None:
        assert self.filling is not None, "called when projections have been replaced"
        name = _name_of(model, old)
        model.set_submodule(name, new)
        self.filling.missing.add(name)

    def get_weight_conversions(self) -> list[Any]:
        """One for all three tensors of a layer, and one for norms that transformers stores otherwise."""
        conversions = [_converter(list(PARTS), CheckOwn(self))]
        if self.quantization_config.use_rms_norm:
            conversions.append(WeightRenaming(r"_proj\.linear\.", "_proj."))
            conversions.append(WeightRenaming(r"_proj\.norm\.", "_proj.rms_norm."))
        if self.norm_offset:
            conversions.append(
                WeightConverter("norm.weight", "norm.weight", operations=[SubtractOffset(self)])
            )
        return conversions

    def _layout(self, name: str) -> str:
        stored = self._stored_layout(name)
        return stored if stored in native_layouts() else best_layout()

    def _stored_layout(self, name: str) -> str:
        inner = ".linear" if self.quantization_config.use_rms_norm else ""
        return str(self.quantization_config.layout_of(name + inner))


class _Filling:
    """Layers being filled.

    Attributes:
        missing: names of layers that have no weights yet.
        memory: where packed weights go.
        workspace: where one layer after another is unpacked. Memory that is taken and given back for each of
            them would leave holes between what stays.
        from_files: whether tensors come from files, whose pages are not needed when a layer is packed, and
            not from a dictionary of the caller's.
        dtypes: those that were asked for, by the names of parameters.
    """

    def __init__(self, missing: set[str], from_files: bool, dtypes: dict[str, torch.dtype]) -> None:
        self.missing = missing
        self.dtypes = dtypes
        self.memory, self.workspace = HugePages(), HugePages()
        self.from_files = from_files

    def done(self, name: str, *sources: Tensor | None) -> None:
        """A layer has been made from these tensors."""
        self.missing.discard(name)
        if self.from_files:
            for source in sources:
                if source is not None:
                    forget_file_pages(source)


class _Load(ConversionOps):  # type: ignore[misc]
    """An operation on the tensors of a layer.

    Attributes:
        hf_quantizer: its quantizer; transformers takes the name for a sign not to cast tensors before.
    """

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Load:
        """The same: transformers copies operations for every tensor."""
        return self

    def layer_of(self, model: nn.Module, full_name: str) -> tuple[str, TernaryMatrix, _Filling]:
        """The layer that a tensor belongs to."""
        name = full_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        assert isinstance(layer, TernaryMatrix), "only names of ours are converted"
        assert self.hf_quantizer.filling is not None, "loading begins with empty layers"
        return name, layer, self.hf_quantizer.filling


class PackPublished(_Load):
    """Packs a layer of the published layout."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **options: Any
    ) -> dict[str, Tensor]:
        """Is called by transformers with the tensors of one layer."""
        name, layer, filling = self.layer_of(model, full_layer_name)
        weight, scale, bias = (
            versions.only(input_dict.get(part)) for part in ("weight", "weight_scale", "bias")
        )
        error = _error_maker(name)
        if weight is None:
            raise error("a weight", "none")
        if (bias is None) != (layer.bias is None):
            raise error("no bias" if layer.bias is None else "a bias", "none" if bias is None else "one")
        config = self.hf_quantizer.quantization_config
        kind = "bitlinear" if config.linear_class == "bitlinear" else config.quantization_mode
        filling.workspace.reuse()
        sizes = (layer.out_features, layer.in_features)
        with one_thread():
            weights = ternary_weights(kind, sizes, weight, scale, bias, error, filling.workspace.empty)
            packed, _ = pack_rows(lambda begin, end: weights.w[begin:end], layer, filling.memory)
        filling.done(name, weight)
        tensors = {
            "packed_weight": packed,
            "weight_scale": weights.weight_scale.expand(layer.out_features).contiguous(),
        }
        return tensors if weights.bias is None else {**tensors, "bias": weights.bias.clone()}


class CheckOwn(_Load):
    """Checks the tensors of a layer that bitnet_ops has saved, and brings them into a layout for this CPU."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **options: Any
    ) -> dict[str, Tensor]:
        """Is called by transformers with the tensors of one layer."""
        name, layer, filling = self.layer_of(model, full_layer_name)
        found = {part: versions.only(input_dict.get(part)) for part in PARTS}
        error = _error_maker(name)
        stored = self.hf_quantizer._stored_layout(name)
        sizes = (layer.out_features, layer.in_features)
        scale_dtypes = (torch.float32, torch.float16) if layer.group_size else (torch.float32,)
        for part, shape, dtypes in (
            ("packed_weight", packing.packed_shape(*sizes, stored), (torch.uint8,)),
            ("weight_scale", layer.scale_shape, scale_dtypes),
            ("bias", None if layer.bias is None else tuple(layer.bias.shape), (torch.float32,)),
        ):
            tensor = found[part]
            if (shape is None) != (tensor is None):
                raise error(
                    f"no {part}" if shape is None else f"a {part}", "one" if shape is None else "none"
                )
            if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
                raise error(
                    f"{part} {list(shape or ())} of {' or '.join(map(str, dtypes))}",
                    f"{list(tensor.shape)} of {tensor.dtype}",
                )
        packed, scale, bias = found["packed_weight"], found["weight_scale"], found["bias"]
        assert packed is not None, "checked above"
        assert scale is not None, "checked above"
        with one_thread():
            check_packed(Complaints(error), "packed_weight", packed, *sizes, stored)  # type: ignore[arg-type]
        for part in ("weight_scale", "bias"):
            if (tensor := found[part]) is not None and not bool(tensor.isfinite().all()):
                raise error(f"finite numbers in {part}", "a NaN or an infinity")
        here = packed if stored == layer.layout else ops.repack_ternary(packed, *sizes, stored, layer.layout)
        own_scale = packing.pack_scales(scale) if layer.group_size else scale.clone()
        tensors = {"packed_weight": filling.memory.copy(here), "weight_scale": own_scale}
        filling.done(name, packed)
        return tensors if bias is None else {**tensors, "bias": bias.clone()}


class SubtractOffset(_Load):
    """From the factors of a norm, which our folders have, to the weight that the family stores."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", **options: Any
    ) -> dict[str, Tensor]:
        """Is called by transformers with the weight of one norm."""
        weight = versions.only(input_dict.get("norm.weight"))
        assert weight is not None, "transformers calls with what it has found"
        # Norms inside projections come from the quantizer, not from the family.
        offset = 0.0 if "rms_norm" in full_layer_name else self.hf_quantizer.norm_offset
        dtype = options["model"].get_submodule(full_layer_name.rpartition(".")[0]).weight.dtype
        return {"norm.weight": (weight.float() - offset).to(dtype)}


def _converter(sources: list[str], operation: _Load) -> WeightConverter:
    """From the tensors of a layer to ours.

    As far as transformers knows, to one of ours; it stores what else it is given, too. Before 5.19, many to
    many is what only its own operations may do.
    """
    return WeightConverter(sources, PARTS[0], operations=[operation])


def _error_maker(name: str) -> Any:
    return lambda expected, got: ValueError(f"{name}: expected {expected}, got {got}")


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """Of the empty parameters of a model; none of them where some are to stay float32."""
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return {}
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def _cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))


def _name_of(model: nn.Module, module: nn.Module) -> str:
    names: Iterator[str] = (name for name, other in model.named_modules() if other is module)
    return next(names)


def _on_cpu(device_map: Any) -> bool:
    if device_map is None:  # transformers' own default
        return True
    devices: Iterator[Any] = iter(device_map.values() if isinstance(device_map, dict) else (device_map,))
    automatic = "cpu" if not torch.accelerator.is_available() else "accelerator"
    strategies = ("auto", "balanced", "balanced_low_0", "sequential")
    return all(str(automatic if device in strategies else device).startswith("cpu") for device in devices)
