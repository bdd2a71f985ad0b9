"""A `KVCache` of ours inside transformers' ``DynamicCache``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..decoder.cache import KVCache
from ..decoder.config import DecoderConfig


class SharedCache:
    """The keys and values of all layers.

    Attributes:
        kv: a float32 `KVCache`.
    """

    def __init__(self, config: DecoderConfig, batch_size: int, tokens: int) -> None:
        """Makes an empty one with room for some tokens."""
        self.kv = KVCache(config, batch_size, max(tokens, 64))

    def layer(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as transformers has them: [B, heads, tokens, head_dim], padding too."""
        kv, length, head_dim = self.kv, self.kv.length, self.kv.config.head_dim
        keys = kv.keys[slot].transpose(-1, -2).flatten(2, 3)[:, :, :length]
        values = kv.values[slot][:, :, :length, :head_dim]
        if not bool(kv.padding.any()):
            return keys.clone(), values.clone()
        # Ours has no place for padding: row by row it is put in front again.
        shifted = [torch.zeros_like(keys), torch.zeros_like(values)]
        for row, padding in enumerate(kv.padding.tolist()):
            for new, old in zip(shifted, (keys, values), strict=True):
                new[row, :, padding:] = old[row, :, : length - padding]
        return shifted[0], shifted[1]

    def select(self, rows: Tensor) -> None:
        """Keeps some rows of the batch, in this order; a row may be there several times."""
        kv = self.kv
        kv.tensors = type(kv.tensors)(
            kv.keys.index_select(1, rows), kv.values.index_select(1, rows), None, None
        )
        kv.padding = kv.padding[rows]
        kv.batch_size = len(rows)


class SharedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a `SharedCache`, as transformers sees it.

    All layers change together, so what changes the cache is done where transformers asks the first one. A
    layer that transformers' own attention adds to becomes an ordinary one.
    """

    def __init__(self, shared: SharedCache, slot: int) -> None:
        self._own: dict[str, Tensor | None] = {"keys": None, "values": None}
        self.shared: SharedCache | None = None
        super().__init__()
        self.shared, self.slot = shared, slot
        self.is_initialized = True
        self.device = shared.kv.keys.device

    @property
    def keys(self) -> Tensor | None:
        """[B, heads, tokens, head_dim]."""
        return self._own["keys"] if self.shared is None else self.shared.layer(self.slot)[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._own["keys"] = value

    @property
    def values(self) -> Tensor | None:
        """[B, heads, tokens, head_dim]."""
        return self._own["values"] if self.shared is None else self.shared.layer(self.slot)[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._own["values"] = value

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Is called by transformers' own attention: from here on the layer keeps its tensors itself."""
        if self.shared is not None:
            keys, values = self.shared.layer(self.slot)
            self.shared = None
            self.keys, self.values = keys.to(key_states.dtype), values.to(value_states.dtype)
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, *arguments, **options)
        return result

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return int(super().get_seq_length()) if self.shared is None else self.shared.kv.length

    def reset(self) -> None:
        """Forgets all tokens."""
        self.shared = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens: -n of them; a positive number is what is to stay."""
        if self.shared is None:
            super().crop(tokens_to_remove)
        elif self.slot == 0:
            kv = self.shared.kv
            kv.length = min(kv.length, max(tokens_to_remove, 0) or max(kv.length + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of a beam search."""
        if self.shared is None:
            super().reorder_cache(beam_idx)
        elif self.slot == 0:
            self.shared.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        if self.shared is None:
            super().batch_repeat_interleave(repeats)
        elif self.slot == 0:
            self.shared.select(torch.arange(self.shared.kv.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        if self.shared is None:
            super().batch_select_indices(indices)
        elif self.slot == 0:
            self.shared.select(torch.arange(self.shared.kv.batch_size)[indices])


def shared_cache(cache: Any, config: DecoderConfig, batch_size: int, tokens: int) -> SharedCache | None:
    """The cache of ours in one of transformers', which is put there where that is empty.

    Args:
        cache: what transformers hands on.
        config: of the decoder.
        batch_size: rows of the batch.
        tokens: that are to be added.

    Returns:
        None where it is of another kind, or filled by transformers' own attention.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    layers, number = cache.layers, config.num_hidden_layers
    if layers and all(type(layer) is SharedLayer for layer in layers):
        shared = layers[0].shared
        usable = shared is not None and len(layers) == number and shared.kv.batch_size == batch_size
        same = usable and all(layer.shared is shared for layer in layers)
        return shared if same and shared.kv.config is config else None
    if len(layers) not in (0, number) or any(
        type(layer) is not DynamicLayer or layer.get_seq_length() for layer in layers
    ):
        return None
    shared = SharedCache(config, batch_size, tokens)
    cache.layers = [SharedLayer(shared, slot) for slot in range(number)]
    return shared
