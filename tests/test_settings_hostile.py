"""Fields of config.json that are missing, out of range or wrong for the tensors: an error names them."""

import json
from pathlib import Path

import pytest
from damaged_checkpoints import (
    YARN,
    assert_refused,
    change_config,
)
from tiny_checkpoints import (
    LLAMA3_ROPE,
)

from bitnet_ops import from_pretrained


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
