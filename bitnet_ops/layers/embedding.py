"""Tables of token embeddings: one of floats, and one of packed ternary rows."""

import torch
from torch import Tensor, nn

from .. import ops
from ..packing import TILE_ROWS
from .matrix import TernaryMatrix


class Embedding(nn.Embedding):
    """An ``nn.Embedding`` that does not bring a mapped table into memory where only some rows are wanted."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps int64 [...] to [..., embedding_dim]."""
        weight = self.weight
        if (
            self.training
            or torch.compiler.is_compiling()  # PyTorch's own operator can be fused and exported
            or not weight.is_cpu
            or input.dtype != torch.int64
            or (torch.is_grad_enabled() and weight.requires_grad)
        ):
            return super().forward(input)
        return ops.embedding(input, weight)


class TernaryEmbedding(TernaryMatrix):
    """An embedding whose rows are ternary, and stay packed: a token's row is unpacked when it is looked up.

    ``row[k] = w[id, k] * scales[k div group_size, id]``, exactly. `product` makes scores with the same
    packed matrix. ``out_features`` is the size of the vocabulary, ``in_features`` that of a row; the layout
    is always "tile16".

    Example:
        >>> table = TernaryEmbedding.from_ternary(w, scale, group_size=128, activation_bits=16)
        >>> table(torch.tensor([[3, 5]])).shape     # float32 [1, 2, w.shape[1]]
        >>> table.product(hidden).shape             # scores [..., len(w)]
    """

    only_tile16 = True

    def forward(self, ids: Tensor) -> Tensor:
        """Looks rows up.

        Args:
            ids: int64 or int32 [...].

        Returns:
            float32 [..., in_features].

        Raises:
            IndexError: an id is negative, or not below ``out_features``.
        """
        flat = ids.reshape(-1)
        # index_select refuses ids that are out of range; there may be rows of padding behind the last. Scales
        # in the order of tiles cannot be selected that way: there it selects zeros, which change nothing.
        if self.group_size:
            flat = flat + flat.new_zeros(1).expand(self.out_features).index_select(0, flat)
            scale = self.weight_scale[flat // TILE_ROWS, :, flat % TILE_ROWS].float()  # [ids, group]
        else:
            scale = self.weight_scale.index_select(0, flat).float()
        tiles = self.packed_weight.unflatten(2, (TILE_ROWS, 4))  # [tile, block, row, j], packing.py
        codes = tiles[flat // TILE_ROWS, :, flat % TILE_ROWS]  # [ids, block, j]
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device).view(4, 1)
        w = ((codes.unsqueeze(-2) >> shifts) & 3).flatten(1).float() - 1  # step p, then j: inputs in order
        if self.group_size:
            of_inputs = scale.unsqueeze(-1).expand(-1, -1, self.group_size).flatten(1)
        else:
            of_inputs = scale.unsqueeze(-1).expand(-1, self.in_features)
        rows: Tensor = w[:, : self.in_features] * of_inputs[:, : self.in_features]
        return rows.reshape(*ids.shape, self.in_features)
