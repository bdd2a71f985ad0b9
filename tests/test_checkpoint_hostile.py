"""Damaged and hostile checkpoints: one clear CheckpointError that names file and tensor, never a crash."""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    LLAMA3_ROPE,
    Sizes,
    Weights,
    byte_tokenizer,
    published_tensors,
    tiny_folder,
    write_folder,
)
from tokenizers import Tokenizer, models
from torch import Tensor

from bitnet_ops import from_pretrained, packing, repack
from bitnet_ops.checkpoint import CheckpointError
from bitnet_ops.checkpoint.files import TensorFiles
from bitnet_ops.generation.chat import ChatSession

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.self_attn.attn_sub_norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid packed checkpoint in the published format, for a test to spoil."""
    return tiny_folder(tmp_path / "checkpoint")


@pytest.fixture
def ours(folder: Path, tmp_path: Path) -> Path:
    """The same model in our own format, in tile16 on every machine."""
    repack(from_pretrained(folder), "tile16").save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


LLAMA = Sizes(llama=True, norms=True, head=12)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A valid Llama-class checkpoint as published, with biases and with norms inside projections."""
    tensors = published_tensors(Weights.random(LLAMA), reciprocal=True)
    return write_folder(tmp_path / "llama", LLAMA.config(), tensors)


@pytest.fixture
def our_llama(llama: Path, tmp_path: Path) -> Path:
    """The same in our own format, in tile16 on every machine."""
    repack(from_pretrained(llama), "tile16").save_pretrained(tmp_path / "our-llama")
    return tmp_path / "our-llama"


def assert_refused(folder: Path, *words: str) -> None:
    """Loading fails with a text that has all the words."""
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is missing in: {message}"


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# The folder and its files


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match=r"folder with a checkpoint.*which does not exist"):
        from_pretrained("no-such-folder")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert_refused(folder / "config.json", "folder with a checkpoint", "is another file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, name, "no such file")


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"],
)
def test_a_named_pipe_does_not_block(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert_refused(folder, name)


def test_another_format_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
        b"nonsense",
    ],
    ids=["empty", "cut", "list", "null", "utf-16", "deep list", "deep object", "long number", "word"],
)
def test_json_garbage(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert_refused(folder, name, "expected")


def test_a_huge_json_file_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    assert_refused(folder, "config.json", "at most")


# config.json


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("model_type", ["bitnet"]),
        ("hidden_act", "silu"),
        ("attention_bias", True),
        ("attention_bias", 0),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 2e4}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("rope_parameters", [1e4]),
        ("rope_theta", "big"),
        ("rope_theta", 0),
        ("rope_theta", float("nan")),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", None),
        ("head_dim", 16),
        ("hidden_size", 0),
        ("hidden_size", -24),
        ("hidden_size", 24.0),
        ("hidden_size", "24"),
        ("hidden_size", True),
        ("num_attention_heads", 5),
        ("num_attention_heads", 24),  # a head size of 1 cannot turn in pairs
        ("num_key_value_heads", 2),
        ("vocab_size", None),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", 61),
        ("eos_token_id", [2, -1]),
        ("eos_token_id", {"id": 2}),
        ("bos_token_id", 2.5),
        ("pad_token_id", 1 << 70),
    ],
    ids=str,
)
def test_config_fields_out_of_range(folder: Path, field: str, value: object) -> None:
    change_config(folder, **{field: value})
    assert_refused(folder, "config.json", "expected", "got")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "gptq"),
        ("quant_method", None),
        ("linear_class", "linear"),
        ("linear_class", ["autobitlinear"]),
        ("quantization_mode", "sometimes"),
        ("use_rms_norm", True),
        ("modules_to_not_convert", ["lm_head", "q_proj"]),
    ],
    ids=str,
)
def test_quantization_that_is_not_supported(folder: Path, field: str, value: object) -> None:
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    change_config(folder, quantization_config=quantization | {field: value})
    assert_refused(folder, "config.json", f"quantization_config.{field}", "expected", "got")


def test_quantization_that_is_no_object(folder: Path) -> None:
    change_config(folder, quantization_config="bitnet")
    assert_refused(folder, "config.json", "quantization_config", "an object", "'bitnet'")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "qwen2", ["'bitnet' or 'llama'", "'qwen2'"]),
        ("model_type", {"a": 1}, ["'bitnet' or 'llama'"]),
        ("hidden_act", "gelu", ["'silu'", "'gelu'"]),
        ("hidden_act", ["silu"], ["'silu'"]),
        ("attention_bias", 1, ["true or false"]),
        ("mlp_bias", "yes", ["true or false"]),
        ("head_dim", 7, ["an even number", "7"]),
        ("head_dim", 12.0, ["a positive int"]),
        ("head_dim", -2, ["a positive int"]),
        ("partial_rotary_factor", 0.5, ["1.0", "0.5"]),
        ("rope_theta", 10**400, ["a number in"]),
        ("rope_scaling", "llama3", ["an object"]),
        (
            "rope_scaling",
            {"rope_type": "longrope", "factor": 4.0},
            ["rope_scaling.rope_type", "'llama3'", "'longrope'"],
        ),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}, ["rope_scaling.type", "'dynamic'"]),
        ("rope_scaling", {"rope_type": ["llama3"]}, ["rope_scaling.rope_type"]),
        ("rope_scaling", {"rope_type": "linear"}, ["rope_scaling.factor", "nothing"]),
        ("rope_scaling", {"type": "linear", "factor": 0}, ["factor"]),
        ("rope_scaling", {"type": "linear", "factor": "2"}, ["factor"]),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, ["low_freq_factor"]),
        ("rope_scaling", LLAMA3_ROPE | {"high_freq_factor": 1.0}, ["high_freq_factor", "above"]),
        ("rope_scaling", LLAMA3_ROPE | {"original_max_position_embeddings": 1.5}, ["a positive int"]),
        ("rope_scaling", {"type": "yarn"}, ["rope_scaling.factor", "nothing"]),
        ("rope_scaling", YARN | {"beta_fast": 0.5}, ["beta_fast", "at least beta_slow"]),
        ("rope_scaling", YARN | {"beta_slow": 1e-300}, ["beta_slow"]),
        ("rope_scaling", YARN | {"truncate": 1}, ["true or false"]),
        ("rope_scaling", YARN | {"attention_factor": 0.0}, ["attention_factor"]),
        ("rope_scaling", YARN | {"mscale": "1"}, ["mscale"]),
        ("rope_scaling", YARN | {"original_max_position_embeddings": 2**70}, ["original_max_position"]),
        ("rope_scaling", YARN | {"low_freq_factor": 1.0}, ["low_freq_factor"]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, ["what rope_scaling says"]),
        ("rope_parameters", LLAMA3_ROPE | {"factor": 2.0}, ["what rope_scaling says"]),
        ("rope_parameters", LLAMA3_ROPE | {"rope_theta": 2e4}, ["rope_theta = 20000.0", "10000.0"]),
        ("quantization_config", {"quant_method": "bitnet", "use_rms_norm": "yes"}, ["use_rms_norm"]),
        (
            "quantization_config",
            {"quant_method": "bitnet", "use_rms_norm": True, "rms_norm_eps": -1},
            ["projection_norm_eps", "-1"],
        ),
        (
            "quantization_config",
            {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "online",
                "modules_to_not_convert": [],
            },
            ["modules_to_not_convert"],
        ),
    ],
    ids=str,
)
def test_fields_of_a_llama(llama: Path, field: str, value: object, words: list[str]) -> None:
    change_config(llama, **{field: value})
    assert_refused(llama, "config.json", "expected", "got", *words)


def test_a_llama_without_its_quantization_config(llama: Path) -> None:
    """Then it may be float weights that are ternary, which packed ones are not."""
    change_config(llama, quantization_config=None)
    assert_refused(llama, "model.safetensors", "q_proj.weight", "F32 or BF16 or F16", "U8")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_config", [1]),
        ("decoder_config", {"window_": 3}),
        ("decoder_config", {"window": 2**40, "local_layers": [0]}),
        ("decoder_config", {"window": 3, "local_layers": 1}),
        ("decoder_config", {"window": 3, "local_layers": [2]}),
        ("decoder_config", {"rope_scaling": 3}),
        ("decoder_config", {"rope_scaling": {"kind": "longrope", "factor": 2.0}}),
        ("decoder_config", {"rope_scaling": {"kind": "factors", "factor": 1.0}}),
        ("decoder_config", {"rope_scaling": {"kind": "factors", "factor": 1.0, "factors": [1.0] * 5}}),
        ("decoder_config", {"rope_scaling": {"kind": "factors", "factor": 1.0, "factors": [0.0] * 6}}),
        ("decoder_config", {"rope_scaling": {"kind": "factors", "factor": 1.0, "factors": "123456"}}),
        ("decoder_config", {"rope_scaling": {"kind": "yarn", "factor": 2.0}, "rope_theta": 1.0}),
        ("decoder_config", {"rope_scaling": {"kind": "linear"}}),
        ("decoder_config", {"activation": ["silu"]}),
        ("decoder_config", {"residual_scale": 10**400}),
        ("decoder_config", {"qk_norm": 1}),
        ("activation_bits", 8.0),
        ("activation_bits", 4),
        ("group_size", False),
        ("group_size", 32),
        ("use_rms_norm", 1),
    ],
    ids=str,
)
def test_fields_of_our_own_folders(our_llama: Path, field: str, value: object) -> None:
    if field != "decoder_config":
        quantization = json.loads((our_llama / "config.json").read_text())["quantization_config"]
        field, value = "quantization_config", quantization | {field: value}
    change_config(our_llama, **{field: value})
    assert_refused(our_llama, "config.json", "expected", "got")


def test_a_published_folder_has_no_fields_of_ours(llama: Path) -> None:
    """The names may mean anything there: Falcon3 has an "activation" that is none of ours."""
    before = from_pretrained(llama).config
    change_config(llama, activation="swiglu", decoder_config={"window": 3}, group_size=64, qk_norm=True)
    assert from_pretrained(llama).config == before


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"]
)
def test_a_missing_size_is_named(folder: Path, name: str) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    del fields[name]
    file.write_text(json.dumps(fields))
    assert_refused(folder, "config.json", name, "got nothing")


@pytest.mark.parametrize("size", [10**9, 10**15, 10**40])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_huge_claimed_sizes(folder: Path, name: str, size: int) -> None:
    changes = {name: size}
    if name == "hidden_size":
        changes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    change_config(folder, **changes)
    assert_refused(folder, "config.json", name, str(size))


@pytest.mark.parametrize("size", [10**9, 10**15, 10**40])
@pytest.mark.parametrize("name", ["num_attention_heads", "head_dim"])
def test_huge_claimed_heads(llama: Path, name: str, size: int) -> None:
    """No head_dim is too large for a divisor; the product with hidden_size is."""
    change_config(llama, **{name: 3 * size})
    assert_refused(
        llama, "config.json", "num_attention_heads, head_dim and hidden_size", "a matrix that fits"
    )


# Tensors


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(f"{UP}.weight"))
    assert_refused(folder, "model.safetensors", f"{UP}.weight", "U8 [9, 24]", "no such tensor")


def test_a_missing_scale_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    assert_refused(folder, "model.safetensors", f"{UP}.weight_scale", "no such tensor")


def test_a_missing_head_is_named(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    assert_refused(folder, "model.safetensors", "lm_head.weight", "no such tensor")


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(36)}))
    assert_refused(folder, "model.safetensors", f"{UP}.bias", "only the")


def test_a_layer_too_many(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    assert_refused(folder, "model.safetensors", "model.layers.1.", "only the")


def test_a_layer_too_few(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    assert_refused(folder, "config.json", "num_hidden_layers", "model.layers.2")


def test_a_second_head_that_differs(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": -tensors[EMBEDDING]}))
    assert_refused(folder, "model.safetensors", "lm_head.weight")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{UP}.weight", torch.zeros(36, 24, dtype=torch.uint8)),
        (f"{UP}.weight", torch.zeros(24, 9, dtype=torch.uint8)),
        (f"{UP}.weight", torch.zeros(216, dtype=torch.uint8)),
        (f"{UP}.weight", torch.zeros(9, 24, dtype=torch.int8)),
        (f"{UP}.weight", torch.zeros(9, 24)),
        (f"{UP}.weight", torch.zeros(0, 24, dtype=torch.uint8)),
        (f"{UP}.weight_scale", torch.ones(2)),
        (f"{UP}.weight_scale", torch.ones(1, dtype=torch.int32)),
        (f"{UP}.weight_scale", torch.ones(1, dtype=torch.float64)),
        (f"{UP}.weight_scale", torch.ones(0)),
        (NORM, torch.ones(23)),
        (NORM, torch.ones(24, dtype=torch.int64)),
        (NORM, torch.ones(24, 1)),
        (EMBEDDING, torch.ones(60, 24)),
        (EMBEDDING, torch.ones(61, 24, dtype=torch.float64)),
        (EMBEDDING, torch.ones(61, 24, dtype=torch.uint8)),
    ],
    ids=lambda value: (
        value.rsplit(".", 2)[-1] if isinstance(value, str) else f"{value.dtype} {list(value.shape)}"
    ),
)
def test_wrong_shapes_and_dtypes(folder: Path, name: str, tensor: Tensor) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    assert_refused(folder, "model.safetensors", name, "expected", str(list(tensor.shape)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0])
def test_impossible_scales(folder: Path, value: float) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight_scale": torch.tensor([value])}))
    assert_refused(folder, "model.safetensors", f"{UP}.weight_scale", "above 0", str(value))


def test_a_reciprocal_scale_that_overflows(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitnet", "linear_class": "bitlinear"})
    change_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight_scale": torch.tensor([1e-40])}))
    assert_refused(folder, "model.safetensors", f"{UP}.weight_scale", "reciprocal")


def test_a_row_scale_of_ours_that_is_impossible(ours: Path) -> None:
    change_tensors(ours, lambda tensors: tensors[f"{UP}.weight_scale"][35:].fill_(float("nan")))
    assert_refused(ours, "model.safetensors", f"{UP}.weight_scale")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [NORM, EMBEDDING])
def test_floats_that_are_none(folder: Path, name: str, value: float) -> None:
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert_refused(folder, "model.safetensors", name, "finite")


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{Q}.bias", torch.ones(35)),
        (f"{Q}.bias", torch.ones(36, dtype=torch.int64)),
        (f"{Q}.bias", torch.full((36,), torch.nan)),
        (f"{Q}.rms_norm.weight", torch.ones(36)),
        (f"{Q}.rms_norm.weight", torch.full((24,), torch.inf)),
        (f"{Q}.norm.weight", torch.ones(24)),
        (f"{Q}.linear.weight", torch.zeros(9, 24, dtype=torch.uint8)),
        (f"{Q}.weight", torch.zeros(6, 24, dtype=torch.uint8)),  # hidden / heads instead of head_dim
        (f"{Q}.weight", torch.zeros(36, 24)),  # "bitlinear" is packed always
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype} {list(value.shape)}",
)
def test_tensors_of_a_llama(llama: Path, name: str, tensor: Tensor) -> None:
    change_tensors(llama, lambda tensors: tensors.update({name: tensor}))
    assert_refused(llama, "model.safetensors", name, "expected", "got")


@pytest.mark.parametrize("name", [f"{Q}.bias", f"{Q}.rms_norm.weight", f"{Q}.weight_scale"])
def test_a_missing_tensor_of_a_llama(llama: Path, name: str) -> None:
    change_tensors(llama, lambda tensors: tensors.pop(name))
    assert_refused(llama, "model.safetensors", name, "no such tensor")


def test_a_bias_that_overflows_with_its_scale(llama: Path) -> None:
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "use_rms_norm": True}
    change_config(llama, quantization_config=quantization)
    from_pretrained(llama)
    change_tensors(
        llama,
        lambda tensors: tensors.update(
            {f"{Q}.bias": torch.full((36,), 1e38), f"{Q}.weight_scale": torch.tensor([100.0])}
        ),
    )
    assert_refused(llama, "model.safetensors", f"{Q}.bias", "finite numbers")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{Q}.linear.bias", torch.ones(35)),
        (f"{Q}.linear.bias", torch.full((36,), torch.nan)),
        (f"{Q}.linear.weight_scale", torch.ones(1, 36)),
        (f"{Q}.norm.weight", torch.full((24,), torch.nan)),
        (f"{Q}.rms_norm.weight", torch.ones(24)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype} {list(value.shape)}",
)
def test_tensors_of_our_llama(our_llama: Path, name: str, tensor: Tensor) -> None:
    change_tensors(our_llama, lambda tensors: tensors.update({name: tensor}))
    assert_refused(our_llama, "model.safetensors", name, "expected", "got")


def test_group_scales_in_our_own_format(our_llama: Path) -> None:
    """Groups of 64 inputs: one for 24 inputs, and for 36. A scale of 0 is that of a group of zeros."""
    fields = json.loads((our_llama / "config.json").read_text())["quantization_config"]
    change_config(our_llama, quantization_config=fields | {"group_size": 64})
    assert_refused(our_llama, "model.safetensors", "weight_scale", "[1, 36]")

    def group(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name][None].clone()

    change_tensors(our_llama, group)
    assert from_pretrained(our_llama).config.group_size == 64
    change_tensors(our_llama, lambda tensors: tensors[f"{Q}.linear.weight_scale"][0, 3:4].fill_(0.0))
    from_pretrained(our_llama)
    change_tensors(our_llama, lambda tensors: tensors[f"{Q}.linear.weight_scale"][0, 3:4].fill_(-1.0))
    assert_refused(our_llama, "model.safetensors", f"{Q}.linear.weight_scale")


def test_group_scales_have_one_layout(our_llama: Path) -> None:
    """Row has the same shape for 36 x 24 as for no other layout, so the shape alone is right."""
    fields = json.loads((our_llama / "config.json").read_text())["quantization_config"]
    change_config(
        our_llama, quantization_config=fields | {"group_size": 64, "layouts": {f"{Q}.linear": "row"}}
    )

    def group(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name][None].clone()
        tensors[f"{Q}.linear.packed_weight"] = torch.full((36, 1, 64), 0b01010101, dtype=torch.uint8)

    change_tensors(our_llama, group)
    assert_refused(our_llama, "model.safetensors", f"{Q}.linear.packed_weight", "'tile16'", "'row'")


@pytest.mark.parametrize("place", range(4))
def test_code_3_in_published_weights(folder: Path, place: int) -> None:
    change_tensors(folder, lambda tensors: tensors[f"{UP}.weight"][8, 23:].bitwise_or_(3 << 2 * place))
    assert_refused(folder, "model.safetensors", f"{UP}.weight", "code 3", "byte 215")


@pytest.mark.parametrize("place", range(4))
def test_code_3_in_our_weights(ours: Path, place: int) -> None:
    change_tensors(
        ours, lambda tensors: tensors[f"{UP}.packed_weight"][1, 1, 5:6].bitwise_or_(3 << 2 * place)
    )
    assert_refused(ours, "model.safetensors", f"{UP}.packed_weight", "code 3", f"byte {3 * 64 + 5}")


@pytest.mark.parametrize(
    "index", [(2, 0, 16), (2, 1, 63), (0, 1, 0)], ids=["row 36 of 36", "last row", "column 24 of 24"]
)
def test_padding_of_our_weights_that_is_not_zero(ours: Path, index: tuple[int, int, int]) -> None:
    """up_proj is 36 x 24: rows 4 to 15 of the third tile, inputs 8 to 15 of the second block are padding."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        packed = tensors[f"{UP}.packed_weight"]
        packed[index] = int(packed[index]) & 0b00111111 | 0b10000000  # p = 3: inputs 12 to 15 of the block

    change_tensors(ours, spoil)
    assert_refused(ours, "model.safetensors", f"{UP}.packed_weight", "padding")


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_padding_of_every_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    """Weights of 1 in all of the padding, as large as the layout makes it."""
    repack(from_pretrained(folder), layout).save_pretrained(tmp_path / "ours")
    name = f"{UP}.packed_weight"

    def spoil(tensors: dict[str, Tensor], rows: int, columns: int) -> None:
        padded = packing.padded_size(36, 24, layout)
        w = torch.ones(padded, dtype=torch.int8)
        w[:rows, :columns] = packing.unpack(tensors[name], *padded, layout)[:rows, :columns]
        tensors[name] = packing.pack(w, layout)

    change_tensors(tmp_path / "ours", lambda tensors: spoil(tensors, *packing.padded_size(36, 24, layout)))
    from_pretrained(tmp_path / "ours")  # nothing but the weights again
    rows, columns = packing.padded_size(36, 24, layout)
    if rows > 36:
        change_tensors(tmp_path / "ours", lambda tensors: spoil(tensors, 36, columns))
        assert_refused(tmp_path / "ours", "model.safetensors", name, "padding")
    if columns > 24:
        change_tensors(tmp_path / "ours", lambda tensors: spoil(tensors, rows, 24))
        assert_refused(tmp_path / "ours", "model.safetensors", name, "padding")


def test_bytes_that_are_no_codes_in_base_3(folder: Path, tmp_path: Path) -> None:
    repack(from_pretrained(folder), "tile16_base3").save_pretrained(tmp_path / "ours")
    name = f"{UP}.packed_weight"
    change_tensors(tmp_path / "ours", lambda tensors: tensors[name][1, 1, 5:6].fill_(243))
    assert_refused(tmp_path / "ours", "model.safetensors", name, "at most 242", "got 243")


@pytest.mark.parametrize("layouts", [{UP: "tile17"}, {UP: None}, [UP], "row"], ids=str)
def test_layouts_have_to_be_known(ours: Path, layouts: Any) -> None:
    quantization = {"quant_method": "bitnet_ops", "layout": "tile16", "layouts": layouts}
    change_config(ours, quantization_config=quantization)
    assert_refused(ours, "config.json", "quantization_config.layouts")


def test_a_layout_that_is_not_that_of_the_file(ours: Path) -> None:
    quantization = {"quant_method": "bitnet_ops", "layout": "tile16", "layouts": {UP: "row"}}
    change_config(ours, quantization_config=quantization)
    assert_refused(ours, "model.safetensors", f"{UP}.packed_weight", "expected U8")


def test_our_layout_has_to_be_known(ours: Path) -> None:
    change_config(ours, quantization_config={"quant_method": "bitnet_ops", "layout": "tile17"})
    assert_refused(ours, "config.json", "quantization_config.layout", "tile17")


def test_floats_with_a_scale_have_to_be_ternary(folder: Path) -> None:
    for value in (0.5, 2.0, 300.0, float("nan")):
        weight = torch.ones(36, 24)
        weight[35, 23] = value
        change_tensors(folder, lambda tensors, weight=weight: tensors.update({f"{UP}.weight": weight}))
        assert_refused(folder, "model.safetensors", f"{UP}.weight", "{-1, 0, 1}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_master_weights_have_to_be_finite(tmp_path: Path, value: float) -> None:
    sizes = Sizes()
    weights = Weights.random(sizes)
    tensors = weights.floats | {f"{name}.weight": w.float() for name, w in weights.ternary.items()}
    tensors[f"{UP}.weight"][0, :8] = value  # eight times 3e38 is above the largest float32
    folder = write_folder(tmp_path, sizes.config(quantization_config=None), tensors)
    assert_refused(folder, "model.safetensors", f"{UP}.weight", "finite")


def test_packed_weights_where_the_config_speaks_of_master_weights(folder: Path) -> None:
    change_config(folder, quantization_config=None)
    assert_refused(folder, "model.safetensors", ".weight", "F32", "U8 [6, 24]")


def test_rows_that_the_published_packing_cannot_hold(folder: Path) -> None:
    change_config(folder, intermediate_size=34)
    assert_refused(folder, "gate_proj.weight", "34")


# The index of several files


def sharded(folder: Path, **weight_map: str) -> Path:
    """A valid folder of two files whose index is then changed; "__" in a name stands for "."."""
    sizes = Sizes()
    write_folder(folder, sizes.config(), published_tensors(Weights.random(sizes)), files=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
    index.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "../checkpoint/model-00001-of-00002.safetensors",
        "/etc/passwd",
        "/tmp/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "sub/a.safetensors",
        "a\0.safetensors",
        ".safetensors",
        "passwd",
        "",
        7,
        None,
        ["model-00001-of-00002.safetensors"],
    ],
    ids=repr,
)
def test_the_index_cannot_lead_out_of_the_folder(tmp_path: Path, path: Any) -> None:
    folder = sharded(tmp_path / "checkpoint", model__norm__weight=path)
    assert_refused(folder, "model.safetensors.index.json", "model.norm.weight", "plain name")


def test_the_index_names_a_file_that_is_missing(tmp_path: Path) -> None:
    folder = sharded(tmp_path, model__norm__weight="other.safetensors")
    assert_refused(folder, "other.safetensors", "no such file")


def test_the_index_names_the_wrong_file(tmp_path: Path) -> None:
    content = json.loads((sharded(tmp_path) / "model.safetensors.index.json").read_text())
    files = sorted(set(content["weight_map"].values()))
    other = files[1 - files.index(content["weight_map"]["model.norm.weight"])]
    sharded(tmp_path, model__norm__weight=other)
    assert_refused(tmp_path, other, "model.norm.weight", "no such tensor")


def test_the_index_names_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    folder = sharded(tmp_path, made_up="model-00001-of-00002.safetensors")
    assert_refused(folder, "model-00001-of-00002.safetensors", "made_up", "no such tensor")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    first, second = (folder / f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    save_file(load_file(first) | load_file(second), second)
    assert_refused(folder, second.name, "each tensor in one file")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "[1]"]
)
def test_an_index_without_a_map(tmp_path: Path, content: str) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(content)
    assert_refused(tmp_path, "model.safetensors.index.json", "expected", "got")


# Headers that safetensors itself would never write


def with_header(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + data)
    return folder


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"{}",
        b'{"a":1}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}',
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U9","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}',
        b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}',
        b"[" * 100_000,
    ],
    ids=lambda header: header[:60].decode(),
)
@pytest.mark.parametrize("data", [b"", b"\0"], ids=["no data", "a byte"])
def test_strange_headers(folder: Path, header: bytes, data: bytes) -> None:
    assert_refused(with_header(folder, header, data), "safetensors", "expected")


@pytest.mark.parametrize("length", [1, 1 << 20, 100_000_001, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
def test_header_lengths_beyond_the_file(folder: Path, length: int) -> None:
    assert_refused(with_header(folder, b"{}", length=length), "model.safetensors", "valid safetensors")


def test_a_file_that_shrinks_while_it_is_read(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet_ops.checkpoint.tensor_source.PIECE_BYTES", 100)
    file = ours / "model.safetensors"
    expected = load_file(file)
    with TensorFiles(ours, mmap=False) as files:
        large = [name for name, stored in files.tensors.items() if stored.nbytes > 300]
        assert large
        for name in large:  # several pieces, in several threads
            assert torch.equal(files.read(name), expected[name])
        last = max(large, key=lambda name: files.tensors[name].offset)
        end = files.tensors[last].offset + files.tensors[last].nbytes
        os.truncate(file, end - 1)
        with pytest.raises(CheckpointError, match=r"readable data.*ends before the tensor"):
            files.read(last)


# Text files


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xff", b'{"version":"1.0"}', b"[" * 200_000])
def test_tokenizer_garbage(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert_refused(folder, "tokenizer.json", "a tokenizer")


def test_token_ids_beyond_the_embedding(folder: Path) -> None:
    byte_tokenizer(62).save(str(folder / "tokenizer.json"))
    assert_refused(folder, "tokenizer.json", "vocab_size = 61", "61")


@pytest.mark.parametrize("token", [61, 99, 100, 4_294_967_295])
def test_a_single_token_id_beyond_the_embedding(folder: Path, token: int) -> None:
    tokenizer = json.loads(byte_tokenizer(60).to_str())
    tokenizer["model"]["vocab"]["ab"] = token
    for indent in (None, 2):
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=indent))
        assert_refused(folder, "tokenizer.json", "vocab_size = 61", str(token))


def test_token_ids_that_count_entries(folder: Path) -> None:
    entries = [(chr(256 + number), -1.0) for number in range(62)]
    Tokenizer(models.Unigram(entries, unk_id=0)).save(str(folder / "tokenizer.json"))
    assert_refused(folder, "tokenizer.json", "vocab_size = 61", "61")


def test_an_added_token_beyond_the_embedding(folder: Path) -> None:
    tokenizer = byte_tokenizer(61)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert_refused(folder, "tokenizer.json", "vocab_size = 61", "61")


def test_a_token_may_look_like_an_id(folder: Path) -> None:
    tokenizer = json.loads(byte_tokenizer(60).to_str())
    tokenizer["model"]["vocab"]['":999'] = 60
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = from_pretrained(folder).tokenizer
    assert loaded is not None
    assert loaded.token_to_id('":999') == 60


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": 61},
        {"eos_token_id": [2, "3"]},
        {"eos_token_id": True},
        {"bos_token_id": [1]},
        {"pad_token_id": -1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_p": float("inf")},
        {"top_k": True},
        {"max_new_tokens": [1]},
        {"do_sample": "yes"},
    ],
    ids=str,
)
def test_generation_fields(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    assert_refused(folder, "generation_config.json", next(iter(fields)), "expected", "got")


@pytest.mark.parametrize("template", [3, {"default": "x"}, [{"name": "default", "template": 3}]], ids=str)
def test_chat_templates(folder: Path, template: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert_refused(folder, "tokenizer_config.json", "chat_template", "a string")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'x' | center(10**10) }}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_hostile_chat_templates_in_a_folder(folder: Path, template: str, place: str) -> None:
    """Loading does not run them; a chat refuses them, fast and in little memory."""
    byte_tokenizer(61).save(str(folder / "tokenizer.json"))
    content = template if place.endswith("jinja") else json.dumps({"chat_template": template})
    (folder / place).write_text(content)
    session = ChatSession(from_pretrained(folder))
    with pytest.raises(ValueError, match="chat_template: "):
        list(session.reply("Hello"))


# Fuzzing: whatever happens to the bytes, there is a model that runs or a CheckpointError


def load_or_refuse(folder: Path) -> bool:
    """Whether the folder loads; a model that loads has to run, too."""
    try:
        model = from_pretrained(folder)
    except CheckpointError as error:
        if str(folder) not in str(error):
            raise AssertionError("the message names no file") from error
        return False
    ids = torch.tensor([[0, 3, 1]])
    assert model(ids).shape == (1, 3, model.config.vocab_size)
    return True


# One kind of file in each fast run: ours, with every tensor that there is.
@pytest.fixture(
    params=[
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("folder", "ours", "llama")),
        "our_llama",
    ]
)
def subject(request: pytest.FixtureRequest) -> Path:
    """A valid folder in either format, small enough to load some thousand times."""
    return request.getfixturevalue(request.param)


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_fuzz_truncation(subject: Path) -> None:
    file = subject / "model.safetensors"
    data = file.read_bytes()
    chance = random.Random(1)
    ends = {0, 1, 7, 8, 9, header_end(data) - 1, header_end(data), header_end(data) + 1, len(data) - 1}
    for end in sorted(ends | {chance.randrange(len(data)) for _ in range(100)}):
        file.write_bytes(data[:end])
        assert not load_or_refuse(subject), end
    file.write_bytes(data + b"\0")
    assert not load_or_refuse(subject)
    file.write_bytes(data)
    assert load_or_refuse(subject)


def flips(data: bytes, start: int, end: int, count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(count):
        spoiled = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            spoiled[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
        yield bytes(spoiled)


def test_fuzz_header_bytes(subject: Path) -> None:
    file = subject / "model.safetensors"
    data = file.read_bytes()
    refused = 0
    for spoiled in flips(data, 0, header_end(data), 400, seed=2):
        file.write_bytes(spoiled)
        refused += not load_or_refuse(subject)
    # A flip goes unnoticed only in a space of the padding or in the file's own metadata.
    assert refused > 360


def test_fuzz_data_bytes(subject: Path) -> None:
    file = subject / "model.safetensors"
    data = file.read_bytes()
    results = set()
    for spoiled in flips(data, header_end(data), len(data), 200, seed=3):
        file.write_bytes(spoiled)
        results.add(load_or_refuse(subject))
    assert results == {True, False}  # some flips make a code 3 or a NaN, some only another weight


STRANGE_VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 61, 1.5, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 63,
    10**30, "", "24", "bitnet", "x" * 10_000, [], [1], [[[]]], {}, {"a": None}, {"rope_type": "default"},
)  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_fuzz_json_fields(subject: Path, name: str) -> None:
    file = subject / name
    if name == "generation_config.json":
        fields: dict[str, Any] = dict.fromkeys(
            ("eos_token_id", "bos_token_id", "temperature", "top_k", "do_sample"), 1
        )
        fields["do_sample"] = True
    else:
        fields = {
            "head_dim": 8,
            "rope_scaling": None,
            "attention_bias": False,
            **json.loads(file.read_text()),
        }
        rope = fields["rope_scaling"] or {"rope_type": "default"}
        fields["rope_parameters"] = {"rope_theta": fields["rope_theta"], **rope}
        if subject.name.startswith("our"):
            fields["decoder_config"] = {
                "qk_norm": False, "residual_scale": 1.0, "logit_scale": 1.0, "rope_scaling": None,
                "local_layers": [1], "window": 3, "query_scale": 0.3, "dropout": 0.0,
            }  # fmt: skip
            if rope["rope_type"] != "default":
                fields["decoder_config"]["rope_scaling"] = {"kind": "linear", "factor": 2.0}
    file.write_text(json.dumps(fields))
    assert load_or_refuse(subject)
    for field in fields:
        for value in STRANGE_VALUES:
            file.write_text(json.dumps(fields | {field: value}))
            load_or_refuse(subject)
            if isinstance(fields[field], dict):
                for inner in fields[field]:
                    file.write_text(json.dumps(fields | {field: fields[field] | {inner: value}}))
                    load_or_refuse(subject)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_fuzz_json_bytes(subject: Path, name: str) -> None:
    file = subject / name
    if name == "tokenizer.json":
        byte_tokenizer(60).save(str(file))
    data = file.read_bytes()
    loaded = []
    for spoiled in flips(data, 0, len(data), 200, seed=4):
        file.write_bytes(spoiled)
        loaded.append(load_or_refuse(subject))
    assert not all(loaded), "no flip was noticed"
