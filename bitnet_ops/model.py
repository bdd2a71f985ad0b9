"""BitNet b1.58 2B4T, readable in one sitting.

A Llama-style decoder (arXiv:2504.12285) with three differences: every projection is ternary, the
feed-forward block uses the squared ReLU, and a norm ("subln") stands before each output projection.
Modules and parameters are named as in the published checkpoint, so files map one to one.

In training mode every step is plain PyTorch (autocast, any device); in eval mode norms, projections and
head are the operators of `bitnet_ops.ops`.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, reference
from .config import BitNetConfig
from .generate import GenerationMixin
from .kv_cache import KVCache
from .linear import BitLinear

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LinearFactory = Callable[..., nn.Module]
"""Makes a projection from (in_features, out_features, bias=False), for the architecture has no biases:
BitLinear, BitLinearQAT, or nn.Linear to compare."""


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rms_norm = reference.rms_norm if self.training else ops.rms_norm
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and fewer key-value heads than query heads."""

    def __init__(self, config: BitNetConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = linear(config.hidden_size, config.hidden_size, bias=False)
        self.attn_sub_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # Not an `and` of the two: under torch.compile that may be a symbol, which attention does not take.
        causal = True if mask is None and q.shape[2] > 1 else False  # noqa: SIM210
        y = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        return self.o_proj(self.attn_sub_norm(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Gated feed-forward block with the squared ReLU, ``relu(gate)^2 * up``."""

    def __init__(self, config: BitNetConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, bias=False)
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gate_proj(x)).square() * self.up_proj(x)
        return self.down_proj(self.ffn_sub_norm(y))


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: BitNetConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, linear)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, linear)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotation, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: BitNetConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, linear) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        positions, mask = positions_and_mask(input_ids, attention_mask, cache)
        rotation = rotary_embedding(positions, self.config.head_dim, self.config.rope_theta)
        x = self.dropout(self.embed_tokens(input_ids).float())
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)


class BitNet(GenerationMixin, nn.Module):
    """A ternary language model in the architecture of BitNet b1.58 2B4T.

    Calling it gives scores; `generate`, `stream` and `encode` come from `bitnet_ops.generate`.

    Args:
        config: the sizes.
        linear: makes the projections. `BitLinear` (packed, inference) by default, `BitLinearQAT` to train.

    Attributes:
        tokenizer: from text to ids and back, or None. This and the next two come from the checkpoint's
            folder; the forward pass does not look at them.
        chat_template: Jinja text that turns a conversation into a prompt, or None.
        generation_config: the checkpoint's defaults for `generate`, as generation_config.json has them, or
            None.

    Example:
        >>> model = BitNet(BitNetConfig(vocab_size=256, hidden_size=64, ...), BitLinearQAT)
        >>> logits = model(torch.randint(256, (1, 10)))     # [1, 10, 256]
    """

    def __init__(self, config: BitNetConfig, linear: LinearFactory = BitLinear) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.chat_template: str | None = None
        self.generation_config: dict[str, Any] | None = None
        self.model = Decoder(config, linear)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, hidden_size], the embedding matrix where the model ties them."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Scores every next token.

        Args:
            input_ids: int64 [B, T]. With a cache, the tokens that follow the ones it holds.
            attention_mask: [B, T], 1 for a token and 0 for padding; None when nothing is padded.
            cache: filled and moved on in place.
            logits_to_keep: compute the scores of only so many last positions; 0 means all.

        Returns:
            float32 [B, T or logits_to_keep, vocab_size].
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected shape [batch, tokens], got {list(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}"
            )
        if cache is not None and cache.length + input_ids.shape[1] > cache.capacity:
            raise ValueError(
                f"cache: expected room for {input_ids.shape[1]} more tokens, "
                f"got {cache.capacity - cache.length} of {cache.capacity} places left"
            )
        hidden = self.model(input_ids, attention_mask, cache)[:, -logits_to_keep:]
        if self.training:
            return F.linear(hidden, self.head_weight).float()
        return ops.lm_head(hidden, self.head_weight)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a packed model to a folder; see `bitnet_ops.checkpoint.save_pretrained`."""
        from .checkpoint import save_pretrained  # here, because checkpoints know models

        save_pretrained(self, folder)


def positions_and_mask(
    input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None
) -> tuple[Tensor, Tensor | None]:
    """Where the new tokens stand, and which keys each may look at.

    Returns:
        ``(positions, mask)``: int64 [B or 1, T], padding not counted; and bool [B or 1, 1, T, S] over the
        S keys stored so far, or None where plain causal attention (T > 1 and nothing cached) or full
        attention (T = 1) is meant.
    """
    new = input_ids.shape[1]
    start = 0 if cache is None else cache.length
    end = start + new
    device = input_ids.device
    visible = None
    if attention_mask is not None or (cache is not None and cache.padded):
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        visible = visible.bool()
        if cache is not None:
            cache.padded = True
            cache.visible[:, start:end] = visible
            visible = cache.visible[:, :end]
        positions = (visible.cumsum(1) - 1).clamp(min=0)[:, start:]
    else:
        positions = torch.arange(start, end, device=device).unsqueeze(0)
        if new == 1 or start == 0:
            return positions, None
    query = torch.arange(start, end, device=device).unsqueeze(1)
    key = torch.arange(end, device=device).unsqueeze(0)
    mask = (key <= query).unsqueeze(0)
    if visible is not None:
        # A padding token sees itself, so that no row of the softmax is empty and turns into NaN.
        mask = mask & visible.unsqueeze(1) | (key == query)
    return positions, mask.unsqueeze(1)


def rotary_embedding(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (arXiv:2104.09864), float32 [B, 1, T, head_dim].

    Position p turns the pair (i, i + head_dim / 2) by the angle ``p * theta^(-2i / head_dim)``.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / theta**exponent)
    # Libraries and torch.compile disagree about the last bit of a sine; rounded from float64 it is the same.
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1).double()
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns heads [B, heads, T, head_dim] by their positions (rotate-half convention)."""
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
