"""The keys and values of the tokens seen so far, and the angles of their positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from .config import DecoderConfig

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class CacheTensors(NamedTuple):
    """What a cache is made of, without a count of tokens: `KVCache` says what each tensor is."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    def of_layer(self, slot: int) -> CacheTensors:
        """The tensors of one layer, as `ops.cached_attention` takes them."""
        scales = (None if scale is None else scale[slot] for scale in (self.key_scales, self.value_scales))
        return CacheTensors(self.keys[slot], self.values[slot], *scales)


class Context(NamedTuple):
    """What attention needs beside queries, keys and values: positions, and the tokens before these.

    Attributes:
        cos: float32 [tables, positions, head_dim / 2], from `rotation_tables`.
        sin: likewise.
        start: int64 [B], the position of each row's first token; see `ops.cached_attention` and, where there
            is no cache, `ops.attention`. None without padding and cache.
        cache: keys and values before these tokens, which theirs are added to; or None.
    """

    cos: Tensor
    sin: Tensor
    start: Tensor | None = None
    cache: CacheTensors | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, slot: int, rotation: int, training: bool, **options: Any
    ) -> Tensor:
        """Causal attention of a layer: `ops.attention` or `ops.cached_attention`.

        Args:
            q: as for these operators, like the next two.
            k: likewise.
            v: likewise.
            slot: the layer's place in the cache.
            rotation: number of its table of angles.
            training: whether gradients are wanted, so that plain PyTorch has to do it.
            **options: ``scale`` and ``window``, as for these operators.
        """
        cos, sin = self.cos[rotation], self.sin[rotation]
        if self.cache is not None and self.start is not None:
            return ops.cached_attention(q, k, v, cos, sin, self.start, *self.cache.of_layer(slot), **options)
        attention = reference.attention if training else ops.attention
        return attention(q, k, v, cos, sin, self.start, **options)

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `ops.decoder_layers` from ``cos`` on, but the slot."""
        return self.cos, self.sin, self.start, *(self.cache or (None, None, None, None))


def rotation_tables(config: DecoderConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a model's positions: one table, or a second one for local layers.

    Returns:
        Two of float32 [tables, *positions.shape, head_dim / 2].
    """
    tables = [reference.rotary_embedding(positions, config.head_dim, config.rope_theta, config.rope_scaling)]
    if config.local_rope_theta is not None:
        tables.append(reference.rotary_embedding(positions, config.head_dim, config.local_rope_theta))
    cos, sin = zip(*tables, strict=True)
    return torch.stack(cos), torch.stack(sin)


class KVCache:
    """Keys and values per layer, which the model fills and reads in place.

    ``model(input_ids, cache=cache)`` adds the new tokens to the ``length`` tokens already there. Where they
    do not fit, the cache grows to twice its size or more. To take back the last tokens, set ``length``.

    Rows of a batch are padded on the left, but padding has no place in the cache: token t of a row with p
    padding tokens is stored at position t - p.

    Attributes:
        tensors: a `CacheTensors`; its fields are attributes of the cache, too:
        keys: in ``dtype``, rotated, [layers, batch, kv_heads, capacity / 64, head_dim, 64]; with int8
            [layers, batch, kv_heads, capacity / 256, 256 * width], width being head_dim rounded up to 16.
        values: in ``dtype``, [layers, batch, kv_heads, capacity, width]; with int8 as keys.
        key_scales: None, or with int8 float32 [layers, batch, kv_heads, capacity].
        value_scales: likewise.
        length: tokens seen so far, padding included, the same for every row.
        padding: int64 [batch], how many of them are padding.
        cos, sin: float32 [tables, capacity, head_dim / 2], the rotations of all positions; see
            `rotation_tables`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocates room for ``capacity`` tokens in each of ``batch_size`` rows.

        Args:
            config: the model's.
            batch_size: number of rows.
            capacity: rounded up to a multiple of 64, with int8 of 256. The system hands out the memory as it
                is written to.
            dtype: float32; bfloat16, half the bytes; or int8 with a scale for each head of each token, a
                quarter. What is stored is rounded to it, so the dtype changes the scores.
            device: that of the model.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"KVCache: dtype: expected torch.float32, bfloat16 or int8, got {dtype}")
        self.config = config
        self.batch_size = batch_size
        self.dtype = dtype
        self.length = 0
        self.padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._allocate(capacity)

    @property
    def keys(self) -> Tensor:
        """The keys of all layers."""
        return self.tensors.keys

    @property
    def values(self) -> Tensor:
        """The values of all layers."""
        return self.tensors.values

    @property
    def key_scales(self) -> Tensor | None:
        """The scales of int8 keys."""
        return self.tensors.key_scales

    @property
    def value_scales(self) -> Tensor | None:
        """The scales of int8 values."""
        return self.tensors.value_scales

    @property
    def capacity(self) -> int:
        """Number of tokens a row can hold before the cache grows."""
        return self.cos.shape[1]

    def context(self) -> Context:
        """What the next tokens of every row see."""
        return Context(self.cos, self.sin, self.length - self.padding, self.tensors)

    def reserve(self, tokens: int) -> None:
        """Makes room for tokens to come; what the cache holds stays.

        Args:
            tokens: how many a row is to hold in all, those already there included.
        """
        if tokens > self.capacity:
            old = self.tensors
            self._allocate(max(tokens, 2 * self.capacity))
            for new, kept in zip(self.tensors, old, strict=True):
                if new is not None and kept is not None:
                    new[:, :, :, : kept.shape[3]] = kept

    def _allocate(self, capacity: int) -> None:
        config, device = self.config, self.padding.device
        int8 = self.dtype == torch.int8
        part = reference.KEYS_IN_SPAN if int8 else reference.KEYS_IN_BLOCK
        parts = -(-capacity // part)
        heads = (self.batch_size, config.num_key_value_heads)
        width = -(-config.head_dim // 16) * 16

        def allocate(*shape: int, dtype: torch.dtype) -> Tensor:
            # One allocation for all layers: the system hands such a large one out and takes it back by
            # itself. Among the activations of a prompt, caches of single layers leave gaps in the heap that
            # nothing fits into, 250 MB of them for 4096 tokens of 2B4T.
            return torch.empty(config.num_hidden_layers, *heads, *shape, dtype=dtype, device=device)

        key_shape: tuple[int, ...] = (parts, config.head_dim, part)
        value_shape: tuple[int, ...] = (parts * part, width)
        if int8:
            key_shape = value_shape = (parts, part * width)
        self.tensors = CacheTensors(
            allocate(*key_shape, dtype=self.dtype),
            allocate(*value_shape, dtype=self.dtype),
            allocate(parts * part, dtype=torch.float32) if int8 else None,
            allocate(parts * part, dtype=torch.float32) if int8 else None,
        )
        self.cos, self.sin = rotation_tables(config, torch.arange(parts * part, device=device))
