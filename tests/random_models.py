"""Random packed models of every family's parts, for tests of what is written."""

import torch
from text_models import byte_level_tokenizer

from bitnet_ops import BitNet, BitNetConfig, DecoderConfig, RopeScaling
from bitnet_ops.layers.matrix import TernaryMatrix
from bitnet_ops.layers.norm import RMSNorm

SIZES = {
    "vocab_size": 410,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": (0, 1),
}
"""Sizes that every type of GGUF has blocks for."""

FAMILIES: dict[str, DecoderConfig] = {
    "bitnet-b1.58": BitNetConfig(**SIZES, rope_theta=12345.0),
    "bitnet": DecoderConfig(**SIZES, sub_norms=True, tie_word_embeddings=True),
    "llama": DecoderConfig(
        **SIZES,
        head_dim=128,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        attention_bias=True,
        attention_output_bias=False,
        mlp_bias=True,
        pad_token_id=3,
    ),
    "qwen3": DecoderConfig(
        **SIZES,
        rms_norm_eps=1e-6,
        qk_norm=True,
        activation_bits=16,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=64),
    ),
    "gemma3": DecoderConfig(
        **SIZES,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        projection_norms=True,
        local_rope_theta=10000.0,
        rope_theta=1e6,
        window=16,
        local_layers=(0,),
        embedding_scale=16.0,
        tie_word_embeddings=True,
    ),
}
"""By the architecture that GGUF has for them."""


def random_model(
    config: DecoderConfig,
    *,
    scales: str = "rows",
    exact: bool = True,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> BitNet:
    """A packed model of random weights whose texts do not go in circles at once.

    Args:
        config: what it is made of.
        scales: "rows" for a random scale of each row or group, "matrix" for one of each matrix.
        exact: whether float16 holds them.
        dtype: of embedding and head.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    model = BitNet(config).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, TernaryMatrix):
            shape = (module.out_features, module.in_features)
            w = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
            size = module.scale_shape if scales == "rows" else (1,)
            scale = (torch.rand(size, generator=generator) + 0.5) * 1.2 * shape[1] ** -0.5
            bias = None
            if module.bias is not None:
                bias = 0.3 * torch.randn(shape[0], generator=generator)
            filled = type(module).from_ternary(
                w,
                scale.half() if exact else scale,
                bias,
                activation_bits=config.activation_bits,
                group_size=config.group_size,
            )
            model.set_submodule(name, filled)
        elif isinstance(module, RMSNorm):
            module.weight.copy_(1 + 0.2 * torch.randn(module.weight.shape, generator=generator))
        elif isinstance(module, (torch.nn.Embedding, torch.nn.Linear)):
            weight = torch.randn(module.weight.shape, generator=generator).to(dtype)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def with_tokenizer(model: BitNet) -> BitNet:
    """The same model with a byte-level BPE and a template."""
    model.tokenizer = byte_level_tokenizer()
    model.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    return model
