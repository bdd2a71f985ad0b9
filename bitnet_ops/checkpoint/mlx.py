"""MLX's 2-bit form, where its four values are three: how Ternary-Bonsai is published for Apple's machines.

A matrix [N, K] is three tensors, with K / group groups of inputs in a row ("group_size" in "quantization" of
config.json)::

    NAME.weight    uint32 [N, K / 16]       16 codes of two bits a word, low bits first
    NAME.scales    float  [N, K / group]
    NAME.biases    float  [N, K / group]    beside NAME.bias [N], that of the layer

    word       | c15 | c14 | ... |  c1 |  c0 |      = sum of c[j] * 4^j, j = 0..15
    bits        31 30 29 28  ...   3 2   1 0
    in bytes   | c3 c2 c1 c0 | c7 c6 c5 c4 | ...    words lie with the low byte first

    w[n, k] = scales[n, g] * c[n, k] + biases[n, g]        g = k div group

With ``biases = -scales`` and codes 0, 1 and 2 that is ``scales * (c - 1)``: ternary, and nothing else is
read. Embedding and head come in the same form, or in floats: a module is in this form where it has scales.
Where a scale of theirs holds for 64 inputs or more they stay packed. With smaller groups, and where dense
projections are wanted, they become floats in the dtype of their scales, which hold ``-s, 0, s`` exactly.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..decoder.config import DecoderConfig
from ..families import Family
from ..layers.matrix import TernaryMatrix
from ..layers.memory import HugePages
from .codes import check_codes
from .errors import CheckpointError
from .group_sizes import FittingSizes, merge_scales
from .pieces import for_each_piece
from .tensor_source import FLOAT_DTYPES, TensorSource
from .weights import (
    CHUNK_ROWS,
    Projection,
    WeightReader,
    check_bias,
    pack_rows,
    projection_shapes,
    read_bias,
    tables,
)

ACTIVATION_BITS = 16
"""Models of this form were trained with float activations."""

BITS = 2
CODES_PER_WORD = 16
MODE = "affine"
"""Of MLX's modes the one with scales and biases; its others store floats of four or eight bits."""

STORED_GROUPS = (32, 64, 128)
"""Those that MLX has."""


def mlx_settings(data: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says about MLX's quantisation, or None where the model has none.

    Its programs write it twice, as "quantization" and as "quantization_config"; old ones only the first.
    """
    for name in ("quantization", "quantization_config"):
        settings = data.get(name)
        if isinstance(settings, dict) and "bits" in settings and settings.get("quant_method") is None:
            return settings
    return None


class MlxWeights(WeightReader):
    """Reads projections and matrices in MLX's 2-bit form.

    Attributes:
        group: inputs with one scale, in the files.
        dense: whether projections are wanted as floats, like embedding and head.
    """

    def __init__(self, family: Family, group: int, dense: bool) -> None:
        super().__init__(family)
        self.group, self.dense = group, dense

    @classmethod
    def from_config(
        cls, settings: dict[str, Any], family: Family, file: Path, dense: bool = False
    ) -> "MlxWeights":
        """Understands what `mlx_settings` gives.

        Raises:
            CheckpointError: the numbers are not ternary, or not in this form.
        """
        group = settings.get("group_size")
        if type(group) is not int or group not in STORED_GROUPS:
            known = " or ".join(map(str, STORED_GROUPS))
            raise CheckpointError.at(file, "quantization.group_size", known, f"{group!r:.200}")
        modules = {f"[{name!r:.200}]": value for name, value in settings.items() if isinstance(value, dict)}
        for name, values in {"": settings, **modules}.items():
            expected = {"bits": BITS, "group_size": group, "mode": MODE}
            for field, value in expected.items():
                given = values.get(field, value)
                if given != value or type(given) is not type(value):
                    why = " (other numbers of bits are not ternary)" if field == "bits" else ""
                    raise CheckpointError.at(
                        file, f"quantization{name}.{field}", f"{value!r}{why}", f"{given!r:.200}"
                    )
        return cls(family, group, dense)

    def complete(self, config: DecoderConfig, files: TensorSource) -> DecoderConfig:
        """Looks at all scales: sets ``group_size``, ``activation_bits`` to 16, and which tables are ternary.

        Raises:
            CheckpointError: a scale or bias is not that of ternary weights, missing, or of another shape.
        """
        if self.dense:
            return config
        sizes = FittingSizes(self.group)
        shapes = projection_shapes(config).items()
        for module, shape in tqdm(shapes, desc="finding scales", unit="tensor", disable=None, leave=False):
            name = self.stored_name(module)
            self._expect(files, name, shape)
            if not sizes.see(self._scales(files, name)):
                raise files.error(
                    f"{name}.scales",
                    "one scale for each 64, 128 or 256 inputs of a row",
                    f"one for {self.group}",
                )
        fields = {}
        for field, module in tables(config).items():
            name = self.stored_name(module)
            if f"{name}.scales" not in files.tensors:
                continue
            self._expect(files, name, (config.vocab_size, config.hidden_size))
            of_table = FittingSizes(self.group)
            if of_table.see(self._scales(files, name)):
                fields[field] = True
                sizes.join(of_table)
        return config.replace(activation_bits=ACTIVATION_BITS, group_size=sizes.coarsest, **fields)

    def check_projection(self, files: TensorSource, name: str, layer: TernaryMatrix) -> list[str]:
        """Checks the headers of a projection's tensors; see `WeightReader`."""
        used = self._expect(files, name, (layer.out_features, layer.in_features))
        return [*used, *check_bias(files, name, layer)]

    def read_projection(
        self, files: TensorSource, name: str, layer: TernaryMatrix, memory: HugePages
    ) -> Projection:
        """Repacks a projection that `check_projection` has passed."""
        stored = self._scales(files, name)
        scales, fits = merge_scales(stored, layer.group_size, self.group)
        if not fits.all():
            raise files.error(
                f"{name}.scales", f"the same in groups of {layer.group_size or layer.in_features}", "others"
            )
        scales = scales.float().T
        if layer.group_size == 0:
            scales = scales.masked_fill(scales == 0, 1.0).squeeze(0)
        packed, layout = pack_rows(partial(self._rows, files, name, stored), layer, memory)
        return Projection(packed, layout, scales, read_bias(files, name, layer))

    def check_matrix(self, files: TensorSource, name: str, module: nn.Embedding | nn.Linear) -> list[str]:
        """Checks the headers of an embedding or a head, in this form or in floats."""
        if f"{name}.scales" not in files.tensors:
            return super().check_matrix(files, name, module)
        rows, columns = module.weight.shape
        used = self._expect(files, name, (rows, columns))
        if isinstance(module, nn.Linear) and module.bias is not None:
            files.expect(f"{name}.bias", FLOAT_DTYPES, (rows,))
            used.append(f"{name}.bias")
        return used

    def read_matrix(self, files: TensorSource, name: str, memory: HugePages) -> Tensor:
        """The weight of a module that `check_matrix` has passed."""
        if f"{name}.scales" not in files.tensors:
            return super().read_matrix(files, name, memory)
        scales = self._scales(files, name)
        matrix = memory.empty((scales.shape[0], scales.shape[1] * self.group), scales.dtype)

        def fill(begin: int) -> None:
            w = self._rows(files, name, scales, begin, min(begin + CHUNK_ROWS, len(scales)))
            part = scales[begin : begin + len(w)].unsqueeze(-1)
            out = matrix[begin : begin + len(w)].unflatten(1, (-1, self.group))
            torch.mul(w.unflatten(1, (-1, self.group)), part, out=out)

        for_each_piece(fill, range(0, len(scales), CHUNK_ROWS))
        return matrix

    def _expect(self, files: TensorSource, name: str, shape: tuple[int, int]) -> list[str]:
        """Checks the headers of a matrix's three tensors; their names."""
        rows, columns = shape
        if columns % self.group:
            raise CheckpointError(
                f"{files.file_names}: tensor {name + '.weight'!r}: expected a number of inputs that "
                f"group_size = {self.group} divides, got {columns} by config.json"
            )
        files.expect(f"{name}.weight", ("U32",), (rows, columns // CODES_PER_WORD))
        stored = files.expect(f"{name}.scales", FLOAT_DTYPES, (rows, columns // self.group))
        files.expect(f"{name}.biases", (stored.dtype,), stored.shape)
        return [f"{name}.weight", f"{name}.scales", f"{name}.biases"]

    def _scales(self, files: TensorSource, name: str) -> Tensor:
        """The scales [N, K / group] as stored, after a look at them and at the biases."""
        scales, biases = files.read(f"{name}.scales"), files.read(f"{name}.biases")
        for tensor, good, expected in (
            ("scales", scales.isfinite() & (scales >= 0), "finite numbers of at least 0"),
            ("biases", biases == -scales, "minus the scale, because the weights have to be ternary"),
        ):
            if not good.all():
                row, group = (~good).nonzero()[0].tolist()
                given = f"{biases[row, group].item():.9g} beside " if tensor == "biases" else ""
                raise files.error(
                    f"{name}.{tensor}",
                    expected,
                    f"{given}{scales[row, group].item():.9g} in row {row}, group {group}",
                )
        return scales

    def _rows(self, files: TensorSource, name: str, scales: Tensor, begin: int, end: int) -> Tensor:
        """Some rows of the ternary weights, int8 [end - begin, K]."""
        words = files.rows(f"{name}.weight", begin, end)
        packed = words.view(torch.uint8)
        check_codes(files, f"{name}.weight", packed, begin * packed.shape[1])
        w = unpack_codes(packed)
        nothing = scales[begin:end] == 0
        if nothing.any():  # 0 times anything, also where a coarser group gives it another scale
            w.unflatten(1, (-1, self.group))[nothing] = 0
        files.forget(words)
        return w


def unpack_codes(packed: Tensor) -> Tensor:
    """Takes codes in sequence, four a byte and low bits first, apart.

    Args:
        packed: uint8 [n, K / 4] with codes in {0, 1, 2}.

    Returns:
        int8 [n, K] in {-1, 0, 1}.
    """
    shifts = torch.arange(0, 8, BITS, dtype=torch.uint8)
    codes = (packed.unsqueeze(-1) >> shifts).bitwise_and_(3)
    return codes.view(torch.int8).sub_(1).flatten(1)
