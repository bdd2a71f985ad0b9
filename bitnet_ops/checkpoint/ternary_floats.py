"""Float weights that are ternary already: how their scales are found.

Some models are published as ordinary float checkpoints, without "quantization_config", whose projections hold
no values but ``-s``, ``0`` and ``s``: TriLM with one s for some rows, Ternary-Bonsai with one for each 128
inputs of a row. Nothing in the files says which, so it is looked up::

    w[n, k] in {-s, 0, s}        s = s[n, k div group]        group = K, 256, 128 or 64

The coarsest group that fits all projections becomes `DecoderConfig.group_size` (0 for K: one scale a row, of
which one for the tensor is a case). A scale is the stored number itself, exactly. It is found among bits, for
those of a float without its sign are an integer, in the order of magnitudes::

    bfloat16   | sign | exponent 8 | mantissa  7 |      magnitude = bits & 0x7fff     0 and -0 have 0
    float16    | sign | exponent 5 | mantissa 10 |
    float32    | sign | exponent 8 | mantissa 23 |      magnitude = bits & 0x7fffffff

A group is ternary where the largest of its magnitudes is that of a finite number, and equals the smallest
above 0. Such models were trained with float activations, so theirs have 16 bits here.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..decoder.config import DecoderConfig
from ..layers.matrix import TernaryMatrix
from ..layers.memory import HugePages
from .errors import CheckpointError
from .group_sizes import FINEST, FittingSizes, merge_scales
from .tensor_source import FLOAT_DTYPES, TensorSource
from .weights import (
    Projection,
    WeightReader,
    check_bias,
    pack_rows,
    projection_shapes,
    read_bias,
    tables,
)

ACTIVATION_BITS = 16

NOT_TERNARY_HINT = "a model that is not ternary loads with linear=torch.nn.Linear, from Python only"
"""For errors; the command line runs ternary models."""

CHUNK_BYTES = 4 << 20
"""Bytes of weights that are looked at together. Temporaries have the same size and should stay in the cache;
much smaller pieces lose more to handing each step out to threads, above all on a busy machine."""

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class NotTernary(ValueError):
    """Weights are not as `group_scales` wants them.

    Attributes:
        row: of the first that are not.
        given: an example from there.
    """

    def __init__(self, row: int, given: str) -> None:
        super().__init__(f"row {row}: expected weights -s, 0 or s, got {given}")
        self.row, self.given = row, given


class Ternary(NamedTuple):
    """Rows of a ternary matrix: int8 [n, K] in {-1, 0, 1}, and float32 multipliers [G, n]."""

    w: Tensor
    scales: Tensor


def group_scales(x: Tensor) -> Tensor:
    """The s of each 64 inputs of float rows that hold -s, 0 and s only.

    Args:
        x: float32, bfloat16 or float16 [n, K].

    Returns:
        [n, ceil(K / 64)] in the dtype of ``x``; 0 for a group of zeros.

    Raises:
        NotTernary: a group has other values, a NaN, or an infinity.
    """
    bits = x.view(_BITS[x.dtype])
    most = torch.iinfo(bits.dtype).max
    magnitude = bits & most
    high = torch.cat([part.amax(-1) for part in _groups(magnitude)], 1)
    magnitude.sub_(1).bitwise_and_(most)  # 0 becomes the largest, the order of the others stays
    low = torch.cat([part.amin(-1) for part in _groups(magnitude)], 1)
    infinity = torch.tensor(torch.inf, dtype=x.dtype).view(bits.dtype)
    wrong = ((high != 0) & (low != high - 1)) | (high >= infinity)
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise NotTernary(row, _example(x[row, group * FINEST : (group + 1) * FINEST]))
    return high.view(x.dtype)


def _groups(x: Tensor) -> list[Tensor]:
    """Views of [n, K] as [n, G, 64] and, where 64 does not divide K, [n, 1, K mod 64]."""
    whole = x.shape[1] // FINEST * FINEST
    parts = [x[:, :whole].unflatten(1, (-1, FINEST)), x[:, whole:].unsqueeze(1)]
    return [part for part in parts if part.numel()]


def to_ternary(x: Tensor, group_size: int) -> Ternary:
    """Takes float rows apart into ternary weights and their scales; ``w * scale`` are the rows, exactly.

    Args:
        x: float32, bfloat16 or float16 [n, K] with values -s, 0 and s, with one s for each ``group_size``
            inputs of a row.
        group_size: 64, 128 or 256; 0 for one s a row.

    Returns:
        Weights and multipliers; a group of zeros has 0, a row of zeros with ``group_size`` 0 has 1.

    Raises:
        NotTernary: other values.
    """
    finest = group_scales(x)
    scales, fits = merge_scales(finest, group_size)
    if not fits.all():
        row, group = (~fits).nonzero()[0].tolist()
        raise NotTernary(row, _example(x[row, group * group_size :][: group_size or None]))
    scales = scales.float()
    if group_size == 0:
        scales = scales.masked_fill_(scales == 0, 1.0)
    # The sign of -0 is 0.
    return Ternary(x.sign().to(torch.int8), scales.T)


class TernaryFloats(WeightReader):
    """Reads projections whose float weights are ternary already."""

    def complete(self, config: DecoderConfig, files: TensorSource) -> DecoderConfig:
        """Looks at all matrices: sets ``group_size``, ``activation_bits`` = 16, and which tables are ternary.

        Raises:
            CheckpointError: a projection is not ternary, missing, or of another shape or dtype.
        """
        sizes = FittingSizes()
        shapes = projection_shapes(config)
        for module, shape in tqdm(
            shapes.items(), desc="finding scales", unit="tensor", disable=None, leave=False
        ):
            name = f"{self.stored_name(module)}.weight"
            files.expect(name, FLOAT_DTYPES, shape)
            for begin, x in _chunks(files, name, 0, shape[0]):
                try:
                    sizes.see(group_scales(x))
                except NotTernary as error:
                    raise not_ternary(files, name, begin, error) from None
        fields = {}
        for field, module in tables(config).items():
            name = f"{self.stored_name(module)}.weight"
            files.expect(name, FLOAT_DTYPES, (config.vocab_size, config.hidden_size))
            of_table = _sizes_of_table(files, name)
            if of_table is not None:
                fields[field] = True
                sizes.join(of_table)
        return config.replace(activation_bits=ACTIVATION_BITS, group_size=sizes.coarsest, **fields)

    def check_projection(self, files: TensorSource, name: str, layer: TernaryMatrix) -> list[str]:
        """Checks the headers of a projection's tensors; see `WeightReader`."""
        files.expect(f"{name}.weight", FLOAT_DTYPES, (layer.out_features, layer.in_features))
        return [f"{name}.weight", *check_bias(files, name, layer)]

    def read_projection(
        self, files: TensorSource, name: str, layer: TernaryMatrix, memory: HugePages
    ) -> Projection:
        """Takes a projection that `check_projection` has passed apart."""
        return read_floats(files, name, layer, memory)


def _sizes_of_table(files: TensorSource, name: str) -> FittingSizes | None:
    """The groups of an embedding or a head; None where its numbers are not ternary."""
    sizes = FittingSizes()
    for _, x in _chunks(files, name, 0, files.tensors[name].shape[0]):
        try:
            sizes.see(group_scales(x))
        except NotTernary:
            return None
    return sizes


def read_floats(files: TensorSource, name: str, layer: TernaryMatrix, memory: HugePages) -> Projection:
    """A projection out of a float tensor [N, K] with ternary values, some rows at a time.

    Args:
        files: where it lies.
        name: of the module; its tensors are ``name.weight`` and, where ``layer`` has one, ``name.bias``.
        layer: of its sizes and its group size.
        memory: where the packed weights and the scales go.

    Raises:
        CheckpointError: a group of the layer's size has other values than -s, 0 and s.
    """
    weight = f"{name}.weight"
    scales = torch.empty(layer.scale_shape)

    def rows(top: int, end: int) -> Tensor:
        parts = []
        for begin, x in _chunks(files, weight, top, end):
            try:
                part = to_ternary(x, layer.group_size)
            except NotTernary as error:
                raise not_ternary(files, weight, begin, error) from None
            parts.append(part.w)
            scales[..., begin : begin + len(x)] = part.scales
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    packed, layout = pack_rows(rows, layer, memory)
    return Projection(packed, layout, scales, read_bias(files, name, layer))


def not_ternary(files: TensorSource, name: str, begin: int, error: NotTernary) -> CheckpointError:
    """The error to raise for a tensor whose rows from ``begin`` on gave ``error``."""
    return files.error(
        name,
        "weights -s, 0 or s with one s for each 64, 128 or 256 inputs of a row",
        f"{error.given} in row {begin + error.row}; {NOT_TERNARY_HINT}, "
        "and master weights of one that is need 'quantization_config': "
        "{'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'quantization_mode': 'online'}",
    )


def _chunks(files: TensorSource, name: str, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """Some rows of a matrix at a time, with the number of the first."""
    stored = files.tensors[name]
    step = max(1, CHUNK_BYTES * stored.shape[0] // max(stored.nbytes, 1))
    for first in range(begin, end, step):
        x = files.rows(name, first, min(first + step, end))
        yield first, x
        files.forget(x)


def _example(group: Tensor) -> str:
    """Two values that do not go together, or one that goes with none."""
    strange = group[~group.isfinite()]
    if len(strange):
        return f"{strange[0].item()!r}"
    values = group[group != 0]
    other = values[values.abs() != values[0].abs()]
    return f"{values[0].item():.9g} and {other[0].item():.9g}"
