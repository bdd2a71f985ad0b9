"""A ternary language model, readable in one sitting: a decoder, and the head that makes scores.

The decoder is Llama's with optional parts; `DecoderConfig` says which ones a model has. BitNet b1.58 2B4T
(arXiv:2504.12285) has the squared ReLU and a norm ("subln") in front of each output projection. Modules and
parameters are named as in the published checkpoints, so files map one to one.

In training mode every step is plain PyTorch (autocast, any device); in eval mode norms, projections,
attention and head are the operators of `bitnet_ops.ops`, and `bitnet_ops.decoder.plan` runs all layers in one
of them where nobody looks in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ..layers.embedding import Embedding, TernaryEmbedding
from ..layers.linear import BitLinear, NormedLinear
from ..layers.norm import RMSNorm
from .cache import Context, KVCache, rotation_tables
from .config import DecoderConfig
from .head import LEAST_BYTES, ScreenedHead, copy_lock
from .plan import Known, Plan, collect, number_decoder, opaque_decoder, run, runs_in_operators
from .pooling import EmbeddingSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer


LinearFactory = Callable[..., nn.Module]
"""Makes a projection from (in_features, out_features, bias=...): BitLinear, BitLinearQAT, or nn.Linear to
compare."""


def projection(
    config: DecoderConfig, linear: LinearFactory, in_features: int, out_features: int, bias: bool
) -> nn.Module:
    """One projection, with a norm of its own where the model has these."""
    options = ternary_options(config) if linear is BitLinear else {}
    made = linear(in_features, out_features, bias=bias, **options)
    if not config.projection_norms:
        return made
    return NormedLinear(RMSNorm(in_features, config.projection_norm_eps), made)


def ternary_options(config: DecoderConfig) -> dict[str, Any]:
    """What the configuration says about all ternary matrices."""
    return {"activation_bits": config.activation_bits, "group_size": config.group_size}


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, mostly, fewer key-value heads than query heads."""

    def __init__(self, config: DecoderConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()
        local = layer in config.local_layers
        self.head_dim = config.head_dim
        self.window = config.window if local else 0
        self.rotation = int(local and config.local_rope_theta is not None)
        self.query_scale = config.query_scale
        hidden, q_size, kv_size = config.hidden_size, config.q_size, config.kv_size
        self.q_proj = projection(config, linear, hidden, q_size, config.attention_bias)
        self.k_proj = projection(config, linear, hidden, kv_size, config.attention_bias)
        self.v_proj = projection(config, linear, hidden, kv_size, config.attention_bias)
        self.o_proj = projection(config, linear, q_size, hidden, bool(config.attention_output_bias))
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.attn_sub_norm = RMSNorm(q_size, config.rms_norm_eps) if config.sub_norms else None

    def forward(self, x: Tensor, context: Context, slot: int) -> Tensor:
        """Maps [B, T, hidden_size] to the same; ``slot`` is the layer's place in the cache."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        y = context.attend(
            q, k, v, slot, self.rotation, self.training, scale=self.query_scale, window=self.window
        )
        if self.attn_sub_norm is not None:
            y = self.attn_sub_norm(y)
        out: Tensor = self.o_proj(y)
        return out


class FeedForward(nn.Module):
    """Gated feed-forward block, ``activation(gate) * up``."""

    def __init__(self, config: DecoderConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.activation = config.activation
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = projection(config, linear, hidden, inner, config.mlp_bias)
        self.up_proj = projection(config, linear, hidden, inner, config.mlp_bias)
        self.down_proj = projection(config, linear, inner, hidden, config.mlp_bias)
        self.ffn_sub_norm = RMSNorm(inner, config.rms_norm_eps) if config.sub_norms else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, hidden_size] to the same."""
        glu = reference.glu if self.training else ops.glu
        y = glu(self.gate_proj(x), self.up_proj(x), self.activation)
        if self.ffn_sub_norm is not None:
            y = self.ffn_sub_norm(y)
        out: Tensor = self.down_proj(y)
        return out


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int, linear: LinearFactory) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.residual_scale = config.residual_scale
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer, linear)
        self.post_attention_layernorm = norm()
        self.mlp = FeedForward(config, linear)
        # The names are Gemma's, where the norm behind the attention takes that of Llama's next one.
        self.pre_feedforward_layernorm = norm() if config.post_norms else None
        self.post_feedforward_layernorm = norm() if config.post_norms else None
        self.dropout = nn.Dropout(config.dropout)

    @property
    def post_attention_norm(self) -> nn.Module | None:
        """The norm behind the attention."""
        return None if self.pre_feedforward_layernorm is None else self.post_attention_layernorm

    @property
    def feed_forward_norm(self) -> nn.Module:
        """The norm in front of the feed-forward block."""
        return self.pre_feedforward_layernorm or self.post_attention_layernorm

    @property
    def post_feed_forward_norm(self) -> nn.Module | None:
        """The norm behind the feed-forward block."""
        return self.post_feedforward_layernorm

    def forward(self, x: Tensor, context: Context, slot: int) -> Tensor:
        """Maps the residual stream [B, T, hidden_size] to the same behind this layer."""
        y = self.self_attn(self.input_layernorm(x), context, slot)
        x = x + self.dropout(self._behind(self.post_attention_norm, y))
        y = self.mlp(self.feed_forward_norm(x))
        x = x + self.dropout(self._behind(self.post_feed_forward_norm, y))
        return x

    def _behind(self, norm: nn.Module | None, y: Tensor) -> Tensor:
        if norm is not None:
            y = norm(y)
        return y if self.residual_scale == 1.0 else y * self.residual_scale


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    _plan: Plan | None = None

    def __init__(self, config: DecoderConfig, linear: LinearFactory) -> None:
        super().__init__()
        self._number = number_decoder(self)
        self.config = config
        self.embed_tokens: nn.Module
        if config.ternary_embedding and linear is BitLinear:
            self.embed_tokens = TernaryEmbedding(
                config.hidden_size, config.vocab_size, **ternary_options(config)
            )
        else:
            # Filled by LanguageModel, whose business initial values are.
            table = torch.empty(config.vocab_size, config.hidden_size)
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, _weight=table)
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
            start = None if padding is None else -padding
            return self.step(input_ids, Context(*rotation_tables(self.config, positions), start))
        if padding is not None:
            cache.padding += padding
        hidden = self.step(input_ids, cache.context())
        cache.length += input_ids.shape[1]
        return hidden

    def step(self, input_ids: Tensor, context: Context) -> Tensor:
        """The forward pass as a function of tensors."""
        if self._is_opaque(input_ids):
            return opaque_decoder(input_ids, self._number, context)
        x = self.embed_tokens(input_ids).float()
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        x = self._run_layers(self.dropout(x), context)
        hidden: Tensor = self.norm(x)
        return hidden if self.config.logit_scale == 1.0 else hidden * self.config.logit_scale

    def _run_layers(self, x: Tensor, context: Context) -> Tensor:
        if self.training:
            for slot, layer in enumerate(self.layers):
                x = layer(x, context, slot)
            return x
        if torch.compiler.is_compiling():
            return run(collect(self.layers, KNOWN), self.layers, x, context)
        return self.plan().run(x, context)

    def plan(self) -> Plan:
        """How the layers run in eval mode, made anew when one of them has changed."""
        plan = self._plan
        if plan is None or not plan.is_current():
            plan = self._plan = Plan(self.layers, KNOWN)
        return plan

    def _is_opaque(self, input_ids: Tensor) -> bool:
        """Whether a program being compiled has the whole step as one operator.

        An exported program has not: it runs where this decoder is not. Nor has one with gradients.
        """
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or self.training:
            return False
        return input_ids.is_cpu and not torch.is_grad_enabled() and runs_in_operators(self._number)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another decoder, and so is what comes out of a pickle."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = number_decoder(self)


KNOWN: Known = {
    DecoderLayer: ("residual_scale",),
    Attention: ("head_dim", "window", "rotation", "query_scale"),
    FeedForward: ("activation",),
    RMSNorm: ("eps",),
    BitLinear: ("layout", "activation_bits", "group_size"),
    NormedLinear: (),
    nn.Dropout: (),
}
"""Modules that `bitnet_ops.decoder.plan` knows, with the attributes it hands over; a layer with another among
them runs as a module."""


class LanguageModel(nn.Module):
    """A decoder with a head: token ids to scores of the next token.

    Args:
        config: what it is made of.
        linear: makes the projections. `BitLinear` (packed, inference) by default, `BitLinearQAT` to train.

    Attributes:
        tokenizer: from text to ids and back, or None. This and the next three come from the checkpoint's
            folder; the forward pass does not look at them.
        chat_template: Jinja text that turns a conversation into a prompt, or None.
        generation_config: the checkpoint's defaults for `generate`, as generation_config.json has them, or
            None.
        embedding_settings: how the model makes a vector of a text, where it was trained for that, or None.
    """

    certified_head: bool | None = None
    """Whether texts are written with `screened_head`, which changes nothing but their speed and takes three
    eighths of the memory of a bfloat16 head once more. None leaves it to the size of the head
    (`bitnet_ops.decoder.head.LEAST_BYTES`)."""

    _screened_head: ScreenedHead | None = None

    def __init__(self, config: DecoderConfig, linear: LinearFactory = BitLinear) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.chat_template: str | None = None
        self.generation_config: dict[str, Any] | None = None
        self.embedding_settings: EmbeddingSettings | None = None
        self.model = Decoder(config, linear)
        if not config.tie_word_embeddings:
            self.lm_head: nn.Module
            if config.ternary_head and linear is BitLinear:
                self.lm_head = BitLinear(config.hidden_size, config.vocab_size, **ternary_options(config))
            else:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            # On the meta device there is nothing to fill, and trying to imports half of torch for seconds.
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=config.initializer_range)

    @property
    def head(self) -> nn.Module:
        """What has the weights of the head: the embedding where the model ties them."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def head_weight(self) -> Tensor | None:
        """[vocab_size, hidden_size], float; None where the head is ternary."""
        weight: Tensor | None = getattr(self.head, "weight", None)
        return weight

    def score(self, hidden: Tensor) -> Tensor:
        """The head: scores of every token of the vocabulary.

        A dense head multiplies its stored numbers with float32 activations (`ops.lm_head`). A ternary one is
        a `BitLinear`, whose activations have ``config.activation_bits`` as those of the projections.

        Args:
            hidden: float32 [..., hidden_size], from `hidden_states`.

        Returns:
            float32 [..., vocab_size].
        """
        head, weight = self.head, self.head_weight
        if weight is None:
            scores: Tensor = head.product(hidden) if isinstance(head, TernaryEmbedding) else head(hidden)
            return scores
        # What is trained is float32; a published table in bfloat16 is frozen, below adapters for instance.
        if self.training and weight.dtype == hidden.dtype:
            return F.linear(hidden, weight).float()
        return ops.lm_head(hidden, weight)

    def screened_head(
        self,
        copy: tuple[Tensor, Tensor] | None = None,
        done: Callable[[Tensor], None] = lambda rows: None,
    ) -> ScreenedHead | None:
        """The head as `generate` uses it, made at the first call and anew when the weights have changed.

        Args:
            copy: the copy's tensors, from a loader that has them stored; see `ScreenedHead`.
            done: called with rows of the table that have been read.

        Returns:
            None where it does not apply: `certified_head` says so, the head is ternary (it takes fewer bits
            than a copy would), in training mode, or on another device.
        """
        weight = self.head_weight
        if weight is None:
            return None
        wanted = self.certified_head
        if wanted is None:
            wanted = weight.nbytes >= LEAST_BYTES
        if not wanted or self.training or weight.device.type != "cpu":
            return None
        with copy_lock:
            head = self._screened_head
            if head is None or not head.is_current(weight):
                head = self._screened_head = ScreenedHead(weight, copy, done)
            return head

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
        return self.score(hidden)

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


def check_left_padding(attention_mask: Tensor, cache: KVCache | None) -> None:
    """Raises ValueError where padding comes after a token, in the mask or in the cache."""
    real = attention_mask != 0
    begun = real.cummax(1).values if real.shape[1] else real
    if cache is not None:
        begun = begun | (cache.padding < cache.length).unsqueeze(1)
    if bool((begun & ~real).any()):
        raise ValueError("attention_mask: expected padding on the left only, got padding behind a token")
