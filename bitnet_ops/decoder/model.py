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

from .. import ops, reference
from ..generation.mixin import GenerationMixin
from ..layers.linear import BitLinear
from ..layers.norm import RMSNorm
from .cache import CacheTensors, KVCache
from .config import BitNetConfig
from .fused import norm_linear_add, norm_linears, norm_squared_relu_glu
from .opaque import has_fused_layers, number_decoder, opaque_decoder
from .plan import FusedLayers, LayerArguments, layer_arguments

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LinearFactory = Callable[..., nn.Module]
"""Makes a projection from (in_features, out_features, bias=False), for the architecture has no biases:
BitLinear, BitLinearQAT, or nn.Linear to compare."""


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
        self,
        x: Tensor,
        norm: RMSNorm,
        dropout: nn.Dropout,
        rotation: tuple[Tensor, Tensor],
        start: Tensor | None,
        cache: CacheTensors | None,
    ) -> Tensor:
        """``x + dropout(attention(norm(x)))``."""
        q, k, v = norm_linears(norm, (self.q_proj, self.k_proj, self.v_proj), x)
        if cache is not None and start is not None:
            y = cache.attend(self.layer, q, k, v, start)
        elif self.training:
            y = reference.attention(q, k, v, *rotation, start)
        else:
            y = ops.attention(q, k, v, *rotation, start)
        return norm_linear_add(self.attn_sub_norm, self.o_proj, y, x, dropout)


class FeedForward(nn.Module):
    """Gated feed-forward block with the squared ReLU, ``relu(gate)^2 * up``."""

    def __init__(self, config: BitNetConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, bias=False)
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps)

    def forward(self, x: Tensor, norm: RMSNorm, dropout: nn.Dropout) -> Tensor:
        """``x + dropout(feed_forward(norm(x)))``."""
        y = norm_squared_relu_glu(norm, self.gate_proj, self.up_proj, x)
        return norm_linear_add(self.ffn_sub_norm, self.down_proj, y, x, dropout)


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
        self, x: Tensor, rotation: tuple[Tensor, Tensor], start: Tensor | None, cache: CacheTensors | None
    ) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, self.dropout, rotation, start, cache)
        y: Tensor = self.mlp(x, self.post_attention_layernorm, self.dropout)
        return y


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    _fused_layers: FusedLayers | None = None

    def __init__(self, config: BitNetConfig, linear: LinearFactory) -> None:
        super().__init__()
        self._number = number_decoder(self)
        self.config = config
        # Filled by BitNet, whose business initial values are.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, linear) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        # Positions count a row's own tokens: where padding comes first, they start below 0.
        padding = None if attention_mask is None else (attention_mask == 0).sum(1)
        if cache is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            rotation = reference.rotary_embedding(positions, self.config.head_dim, self.config.rope_theta)
            return self._run(input_ids, rotation, None if padding is None else -padding, None)
        if padding is not None:
            cache.padding += padding
        hidden = self.step(input_ids, cache.length - cache.padding, cache)
        cache.length += input_ids.shape[1]
        return hidden

    def step(self, input_ids: Tensor, start: Tensor, cache: CacheTensors) -> Tensor:
        """The forward pass over a cache as a function of tensors; ``start`` as in `ops.cached_attention`."""
        if self._is_opaque(input_ids):
            return opaque_decoder(input_ids, self._number, start, cache)
        return self._run(input_ids, (cache.cos, cache.sin), start, cache)

    def _run(
        self,
        input_ids: Tensor,
        rotation: tuple[Tensor, Tensor],
        start: Tensor | None,
        cache: CacheTensors | None,
    ) -> Tensor:
        x = self.dropout(self.embed_tokens(input_ids).float())
        fused = None if cache is None else self.fused_layers()
        if cache is not None and start is not None and fused is not None and fused.apply_to(x):
            x = fused.run(x, cache, start)
        else:
            for layer in self.layers:
                x = layer(x, rotation, start, cache)
        hidden: Tensor = self.norm(x)
        return hidden

    def fused_layers(self) -> LayerArguments | FusedLayers | None:
        """All layers as one operator, collected anew when one of them has changed; None where it is none."""
        if torch.compiler.is_compiling():
            return layer_arguments(self.layers, FUSIBLE)
        if self._fused_layers is None or not self._fused_layers.is_current():
            self._fused_layers = FusedLayers(self.layers, FUSIBLE)
        return None if self._fused_layers.arguments is None else self._fused_layers

    def _is_opaque(self, input_ids: Tensor) -> bool:
        """Whether a program being compiled has the whole step as one operator.

        An exported program has not: it runs where this decoder is not. Nor has one with gradients.
        """
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False
        return input_ids.is_cpu and not torch.is_grad_enabled() and has_fused_layers(self._number)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another decoder, and so is what comes out of a pickle."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = number_decoder(self)


FUSIBLE = (nn.ModuleList, DecoderLayer, Attention, FeedForward, RMSNorm, BitLinear, nn.Dropout)
"""Modules that `FusedLayers` knows; with another among them the layers run one by one."""


class BitNet(GenerationMixin, nn.Module):
    """A ternary language model in the architecture of BitNet b1.58 2B4T.

    Calling it gives scores; `generate`, `stream` and `encode` come from `bitnet_ops.generation.mixin`.

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
            # On the meta device there is nothing to fill, and trying to imports half of torch for seconds.
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
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
            attention_mask: [B, T], 1 for a token and 0 for padding, which stands on the left; None when
                nothing is padded. Scores of padding mean nothing.
            cache: filled and moved on in place.
            logits_to_keep: compute the scores of only so many last positions; 0 means all.

        Returns:
            float32 [B, T or logits_to_keep, vocab_size].

        Raises:
            ValueError: shapes that do not fit, or padding behind a token.
        """
        hidden = self.hidden_states(input_ids, attention_mask, cache)[:, -logits_to_keep:]
        # What is trained is float32; a published table in bfloat16 is frozen, below adapters for instance.
        if self.training and self.head_weight.dtype == hidden.dtype:
            return F.linear(hidden, self.head_weight).float()
        return ops.lm_head(hidden, self.head_weight)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the head turns into scores.

        Args:
            input_ids: as for the model itself.
            attention_mask: likewise.
            cache: likewise.

        Returns:
            float32 [B, T, hidden_size].

        Raises:
            ValueError: as for the model itself.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected shape [batch, tokens], got {list(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}"
            )
        if cache is not None:
            cache.reserve(cache.length + input_ids.shape[1])
        if attention_mask is not None and not torch.compiler.is_compiling():
            check_left_padding(attention_mask, cache)
        hidden: Tensor = self.model(input_ids, attention_mask, cache)
        return hidden

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a packed model to a folder; see `bitnet_ops.checkpoint.save_pretrained`."""
        from ..checkpoint import save_pretrained  # here, because checkpoints know models

        save_pretrained(self, folder)


def check_left_padding(attention_mask: Tensor, cache: KVCache | None) -> None:
    """Raises ValueError where padding comes after a token, in the mask or in the cache."""
    real = attention_mask != 0
    begun = real.cummax(1).values if real.shape[1] else real
    if cache is not None:
        begun = begun | (cache.padding < cache.length).unsqueeze(1)
    if bool((begun & ~real).any()):
        raise ValueError("attention_mask: expected padding on the left only, got padding behind a token")
