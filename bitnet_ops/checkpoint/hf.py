"""The published layout of Hugging Face checkpoints: how the weights of a projection are stored.

transformers knows three ways, told apart by "quantization_config" in config.json:

    packed     weight uint8 [N / 4, K], weight_scale [1]   "quantization_mode": "offline", and all "bitlinear"
    ternary    weight float [N, K], weight_scale [1]       "offline", unpacked and saved again by transformers
    master     weight float [N, K]                         "quantization_mode": "online", or nothing is said

Packed: row n of the matrix has its codes c = w + 1 in the stored row n mod N/4, at the bits 2i..2i+1
with i = n div N/4, so each of the four quarters of the matrix fills one pair of bits.

weight_scale is the multiplier (``y = acc * x_scale * weight_scale``) in the linear class "autobitlinear",
and its reciprocal in "bitlinear". Master weights are quantised here (`reference.quantize_weight`).

A bias [N] is added to the result, except that "autobitlinear" with a scale multiplies it, too:
``(acc * x_scale + bias) * weight_scale``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..families import Family
from ..layers.matrix import TernaryMatrix
from ..layers.memory import HugePages
from .codes import check_codes
from .errors import CheckpointError
from .quarters import WEIGHTS_PER_BYTE, unpack_quarters
from .tensor_source import FLOAT_DTYPES, TensorSource
from .weights import Projection, WeightReader, check_bias, pack_rows, read_bias

LINEAR_CLASSES = ("autobitlinear", "bitlinear")
MODES = ("offline", "online")


class PublishedWeights(WeightReader):
    """Reads projections in the published layout.

    Attributes:
        has_scale: whether the file holds a scale (packed or ternary), and not master weights.
        reciprocal: whether that scale is the reciprocal of the multiplier.
    """

    in_pieces = False

    def __init__(self, family: Family, *, has_scale: bool, reciprocal: bool) -> None:
        super().__init__(family)
        self.has_scale, self.reciprocal = has_scale, reciprocal
        # Where one projection after another is converted. Memory that is taken and given back for each of
        # them would leave holes between what stays.
        self._workspace = HugePages()

    @classmethod
    def from_config(
        cls, quantization: dict[str, Any] | None, family: Family, file: Path
    ) -> "PublishedWeights":
        """Understands "quantization_config" of config.json; None, where there is none, for masters.

        Raises:
            CheckpointError: it asks for something that is not supported.
        """
        if quantization is None:
            return cls(family, has_scale=False, reciprocal=False)
        # Absent fields mean what they mean to transformers' BitNetQuantConfig.
        linear_class = quantization.get("linear_class", "bitlinear")
        mode = quantization.get("quantization_mode", "offline")
        for name, value, known in (
            ("linear_class", linear_class, LINEAR_CLASSES),
            ("quantization_mode", mode, MODES),
        ):
            if value not in known:
                raise CheckpointError.at(
                    file, f"quantization_config.{name}", " or ".join(map(repr, known)), f"{value!r:.200}"
                )
        skipped = quantization.get("modules_to_not_convert")
        # With an empty list the head would be ternary as well, which packed files show and masters do not.
        masters = linear_class == "autobitlinear" and mode == "online"
        if skipped not in (None, ["lm_head"]) and (skipped != [] or masters):
            raise CheckpointError.at(
                file,
                "quantization_config.modules_to_not_convert",
                "nothing but 'lm_head' (every projection is ternary)",
                f"{skipped!r:.200}",
            )
        # transformers has no online mode of "bitlinear": that class always reads packed weights.
        return cls(
            family,
            has_scale=linear_class == "bitlinear" or mode == "offline",
            reciprocal=linear_class == "bitlinear",
        )

    def check_projection(self, files: TensorSource, name: str, layer: TernaryMatrix) -> list[str]:
        """Checks the headers of a projection's tensors; see `WeightReader`."""
        weight, scale = f"{name}.weight", f"{name}.weight_scale"
        out_features, in_features = whole = (layer.out_features, layer.in_features)
        bias = check_bias(files, name, layer)
        if not self.has_scale:
            files.expect(weight, FLOAT_DTYPES, whole)
            return [weight, *bias]
        stored = files.tensors.get(weight)
        if stored is not None and stored.dtype in FLOAT_DTYPES and not self.reciprocal:
            files.expect(weight, FLOAT_DTYPES, whole)
        elif stored is not None and out_features % WEIGHTS_PER_BYTE:
            raise files.error(
                weight,
                f"a number of rows that {WEIGHTS_PER_BYTE} divides, for the format packs as many into one",
                f"{out_features} by config.json",
            )
        else:
            files.expect(weight, ("U8",), (-(-out_features // WEIGHTS_PER_BYTE), in_features))
        files.expect(scale, FLOAT_DTYPES, (1,), ())
        return [weight, scale, *bias]

    def read_projection(
        self, files: TensorSource, name: str, layer: TernaryMatrix, memory: HugePages
    ) -> Projection:
        """Converts a projection that `check_projection` has passed."""
        weight = f"{name}.weight"
        self._workspace.reuse()
        stored = files.tensor(weight, self._workspace.empty)
        if not self.has_scale:
            w, scale = reference.quantize_weight(stored)
            if not scale.isfinite():
                raise files.error(
                    weight, "finite numbers of finite sum", "a NaN, an infinity or a too large number"
                )
        else:
            scale = self._read_scale(files, f"{name}.weight_scale")
            if stored.dtype == torch.uint8:
                check_codes(files, weight, stored)
                w = unpack_quarters(stored, self._workspace.empty)
            else:
                w = stored.to(torch.int8)
                if not (w == stored).all() or w.abs().max() > 1:
                    raise files.error(
                        weight, "weights in {-1, 0, 1}, because it has a weight_scale", "other numbers"
                    )
        files.forget(stored)
        packed, layout = pack_rows(lambda begin, end: w[begin:end], layer, memory)
        bias = read_bias(files, name, layer, scale if self.has_scale and not self.reciprocal else 1.0)
        return Projection(packed, layout, memory.copy(scale.reshape(1).expand(layer.out_features)), bias)

    def _read_scale(self, files: TensorSource, name: str) -> Tensor:
        stored = files.read(name).float()
        scale = 1.0 / stored if self.reciprocal else stored
        # A mean of absolute values is above 0; the reciprocal of a subnormal number is infinite.
        if not (stored.isfinite() & (stored > 0) & scale.isfinite() & (scale > 0)).all():
            raise files.error(
                name, "a finite number above 0 whose reciprocal is finite too", f"{stored.item()!r}"
            )
        return scale
