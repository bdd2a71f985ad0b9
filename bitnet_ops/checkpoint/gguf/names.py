"""What GGUF calls a model's tensors, in tables that are read in both directions.

A tensor is called after its module, with ".weight" or ".bias"::

    ours                                        GGUF's
    model.embed_tokens                          token_embd
    model.layers.3.self_attn.q_proj             blk.3.attn_q
    model.layers.3.self_attn.q_proj.linear      blk.3.attn_q              a projection with a norm inside,
    model.layers.3.self_attn.q_proj.norm        blk.3.attn_q_norm_in      and that norm
"""

import re

OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""Modules that are no part of a layer."""

PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""The projections of a layer."""

NORMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
"""The norms of a layer, but those around its feed-forward block."""

FEED_FORWARD_NORMS = {"post_attention_layernorm": "ffn_norm"}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Those, in models without and with `DecoderConfig.post_norms`."""

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary embedding's frequencies; no module has them."""


def layer_names(post_norms: bool) -> dict[str, str]:
    """The modules of a layer, from our names to GGUF's."""
    return PROJECTIONS | NORMS | (POST_NORMS if post_norms else FEED_FORWARD_NORMS)


def gguf_name(module: str, post_norms: bool) -> str:
    """GGUF's name of a module.

    Args:
        module: as the model calls it.
        post_norms: whether the model has norms behind its blocks.

    Returns:
        The name without ".weight"; that of a module that GGUF does not know unchanged.

    Example:
        >>> gguf_name("model.layers.3.mlp.up_proj", False)
        'blk.3.ffn_up'
    """
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match is None:
        return OUTSIDE.get(module, module)
    layer, inner = match.groups()
    outer, _, part = inner.rpartition(".")
    if outer in PROJECTIONS:
        return f"blk.{layer}.{PROJECTIONS[outer]}{'_norm_in' if part == 'norm' else ''}"
    names = layer_names(post_norms)
    return f"blk.{layer}.{names[inner]}" if inner in names else module


def attention_part(stored: str) -> str | None:
    """Which of "q" and "k" a tensor or module of GGUF's name is, or None.

    Example:
        >>> attention_part("blk.3.attn_k.bias")
        'k'
    """
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])(\.weight|\.bias)?", stored)
    return None if match is None else match[1]
