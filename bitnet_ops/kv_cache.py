"""The keys and values of the tokens seen so far."""

import torch
from torch import Tensor

from .config import BitNetConfig


class KVCache:
    """Keys and values per layer, in buffers of a fixed capacity that the model fills from the left.

    ``model(input_ids, cache=cache)`` writes the new tokens behind the ``length`` tokens already there.

    Attributes:
        keys, values: one tensor [batch, kv_heads, capacity, head_dim] per layer.
        length: tokens stored so far, the same for every row (shorter prompts are padded on the left).
        padded: whether any token stored so far may be padding.
        visible: bool [batch, capacity], False where a token is padding; written only where ``padded``.
    """

    def __init__(
        self,
        config: BitNetConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocates room for ``capacity`` tokens in each of ``batch_size`` rows."""
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.padded = False
        self.visible = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Largest number of tokens a row can hold."""
        return self.keys[0].shape[2]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values [batch, kv_heads, T, head_dim].

        Returns:
            Views of all keys and values so far, the new ones included. ``length`` moves only when the
            model has run through all layers.
        """
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
