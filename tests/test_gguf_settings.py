"""What the metadata of GGUF files says about a model and its texts, key by key."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gguf import (
    ARRAY,
    CONFIGS,
    I32,
    ONE_LAYER,
    STRING,
    TYPES,
    Entry,
    Tiny,
    Typed,
    assert_same,
    entries,
    gguf_bytes,
    settings,
    write_tiny,
)
from tokenizers import pre_tokenizers

from bitnet_ops import DecoderConfig, RopeScaling, from_pretrained
from bitnet_ops.checkpoint.gguf.header import GgufFile
from bitnet_ops.checkpoint.gguf.settings import read_settings
from bitnet_ops.checkpoint.pooling import BITNET_EMBEDDING
from bitnet_ops.decoder.pooling import EmbeddingSettings
from bitnet_ops.generation.chat import render_chat


def load_config(
    tmp_path: Path, architecture: str = "llama", kind: str = "I2_S", **changes: Any
) -> DecoderConfig:
    """The configuration of a file of seven layers, of which hardly any tensor is there."""
    metadata = settings(CONFIGS[architecture].replace(local_layers=(), window=0), architecture)
    metadata[f"{architecture}.block_count"] = 7
    if architecture == "gemma3":
        metadata["gemma3.attention.sliding_window"] = 5
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    number, encode = TYPES[kind]
    matrix = encode(torch.ones(2, 256, dtype=torch.int8), torch.ones(1, 2))
    made = [Entry("token_embd.weight", (61, 256), 1, bytes(61 * 512))]
    made += [Entry(f"blk.{layer}.attn_q.weight", (2, 256), number, matrix) for layer in range(7)]
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(metadata, made))
    with GgufFile(file) as files:
        return read_settings(files)


@pytest.mark.parametrize(
    ("architecture", "kind", "bits"),
    [
        ("llama", "I2_S", 8),
        ("llama", "IQ2_BN", 8),
        ("llama", "TQ2_0", 16),
        ("qwen3", "Q2_0", 16),
        ("gemma3", "TQ1_0", 16),
        ("bitnet", "TQ1_0", 8),
        ("bitnet-b1.58", "TQ2_0", 8),
    ],
)
def test_bits_of_activations(architecture: str, kind: str, bits: int, tmp_path: Path) -> None:
    assert load_config(tmp_path, architecture, kind).activation_bits == bits
    other = load_config(tmp_path, architecture, kind, bitnet_ops__activation_bits=24 - bits)
    assert other.activation_bits == 24 - bits


def test_linear_scaling_of_the_rotary_embedding(tmp_path: Path) -> None:
    keys = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    assert load_config(tmp_path, **keys).rope_scaling == RopeScaling("linear", 4.0)
    # A factor alone means the same, and one of 1 nothing: 1bitLLM's files have that.
    assert load_config(tmp_path, llama__rope__scaling__factor=4.0).rope_scaling == RopeScaling("linear", 4.0)
    assert load_config(tmp_path, **(keys | {"llama__rope__scaling__factor": 1.0})).rope_scaling is None
    assert load_config(tmp_path, llama__rope__scaling__type="none").rope_scaling is None


def test_yarn(tmp_path: Path) -> None:
    keys = {
        "qwen3__rope__scaling__type": "yarn",
        "qwen3__rope__scaling__factor": 4.0,
        "qwen3__rope__scaling__original_context_length": 32,
    }
    expected = RopeScaling("yarn", 4.0, original_max_position_embeddings=32)
    assert load_config(tmp_path, "qwen3", **keys).rope_scaling == expected
    keys |= {"qwen3__rope__scaling__yarn_beta_fast": 16.0, "qwen3__rope__scaling__attn_factor": 0.5}
    scaling = load_config(tmp_path, "qwen3", **keys).rope_scaling
    assert scaling is not None
    assert scaling.beta_fast == 16.0
    assert scaling.attention_factor == pytest.approx(0.5 * expected.rotation_scale, rel=1e-15)


def llama3_factors(head_dim: int, theta: float, factor: float, context: int) -> np.ndarray[Any, Any]:
    """The tensor of llama.cpp's converter, from the description of Llama 3's scaling."""
    factors = []
    for pair in range(head_dim // 2):
        turns = context * np.float32(theta ** (-2 * pair / head_dim)) / (2 * np.pi)
        kept = np.clip((turns - 1) / (4 - 1), 0, 1)
        factors.append(1 / ((1 - kept) / factor + kept))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize(("factor", "key"), [(8.0, None), (32.0, None), (4.0, 16)])
def test_factors_of_llama_3(factor: float, key: int | None, tmp_path: Path) -> None:
    config = ONE_LAYER["llama"].replace(rope_theta=500000.0, tie_word_embeddings=True)
    tiny = Tiny.random(config)
    factors = llama3_factors(config.head_dim, config.rope_theta, factor, key or 8192)
    metadata = settings(config, "llama")
    if key is not None:
        metadata["llama.rope.scaling.original_context_length"] = key
    file = tmp_path / "m.gguf"
    made = [Entry("rope_freqs.weight", (32,), 0, factors.tobytes()), *entries(tiny, "llama")]
    file.write_bytes(gguf_bytes(metadata, made))
    expected = RopeScaling("llama3", factor, original_max_position_embeddings=key or 8192)
    model = from_pretrained(file)
    assert model.config.rope_scaling == expected
    assert_same(model, tiny.model(rope_scaling=expected))


def test_other_factors_stay_as_they_are(tmp_path: Path) -> None:
    tiny = Tiny.random(CONFIGS["llama"])
    factors = llama3_factors(64, 10000.0, 8.0, 8192)
    factors[7] *= 1.01
    file = tmp_path / "m.gguf"
    made = [Entry("rope_freqs.weight", (32,), 0, factors.tobytes()), *entries(tiny, "llama")]
    file.write_bytes(gguf_bytes(settings(tiny.config, "llama"), made))
    scaling = from_pretrained(file).config.rope_scaling
    assert scaling is not None
    assert scaling.kind == "factors"
    assert scaling.factors == tuple(factors.tolist())


def test_which_layers_of_gemma_are_local(tmp_path: Path) -> None:
    assert load_config(tmp_path, "gemma3").local_layers == (0, 1, 2, 3, 4, 6)
    pattern = "gemma3__attention__sliding_window_pattern"
    assert load_config(tmp_path, "gemma3", **{pattern: 3}).local_layers == (0, 1, 3, 4, 6)
    listed = [True, False, False, True, False, False, False]
    assert load_config(tmp_path, "gemma3", **{pattern: listed}).local_layers == (0, 3)
    config = load_config(tmp_path, "gemma3", gemma3__attention__sliding_window=None)
    assert (config.window, config.local_layers, config.local_rope_theta) == (0, (), None)
    base = load_config(tmp_path, "gemma3", gemma3__rope__freq_base_swa=20000.0).local_rope_theta
    assert base == 20000.0


def test_norms_inside_projections(tmp_path: Path) -> None:
    """As in the embedding models; they were trained with 8-bit activations."""
    tiny = Tiny.random(CONFIGS["gemma3"].replace(projection_norms=True))
    model = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, "gemma3", "TQ2_0"))
    assert (model.config.projection_norms, model.config.activation_bits) == (True, 8)
    assert_same(model, tiny.model())


@pytest.mark.parametrize(
    ("number", "pooling"), [(1, "mean"), (2, "cls"), (3, "last"), (0, None), (None, None)]
)
def test_how_vectors_are_made_of_texts(number: int | None, pooling: str | None, tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["qwen3"])
    file = write_tiny(tmp_path / "m.gguf", tiny, "qwen3", qwen3__pooling_type=number)
    expected = None if pooling is None else EmbeddingSettings(pooling=pooling)
    assert from_pretrained(file).embedding_settings == expected
    # What files of BitNet-embedding say is not what their models do.
    tiny = Tiny.random(ONE_LAYER["qwen3"].replace(projection_norms=True))
    file = write_tiny(tmp_path / "m.gguf", tiny, "qwen3", qwen3__pooling_type=number)
    assert from_pretrained(file).embedding_settings == BITNET_EMBEDDING


def test_an_activation_by_name(tmp_path: Path) -> None:
    assert load_config(tmp_path, "bitnet", bitnet__hidden_activation="relu2").activation == "relu2"


def test_a_scale_of_queries(tmp_path: Path) -> None:
    assert load_config(tmp_path, llama__attention__scale=0.0625).query_scale == 0.0625
    assert load_config(tmp_path, llama__attention__scale=0.0).query_scale is None


def test_numbers_of_each_layer_that_are_the_same(tmp_path: Path) -> None:
    config = load_config(tmp_path, llama__attention__head_count_kv=[2] * 7)
    assert config.num_key_value_heads == 2


# Text


def test_special_tokens(tmp_path: Path) -> None:
    ids = {
        "tokenizer__ggml__bos_token_id": 3,
        "tokenizer__ggml__eos_token_id": 4,
        "tokenizer__ggml__eot_token_id": 5,
        "tokenizer__ggml__padding_token_id": 2**32 - 1,  # there is none
    }
    tiny = Tiny.random(CONFIGS["llama"])
    model = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, "llama", **ids))
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (
        3,
        (4, 5),
        None,
    )
    assert model.generation_config == {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": None}


def write_with_tokens(file: Path, tiny: Tiny, architecture: str, **changes: Any) -> Path:
    """A file with a byte-level tokenizer of 60 tokens and the end of a turn; like 2B4T's without "pre"."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:60], "<|eot_id|>"]
    keys: dict[str, Any] = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__tokens": Typed(tokens, ARRAY, STRING),
        "tokenizer__ggml__token_type": Typed([1] * 60 + [3], ARRAY, I32),
        "tokenizer__ggml__merges": Typed(["A B"], ARRAY, STRING),
        "tokenizer__ggml__bos_token_id": 2,
        "tokenizer__ggml__eos_token_id": 4,
        "tokenizer__ggml__add_bos_token": False,
    }
    tokens[-2] = "AB"
    return write_tiny(file, tiny, architecture, **(keys | changes))


def test_a_template_and_the_tokens_that_end_texts(tmp_path: Path) -> None:
    """2B4T's file has no template, and no key for the token that ends a turn."""
    tiny = Tiny.random(CONFIGS["bitnet-b1.58"])
    model = from_pretrained(write_with_tokens(tmp_path / "m.gguf", tiny, "bitnet-b1.58"))
    assert model.tokenizer is not None
    assert model.tokenizer.encode("AB!<|eot_id|>").ids == [59, 0, 60]
    assert model.generation_config is not None
    assert model.generation_config["eos_token_id"] == [4, 60]
    assert model.config.eos_token_id == 4
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hello"}]
    assert model.chat_template is not None
    text = render_chat(model.chat_template, messages)
    assert text == "System: Be kind.<|eot_id|>User: Hello<|eot_id|>Assistant: "
    own = write_with_tokens(tmp_path / "m.gguf", tiny, "bitnet-b1.58", tokenizer__chat_template="{{ 1 }}")
    assert from_pretrained(own).chat_template == "{{ 1 }}"
    llama = write_with_tokens(tmp_path / "l.gguf", Tiny.random(CONFIGS["llama"]), "llama",
                              tokenizer__ggml__pre="llama-bpe")  # fmt: skip
    assert from_pretrained(llama).chat_template is None
