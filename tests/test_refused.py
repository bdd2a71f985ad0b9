"""Models that are known to be of another kind are refused by name, with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import Sizes, Weights, published_tensors, tiny_folder, write_folder

from bitnet_ops import from_pretrained
from bitnet_ops.checkpoint import CheckpointError
from bitnet_ops.families import FAMILIES, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid checkpoint."""
    sizes = Sizes(llama=True)
    tensors = published_tensors(Weights.random(sizes), reciprocal=True)
    return write_folder(tmp_path / "checkpoint", sizes.config(), tensors)


def assert_refused(folder: Path, words: list[str], **changes: Any) -> None:
    """With these fields in config.json, loading fails with all the words, for either kind of projection."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for linear in ({}, {"linear": torch.nn.Linear}):
        with pytest.raises(CheckpointError) as caught:
            from_pretrained(folder, **linear)
        for word in (str(file), "expected", "got", *words):
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("mixtral", ["a mixture of experts"]),
        ("qwen3_moe", ["a mixture of experts"]),
        ("mamba2", ["recurrent layers"]),
        ("qwen3_next", ["recurrent layers"]),
        ("falcon_h1", ["recurrent layers"]),
        ("lfm2", ["recurrent layers"]),
        ("rwkv7", ["recurrent layers"]),
        ("bert", ["an encoder", "only decoders"]),
        ("t5", ["an encoder with a decoder"]),
        ("gemma3", ["text and other media", "language model alone"]),
        ("minicpm3", ["multi-head latent attention"]),
        ("mistral", ["a dense decoder"]),
        ("hunyuan_v1_dense", ["-1.5, -0.5, 0.5 and 1.5", "not ternary"]),
    ],
)
def test_a_known_model_type_is_refused_with_the_reason(
    folder: Path, model_type: str, words: list[str]
) -> None:
    assert_refused(
        folder, ["model_type", "'bitnet' or 'llama'", repr(model_type), *words], model_type=model_type
    )


@pytest.mark.parametrize("model_type", ["a type of tomorrow", None, ["mixtral"], 3, ""])
def test_an_unknown_model_type_names_those_that_are_known(folder: Path, model_type: Any) -> None:
    assert_refused(folder, ["model_type", "'bitnet' or 'llama'", repr(model_type)], model_type=model_type)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_experts", 8, ["a mixture of experts", "8"]),
        ("num_local_experts", 16, ["a mixture of experts"]),
        ("n_routed_experts", [64, 64], ["a mixture of experts"]),
        ("layer_types", ["full_attention", "linear_attention"], ["'linear_attention'", "recurrent layers"]),
        ("layer_types", ["conv", "full_attention"], ["'conv'", "recurrent layers"]),
        ("layer_types", [["full_attention"]], ["recurrent layers"]),
        ("mamba_d_state", 128, ["recurrent layers"]),
        ("full_attention_interval", 4, ["recurrent layers"]),
        ("vision_config", {"hidden_size": 3}, ["text and other media"]),
        ("text_config", {"model_type": "llama"}, ["text and other media"]),
        ("is_encoder_decoder", True, ["an encoder with a decoder"]),
        ("kv_lora_rank", 512, ["multi-head latent attention"]),
        ("prism.hadamard.version", 1, ["a rotated basis"]),
        ("hadamard_block_size", 0, ["a rotated basis"]),
        ("rotation", {"Hadamard": True}, ["rotation.Hadamard", "a rotated basis"]),
    ],
    ids=str,
)
def test_a_part_that_no_family_has_is_refused(folder: Path, field: str, value: Any, words: list[str]) -> None:
    assert_refused(folder, [field, *words], **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", None),
        ("num_experts", 0),
        ("num_local_experts", 1),
        ("layer_types", None),
        ("layer_types", ["full_attention", "full_attention"]),
        ("vision_config", None),
        ("is_encoder_decoder", False),
        ("use_hadamard", False),
    ],
    ids=str,
)
def test_fields_of_such_models_that_say_no_are_no_reason(folder: Path, field: str, value: Any) -> None:
    before = from_pretrained(folder).config
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert from_pretrained(folder).config == before


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", ["2 to 8 bits", "not ternary"]),
        ("awq", ["not ternary"]),
        ("compressed-tensors", ["not ternary"]),
        ("bitsandbytes", ["not ternary"]),
        ("aqlm", ["not ternary"]),
        ("hqq", ["not ternary"]),
        ("quip", ["not ternary"]),
        ("fbgemm_fp8", ["floats of 4 or 8 bits"]),
        ("fp8", ["floats of 4 or 8 bits"]),
        ("FP8", ["floats of 4 or 8 bits"]),
        ("mxfp4", ["4 bits a weight"]),
    ],
)
def test_other_quantizations_are_refused_with_the_reason(folder: Path, method: str, words: list[str]) -> None:
    quantization = {"quant_method": method, "bits": 2}
    field = "quantization_config.quant_method"
    assert_refused(folder, [field, repr(method), *words], quantization_config=quantization)


def test_no_family_is_refused() -> None:
    assert not {family.model_type for family in FAMILIES} & refused.MODEL_TYPES.keys()


def test_every_quantization_of_transformers_is_known() -> None:
    """So that none of a new version is read as if it were not there."""
    auto = pytest.importorskip("transformers.quantizers.auto")
    known = {"bitnet", "gguf", "gemma", "bitsandbytes_4bit", "bitsandbytes_8bit", *refused.QUANT_METHODS}
    assert not auto.AUTO_QUANTIZATION_CONFIG_MAPPING.keys() - known


def test_a_folder_without_model_type_is_told_by_its_architecture(tmp_path: Path) -> None:
    for name in ("BitNetForCausalLM", None):
        folder = tiny_folder(tmp_path / f"{name}", model_type=None, architectures=name and [name])
        assert from_pretrained(folder).config.sub_norms
    folder = tiny_folder(tmp_path / "other", model_type=None, architectures=["OtherForCausalLM"])
    with pytest.raises(CheckpointError, match=r"model_type: expected 'bitnet' or 'llama'.*, got nothing"):
        from_pretrained(folder)
