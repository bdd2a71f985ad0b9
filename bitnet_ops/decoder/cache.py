"""The keys and values of the tokens seen so far."""

import torch
from torch import Tensor

from .. import ops, reference
from .config import BitNetConfig

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class CacheTensors:
    """What a cache is made of, without a count of tokens: `KVCache` says what each tensor is."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None,
        value_scales: Tensor | None,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        self.keys = keys
        self.values = values
        self.key_scales = key_scales
        self.value_scales = value_scales
        self.cos = cos
        self.sin = sin

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        """Stores one layer's new keys and values and attends to all so far: `ops.cached_attention`.

        Args:
            layer: its number.
            q: as for `ops.cached_attention`, like the following.
            k: likewise.
            v: likewise.
            start: likewise.

        Returns:
            float32 [B, T, heads * head_dim].
        """
        return ops.cached_attention(
            q, k, v, self.cos, self.sin, start, *(tensor[layer] for tensor in self._stored())
        )

    def arguments(
        self, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The arguments of `ops.decoder_layers` that do not come from the layers.

        Args:
            start: as for `ops.cached_attention`.
        """
        return (
            self.cos, self.sin, start, self.keys, self.values, self.key_scales, self.value_scales,
        )  # fmt: skip

    def _stored(self) -> list[Tensor]:
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return [tensor for tensor in tensors if tensor is not None]


class KVCache(CacheTensors):
    """Keys and values per layer, which the model fills and reads in place.

    ``model(input_ids, cache=cache)`` adds the new tokens to the ``length`` tokens already there. Where they
    do not fit, the cache grows to twice its size or more. To take back the last tokens, set ``length``.

    Rows of a batch are padded on the left, but padding has no place in the cache: token t of a row with p
    padding tokens is stored at position t - p.

    Attributes:
        keys: in ``dtype``, rotated, [layers, batch, kv_heads, capacity / 64, head_dim, 64]; with int8
            [layers, batch, kv_heads, capacity / 256, 256 * width], width being head_dim rounded up to 16.
        values: in ``dtype``, [layers, batch, kv_heads, capacity, width]; with int8 as keys.
        key_scales: None, or with int8 float32 [layers, batch, kv_heads, capacity].
        value_scales: likewise.
        length: tokens seen so far, padding included, the same for every row.
        padding: int64 [batch], how many of them are padding.
        cos, sin: float32 [capacity, head_dim / 2], the rotations of all positions.
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
    def capacity(self) -> int:
        """Number of tokens a row can hold before the cache grows."""
        return self.cos.shape[0]

    def reserve(self, tokens: int) -> None:
        """Makes room for tokens to come; what the cache holds stays.

        Args:
            tokens: how many a row is to hold in all, those already there included.
        """
        if tokens > self.capacity:
            old = self._stored()
            self._allocate(max(tokens, 2 * self.capacity))
            for new, kept in zip(self._stored(), old, strict=True):
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
        positions = torch.arange(parts * part, device=device)
        super().__init__(
            allocate(*key_shape, dtype=self.dtype),
            allocate(*value_shape, dtype=self.dtype),
            allocate(parts * part, dtype=torch.float32) if int8 else None,
            allocate(parts * part, dtype=torch.float32) if int8 else None,
            *reference.rotary_embedding(positions, config.head_dim, config.rope_theta),
        )
