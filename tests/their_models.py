"""The same random checkpoint in bitnet_ops and in transformers, and how far their results may lie apart.

Notation: u = 2^-24 is the unit roundoff of float32.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_checkpoints import Sizes, Weights, published_tensors, write_folder
from torch import Tensor, nn
from transformers import BitNetConfig as TheirConfig
from transformers import (
    BitNetForCausalLM,
    BitNetQuantConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.bitnet import (
    VALUES_PER_ITEM,
    AutoBitLinear,
    WeightQuant,
    pack_weights,
    replace_with_bitnet_linear,
    unpack_weights,
)
from transformers.integrations.bitnet import (
    BitLinear as TheirBitLinear,
)

from bitnet_ops import DEFAULT_MODEL, BitLinear, BitNet, BitNetConfig, from_pretrained, reference
from bitnet_ops.layers.linear import NormedLinear

U = 2.0**-24

FORMATS = ("autobitlinear", "bitlinear", "online")


@dataclass
class Pair:
    """The same checkpoint in both implementations, float32, and what it was made from."""

    sizes: Sizes
    weights: Weights
    ours: BitNet
    theirs: nn.Module


def make_pair(folder: Path, sizes: Sizes, form: str, seed: int = 0) -> Pair:
    """Writes a random checkpoint, loads it with `from_pretrained`, and fills transformers' model from it.

    Their loader needs the accelerate package; the modules, the packing and the unpacking are theirs.
    """
    weights = Weights.random(sizes, seed)
    if form == "online":
        masters = {
            name: torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
            * weights.scale[name].float()
            for name, w in weights.ternary.items()
        }
        for name, master in masters.items():
            weights.ternary[name], scale = reference.quantize_weight(master)
            weights.scale[name] = scale.reshape(1)
        tensors = weights.floats | {f"{name}.weight": master for name, master in masters.items()}
    else:
        tensors = published_tensors(weights, reciprocal=form == "bitlinear")
        for name, w in weights.ternary.items():
            tensors[f"{name}.weight"] = pack_weights(w.clone())  # it changes its argument
    quantization = BitNetQuantConfig(
        linear_class="bitlinear" if form == "bitlinear" else "autobitlinear",
        quantization_mode="online" if form == "online" else "offline",
    )
    published = {
        "quant_method": "bitnet",
        "linear_class": quantization.linear_class,
        "quantization_mode": quantization.quantization_mode,
    }
    write_folder(folder, sizes.config(quantization_config=published), tensors)
    ours = from_pretrained(folder)
    theirs = their_modules(ours.config, quantization, attn_implementation="eager")
    state = {
        name: tensor if tensor.dtype == torch.uint8 else tensor.float() for name, tensor in tensors.items()
    }
    for name, module in theirs.named_modules():
        if isinstance(module, AutoBitLinear) and form == "autobitlinear":
            assert state[f"{name}.weight"].shape[0] * VALUES_PER_ITEM == module.out_features
            state[f"{name}.weight"] = unpack_weights(state[f"{name}.weight"], dtype=torch.float32)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, assign=True)
    theirs.eval().requires_grad_(False)
    return Pair(sizes, weights, ours, theirs)


def their_modules(config: BitNetConfig, quantization: BitNetQuantConfig, **options: Any) -> BitNetForCausalLM:
    """An unfilled transformers model of our sizes, with the ternary layers that ``quantization`` asks for."""
    theirs = BitNetForCausalLM(
        TheirConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            **options,
        )
    )
    return replace_with_bitnet_linear(theirs, ["lm_head"], quantization)


def assert_within(ours: Tensor, theirs: Tensor, bound: Tensor | float, what: str) -> None:
    """|ours - theirs| <= bound, element by element."""
    excess = (ours.double() - theirs.double()).abs() - bound
    assert (excess <= 0).all(), f"{what}: {excess.max():.3g} above the bound"


def linear_bound(x: Tensor, layer: BitLinear) -> Tensor:
    """How far two correct float32 BitLinears may lie apart on the same input, [..., N] float64.

    The int8 codes q are equal: both compute round(x * (127 / max |x|)) in the same order. The integer sum
    is exact here; there, the terms q / s * w * weight_scale carry the roundings of 127 / max (none: the same
    number), q / s, of 1 / mean and w / (1 / mean) (master weights), of the product with the scale, and those
    of a sum of K: at most K + 6 in all. Ours carry those of 1 / s, the product of the scales, its own
    reciprocal ("bitlinear") and the last product: at most 4. All are relative to sum |q w| * x_scale * scale.
    """
    q, x_scale = reference.quantize_activations(x)
    magnitude = q.double().abs() @ layer.unpack().double().abs().T
    return (
        (layer.in_features + 10)
        * U
        * magnitude
        * x_scale.double().unsqueeze(-1)
        * layer.weight_scale.double()
    )


def exact_logits(pair: Pair, ids: Tensor) -> Tensor:
    """The model in float64 (docs/architecture.md), [T] to [T, V]; it shares nothing with either side."""
    sizes, weights = pair.sizes, pair.weights
    floats = {name: tensor.double() for name, tensor in weights.floats.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * floats[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (
            (x * s).round().clamp(-128, 127)
            / s
            @ weights.ternary[name].double().T
            * weights.scale[name].double()
        )

    time = torch.arange(len(ids), dtype=torch.float64)
    half = sizes.head_dim // 2
    angle = time[:, None] / 10000.0 ** (torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(
        x: Tensor,
    ) -> Tensor:  # [T, heads, d]: the pair (i, i + d/2) is a complex number that is turned
        turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    x = floats["model.embed_tokens.weight"][ids]
    for layer in range(sizes.layers):
        at = f"model.layers.{layer}"
        n = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            linear(n, f"{at}.self_attn.{name}").unflatten(-1, (-1, sizes.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q), rotate(k)
        out = []
        for head in range(sizes.heads):
            group = head * sizes.kv_heads // sizes.heads
            scores = q[:, head] @ k[:, group].T / sizes.head_dim**0.5
            scores = scores.masked_fill(time[None] > time[:, None], -torch.inf)
            out.append(scores.softmax(-1) @ v[:, group])
        x = x + linear(norm(torch.cat(out, -1), f"{at}.self_attn.attn_sub_norm"), f"{at}.self_attn.o_proj")
        m = norm(x, f"{at}.post_attention_layernorm")
        y = F.relu(linear(m, f"{at}.mlp.gate_proj")).square() * linear(m, f"{at}.mlp.up_proj")
        x = x + linear(norm(y, f"{at}.mlp.ffn_sub_norm"), f"{at}.mlp.down_proj")
    return norm(x, "model.norm") @ floats["model.embed_tokens.weight"].T


def median_error(logits: Tensor, exact: Tensor) -> Tensor:
    """Of the sequences' mean errors the median: that of a sequence where no rounding flipped."""
    return (logits - exact).abs().mean((1, 2)).median()


def shipped_model() -> BitNetForCausalLM:
    """The model in the package, which is trained, in transformers' modules and float32."""
    ours = from_pretrained(DEFAULT_MODEL)
    quantization = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="offline")
    theirs = their_modules(ours.config, quantization)
    state = {"lm_head.weight": ours.head_weight.float()}
    for name, module in ours.named_modules():
        if isinstance(module, BitLinear):
            state[f"{name}.weight"] = module.unpack().float()
            state[f"{name}.weight_scale"] = module.weight_scale[:1]
        elif not list(module.children()) and list(module.parameters()):
            state[f"{name}.weight"] = module.weight.float()
    theirs.load_state_dict(state, assign=True)
    theirs.tie_weights()
    return theirs.eval().requires_grad_(False)


# Llama- and Qwen3-class models

LLAMA_FORMATS = ("bitlinear", "autobitlinear", "ternary", "online")
"""Packed in either class, "autobitlinear" unpacked as transformers saves it, and its masters."""


@dataclass
class LlamaPair:
    """The same Llama- or Qwen3-class checkpoint in both implementations, float32, and its folder."""

    folder: Path
    ours: BitNet
    theirs: Any


def make_llama(
    folder: Path,
    form: str,
    seed: int = 0,
    *,
    norms: bool = False,
    config_class: type = LlamaConfig,
    **fields: Any,
) -> LlamaPair:
    """Fills transformers' own model with random numbers, writes it down and loads it with `from_pretrained`.

    Args:
        folder: of the checkpoint.
        form: one of `LLAMA_FORMATS`.
        seed: of the weights.
        norms: "use_rms_norm".
        config_class: LlamaConfig or Qwen3Config.
        **fields: of the configuration.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    defaults = {"vocab_size": 97, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = config_class(attn_implementation="eager", **(defaults | fields))
    quantization = BitNetQuantConfig(
        linear_class="bitlinear" if form == "bitlinear" else "autobitlinear",
        quantization_mode="online" if form == "online" else "offline",
        use_rms_norm=norms,
        rms_norm_eps=1e-4,  # neither their default nor that of the other norms
    )
    theirs = replace_with_bitnet_linear(their_class(config)(config), ["lm_head"], quantization)
    tensors: dict[str, Tensor] = {}
    for name, module in theirs.named_modules():
        tensor = f"{name}.weight"
        if isinstance(module, (AutoBitLinear, TheirBitLinear)):
            shape = (module.out_features, module.in_features)
            scale = normal(1).exp() * shape[1] ** -0.5
            if form == "online":
                tensors[tensor] = normal(*shape) * scale
            else:
                w = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
                packed = pack_weights(w.clone())  # it changes its argument
                tensors[tensor] = w.float() if form == "ternary" else packed
                tensors[f"{name}.weight_scale"] = 1 / scale if form == "bitlinear" else scale
            if module.bias is not None:
                # "autobitlinear" multiplies it with the scale.
                size = 1.0 if form in ("bitlinear", "online") else 1 / scale
                tensors[f"{name}.bias"] = 0.3 * size * normal(shape[0])
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            if not (config.tie_word_embeddings and isinstance(module, nn.Linear)):
                tensors[tensor] = normal(*module.weight.shape)
        elif not list(module.children()) and hasattr(module, "weight"):
            tensors[tensor] = 1 + 0.2 * normal(*module.weight.shape)
    fields = json.loads(config.to_json_string(use_diff=False))
    ours = from_pretrained(
        write_folder(folder, fields | {"quantization_config": quantization.to_dict()}, tensors)
    )
    state = dict(tensors)
    if form == "autobitlinear":
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8:
                state[name] = unpack_weights(tensor, dtype=torch.float32)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, assign=True)
    theirs.eval().requires_grad_(False)
    return LlamaPair(folder, ours, theirs)


def their_class(config: Any) -> Any:
    """The class of transformers' models with such a configuration."""
    return Qwen3ForCausalLM if config.model_type == "qwen3" else LlamaForCausalLM


def make_ternary_floats(
    folder: Path,
    group: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    tables: bool = False,
    config_class: type = Qwen3Config,
    **fields: Any,
) -> LlamaPair:
    """A checkpoint as those of Ternary-Bonsai and TriLM: plain floats that are ternary times a scale.

    Args:
        folder: of the checkpoint.
        group: inputs that share a scale; 0 for whole rows.
        seed: of the weights.
        dtype: of the stored tensors.
        tables: whether embedding and head are ternary, too.
        config_class: LlamaConfig or Qwen3Config.
        **fields: of the configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    defaults = {"vocab_size": 97, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = config_class(attn_implementation="eager", **(defaults | fields))
    theirs = their_class(config)(config)
    tensors: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():  # a tied head is not among them
        if parameter.dim() == 1:
            offset, size = (0.0, 0.3) if name.endswith("bias") else (1.0, 0.2)
            tensors[name] = offset + size * torch.randn(parameter.shape, generator=generator)
        elif "_proj" in name or tables:
            tensors[name] = ternary_floats(*parameter.shape, group, generator)
        else:
            tensors[name] = torch.randn(parameter.shape, generator=generator)
        tensors[name] = tensors[name].to(dtype)
    ours = from_pretrained(write_folder(folder, json.loads(config.to_json_string(use_diff=False)), tensors))
    theirs.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    theirs.tie_weights()
    theirs.eval().requires_grad_(False)
    return LlamaPair(folder, ours, theirs)


def ternary_floats(n: int, k: int, group: int, generator: torch.Generator) -> Tensor:
    """Random numbers -s, 0 and s [n, k], with one s for each ``group`` inputs of a row; 0 for whole rows."""
    w = torch.randint(-1, 2, (n, k), generator=generator)
    size = group or k
    scales = (0.3 * torch.randn(n, -(-k // size), generator=generator)).exp() * k**-0.5
    return w * scales.repeat_interleave(size, dim=1)[:, :k]


def layer_and_norm(module: nn.Module) -> tuple[BitLinear, nn.Module | None]:
    """A projection of ours and the norm inside it."""
    if isinstance(module, NormedLinear):
        assert isinstance(module.linear, BitLinear)
        return module.linear, module.norm
    assert isinstance(module, BitLinear)
    return module, None


def biased_bound(x: Tensor, layer: BitLinear) -> Tensor:
    """`linear_bound` and what a bias adds: the product with a scale or the sum rounds, on each side."""
    bound = linear_bound(x, layer)
    if layer.bias is None:
        return bound
    return bound + 4 * U * (layer.bias.double().abs() + layer(x).double().abs() + bound)


def exact_llama(
    theirs: Any, ids: Tensor, largest_q: int | None = None, *, rounded_head: bool = False
) -> Tensor:
    """The model in float64, [B, T] to [B, T, V], written out from the formulas; the numbers are theirs.

    With ``largest_q`` the inputs of float projections are rounded to integers up to that, times a scale, and
    with ``rounded_head`` those of the head.
    """
    config = theirs.config

    def norm(x: Tensor, module: Any) -> Tensor:
        root = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return x / root * module.weight.double()

    def linear(x: Tensor, module: Any) -> Tensor:
        if type(module) is nn.Linear:
            if largest_q is not None:
                s = largest_q / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
                x = (x * s).round() / s
            return x @ module.weight.double().T + (0.0 if module.bias is None else module.bias.double())
        if module.rms_norm is not None:
            x = norm(x, module.rms_norm)
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x = (x * s).round().clamp(-128, 127) / s
        bias = 0.0 if module.bias is None else module.bias.double()
        if isinstance(module, TheirBitLinear):
            w = unpack_weights(module.weight, dtype=torch.float64)
            return x @ w.T / module.weight_scale.double() + bias
        if module.online_quant:
            w = WeightQuant.apply(module.weight).sign().double()
            return x @ w.T * module.weight.double().abs().mean() + bias
        return (x @ module.weight.double().T + bias) * module.weight_scale.double()

    half = config.head_dim // 2
    rope = config.rope_parameters
    frequency = rope["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    length = 1.0
    if rope["rope_type"] == "yarn":
        context, base = rope["original_max_position_embeddings"], math.log(rope["rope_theta"])
        low, high = (half * math.log(context / (2 * math.pi * turns)) / base for turns in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
        stretched = ((torch.arange(half, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (1 - stretched + stretched / rope["factor"])
        length = 1 + 0.1 * math.log(rope["factor"])
    time = torch.arange(ids.shape[1], dtype=torch.float64)
    angle = time[:, None] * frequency
    turn = torch.polar(torch.full_like(angle, length), angle)[:, None]

    def heads(x: Tensor, module: Any = None) -> Tensor:
        x = x.unflatten(-1, (-1, config.head_dim))
        return x if module is None else norm(x, module)

    def rotate(x: Tensor) -> Tensor:  # [B, T, heads, d]; the pair (i, i + d/2) is a complex number
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    embedding = theirs.model.embed_tokens.weight.double()
    x = embedding[ids]
    for layer in theirs.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        n = norm(x, layer.input_layernorm)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        q = rotate(heads(linear(n, attention.q_proj), q_norm))
        k, v = rotate(heads(linear(n, attention.k_proj), k_norm)), heads(linear(n, attention.v_proj))
        group = torch.arange(q.shape[2]) * k.shape[2] // q.shape[2]
        k, v = k[:, :, group], v[:, :, group]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / config.head_dim**0.5
        scores = scores.masked_fill(time[None] > time[:, None], -torch.inf)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)
        x = x + linear(y, attention.o_proj)
        m = norm(x, layer.post_attention_layernorm)
        gate = linear(m, mlp.gate_proj)
        x = x + linear(gate * gate.sigmoid() * linear(m, mlp.up_proj), mlp.down_proj)
    if rounded_head:
        return linear(norm(x, theirs.model.norm), theirs.lm_head)
    head = embedding if config.tie_word_embeddings else theirs.lm_head.weight.double()
    return norm(x, theirs.model.norm) @ head.T
