"""A model's weights in a GGUF file.

Projections are ternary in one of the types of ternary/, a scale for each group of inputs, for each row or
for the matrix; or they are floats that are ternary in value. Embedding and head are of any type. Ternary ones
stay so in models of float activations; what else is not float is multiplied out. Norms are float, and stored
as what they multiply by, whatever the family publishes (Gemma's 1 + w).

Architecture "llama" has the rows of q and k in another order, because its programs turn neighbouring numbers
by one angle, where Hugging Face's turn numbers that are head_dim / 2 apart. Within a head::

    row 2 * j + h of the file is our row h * head_dim / 2 + j        h = 0, 1;  j = 0 .. head_dim / 2 - 1
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...decoder.config import DecoderConfig
from ...layers.matrix import TernaryMatrix
from ...layers.memory import HugePages
from ...layers.norm import RMSNorm
from ..group_sizes import FittingSizes, merge_scales
from ..tensor_source import FLOAT_DTYPES, TensorSource
from ..ternary_floats import NOT_TERNARY_HINT, NotTernary, group_scales, not_ternary, to_ternary
from ..weights import (
    CHUNK_ROWS,
    Projection,
    Rows,
    WeightReader,
    check_bias,
    gather_packed,
    may_have_ternary_tables,
    pack_rows,
    read_bias,
    tables,
)
from .architectures import Architecture
from .header import GgufFile
from .matrix import SCALE, GgufMatrix
from .names import PROJECTIONS, ROPE_FACTORS, attention_part, gguf_name
from .ternary import group_size
from .types import TYPES

TERNARY = tuple(type_.name for type_ in TYPES if type_.ternary and not type_.refused)
PACKABLE = (*TERNARY, *FLOAT_DTYPES)
"""Floats may be ternary in value (ternary_floats.py)."""

READABLE = tuple(type_.name for type_ in TYPES if not type_.refused)


class GgufWeights(WeightReader):
    """Reads the weights of a `GgufFile`.

    Attributes:
        architecture: of the file.
        config: of its model, before `complete`.
        dense: whether projections are wanted as they are, and not ternary.
    """

    maps_files = True  # programs replace such files; nobody writes into them

    def __init__(self, architecture: Architecture, config: DecoderConfig, *, dense: bool) -> None:
        super().__init__(architecture.family)
        self.architecture, self.config, self.dense = architecture, config, dense
        # Where one tensor after another is read from a file that is not mapped.
        self._workspace = HugePages()

    def stored_name(self, module: str) -> str:
        """GGUF's name of a module."""
        return gguf_name(module, self.config.post_norms)

    def other_names(self, files: TensorSource) -> list[str]:
        """The factors of the rotary embedding, which are settings."""
        return [ROPE_FACTORS]

    def complete(self, config: DecoderConfig, files: TensorSource) -> DecoderConfig:
        """Finds out how many inputs share a scale: 0 where all groups of each row have the same one.

        And whether embedding and head are ternary.

        Groups may be larger than a type's, for a type may be all that a writer had.
        """
        sizes: set[int] = set()
        for name in () if self.dense else self._projections(config):
            stored = files.tensors.get(f"{name}.weight")
            if stored is None or stored.dtype not in PACKABLE or len(stored.shape) != 2:
                continue  # for `check_projection` to refuse
            matrix = self._matrix(files, name)
            if not matrix.type.ternary:
                try:
                    sizes.add(_group_size_of_floats(matrix))
                except NotTernary as error:
                    raise not_ternary(files, matrix.weight, 0, error) from None
            elif group_size(matrix.type) not in sizes:
                sizes.add(_group_size(matrix.scales(), group_size(matrix.type)))
            matrix.forget()
        config = config.replace(group_size=min(sizes - {0}, default=0))
        if self.dense or not may_have_ternary_tables(config):
            return config
        fields = {}
        for field, module in tables(config).items():
            name = self.stored_name(module)
            files.expect(f"{name}.weight", READABLE, (config.vocab_size, config.hidden_size))
            if files.tensors[f"{name}.weight"].dtype not in PACKABLE:
                continue
            matrix = self._matrix(files, name)
            try:
                if matrix.type.ternary:
                    sizes.add(_group_size(matrix.scales(), group_size(matrix.type)))
                else:
                    sizes.add(_group_size_of_floats(matrix))
                fields[field] = True
            except NotTernary:
                pass
            matrix.forget()
        return config.replace(group_size=min(sizes - {0}, default=0), **fields)

    def check_projection(self, files: TensorSource, name: str, layer: TernaryMatrix) -> list[str]:
        """Checks the headers of a projection's tensors; see `WeightReader`."""
        weight = f"{name}.weight"
        stored = files.tensors.get(weight)
        shape = (layer.out_features, layer.in_features)
        if stored is not None and stored.shape == shape and stored.dtype not in PACKABLE:
            raise files.error(
                weight,
                f"ternary weights ({', '.join(TERNARY)})",
                f"{stored.dtype}, such as {self._examples(files, name)}; {NOT_TERNARY_HINT}",
            )
        files.expect(weight, PACKABLE, shape)
        return [weight, *self._check_scale(files, name), *check_bias(files, name, layer)]

    def read_projection(
        self, files: TensorSource, name: str, layer: TernaryMatrix, memory: HugePages
    ) -> Projection:
        """Packs a projection that `check_projection` has passed, some rows at a time."""
        matrix = self._matrix(files, name, layer.out_features)
        if matrix.type.ternary:
            scale = _for_layer(matrix.scales(), layer)
            packed, layout = gather_packed(matrix.packed, layer, memory)
        else:
            scale = torch.empty(layer.scale_shape)
            packed, layout = pack_rows(_ternary_floats(matrix, layer, scale), layer, memory)
        matrix.forget()
        return Projection(packed, layout, scale, self.read_bias(files, name, layer))

    def read_bias(self, files: TensorSource, name: str, layer: nn.Module) -> Tensor | None:
        """A bias, its rows in our order."""
        bias = read_bias(files, name, layer)
        order = None if bias is None else self._order(name, len(bias))
        return bias if bias is None or order is None else bias[order]

    def check_matrix(self, files: TensorSource, name: str, module: nn.Embedding | nn.Linear) -> list[str]:
        """Checks the headers of an embedding, a head, or a projection that is not ternary."""
        files.expect(f"{name}.weight", READABLE, tuple(module.weight.shape))
        names = [f"{name}.weight", *self._check_scale(files, name)]
        if isinstance(module, nn.Linear) and module.bias is not None:
            files.expect(f"{name}.bias", FLOAT_DTYPES, tuple(module.bias.shape))
            names.append(f"{name}.bias")
        return names

    def read_matrix(self, files: TensorSource, name: str, memory: HugePages) -> Tensor:
        """A matrix that `check_matrix` has passed.

        Returns:
            A projection in float32. Embedding and head as they are stored where that is float; otherwise in
            float16, or in bfloat16 where a number is too large for it.
        """
        stored = files.tensors[f"{name}.weight"]
        if name.startswith("blk."):
            return self._multiplied_out(files, name, torch.float32, memory)
        if stored.dtype in FLOAT_DTYPES:
            return files.tensor(f"{name}.weight", memory.empty)
        small = self._multiplied_out(files, name, torch.float16, memory)
        fits = all(bool(rows.isfinite().all()) for rows in small.split(CHUNK_ROWS))
        return small if fits else self._multiplied_out(files, name, torch.bfloat16, memory)

    def check_norm(self, files: TensorSource, name: str, module: RMSNorm) -> list[str]:
        """Checks the header of a norm's weight."""
        files.expect(f"{name}.weight", FLOAT_DTYPES, tuple(module.weight.shape))
        return [f"{name}.weight"]

    def read_norm(self, files: TensorSource, name: str) -> Tensor:
        """The factors themselves, whatever the family publishes."""
        return files.read(f"{name}.weight").float()

    def _projections(self, config: DecoderConfig) -> Iterator[str]:
        for layer in range(config.num_hidden_layers):
            for name in PROJECTIONS:
                yield self.stored_name(f"model.layers.{layer}.{name}")

    def _check_scale(self, files: TensorSource, name: str) -> list[str]:
        if f"{name}{SCALE}" not in files.tensors:
            return []
        files.expect(f"{name}{SCALE}", FLOAT_DTYPES, (1,))
        return [f"{name}{SCALE}"]

    def _order(self, name: str, rows: int) -> Tensor | None:
        """The file's row of each of ours, or None where they are the same."""
        part = attention_part(name)
        if not self.architecture.permuted or part is None:
            return None
        heads = self.config.num_attention_heads if part == "q" else self.config.num_key_value_heads
        return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()

    def _matrix(self, files: TensorSource, name: str, rows: int = 0) -> GgufMatrix:
        """A matrix, in our order where its number of rows is given."""
        assert isinstance(files, GgufFile)
        self._workspace.reuse()
        return GgufMatrix(files, name, self._order(name, rows) if rows else None, self._workspace.empty)

    def _multiplied_out(
        self, files: TensorSource, name: str, dtype: torch.dtype, memory: HugePages
    ) -> Tensor:
        """A matrix of any type as floats."""
        matrix = self._matrix(files, name, files.tensors[f"{name}.weight"].shape[0])
        scales = matrix.scales() if matrix.type.ternary else None
        out = memory.empty(matrix.shape, dtype)
        for begin, end in _chunks(len(out)):
            out[begin:end] = matrix.floats(begin, end, scales)
        matrix.forget()
        return out

    def _examples(self, files: TensorSource, name: str) -> str:
        """Some numbers of a matrix, for an error."""
        row = self._matrix(files, name).floats(0, 1).flatten()
        return ", ".join(f"{value:.4g}" for value in row[:4].tolist())


def _chunks(rows: int) -> Iterator[tuple[int, int]]:
    """The first rows of `CHUNK_ROWS` after another, and the first behind them."""
    for begin in range(0, rows, CHUNK_ROWS):
        yield begin, min(begin + CHUNK_ROWS, rows)


def _group_size_of_floats(matrix: GgufMatrix) -> int:
    """How many inputs share a scale in a float matrix with ternary values; 0 for whole rows.

    Raises:
        NotTernary: it has others; with the row of the matrix.
    """
    sizes = FittingSizes()
    for begin, end in _chunks(matrix.shape[0]):
        try:
            sizes.see(group_scales(matrix.floats(begin, end)))
        except NotTernary as error:
            raise NotTernary(begin + error.row, error.given) from None
    return sizes.coarsest


def _ternary_floats(matrix: GgufMatrix, layer: TernaryMatrix, scale: Tensor) -> Rows:
    """The weights of a float matrix that `_group_size_of_floats` has seen; fills in their scales."""

    def rows(begin: int, end: int) -> Tensor:
        part = to_ternary(matrix.floats(begin, end), layer.group_size)
        scale[..., begin:end] = part.scales
        return part.w

    return rows


def _group_size(scales: Tensor, size: int) -> int:
    """The most inputs that share each scale, of scales [G, N] of ``size`` inputs; 0 for one scale a row."""
    if size == 0:
        return 0
    sizes = FittingSizes(size)
    sizes.see(scales.T)
    return sizes.coarsest


def _for_layer(scales: Tensor, layer: TernaryMatrix) -> Tensor:
    """Scales [G, N] as the layer has them."""
    size = layer.in_features // len(scales)
    if 0 < layer.group_size < size:  # another projection has smaller groups
        groups = torch.arange(-(-layer.in_features // layer.group_size))
        return scales[groups * layer.group_size // size]
    merged, _ = merge_scales(scales.T, layer.group_size, size)
    if layer.group_size == 0:
        return torch.where(merged == 0, 1.0, merged).flatten()  # 0 for a row of nothing but 0
    return merged.T
