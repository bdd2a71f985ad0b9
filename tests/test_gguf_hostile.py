"""Damaged and hostile GGUF files of models: a clear CheckpointError or a model, never a crash or a hang."""

import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gguf import (
    ARRAY,
    CONFIGS,
    F64,
    I32,
    STRING,
    U64,
    Entry,
    Tiny,
    Typed,
    entries,
    gguf_bytes,
    settings,
)
from tokenizers import pre_tokenizers

from bitnet_ops import BitLinear, BitNet, DecoderConfig, from_pretrained
from bitnet_ops.checkpoint import CheckpointError

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": Typed(
        [*sorted(pre_tokenizers.ByteLevel.alphabet())[:62], "AB", "<|eot_id|>"], ARRAY, STRING
    ),
    "tokenizer.ggml.token_type": Typed([1] * 63 + [3], ARRAY, I32),
    "tokenizer.ggml.merges": Typed(["A B"], ARRAY, STRING),
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.chat_template": "{{ messages }}",
}


def file_of(
    architecture: str = "llama",
    kind: str = "I2_S",
    config: DecoderConfig = CONFIG,
    change: Callable[[dict[str, Any], list[Entry]], object] = lambda metadata, tensors: None,
    tiny: Tiny | None = None,
) -> bytes:
    """A small good file, or one that was changed before it was written."""
    tiny = tiny or Tiny.random(config)
    metadata = settings(tiny.config, architecture) | TOKENS
    tensors = entries(tiny, architecture, kind)
    change(metadata, tensors)
    return gguf_bytes(metadata, tensors)


def load(folder: Path, data: bytes, **options: Any) -> BitNet:
    file = folder / "model.gguf"
    file.write_bytes(data)
    return from_pretrained(file, **options)


def assert_refused(folder: Path, data: bytes, *words: str, **options: Any) -> None:
    """Loading fails with a text that has the file's name and all the words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, data, **options)
    for word in ("model.gguf", *words):
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_the_good_file_loads(tmp_path: Path) -> None:
    model = load(tmp_path, file_of())
    assert model.tokenizer is not None
    assert model(torch.tensor([[1, 2]])).isfinite().all()


# Keys


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", None, ["'llama'", "None"]),
        ("general.architecture", "falcon", ["'bitnet-b1.58'", "'falcon'"]),
        ("general.architecture", "qwen35", ["linear attention"]),
        ("general.architecture", "qwen3moe", ["experts"]),
        ("general.architecture", "hunyuan-dense", ["hunyuan-dense"]),
        ("general.architecture", Typed(["llama"], ARRAY, STRING), ["llama"]),
        ("prism.hadamard.version", 1, ["prism.hadamard.version", "rotated"]),
        ("llama.expert_count", 8, ["expert_count", "8"]),
        ("llama.attention.sliding_window", 32, ["sliding_window", "32"]),
        ("llama.attn_logit_softcapping", 50.0, ["softcapping"]),
        ("llama.attention.causal", False, ["causal", "False"]),
        ("llama.rope.dimension_count", 16, ["rope.dimension_count", "head_dim = 32", "16"]),
        ("llama.attention.value_length", 16, ["value_length", "head_dim = 32", "16"]),
        ("llama.attention.key_length_swa", 16, ["key_length_swa", "head_dim = 32", "16"]),
        ("llama.rope.scaling.type", "longrope", ["rope.scaling.type", "longrope"]),
        ("llama.rope.scaling.attn_factor", 0.5, ["rope.scaling.attn_factor", "0.5"]),
        ("llama.rope.scaling.yarn_ext_factor", 0.5, ["rope.scaling.yarn_ext_factor", "0.5"]),
        ("llama.rope.scaling.factor", "4", ["rope.scaling.factor", "'4'"]),
        ("llama.rope.scaling.factor", float("nan"), ["rope.scaling.factor", "nan"]),
        ("llama.rope.scaling.factor", -1.0, ["factor"]),
        ("llama.rope.freq_base", float("inf"), ["rope.freq_base", "finite"]),
        ("llama.rope.freq_base", -1.0, ["rope_theta"]),
        ("llama.rope.freq_base", Typed(1e300, F64), ["rope_theta"]),
        ("llama.hidden_activation", "gelu", ["hidden_activation", "'gelu'"]),
        ("llama.hidden_activation", 1, ["hidden_activation", "1"]),
        ("bitnet_ops.activation_bits", 4, ["activation_bits", "8 or 16", "4"]),
        ("bitnet_ops.activation_bits", 8.0, ["activation_bits", "8.0"]),
        ("llama.block_count", None, ["llama.block_count", "this key"]),
        ("llama.block_count", 0, ["num_hidden_layers"]),
        ("llama.block_count", 2, ["num_hidden_layers", "blk.1.attn_norm.weight"]),
        ("llama.block_count", 2**31 - 1, ["num_hidden_layers", "blk.1.attn_norm.weight"]),
        ("llama.block_count", 2**32 - 1, ["llama.block_count"]),
        ("llama.block_count", Typed(2**64 - 1, U64), ["llama.block_count"]),
        ("llama.block_count", 1.0, ["llama.block_count", "1.0"]),
        ("llama.block_count", True, ["llama.block_count", "True"]),
        ("llama.block_count", "1", ["llama.block_count", "'1'"]),
        ("llama.embedding_length", 2**31 - 1, ["token_embd.weight", "[V, 2147483647]"]),
        ("llama.embedding_length", 96, ["token_embd.weight", "[V, 96]", "[64, 128]"]),
        ("llama.feed_forward_length", 2**30, ["intermediate_size"]),
        ("llama.feed_forward_length", 256, ["ffn_gate.weight", "[256, 128]"]),
        ("llama.feed_forward_length", Typed([128, 256], ARRAY), ["feed_forward_length", "all layers"]),
        ("llama.feed_forward_length", Typed([], ARRAY), ["feed_forward_length"]),
        ("llama.attention.head_count", 3, ["num_attention_heads"]),
        ("llama.attention.head_count", 2**20, ["num_attention_heads"]),
        ("llama.attention.head_count_kv", 3, ["num_key_value_heads"]),
        ("llama.attention.head_count_kv", 4, ["attn_k.weight", "[128, 128]", "[64, 128]"]),
        ("llama.attention.key_length", 33, ["head_dim"]),
        ("llama.attention.layer_norm_rms_epsilon", None, ["layer_norm_rms_epsilon", "this key"]),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, ["rms_norm_eps"]),
        ("tokenizer.ggml.bos_token_id", 64, ["bos_token_id", "[0, 64)", "64"]),
        ("tokenizer.ggml.eos_token_id", "4", ["eos_token_id", "'4'"]),
        ("tokenizer.ggml.tokens", "abc", ["tokenizer.ggml.tokens"]),
        ("tokenizer.ggml.tokens", None, ["tokens"]),
        ("tokenizer.ggml.model", "bert", ["tokenizer.ggml.model", "bert"]),
        ("tokenizer.chat_template", 1, ["chat_template", "int"]),
        ("llama.pooling_type", 4, ["llama.pooling_type", "2 (cls)", "4"]),
        ("llama.pooling_type", True, ["llama.pooling_type", "True"]),
        ("bitnet_ops.weight_scale.blk.0.attn_q.weight", 1.0, ["attn_q.weight", "1, 128 or 128"]),
        ("bitnet_ops.weight_scale.blk.0.attn_q.weight", Typed([1.0] * 3, ARRAY, 6), ["attn_q.weight"]),
        ("bitnet_ops.weight_scale.blk.0.attn_q.weight", Typed([-1.0], ARRAY, 6), ["attn_q.weight", "scales"]),
        ("bitnet_ops.weight_scale.blk.0.attn_q.weight", Typed([1], ARRAY, 4), ["attn_q.weight"]),
    ],
)
def test_a_key_that_is_wrong(key: str, value: Any, words: list[str], tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: list[Entry]) -> None:
        metadata[key] = value
        if value is None:
            del metadata[key]

    assert_refused(tmp_path, file_of(change=change), *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("gemma3.attention.sliding_window_pattern", Typed([True], ARRAY, 7), ["pattern", "3 bools"]),
        ("gemma3.attention.sliding_window_pattern", -1.0, ["pattern"]),
        ("gemma3.block_count", 2**31 - 1, ["block_count", "2147483647"]),
        ("gemma3.attention.sliding_window", "5", ["sliding_window"]),
    ],
)
def test_a_key_of_gemma_that_is_wrong(key: str, value: Any, words: list[str], tmp_path: Path) -> None:
    config = CONFIGS["gemma3"].replace(vocab_size=64)
    data = file_of("gemma3", config=config, change=lambda metadata, tensors: metadata.update({key: value}))
    assert_refused(tmp_path, data, *words)


# Tensors


def replaced(tensors: list[Entry], name: str, *others: Entry) -> None:
    at = next(at for at, entry in enumerate(tensors) if entry.name == name)
    tensors[at : at + 1] = others


NAN = np.full(128, np.nan, dtype=np.float32).tobytes()
ROW = np.ones(128, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("name", "others", "words"),
    [
        ("blk.0.attn_q.weight", [], ["attn_q.weight", "no such tensor"]),
        ("blk.0.attn_q.weight", [Entry("blk.0.attn_q.weight", (128,), 0, ROW)], ["attn_q.weight"]),
        ("blk.0.ffn_norm.weight", [], ["ffn_norm.weight", "no such tensor"]),
        ("blk.0.ffn_norm.weight", [Entry("blk.0.ffn_norm.weight", (128,), 0, NAN)], ["ffn_norm", "NaN"]),
        ("blk.0.ffn_norm.weight", [Entry("blk.0.ffn_norm.weight", (2, 64), 0, ROW)], ["ffn_norm", "[2, 64]"]),
        ("output_norm.weight", [], ["output_norm.weight", "no such tensor"]),
        ("token_embd.weight", [], ["token_embd.weight", "no such tensor"]),
        ("token_embd.weight", [Entry("token_embd.weight", (128,), 0, ROW)], ["token_embd", "[V, 128]"]),
        ("token_embd.weight", [Entry("token_embd.weight", (64, 128), 0, NAN * 64)], ["token_embd", "NaN"]),
        ("output_norm.weight", [Entry("output_norm.weight", (128,), 0, ROW), Entry("more", (128,), 0, ROW)],
         ["'more'", "only the"]),
        ("output_norm.weight",
         [Entry("output_norm.weight", (128,), 0, ROW), Entry("rope_freqs.weight", (128,), 0, ROW)],
         ["rope_freqs", "[16]"]),
        ("output_norm.weight",
         [Entry("output_norm.weight", (128,), 0, ROW), Entry("rope_freqs.weight", (16,), 0, NAN[:64])],
         ["rope_freqs", "finite"]),
        ("output_norm.weight",
         [Entry("output_norm.weight", (128,), 0, ROW), Entry("blk.0.attn_q.scale", (1,), 0, NAN[:4])],
         ["attn_q.weight", "scales"]),
        ("output_norm.weight",
         [Entry("output_norm.weight", (128,), 0, ROW), Entry("blk.0.attn_q.scale", (2,), 0, ROW[:8])],
         ["attn_q.scale", "[1]"]),
        ("output_norm.weight",
         [Entry("output_norm.weight", (128,), 0, ROW), Entry("blk.0.attn_q.bias", (128,), 0, NAN)],
         ["bias"]),
    ],
)  # fmt: skip
def test_a_tensor_that_is_wrong(name: str, others: list[Entry], words: list[str], tmp_path: Path) -> None:
    data = file_of(change=lambda metadata, tensors: replaced(tensors, name, *others))
    assert_refused(tmp_path, data, *words)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "I2_S", "Q2_0", "PQ2_0", "IQ2_BN"])
def test_bytes_that_are_no_weights(kind: str, mmap: bool, tmp_path: Path) -> None:
    config = CONFIG.replace(hidden_size=256, intermediate_size=256)

    def change(metadata: dict[str, Any], tensors: list[Entry]) -> None:
        entry = next(entry for entry in tensors if entry.name == "blk.0.ffn_up.weight")
        data = bytearray(entry.data)
        data[40:43] = b"\xff\xff\xff"
        replaced(tensors, entry.name, Entry(entry.name, entry.shape, entry.number, bytes(data)))

    data = file_of("llama", kind, config, change)
    if kind == "TQ1_0":  # every byte but 13 stands for digits; 255 does
        load(tmp_path, data, mmap=mmap)
    else:
        assert_refused(tmp_path, data, "blk.0.ffn_up.weight", "0xff", mmap=mmap)


@pytest.mark.parametrize("value", [np.inf, np.nan, -1.0])
@pytest.mark.parametrize("kind", ["TQ2_0", "I2_S", "Q2_0", "IQ2_BN"])
def test_scales_that_are_wrong(kind: str, value: float, tmp_path: Path) -> None:
    tiny = Tiny.random(CONFIG.replace(hidden_size=256, intermediate_size=256))
    number = "<f2" if kind in ("TQ2_0", "Q2_0") else "<f4"

    def change(metadata: dict[str, Any], tensors: list[Entry]) -> None:
        entry = next(entry for entry in tensors if entry.name == "blk.0.ffn_up.weight")
        data = bytearray(entry.data)
        at = {"TQ2_0": 64, "I2_S": len(data) - 32, "Q2_0": 0, "IQ2_BN": 0}[kind]
        size = np.dtype(number).itemsize
        data[at : at + size] = np.array(value, dtype=number).tobytes()
        replaced(tensors, entry.name, Entry(entry.name, entry.shape, entry.number, bytes(data)))

    assert_refused(tmp_path, file_of(kind=kind, tiny=tiny, change=change), "blk.0.ffn_up.weight", "scales")


# Files


def test_a_name_that_ends_in_gguf_and_a_file_that_begins_with_it(tmp_path: Path) -> None:
    assert_refused(tmp_path, b"no such format", "begins with 'GGUF'")
    other = tmp_path / "model.bin"
    other.write_bytes(file_of())
    assert from_pretrained(other).config.vocab_size == 64
    other.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="is another file"):
        from_pretrained(other)


# Many at random


def cut(data: bytes, chance: random.Random, header: int) -> bytes:
    return data[: chance.randrange(len(data))]


def flip_in_header(data: bytes, chance: random.Random, header: int) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        changed[chance.randrange(header)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def flip_in_data(data: bytes, chance: random.Random, header: int) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 4, 64))):
        changed[chance.randrange(header, len(data))] = chance.randrange(256)
    return bytes(changed)


EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def extreme_field(data: bytes, chance: random.Random, header: int) -> bytes:
    changed = bytearray(data)
    size = chance.choice((4, 8))
    at = chance.randrange(header - size)
    changed[at : at + size] = struct.pack("<Q", chance.choice(EXTREMES))[:size]
    return bytes(changed)


def move_bytes(data: bytes, chance: random.Random, header: int) -> bytes:
    begin, end = sorted(chance.sample(range(header), 2))
    to = chance.randrange(header)
    return data[:to] + data[begin:end] + data[to:] if chance.random() < 0.5 else data[:begin] + data[end:]


DAMAGES = (cut, flip_in_header, flip_in_header, flip_in_data, extreme_field, extreme_field, move_bytes)


def damaged(seed: int, count: int) -> Iterator[bytes]:
    """As many files, each damaged in one way."""
    chance = random.Random(seed)
    good = [
        file_of("llama", "I2_S"),
        file_of("qwen3", "Q2_0", CONFIG.replace(qk_norm=True)),
        file_of("gemma3", "PQ2_0", CONFIGS["gemma3"].replace(vocab_size=64, hidden_size=128, head_dim=32,
                intermediate_size=128, num_hidden_layers=2, local_layers=(0,))),
        file_of("bitnet", "IQ2_BN", CONFIG.replace(sub_norms=True)),
    ]  # fmt: skip
    # The header ends in front of the data of the first tensor.
    headers = [len(data) - 32 for data in good]
    for number, data in enumerate(good):
        headers[number] = data.rindex(b".weight", 0, data.rindex(b"norm.weight") + 11) + 64
    for _ in range(count):
        number = chance.randrange(len(good))
        yield chance.choice(DAMAGES)(good[number], chance, headers[number])


def load_damaged(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """How many were refused with the file's name, and how many loaded; other errors are the caller's."""
    refused = loaded = 0
    for number, data in enumerate(damaged(seed, count)):
        begin = time.process_time()  # not of a machine that does other things
        try:
            load(folder, data, linear=torch.nn.Linear if number % 7 == 0 else BitLinear)
            loaded += 1
        except CheckpointError as error:
            refused += "model.gguf" in str(error)
        assert time.process_time() - begin < 30, f"damage {number} of seed {seed}"
    return refused, loaded


def test_damaged_files(tmp_path: Path) -> None:
    refused, loaded = load_damaged(tmp_path, seed=1, count=300)
    assert refused + loaded == 300
    assert loaded > 10  # damage that nobody can notice, such as in a name or a weight


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
def test_many_damaged_files_within_bounded_memory(seed: int, tmp_path: Path) -> None:
    """In a process that may not take more than 1 GB above what it begins with."""
    program = (
        "import resource, sys; from pathlib import Path; import test_gguf_hostile as test\n"
        "from tiny_gguf import *\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "most = pages * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        f"print(*test.load_damaged(Path({str(tmp_path)!r}), {seed}, 800))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, loaded = map(int, done.stdout.split())
    assert refused + loaded == 800
    assert loaded > 20


@pytest.mark.slow
def test_a_file_that_ends_at_every_byte_of_its_header(tmp_path: Path) -> None:
    data = file_of()
    header = data.rindex(b".weight", 0, len(data) // 2) + 40
    for end in range(header):
        assert_refused(tmp_path, data[:end])
