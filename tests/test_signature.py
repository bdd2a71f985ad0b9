"""One number for all that a model computes: it changes when any bit does, on any machine.

The number is a hash of a greedy text's ids and of the bits of its logits. It is the same on every instruction
set, operating system and processor. A change that means to change results writes the new numbers here, and says
so in CHANGELOG.md. tests/kernels/decoder_test.cpp does the same for the layers without Python and torch, also
for NEON in QEMU.
"""

import hashlib

import pytest
import torch
from torch import Tensor

from bitnet_ops import (
    DEFAULT_MODEL,
    BitLinear,
    BitNet,
    BitNetConfig,
    DecoderConfig,
    KVCache,
    RopeScaling,
    from_pretrained,
    ops,
)
from bitnet_ops.layers.norm import RMSNorm

SIZES = {
    "vocab_size": 61, "hidden_size": 60, "intermediate_size": 84, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "bitnet": (BitNetConfig(**SIZES), "7ae2cdb175d33ae0"),
    "llama": (
        DecoderConfig(
            **SIZES, head_dim=14, attention_bias=True, projection_norms=True, tie_word_embeddings=False,
            rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=32),
        ),
        "50159a66f3e8262d",
    ),
    "every part": (
        DecoderConfig(
            **SIZES, head_dim=14, activation="gelu_tanh", sub_norms=True, qk_norm=True, post_norms=True,
            activation_bits=16, window=7, local_layers=(0,), local_rope_theta=100.0, query_scale=0.3,
            embedding_scale=8.0, residual_scale=0.5, tie_word_embeddings=True,
        ),
        "4dddc73f84bbac8c",
    ),
}  # fmt: skip
DEFAULT_MODEL_SIGNATURE = "e79fc5301a379fc7"


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers in [0, 1) that are the same everywhere: a hash of their place, and one exact division."""
    count = torch.Size(shape).numel()
    hashed = (torch.arange(count, dtype=torch.int64) + 97 * seed + 1) * 40503 % 65536 * 30011 % 65521
    return (hashed.float() / 65536).view(shape)


def model_of(config: DecoderConfig) -> BitNet:
    """A model of weights from `numbers`."""
    model = BitNet(config)
    for seed, module in enumerate(model.modules()):
        if isinstance(module, BitLinear):
            w = (numbers((module.out_features, module.in_features), seed) * 3).floor() - 1
            module.packed_weight = ops.pack_ternary(w.to(torch.int8))
            module.weight_scale = (numbers((module.out_features,), seed) + 1) / 16
            if module.bias is not None:
                module.bias = numbers((module.out_features,), seed) - 0.5
        elif isinstance(module, RMSNorm):
            module.weight.data = numbers(tuple(module.weight.shape), seed) + 0.5
        elif isinstance(module, (torch.nn.Embedding, torch.nn.Linear)):
            module.weight.data = numbers(tuple(module.weight.shape), seed) - 0.5
    return model.eval().requires_grad_(False)


def signature(model: BitNet, prompt: Tensor, tokens: int = 24) -> str:
    """Of a prompt in one pass, then a greedy text token by token."""
    digest = hashlib.sha256()
    cache = KVCache(model.config, 1, 64)
    ids = prompt
    for _ in range(tokens):
        logits = model(ids, cache=cache)
        digest.update(bytes(logits.view(torch.uint8).flatten().tolist()))
        ids = logits[:, -1:].argmax(-1)
        digest.update(int(ids).to_bytes(4, "little"))
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(isa: str, family: str) -> None:
    config, expected = FAMILIES[family]
    assert signature(model_of(config), torch.arange(300)[None] % 61) == expected


def test_default_model(isa: str) -> None:
    model = from_pretrained(DEFAULT_MODEL)
    prompt = model.encode("It is a truth universally acknowledged")["input_ids"]
    assert signature(model, prompt) == DEFAULT_MODEL_SIGNATURE
