"""GGUF files give the model that was written, to the last bit, for every architecture and type of weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from tiny_checkpoints import Sizes, Weights, published_tensors, write_folder
from tiny_gguf import (
    CONFIGS,
    GROUPS,
    IDS,
    ONE_LAYER,
    TYPES,
    Entry,
    Tiny,
    as_floats,
    assert_same,
    entries,
    gguf_bytes,
    permute,
    settings,
    write_tiny,
    write_with_gguf,
)
from torch import nn

from bitnet_ops import BitLinear, BitNetConfig, DecoderConfig, from_pretrained
from bitnet_ops.checkpoint import CheckpointError

TERNARY = ["TQ1_0", "TQ2_0", "I2_S", "Q2_0", "Q2_0_128", "PQ2_0", "PTQ1_0", "IQ1_BN", "IQ2_BN"]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_gives_the_model_that_was_written(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny.random(CONFIGS[architecture])
    assert_same(from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, architecture)), tiny.model())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_gives_its_configuration(architecture: str, tmp_path: Path) -> None:
    tiny = Tiny.random(CONFIGS[architecture])
    config = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, architecture)).config
    assert DecoderConfig(**vars(config)) == CONFIGS[architecture]
    assert isinstance(config, BitNetConfig) == (architecture in ("bitnet-b1.58", "bitnet-25"))


@pytest.mark.parametrize("kind", TERNARY)
@pytest.mark.parametrize("mmap", [True, False])
def test_every_ternary_type_gives_the_weights_that_were_written(
    kind: str, mmap: bool, tmp_path: Path
) -> None:
    tiny = Tiny.random(ONE_LAYER["llama"])
    file = write_tiny(tmp_path / "m.gguf", tiny, "llama", kind, bitnet_ops__activation_bits=8)
    model = from_pretrained(file, mmap=mmap)
    assert model.config.group_size == 0
    assert_same(model, tiny.model())


def test_i2_s_of_arm_builds_is_read_on_request(tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["bitnet-b1.58"])
    file = write_tiny(tmp_path / "m.gguf", tiny, "bitnet-b1.58", "I2_S_ARM")
    assert_same(from_pretrained(file, arm_i2_s=True), tiny.model())
    assert not torch.equal(from_pretrained(file)(IDS), tiny.model()(IDS))


@pytest.mark.parametrize("kind", GROUPS)
def test_scales_of_groups_stay(kind: str, tmp_path: Path) -> None:
    group = GROUPS[kind]
    # With blocks of 256, hidden sizes of two groups and more.
    config = ONE_LAYER["qwen3"].replace(hidden_size=512, activation_bits=16, group_size=group)
    tiny = Tiny.random(config, scales="group", group=group)
    model = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, "qwen3", kind))
    assert model.config.group_size == group
    assert_same(model, tiny.model())


@pytest.mark.parametrize("kind", ["TQ2_0", "Q2_0", "IQ2_BN"])
def test_scales_of_rows_need_no_groups(kind: str, tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["llama"], scales="row")  # also permuted
    file = write_tiny(tmp_path / "m.gguf", tiny, "llama", kind, bitnet_ops__activation_bits=8)
    model = from_pretrained(file)
    assert model.config.group_size == 0
    assert_same(model, tiny.model())


def test_types_may_be_mixed(tmp_path: Path) -> None:
    """Groups of 256 in some projections, of 64 in others, one scale in the rest: groups of 64 for all."""
    config = ONE_LAYER["qwen3"].replace(hidden_size=512, activation_bits=16)
    tiny = Tiny.random(config, scales="tensor")
    kinds = {}
    for number, name in enumerate(tiny.ternary):
        kind = kinds[name] = ["TQ2_0", "Q2_0", "I2_S", "IQ2_BN"][number % 4]
        n, k = tiny.ternary[name].shape
        if kind in GROUPS:
            tiny.scales[name] = (torch.rand(k // GROUPS[kind], n) + 0.5).half().float()
    made = {kind: entries(tiny, "qwen3", kind) for kind in {"F32", *kinds.values()}}
    chosen = [made[kinds.get(name, "F32")][at] for at, name in enumerate([*tiny.ternary, *tiny.floats])]
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(settings(config, "qwen3") | {"bitnet_ops.activation_bits": 16}, chosen))
    model = from_pretrained(file)
    assert model.config.group_size == 64
    assert_same(model, tiny.model(group_size=64))


def test_groups_without_weights_have_any_scale(tmp_path: Path) -> None:
    """llama.cpp's quantisers write scale 0 there; one scale a row is still enough."""
    tiny = Tiny.random(ONE_LAYER["bitnet"])
    name = "model.layers.0.mlp.down_proj"
    tiny.ternary[name][:, :256] = 0
    tiny.ternary[name][3] = 0
    model = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, "bitnet", "TQ2_0"))
    assert model.config.group_size == 0
    assert model.model.layers[0].mlp.down_proj.weight_scale[3] == 1.0
    assert_same(model, tiny.model())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "bitnet"])
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_files_of_the_gguf_package(architecture: str, kind: str, tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER[architecture].replace(activation_bits=8 if architecture == "bitnet" else 16))
    assert_same(from_pretrained(write_with_gguf(tmp_path / "m.gguf", tiny, architecture, kind)), tiny.model())


# The same model from a folder in the published layout

PUBLISHED = Sizes(hidden=128, intermediate=384, heads=4, kv_heads=2)


def as_tiny(weights: Weights, config: DecoderConfig) -> Tiny:
    """The weights of a folder as those of a file; scales are bfloat16, which float16 holds at these sizes."""
    scales = {
        name: scale.float().expand(1, len(weights.ternary[name])) for name, scale in weights.scale.items()
    }
    floats = {name: value.float() for name, value in weights.floats.items()}
    return Tiny(config, weights.ternary, scales, floats)


@pytest.mark.parametrize("architecture", ["bitnet-b1.58", "llama"])
@pytest.mark.parametrize("kind", ["I2_S", "Q2_0", "PQ2_0"])
def test_the_model_of_the_published_folder(architecture: str, kind: str, tmp_path: Path) -> None:
    sizes = replace(PUBLISHED, llama=architecture == "llama")
    weights = Weights.random(sizes)
    config = sizes.config()
    config["quantization_config"] |= {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    if sizes.llama:
        config["rope_scaling"] = None
    # A bias of "autobitlinear" is multiplied by the scale, those of a file are not.
    for name in weights.scale:
        if sizes.llama:
            weights.floats[f"{name}.bias"] = torch.ones_like(weights.floats[f"{name}.bias"]) * 0.5
    folder = from_pretrained(write_folder(tmp_path / "folder", config, published_tensors(weights)))
    tiny = as_tiny(weights, folder.config)
    for name, scale in weights.scale.items():
        if sizes.llama:
            tiny.floats[f"{name}.bias"] = tiny.floats[f"{name}.bias"] * scale.float()
    tokens = {"tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__eos_token_id": 2}
    file = write_tiny(tmp_path / "m.gguf", tiny, architecture, kind, bitnet_ops__activation_bits=8, **tokens)
    model = from_pretrained(file)
    assert_same(model, folder)
    assert model.config == folder.config
    assert model.generation_config == folder.generation_config


# The order of rows


def test_rows_of_q_and_k_turn_back_by_their_own_heads(tmp_path: Path) -> None:
    """Against llama.cpp's formula, with fewer key heads than query heads."""
    config = ONE_LAYER["llama"].replace(num_attention_heads=8, num_key_value_heads=2, head_dim=96)
    tiny = Tiny.random(config)
    model = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, "llama"))
    for part, heads in (("q_proj", 8), ("k_proj", 2)):
        name = f"model.layers.0.self_attn.{part}"
        layer = model.get_submodule(name)
        assert isinstance(layer, BitLinear)
        assert torch.equal(layer.unpack(), tiny.ternary[name])
        other = permute(tiny.ternary[name].numpy(), 10 - heads)
        assert not np.array_equal(permute(tiny.ternary[name].numpy(), heads), other)
        assert torch.equal(layer.bias, tiny.floats[f"{name}.bias"])


# Embedding and head


FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMBERS = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q6_K": 14, "Q5_0": 6, "Q4_0": 2, "Q4_K": 12}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", NUMBERS)
def test_an_embedding_of_floats_of_every_type(kind: str, mmap: bool, tmp_path: Path) -> None:
    """As it is stored, or what the gguf package makes of random blocks, rounded to float16."""
    tiny = Tiny.random(ONE_LAYER["bitnet"])
    number = GGMLQuantizationType(NUMBERS[kind])
    if kind in FLOATS:
        expected = torch.randn(61, 256).to(FLOATS[kind])
        data = expected.view(torch.uint8).numpy().tobytes()
    else:
        block, size = GGML_QUANT_SIZES[number]
        bytes_ = np.random.default_rng(0).integers(0, 60, 61 * 256 // block * size, dtype=np.uint8)
        data = bytes_.tobytes()
        dense = quants.dequantize(bytes_.reshape(61, -1), number)
        expected = torch.from_numpy(dense).view(61, 256).half()
    made = entries(tiny, "bitnet")
    at = next(at for at, entry in enumerate(made) if entry.name == "token_embd.weight")
    made[at] = Entry("token_embd.weight", (61, 256), number.value, data)
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(settings(tiny.config, "bitnet"), made))
    table = from_pretrained(file, mmap=mmap).model.embed_tokens.weight
    assert table.dtype == expected.dtype
    assert torch.equal(table, expected)


@pytest.mark.parametrize("kind", TERNARY)
def test_a_ternary_embedding_and_head_are_exact(kind: str, tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["qwen3"].replace(tie_word_embeddings=False))
    w = torch.randint(-1, 2, (61, 256), dtype=torch.int8)
    w[:, ::32] = 1
    scales = torch.full((1, 61), 0.0371).half().float()
    number, encode = TYPES[kind]
    made = [
        entry for entry in entries(tiny, "qwen3") if entry.name not in ("token_embd.weight", "output.weight")
    ]
    other = w.roll(1, 0)
    made.append(Entry("token_embd.weight", (61, 256), number, encode(w, scales)))
    made.append(Entry("output.weight", (61, 256), number, encode(other, scales)))
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(settings(tiny.config, "qwen3"), made))
    model = from_pretrained(file)
    for table, expected in ((model.model.embed_tokens.weight, w), (model.head_weight, other)):
        assert table.dtype == torch.float16
        assert torch.equal(table, (expected * scales[0, 0]).half())


def test_numbers_that_float16_cannot_hold_become_bfloat16(tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["bitnet"])
    block = np.zeros((61, 8, 34), dtype=np.uint8)
    block[..., :2] = np.full((61, 8, 1), 1000.0, dtype="<f2").view(np.uint8)
    block[..., 2:] = 100
    made = [entry for entry in entries(tiny, "bitnet") if entry.name != "token_embd.weight"]
    made.append(Entry("token_embd.weight", (61, 256), 8, block.tobytes()))
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(settings(tiny.config, "bitnet"), made))
    table = from_pretrained(file).model.embed_tokens.weight
    assert torch.equal(table, torch.full((61, 256), 100000.0).bfloat16())


# Models that are not ternary, or are not wanted so


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "TQ2_0", "I2_S"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_projections_as_they_are(architecture: str, kind: str, tmp_path: Path) -> None:
    """Float32 matrices with the numbers that the gguf package reads, rows in our order."""
    tiny = Tiny.random(ONE_LAYER[architecture])
    file = write_tiny(tmp_path / "m.gguf", tiny, architecture, kind)
    model = from_pretrained(file, linear=nn.Linear)
    for name, w in tiny.ternary.items():
        layer = model.get_submodule(name)
        exact = torch.from_numpy(as_floats(w, tiny.scales[name]))
        number = GGMLQuantizationType(TYPES[kind][0]) if kind == "Q8_0" else None
        if number is not None:  # blocks are within rows, so their order does not matter
            stored = quants.quantize(exact.numpy(), number)
            exact = torch.from_numpy(quants.dequantize(stored, number))
        assert isinstance(layer, nn.Linear)
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, exact)
        if f"{name}.bias" in tiny.floats:
            assert torch.equal(layer.bias, tiny.floats[f"{name}.bias"])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_with_ternary_values_are_ternary_projections(kind: str, tmp_path: Path) -> None:
    """With q and k in their order of rows, and scales that bfloat16 holds."""
    tiny = Tiny.random(ONE_LAYER["llama"], scales="row")
    tiny.scales = {name: scale.bfloat16().float() for name, scale in tiny.scales.items()}
    model = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, "llama", kind))
    assert (model.config.group_size, model.config.activation_bits) == (0, 16)
    assert_same(model, tiny.model(activation_bits=16))


def test_floats_with_a_scale_for_each_group(tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["qwen3"], scales="group", group=128)
    model = from_pretrained(write_tiny(tmp_path / "m.gguf", tiny, "qwen3", "F16"))
    assert model.config.group_size == 128
    assert_same(model, tiny.model(activation_bits=16, group_size=128))


def test_floats_with_other_values_are_refused(tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["llama"])
    made = entries(tiny, "llama", "F32")
    matrix = torch.randn(256, 256)
    at = next(at for at, entry in enumerate(made) if entry.name == "blk.0.ffn_up.weight")
    made[at] = Entry("blk.0.ffn_up.weight", (256, 256), 0, matrix.numpy().tobytes())
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(settings(tiny.config, "llama"), made))
    first = f"{matrix[0, 0].item():.9g}"
    with pytest.raises(CheckpointError, match=rf"blk\.0\.ffn_up\.weight.*{first}.*nn\.Linear"):
        from_pretrained(file)


def test_quantised_floats_are_no_ternary_projections(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "m.gguf", Tiny.random(ONE_LAYER["llama"]), "llama", "Q8_0")
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.attn_q\.weight.*ternary.*Q8_0, such as -?0\..*nn\.Linear"
    ):
        from_pretrained(file)


# Scales beside the type's


def test_a_scale_tensor_multiplies(tmp_path: Path) -> None:
    tiny = Tiny.random(ONE_LAYER["bitnet"])
    extra = [
        Entry(f"blk.{layer}.{name}.scale", (1,), 0, np.float32(0.75).tobytes())
        for layer in range(1)
        for name in ("attn_q", "ffn_down")
    ]
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(settings(tiny.config, "bitnet"), entries(tiny, "bitnet") + extra))
    for name in tiny.scales:
        if name.endswith(("q_proj", "down_proj")):
            tiny.scales[name] = tiny.scales[name] * 0.75
    assert_same(from_pretrained(file), tiny.model())


@pytest.mark.parametrize("scales", ["tensor", "row", "group"])
def test_our_own_scales_win(scales: str, tmp_path: Path) -> None:
    """Of a model whose scales float16 cannot hold."""
    config = ONE_LAYER["llama"].replace(hidden_size=512, head_dim=64, activation_bits=16)
    tiny = Tiny.random(config, scales=scales, group=256)
    metadata: dict[str, Any] = settings(config, "llama")
    exact = {}
    made = entries(tiny, "llama", "TQ2_0")
    for entry, (name, value) in zip(made, list(tiny.scales.items()), strict=False):
        own = (value * 1.0001).contiguous()
        exact[name] = own
        heads = {"q": 4, "k": 2}.get(name.split(".")[-1][0])
        stored = own.T.contiguous().numpy()
        if heads is not None and "self_attn" in name:
            stored = permute(stored, heads)
        flat = stored.T.reshape(-1).tolist()
        metadata[f"bitnet_ops.weight_scale.{entry.name}"] = flat[:1] if scales == "tensor" else flat
    tiny.scales = exact
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf_bytes(metadata, made))
    assert_same(from_pretrained(file), tiny.model(group_size=256 if scales == "group" else 0))
