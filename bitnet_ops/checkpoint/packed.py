"""Our own packed folder: what `save_pretrained` writes and what loads without conversion.

The layout of a Hugging Face checkpoint with one difference: a projection, and a ternary embedding or head,
is stored as a ``state_dict`` of `bitnet_ops.BitLinear` has it, but in any layout,

    packed_weight   uint8, drawn in `bitnet_ops.packing`
    weight_scale    the multiplier: float32 [N]; with "group_size" [ceil(K / group_size), N], also float16
    bias            float32 [N], where config.json gives the projection one

"quantization_config" of config.json names the layouts: "layout" that of most projections, "layouts" those of
the others, by the names of their modules. A folder of any layouts loads on any machine.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import ops, packing
from ..families import Family
from ..layers.linear import best_layout, native_layouts
from ..layers.matrix import TernaryMatrix
from ..layers.memory import HugePages
from .codes import check_packed
from .config_json import QUANT_METHOD, config_to_json
from .draft import folder_draft
from .errors import CheckpointError
from .files import SINGLE_FILE
from .head_copy import binding, head_to_store, stored_names, table_name
from .pooling import save_embedding_settings
from .saveable import check_saveable
from .tensor_source import TensorSource
from .text_files import TOKEN_FIELDS, save_text_files
from .weights import Projection, WeightReader, check_bias, read_bias
from .write import write_tensors

if TYPE_CHECKING:
    from ..decoder.model import LanguageModel

CONFIG_FILE = "config.json"


class PackedWeights(WeightReader):
    """Gets projections in our own format.

    Attributes:
        layout: of most projections.
        layouts: of the others, by the names of their modules.
    """

    maps_files = True  # `save_pretrained` replaces files
    side_by_side = True

    def __init__(self, family: Family, layout: str, layouts: dict[str, str]) -> None:
        super().__init__(family)
        self.layout, self.layouts = layout, layouts

    @classmethod
    def from_config(cls, quantization: dict[str, Any], family: Family, file: Path) -> "PackedWeights":
        """Understands "quantization_config" of config.json.

        Raises:
            CheckpointError: a layout is unknown.
        """
        layouts = quantization.get("layouts", {})
        if not isinstance(layouts, dict):
            raise CheckpointError.at(
                file,
                "quantization_config.layouts",
                "an object from projections to layouts",
                f"{layouts!r:.200}",
            )
        fields = {"layout": quantization.get("layout")}
        fields |= {f"layouts[{name!r:.200}]": layout for name, layout in layouts.items()}
        for field, layout in fields.items():
            if layout not in packing.LAYOUTS:
                known = " or ".join(map(repr, packing.LAYOUTS))
                raise CheckpointError.at(file, f"quantization_config.{field}", known, f"{layout!r:.200}")
        return cls(family, quantization["layout"], layouts)

    def stored_name(self, module: str) -> str:
        """The name itself: modules are stored as they are called."""
        return module

    def other_names(self, files: TensorSource) -> list[str]:
        """Those of the head's copy."""
        return stored_names(files)

    def check_projection(self, files: TensorSource, name: str, layer: TernaryMatrix) -> list[str]:
        """Checks the headers of a projection's tensors; see `WeightReader`."""
        weight, scale = f"{name}.packed_weight", f"{name}.weight_scale"
        layout = self.layout_of(name)
        files.expect(weight, ("U8",), packing.packed_shape(layer.out_features, layer.in_features, layout))
        scale_dtypes = ("F32", "F16") if layer.group_size else ("F32",)
        files.expect(scale, scale_dtypes, layer.scale_shape)
        if layout not in layer.layouts:
            why = "because it is an embedding" if layer.only_tile16 else "because it has group scales"
            raise files.error(weight, f"layout 'tile16', {why}", repr(layout))
        return [weight, scale, *check_bias(files, name, layer)]

    def read_projection(
        self, files: TensorSource, name: str, layer: TernaryMatrix, memory: HugePages
    ) -> Projection:
        """Gets a projection that `check_projection` has passed."""
        out_features, in_features = layer.out_features, layer.in_features
        layout = self.layout_of(name)
        weight = f"{name}.packed_weight"
        packed = files.tensor_of_every_token(weight, memory)
        check_packed(files, weight, packed, out_features, in_features, layout)
        scale_name = f"{name}.weight_scale"
        if layer.group_size:  # who gets them brings them into another order, in memory of its own
            scale = files.read(scale_name)
        else:
            scale = files.tensor_of_every_token(scale_name, memory)
        least, most = (float(extreme) for extreme in torch.aminmax(scale))  # NaN where a number is
        # A group may have no weights but 0.
        if not (least >= 0 if layer.group_size else least > 0) or not most < math.inf:
            raise files.error(scale_name, "finite numbers above 0", "a NaN, an infinity, 0 or less")
        bias = read_bias(files, name, layer)
        if layout in native_layouts():
            return Projection(packed, layout, scale, bias)
        # Packed on a machine with other instructions.
        here = best_layout() if best_layout() in layer.layouts else "tile16"
        repacked = memory.copy(ops.repack_ternary(packed, out_features, in_features, layout, here))
        files.forget(packed)
        return Projection(repacked, here, scale, bias)

    def read_norm(self, files: TensorSource, name: str) -> torch.Tensor:
        """The factors themselves, whatever the family publishes."""
        return files.read(f"{name}.weight").float()

    def layout_of(self, name: str) -> str:
        """The layout of a projection by its module's name."""
        return self.layouts.get(name, self.layout)


def save_pretrained(model: "LanguageModel", folder: str | os.PathLike[str]) -> None:
    """Writes a packed model as a folder that `from_pretrained` loads again, bit for bit the same.

    Files: config.json, model.safetensors, generation_config.json, and tokenizer.json, chat_template.jinja and
    those of pooling.py where the model has them. Files of the same names are replaced, others are left alone.
    Everything is written under temporary names first, so a write that fails leaves the folder as it was;
    after a power cut in the middle of the renames the folder has no config.json and refuses to load, rather
    than mix two models.

    Args:
        model: with `BitLinear` projections; turn a trained model into one with `bitnet_ops.pack`.
        folder: made where it does not exist.

    Raises:
        ValueError: the model still has `BitLinearQAT` or other float projections, or a dtype that no
            checkpoint has, or a projection that is not as ``model.config`` says.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_saveable(model, "save_pretrained")
    # Not state_dict(), which is tile16 always: here the layouts stay as they are.
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        if isinstance(module, TernaryMatrix):
            tensors[f"{name}.weight_scale"] = module.scales()
    with folder_draft(Path(folder), CONFIG_FILE) as draft:
        copy, metadata = head_to_store(model.screened_head())
        tensors |= copy
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        write_tensors(draft / SINGLE_FILE, on_cpu, metadata)
        bound = binding(draft, table_name(model.config))
        quantization = {"quant_method": QUANT_METHOD, **_layouts(model), **bound}
        config = config_to_json(model.config, quantization)
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        generation_config = {name: config[name] for name in TOKEN_FIELDS} | dict(
            model.generation_config or {}
        )
        save_text_files(draft, model.tokenizer, model.chat_template, generation_config)
        save_embedding_settings(draft, model.embedding_settings, model.config.hidden_size)


def _layouts(model: "LanguageModel") -> dict[str, Any]:
    """The layouts as "quantization_config" names them."""
    layouts = {
        name: module.layout for name, module in model.named_modules() if isinstance(module, TernaryMatrix)
    }
    (common, _), *_ = Counter(layouts.values()).most_common(1) or [("tile16", 0)]
    others = {name: layout for name, layout in layouts.items() if layout != common}
    return {"layout": common, "layouts": others} if others else {"layout": common}
