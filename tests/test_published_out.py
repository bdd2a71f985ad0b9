"""The published layout, written by us: transformers loads it and gives the same logits, and so do we.

Weights, scales and norms are compared bit by bit with what transformers has loaded. End to end both sides are
compared with float64, as in tests/test_llama.py: our mean error is at most twice that of transformers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import FAMILIES, random_model
from text_models import CHAT_TEMPLATE, EOS, byte_level_tokenizer, tiny_model
from tiny_checkpoints import Sizes, Weights, published_tensors, tiny_folder, write_folder

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from test_llama import CASES, prompts
from their_models import exact_llama, make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, BitNetForCausalLM, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, unpack_weights
from transformers.integrations.bitnet import BitLinear as TheirBitLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import bitnet_ops
from bitnet_ops import BitLinear, BitNet, BitNetConfig, DecoderConfig, from_pretrained, save_published
from bitnet_ops.checkpoint import published_out
from bitnet_ops.layers.norm import RMSNorm

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Models are so small that threads would wait for one another."""
    torch.set_num_threads(1)


def load_theirs(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def assert_same_model(ours: BitNet, again: BitNet) -> None:
    """The same settings and the same numbers, whatever the layout of packed weights."""
    assert again.config.replace(initializer_range=0.02, dropout=0.0) == ours.config.replace(
        initializer_range=0.02, dropout=0.0
    )
    expected, given = ours.state_dict(), again.state_dict()
    assert expected.keys() == given.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.float(), given[name].float()), name


def assert_theirs_has_the_numbers(ours: BitNet, theirs: Any) -> None:
    """Every number of ours is in the module of the same name of theirs."""
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, BitLinear):
            other = modules[name.removesuffix(".linear")]
            if hasattr(other, "weight_scale"):
                w, scale, bias = quantised_numbers(other)
                assert torch.equal(w, module.unpack().float()), name
                assert torch.equal(scale.expand(module.out_features), module.weight_scale), name
            else:
                columns = torch.arange(module.in_features) // (module.group_size or module.in_features)
                scale = module.scales().view(-1, module.out_features)[columns].T
                assert torch.equal(other.weight.float(), module.unpack() * scale), name
                bias = other.bias
            assert (bias is None) == (module.bias is None)
            assert bias is None or torch.equal(bias, module.bias), name
        elif not list(module.children()) and list(module.parameters()):
            other = modules[name.replace("_proj.norm", "_proj.rms_norm")]
            offset = 1.0 if isinstance(other, Gemma3RMSNorm) else 0.0
            assert torch.equal(other.weight.float() + offset, module.weight.float()), name


def quantised_numbers(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ternary weights, multiplier and bias of one of transformers' two classes."""
    if isinstance(layer, TheirBitLinear):
        return unpack_weights(layer.weight, dtype=torch.float32), 1 / layer.weight_scale, layer.bias
    assert isinstance(layer, AutoBitLinear)
    bias = None if layer.bias is None else layer.bias * layer.weight_scale
    return layer.weight, layer.weight_scale, bias


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(hidden=30, heads=3, intermediate=44)])
def test_bitnet(tmp_path: Path, sizes: Sizes) -> None:
    """Sizes of the second one cannot be packed: 30 rows are no multiple of 4."""
    weights = Weights.random(sizes)
    tensors = published_tensors(weights)
    if sizes.hidden % 4:
        for name, w in weights.ternary.items():
            tensors[f"{name}.weight"] = w.bfloat16()
    ours = from_pretrained(write_folder(tmp_path / "a", sizes.config(), tensors))
    save_published(ours, tmp_path / "b")
    assert_same_model(ours, from_pretrained(tmp_path / "b"))
    theirs = load_theirs(tmp_path / "b")
    assert isinstance(theirs, BitNetForCausalLM)
    assert_theirs_has_the_numbers(ours, theirs)


@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear", "ternary"])
@pytest.mark.parametrize("case", CASES)
def test_llama(tmp_path: Path, case: str, form: str) -> None:
    pair = make_llama(tmp_path / "a", form, num_hidden_layers=1, **CASES[case])
    save_published(pair.ours, tmp_path / "b")
    assert_same_model(pair.ours, from_pretrained(tmp_path / "b"))
    theirs = load_theirs(tmp_path / "b")
    assert isinstance(theirs, LlamaForCausalLM)
    assert_theirs_has_the_numbers(pair.ours, theirs)
    biased = CASES[case].get("attention_bias", False)
    written = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert written["linear_class"] == ("bitlinear" if biased and form == "bitlinear" else "autobitlinear")


def test_the_logits_of_transformers(tmp_path: Path) -> None:
    errors = []
    for seed in range(4):
        pair = make_llama(
            tmp_path / f"a{seed}", "autobitlinear", seed, num_hidden_layers=2, **CASES["wide heads"]
        )
        save_published(pair.ours, tmp_path / f"b{seed}")
        theirs = load_theirs(tmp_path / f"b{seed}")
        ids = prompts(2, seed=seed)
        exact = exact_llama(theirs, ids)
        with torch.no_grad():
            logits = (from_pretrained(tmp_path / f"b{seed}")(ids), theirs(ids).logits)
        errors.append([float((one - exact).abs().mean()) for one in logits])
    ours, theirs_error = torch.tensor(errors).median(0).values
    assert 0 < ours <= 2 * theirs_error


def test_a_bias_and_a_scale_that_no_class_has(tmp_path: Path) -> None:
    """The scale is no reciprocal of a float32 number, and the bias no product with the scale."""
    model = make_llama(tmp_path / "a", "bitlinear", num_hidden_layers=1, **CASES["biases"]).ours
    layer = model.model.layers[0].mlp.up_proj
    scales = 1.5 + torch.arange(100) * 2.0**-23
    near = torch.nextafter(1 / scales, torch.tensor([[0.0], [1.0]]))
    no_reciprocal = (1 / torch.cat((near, 1 / scales[None])) != scales).all(0)
    layer.weight_scale = scales[no_reciprocal][0].expand(layer.out_features).contiguous()
    with pytest.raises(ValueError, match=r"save_published: .*up_proj: .*biases and scales .*save_pretrained"):
        save_published(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_master_weights(tmp_path: Path) -> None:
    pair = make_llama(tmp_path / "a", "online", num_hidden_layers=1, **CASES["plain"])
    save_published(pair.ours, tmp_path / "b")
    assert_same_model(pair.ours, from_pretrained(tmp_path / "b"))


WIDE = DecoderConfig(
    vocab_size=61,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=64,
    activation_bits=16,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_activations_are_unpacked(tmp_path: Path, group_size: int, dtype: torch.dtype) -> None:
    ours = random_model(WIDE.replace(group_size=group_size), dtype=dtype)
    for module in ours.modules():
        if isinstance(module, RMSNorm):
            module.weight.copy_(module.weight.bfloat16())
    # bfloat16 does not hold the scales, so that everything is float32.
    expected = torch.float16 if dtype == torch.float16 else torch.float32
    assert save_published(ours, tmp_path / "b") == f"{str(expected).removeprefix('torch.')} weights"
    again = from_pretrained(tmp_path / "b")
    assert_same_model(ours, again)
    assert again.model.embed_tokens.weight.dtype == expected
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert isinstance(theirs, LlamaForCausalLM)
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert {parameter.dtype for parameter in theirs.parameters()} == {expected}
    assert_theirs_has_the_numbers(ours, theirs)


FAMILY_CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bitnet": ("bitnet-b1.58", {}, "packed weights, autobitlinear"),
    "qwen3": ("qwen3", {"activation_bits": 8}, "packed weights, autobitlinear"),
    "qwen3 groups": ("qwen3", {"group_size": 128}, "float32 weights"),
    "gemma3 with norms": ("gemma3", {}, "packed weights, autobitlinear"),
    "gemma3 floats": ("gemma3", {"activation_bits": 16, "projection_norms": False}, "float32 weights"),
}


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_families(tmp_path: Path, case: str) -> None:
    """Numbers are compared bit by bit. Logits show that settings mean the same to transformers: any other
    angle or activation moves them by as much as they spread, and rounding of inputs by a thousandth.
    """
    name, changes, form = FAMILY_CASES[case]
    config = FAMILIES[name].replace(eos_token_id=1, **changes)
    scales = "matrix" if config.activation_bits == 8 else "rows"
    ours = random_model(config, scales=scales)
    assert save_published(ours, tmp_path / "b") == form
    again = from_pretrained(tmp_path / "b")
    assert_same_model(ours, again)
    ids = prompts(2)
    assert torch.equal(ours(ids), again(ids))
    text = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids[:1, :5], **text), again.generate(ids[:1, :5], **text))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager")
    assert type(theirs).__name__.lower().startswith(case[:5])
    assert_theirs_has_the_numbers(ours, theirs)
    difference = (theirs(ids).logits - again(ids)).abs()
    assert difference.median() < 1e-2 * again(ids).std()


REFUSED: dict[str, tuple[Callable[[], BitNet], str]] = {
    "rows with 8 bits": (
        lambda: random_model(WIDE.replace(activation_bits=8)),
        r"q_proj: expected one scale for the matrix, .* got scales of rows",
    ),
    "another activation": (
        lambda: random_model(WIDE.replace(activation="relu2")),
        r"config.json of model_type 'llama' has no field for activation='relu2'",
    ),
    "a residual scale": (
        lambda: random_model(WIDE.replace(residual_scale=0.5, logit_scale=2.0)),
        r"config.json of model_type 'llama' has no field for residual_scale=0.5, logit_scale=2.0",
    ),
    "wide activations of BitNet": (
        lambda: random_model(BitNetConfig(**{**vars(WIDE), "activation": "relu2", "sub_norms": True})),
        r"expected activation_bits=8, .* of model_type 'bitnet' are taken for masters .* got 16",
    ),
    "float projections": (
        lambda: BitNet(WIDE, torch.nn.Linear),
        r"save_published: model: expected BitLinear projections, got Linear at '.*q_proj'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_say(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_published(make(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_text_files(tmp_path: Path) -> None:
    ours = tiny_model(chat=True)
    ours.generation_config = {"temperature": 0.5}
    save_published(ours, tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    assert again.chat_template == CHAT_TEMPLATE
    assert again.generation_config is not None
    assert again.generation_config["temperature"] == 0.5
    text = "It is a truth, 你好"
    expected = byte_level_tokenizer().encode(text).ids
    assert again.tokenizer is not None
    assert again.tokenizer.encode(text).ids == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs(text)["input_ids"] == expected
    assert theirs.eos_token == EOS
    messages = [{"role": "user", "content": "Hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False).startswith("<user>Hello<eos>")
    ids = torch.tensor([expected])
    assert torch.equal(ours.generate(ids, max_new_tokens=8), again.generate(ids, max_new_tokens=8))


def test_a_failure_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "a")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(published_out, "save_text_files", full)
    with pytest.raises(OSError, match="No space"):
        save_published(from_pretrained(folder), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_it_replaces_a_folder(tmp_path: Path) -> None:
    """The model's own, whose files are mapped while it lives."""
    model = bitnet_ops.from_pretrained(tiny_folder(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    save_published(again, tmp_path / "b")
    assert_same_model(model, from_pretrained(tmp_path / "b"))
    assert not list((tmp_path / "b").glob(".saving-*"))
