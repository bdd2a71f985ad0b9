"""Our own packed folder: what `save_pretrained` writes and what loads without any conversion.

The layout of a Hugging Face checkpoint with one difference: a projection is stored as
`bitnet_ops.BitLinear` holds it,

    packed_weight   uint8, the layout named in "quantization_config" (drawn in `bitnet_ops.packing`)
    weight_scale    float32 [N], the multiplier
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import ops, packing
from ..linear import BitLinear, BitLinearQAT
from .codes import check_codes
from .config_json import config_to_json
from .errors import CheckpointError
from .files import SINGLE_FILE, TensorFiles
from .text_files import TOKEN_FIELDS, save_text_files

if TYPE_CHECKING:
    from ..model import BitNet

QUANT_METHOD = "bitnet_ops"
LAYOUT = "tile16"

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class PackedProjections:
    """Reads projections in our own layout."""

    @classmethod
    def from_config(cls, quantization: dict[str, Any], file: Path) -> "PackedProjections":
        """Understands "quantization_config" of config.json."""
        if quantization.get("layout") != LAYOUT:
            raise CheckpointError.at(
                file, "quantization_config.layout", repr(LAYOUT), f"{quantization.get('layout')!r:.200}"
            )
        return cls()

    def check(self, files: TensorFiles, name: str, out_features: int, in_features: int) -> list[str]:
        """Checks the headers of a projection's tensors and returns their names (see `hf`)."""
        weight, scale = f"{name}.packed_weight", f"{name}.weight_scale"
        files.expect(weight, ("U8",), tuple(packing.packed_shape(out_features, in_features)))
        files.expect(scale, ("F32",), (out_features,))
        return [weight, scale]

    def read(
        self, files: TensorFiles, name: str, out_features: int, in_features: int
    ) -> tuple[Tensor, Tensor]:
        """Reads a projection that `check` has passed, as (packed_weight, weight_scale)."""
        packed = files.read(f"{name}.packed_weight")
        check_codes(files, f"{name}.packed_weight", packed)
        # Blocks are independent, so the last row and the last column of blocks are matrices of their own.
        rows, columns = packing.TILE_ROWS * packed.shape[0], packing.BLOCK_INPUTS * packed.shape[1]
        below = ops.unpack_ternary(packed[-1:], 16, columns)[16 - (rows - out_features) :]
        right = ops.unpack_ternary(packed[:, -1:].contiguous(), rows, 16)[:, 16 - (columns - in_features) :]
        if below.any() or right.any():
            raise files.error(f"{name}.packed_weight", "weight 0 in the padding of the last tiles", "others")
        scale = files.read(f"{name}.weight_scale")
        if not (scale.isfinite() & (scale > 0)).all():
            raise files.error(
                f"{name}.weight_scale", "finite numbers above 0", "a NaN, an infinity, 0 or less"
            )
        return packed, scale


def save_pretrained(model: "BitNet", folder: str | os.PathLike[str]) -> None:
    """Writes a packed model as a folder that `from_pretrained` loads again, bit for bit the same.

    Files: config.json, model.safetensors, generation_config.json, and tokenizer.json and
    chat_template.jinja where the model has them. Files of the same names are replaced, others are left
    alone. Everything is written under temporary names first, so a write that fails leaves the folder as
    it was; after a power cut in the middle of the renames the folder has no config.json and refuses to
    load, rather than mix two models.

    Args:
        model: with `BitLinear` projections; turn a trained model into one with `bitnet_ops.pack`.
        folder: made where it does not exist.

    Raises:
        ValueError: the model still has `BitLinearQAT` or other float projections.
        OSError: the disk is full, or the folder cannot be written.
    """
    for name, module in model.named_modules():
        if name != "lm_head" and isinstance(module, torch.nn.Linear):
            hint = "; call bitnet_ops.pack(model) first" if isinstance(module, BitLinearQAT) else ""
            raise ValueError(
                f"save_pretrained: model: expected BitLinear projections, got {type(module).__name__} at "
                f"{name!r}{hint}"
            )
        if isinstance(module, BitLinear) and (module.bias is not None or module.group_size != 0):
            raise ValueError(
                "save_pretrained: model: expected projections without bias and with one scale a row, "
                f"got another at {name!r}"
            )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # In the folder itself, because a rename is atomic only within one file system.
    draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        config = config_to_json(model.config, {"quant_method": QUANT_METHOD, "layout": LAYOUT})
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        generation_config = {name: config[name] for name in TOKEN_FIELDS} | dict(
            model.generation_config or {}
        )
        save_text_files(draft, model.tokenizer, model.chat_template, generation_config)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, draft / SINGLE_FILE, metadata={"format": "pt"})
        # safetensors makes a file that only its owner may read; a model is for whom the folder is for.
        os.chmod(draft / SINGLE_FILE, (draft / CONFIG_FILE).stat().st_mode)
        files = sorted(draft.iterdir(), key=lambda file: file.name == CONFIG_FILE)  # config.json last
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        (target / CONFIG_FILE).unlink(missing_ok=True)
        for file in files:
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
