"""A matrix of a GGUF file, in the model's order of rows, a part of them at a time.

Two things may stand beside the matrix "blk.3.attn_q.weight":

    blk.3.attn_q.scale                              a tensor, float [1]: multiplies what it gives
    bitnet_ops.weight_scale.blk.3.attn_q.weight     a key of ours: its scales in float32, where the type has
                                                    none that are as exact; one, N, or G * N of them, as
                                                    [G, N] in the file's order of rows
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ... import ops
from ..errors import CheckpointError
from ..tensor_source import FLOAT_DTYPES
from .dense import dequantize
from .header import GgufFile
from .ternary import decode_rows, pack_codes, scales

WEIGHT_SCALE_PREFIX = "bitnet_ops.weight_scale."
SCALE = ".scale"


class GgufMatrix:
    """Rows and scales of a matrix [N, K].

    Attributes:
        weight: name of its tensor.
        type: of its bytes.
        shape: N, K.
        order: int64 [N], the file's row of each row of the model; None where they are the same.
    """

    def __init__(
        self, file: GgufFile, name: str, order: Tensor | None, empty: Callable[..., Tensor] = torch.empty
    ) -> None:
        """Gets the bytes of a tensor of two dimensions.

        Args:
            file: where it lies.
            name: of the module, without ".weight".
            order: see the attribute.
            empty: gives memory for the bytes of a file that is not mapped.

        Raises:
            CheckpointError: the tensor beside it has another shape than [1].
        """
        self.weight = f"{name}.weight"
        self.type = file.type_of(self.weight)
        rows, columns = file.tensors[self.weight].shape
        self.shape = (rows, columns)
        self.order = order
        self._file = file
        self._factor = f"{name}{SCALE}" if f"{name}{SCALE}" in file.tensors else None
        if self._factor is not None:
            file.expect(self._factor, FLOAT_DTYPES, (1,))
        self._data = file.data(self.weight, empty)

    def scales(self) -> Tensor:
        """The multipliers of a ternary matrix: float32 [G, N], 0 or more, G groups of inputs.

        Raises:
            CheckpointError: one is damaged.
        """
        values = self._own_scales
        key = f"{WEIGHT_SCALE_PREFIX}{self.weight}"
        if key in self._file.metadata:
            values = self._given_scales(self._file.metadata[key], values.numel())
        if self._factor is not None:
            values = values * self._file.read(self._factor).float()
        if not ((values >= 0) & values.isfinite()).all():
            raise self._file.error(self.weight, "scales that are finite and 0 or more", "others")
        return values if self.order is None else values[:, self.order]

    def packed(self, begin: int, end: int, layout: str) -> Tensor:
        """Some rows of a ternary matrix, packed: what `ops.pack_ternary` makes of `ternary`.

        Raises:
            CheckpointError: a byte stands for no weights.
        """
        rows = slice(begin, end) if self.order is None else self.order[begin:end]
        if self._own_scales[:, rows].all():
            result = pack_codes(self.type, self._data, self.shape, rows, layout)
            if result is not None:
                return result
        return ops.pack_ternary(self.ternary(begin, end), layout)

    def ternary(self, begin: int, end: int) -> Tensor:
        """Some rows of a ternary matrix: int8 [end - begin, K], 0 where the type's own scale is 0.

        Raises:
            CheckpointError: a byte stands for no weights.
        """
        if self.order is None:
            return self._decode(begin, end)
        picked = self.order[begin:end]
        # They lie together, but for a head's other rows at both ends.
        first = int(picked.min())
        return self._decode(first, int(picked.max()) + 1)[picked - first]

    def floats(self, begin: int, end: int, values: Tensor | None = None) -> Tensor:
        """Some rows of a matrix of any type, multiplied out: float32 [end - begin, K].

        Args:
            begin: the first row.
            end: the first row behind them.
            values: what `scales` gives, of a ternary matrix.
        """
        if self.type.ternary:
            if values is None:
                values = self.scales()
            groups = values[:, begin:end].T
            return self.ternary(begin, end) * groups.repeat_interleave(self.shape[1] // len(values), 1)
        first, last = begin, end
        picked = None if self.order is None else self.order[begin:end]
        if picked is not None:
            first, last = int(picked.min()), int(picked.max()) + 1
        row_bytes = len(self._data) // self.shape[0]
        data = self._data[first * row_bytes : last * row_bytes]
        rows = dequantize(self.type, data, (last - first, self.shape[1]), torch.float32)
        if picked is not None:
            rows = rows[picked - first]
        return rows if self._factor is None else rows * self._file.read(self._factor).float()

    def forget(self) -> None:
        """Takes the bytes out of memory until they are needed again, where they are a mapped file's."""
        self._file.forget(self._data)

    @cached_property
    def _own_scales(self) -> Tensor:
        """Those of the type, float32 [G, N] in the file's order of rows."""
        try:
            return scales(self.type, self._data, self.shape)
        except ValueError as error:
            raise self._damaged(error) from None

    def _decode(self, begin: int, end: int) -> Tensor:
        try:
            return decode_rows(self.type, self._data, self.shape, begin, end)
        except ValueError as error:
            raise self._damaged(error) from None

    def _given_scales(self, given: object, most: int) -> Tensor:
        rows = self.shape[0]
        fits = isinstance(given, list) and len(given) in (1, rows, most)
        if not fits or not isinstance(given, list) or not all(type(value) is float for value in given):
            raise self._file.error(
                self.weight, f"1, {rows} or {most} numbers in its key {WEIGHT_SCALE_PREFIX}...", "others"
            )
        values = torch.tensor(given, dtype=torch.float32)
        return values.expand(1, rows) if len(given) == 1 else values.view(-1, rows)

    def _damaged(self, error: ValueError) -> CheckpointError:
        """The error of a decoder, which says "expected ..., got ...", with file and tensor."""
        expected, _, given = f"{error}".removeprefix("expected ").partition(", got ")
        return self._file.error(self.weight, expected, given)
