"""The same random Gemma 3 in bitnet_ops and in transformers, ternary or dense, and the model in float64."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from their_models import TheirBitLinear
from torch import Tensor, nn
from transformers import BitNetQuantConfig, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.integrations.bitnet import (
    AutoBitLinear,
    WeightQuant,
    pack_weights,
    replace_with_bitnet_linear,
    unpack_weights,
)

from bitnet_ops import BitNet, from_pretrained

GEMMA_FORMATS = ("bitlinear", "autobitlinear", "online", "dense")
"""Packed in either class, masters, and a model that is not ternary."""


@dataclass
class GemmaPair:
    """The same checkpoint in both implementations, float32, and its folder."""

    folder: Path
    ours: BitNet
    theirs: Gemma3ForCausalLM


def make_gemma(folder: Path, form: str, seed: int = 0, *, norms: bool = False, **fields: Any) -> GemmaPair:
    """Fills transformers' own model with random numbers, writes it down and loads it with `from_pretrained`.

    Args:
        folder: of the checkpoint.
        form: one of `GEMMA_FORMATS`.
        seed: of the weights.
        norms: "use_rms_norm".
        **fields: of Gemma3TextConfig.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    defaults = {"vocab_size": 97, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = Gemma3TextConfig(attn_implementation="eager", **(defaults | fields))
    theirs = Gemma3ForCausalLM(config)
    published = json.loads(config.to_json_string(use_diff=False))
    if form != "dense":
        quantization = BitNetQuantConfig(
            linear_class="bitlinear" if form == "bitlinear" else "autobitlinear",
            quantization_mode="online" if form == "online" else "offline",
            use_rms_norm=norms,
            rms_norm_eps=1e-4,  # neither their default nor that of the other norms
        )
        theirs = replace_with_bitnet_linear(theirs, ["lm_head"], quantization)
        published["quantization_config"] = quantization.to_dict()
    tensors: dict[str, Tensor] = {}
    for name, module in theirs.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, (AutoBitLinear, TheirBitLinear)):
            shape = (module.out_features, module.in_features)
            scale = normal(1).exp() * shape[1] ** -0.5
            if form == "online":
                tensors[weight] = normal(*shape) * scale
            else:
                tensors[weight] = pack_weights(
                    torch.randint(-1, 2, shape, generator=generator).to(torch.int8)
                )
                tensors[f"{name}.weight_scale"] = 1 / scale if form == "bitlinear" else scale
            if module.bias is not None:
                # "autobitlinear" multiplies it with the scale.
                size = 1 / scale if form == "autobitlinear" else 1.0
                tensors[f"{name}.bias"] = 0.3 * size * normal(shape[0])
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            if not (config.tie_word_embeddings and name == "lm_head"):
                size = module.weight.shape[1] ** -0.5 if "_proj" in name else 1.0
                tensors[weight] = size * normal(*module.weight.shape)
            if isinstance(module, nn.Linear) and module.bias is not None:
                tensors[f"{name}.bias"] = 0.3 * normal(*module.bias.shape)
        elif not list(module.children()) and hasattr(module, "weight"):
            # Gemma's own norms add 1 to the weight, those of the quantiser do not.
            tensors[weight] = ("rms_norm" in name) + 0.2 * normal(*module.weight.shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours = from_pretrained(folder, linear=nn.Linear) if form == "dense" else from_pretrained(folder)
    state = dict(tensors)
    if form == "autobitlinear":
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8:
                state[name] = unpack_weights(tensor, dtype=torch.float32)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, assign=True)
    theirs.eval().requires_grad_(False)
    return GemmaPair(folder, ours, theirs)


def exact_gemma(theirs: Gemma3ForCausalLM, ids: Tensor, last: int = 0) -> Tensor:
    """The model in float64, [B, T] to [B, T, V], written out from the formulas; the numbers are theirs.

    Args:
        theirs: the model.
        ids: int64 [B, T].
        last: for how many of the last tokens logits are wanted; 0 for all.
    """
    config = theirs.config

    def rms(x: Tensor, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def norm(x: Tensor, module: Any) -> Tensor:
        return rms(x, module.eps) * (1 + module.weight.double())

    def linear(x: Tensor, module: Any) -> Tensor:
        bias = 0.0 if module.bias is None else module.bias.double()
        if not isinstance(module, (AutoBitLinear, TheirBitLinear)):
            return x @ module.weight.double().T + bias
        if module.rms_norm is not None:
            x = rms(x, module.rms_norm.variance_epsilon) * module.rms_norm.weight.double()
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x = (x * s).round().clamp(-128, 127) / s
        if isinstance(module, TheirBitLinear):
            w = unpack_weights(module.weight, dtype=torch.float64)
            return x @ w.T / module.weight_scale.double() + bias
        if module.online_quant:
            w = WeightQuant.apply(module.weight).sign().double()
            return x @ w.T * module.weight.double().abs().mean() + bias
        return (x @ module.weight.double().T + bias) * module.weight_scale.double()

    half = config.head_dim // 2
    time = torch.arange(ids.shape[1], dtype=torch.float64)
    distance = time[:, None] - time[None]

    def turns(kind: str) -> Tensor:
        rope = config.rope_parameters[kind]
        frequency = rope["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = time[:, None] * frequency / rope.get("factor", 1.0)
        return torch.polar(torch.ones_like(angle), angle)[:, None]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_dim))

    def rotate(
        x: Tensor, turn: Tensor
    ) -> Tensor:  # [B, T, heads, d]; the pair (i, i + d/2) is a complex number
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    embedding = theirs.model.embed_tokens.weight
    x = embedding[ids].double() * config.hidden_size**0.5
    for kind, layer in zip(config.layer_types, theirs.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        turn = turns(kind)
        n = norm(x, layer.input_layernorm)
        q = rotate(norm(heads(linear(n, attention.q_proj)), attention.q_norm), turn)
        k = rotate(norm(heads(linear(n, attention.k_proj)), attention.k_norm), turn)
        v = heads(linear(n, attention.v_proj))
        group = torch.arange(q.shape[2]) * k.shape[2] // q.shape[2]
        k, v = k[:, :, group], v[:, :, group]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / config.query_pre_attn_scalar**0.5
        seen = distance >= 0
        if kind == "sliding_attention":
            seen = seen & (distance < config.sliding_window)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(-2)
        x = x + norm(linear(y, attention.o_proj), layer.post_attention_layernorm)
        m = norm(x, layer.pre_feedforward_layernorm)
        y = linear(gelu(linear(m, mlp.gate_proj)) * linear(m, mlp.up_proj), mlp.down_proj)
        x = x + norm(y, layer.post_feedforward_layernorm)
    head = embedding if config.tie_word_embeddings else theirs.lm_head.weight
    x = norm(x[:, -last:], theirs.model.norm)
    return torch.cat([x @ rows.double().T for rows in head.split(1 << 14)], -1)
