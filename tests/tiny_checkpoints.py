"""Small checkpoint folders for the tests, written by safetensors and by nothing of ours."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""So short a context that positions within a test are stretched."""


@dataclass(frozen=True)
class Sizes:
    """Of a tiny model; the default shares no factor with a tile except what the published packing needs.

    ``head`` is head_dim where it is not hidden / heads. A llama has the parts of its family, all biases, and
    with ``norms`` one inside every projection ("use_rms_norm").
    """

    vocab: int = 61
    hidden: int = 24
    intermediate: int = 36
    layers: int = 2
    heads: int = 3
    kv_heads: int = 3
    head: int | None = None
    llama: bool = False
    norms: bool = False

    @property
    def head_dim(self) -> int:
        return self.head or self.hidden // self.heads

    def config(self, **changes: Any) -> dict[str, Any]:
        """config.json in the style of transformers 4, as published; a change of None leaves a field out."""
        fields = {
            "architectures": ["BitNetForCausalLM"],
            "model_type": "bitnet",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "relu2",
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "quantization_config": {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "offline",
            },
        }
        if self.llama:
            fields |= {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_act": "silu",
                "head_dim": self.head_dim,
                "attention_bias": True,
                "mlp_bias": True,
                "rope_scaling": LLAMA3_ROPE,
                "quantization_config": {"quant_method": "bitnet", "use_rms_norm": self.norms},
            }
        fields |= changes
        return {name: value for name, value in fields.items() if value is not None}

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) by the names inside a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


@dataclass
class Weights:
    """A random model: ternary projections with their multipliers, and the float tensors by full name."""

    ternary: dict[str, Tensor]
    scale: dict[str, Tensor]
    floats: dict[str, Tensor]

    @classmethod
    def random(cls, sizes: Sizes, seed: int = 0) -> "Weights":
        generator = torch.Generator().manual_seed(seed)
        weights = cls({}, {}, {})

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        for layer in range(sizes.layers):
            prefix = f"model.layers.{layer}"
            for name, shape in sizes.projection_shapes().items():
                full = f"{prefix}.{name}"
                weights.ternary[full] = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
                # Rounded to bfloat16, so that every storage dtype holds the same number.
                weights.scale[full] = (normal(1).exp() * shape[1] ** -0.5).bfloat16()
            norms = {"input_layernorm": sizes.hidden, "post_attention_layernorm": sizes.hidden}
            if not sizes.llama:
                norms |= {"self_attn.attn_sub_norm": sizes.hidden, "mlp.ffn_sub_norm": sizes.intermediate}
            for name, (out_features, in_features) in sizes.projection_shapes().items():
                if sizes.llama:
                    weights.floats[f"{prefix}.{name}.bias"] = normal(out_features).bfloat16()
                if sizes.norms:
                    norms[f"{name}.rms_norm"] = in_features
            for name, size in norms.items():
                weights.floats[f"{prefix}.{name}.weight"] = (1 + 0.2 * normal(size)).bfloat16()
        weights.floats["model.norm.weight"] = (1 + 0.2 * normal(sizes.hidden)).bfloat16()
        weights.floats["model.embed_tokens.weight"] = normal(sizes.vocab, sizes.hidden).bfloat16()
        return weights


def published_tensors(weights: Weights, reciprocal: bool = False) -> dict[str, Tensor]:
    """The packed tensors of the published format, written out with loops over single weights' places."""
    tensors = dict(weights.floats)
    for name, w in weights.ternary.items():
        tensors[f"{name}.weight"] = pack_rows(w)
        scale = weights.scale[name]
        tensors[f"{name}.weight_scale"] = 1 / scale.float() if reciprocal else scale
    return tensors


def pack_rows(w: Tensor) -> Tensor:
    """int8 [N, K] to the published uint8 [N / 4, K]: row n goes to row n mod N/4, bits 2 * (n div N/4)."""
    rows = w.shape[0] // 4
    packed = torch.zeros(rows, w.shape[1], dtype=torch.int32)
    for n, row in enumerate(w.to(torch.int32)):
        packed[n % rows] += (row + 1) * 4 ** (n // rows)
    return packed.to(torch.uint8)


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, files: int = 1) -> Path:
    """Writes config.json and the tensors, over several files with an index where asked."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for part in range(files):
        file = f"model-{part + 1:05}-of-{files:05}.safetensors"
        mine = names[part::files]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def tiny_folder(folder: Path, sizes: Sizes | None = None, seed: int = 0, **changes: Any) -> Path:
    """A valid packed checkpoint in the published format."""
    sizes = sizes or Sizes()
    return write_folder(folder, sizes.config(**changes), published_tensors(Weights.random(sizes, seed)))


def byte_tokenizer(vocab: int) -> Tokenizer:
    """A tokenizer of so many single characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab]
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: token for token, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def untied(weights: Weights) -> Weights:
    """The same model with a head of its own."""
    head = -weights.floats["model.embed_tokens.weight"]
    return replace(weights, floats=weights.floats | {"lm_head.weight": head})
