"""The models of the comparison by their sizes, which with random weights are all that time depends on."""

from bitnet_ops import BitNetConfig, DecoderConfig

SHAPES: dict[str, DecoderConfig] = {
    "bitnet-2b4t": BitNetConfig(),
    "llama-3.2-1b": DecoderConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "gemma-3-1b": DecoderConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        rope_theta=1e6,
        local_rope_theta=1e4,
        window=512,
        local_layers=tuple(n for n in range(26) if (n + 1) % 6),
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": DecoderConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        qk_norm=True,
        activation_bits=16,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
}


def shape(name: str, tiny: bool = False) -> DecoderConfig:
    """A model's sizes; with ``tiny`` its parts with small sizes, to try the code."""
    config = SHAPES[name]
    if not tiny:
        return config
    return config.replace(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        local_layers=(0,) if config.window else (),
        bos_token_id=None,
        eos_token_id=None,
    )
