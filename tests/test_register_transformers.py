"""`bitnet_ops.register_transformers`: plain `from_pretrained` of transformers gives packed models.

What is loaded so has to equal, bit for bit, what `accelerate` makes of the model that transformers loads by
itself: tests/test_accelerate.py compares that with transformers.
"""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_file_memory import needs_page_map, resident_pages
from tiny_checkpoints import Sizes, Weights, published_tensors, write_folder
from torch import nn

import bitnet_ops
from bitnet_ops import BitLinear

transformers = pytest.importorskip("transformers")
from their_gemma import make_gemma  # noqa: E402
from their_models import FORMATS, make_llama, make_pair, make_ternary_floats, shipped_model  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config  # noqa: E402
from transformers.integrations import bitnet as theirs  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

from bitnet_ops.integrations import transformers_decoder  # noqa: E402
from bitnet_ops.integrations import transformers_tables as tables  # noqa: E402
from bitnet_ops.integrations import transformers_versions as versions  # noqa: E402
from bitnet_ops.layers.embedding import TernaryEmbedding  # noqa: E402

SIZES = Sizes(vocab=97, hidden=60, intermediate=100, heads=5, kv_heads=1, layers=2)
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
IDS = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registered for a test; and in theirs, eager quantisers, whose compiled ones take minutes."""
    with bitnet_ops.register_transformers(), torch.compiler.set_stance("force_eager"):
        yield
    assert auto.AUTO_QUANTIZER_MAPPING["bitnet"].__module__.startswith("transformers.")


def load(folder: Path) -> nn.Module:
    """With the attention that the other side has, and without gradients."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).requires_grad_(False)


def packed_layers(model: nn.Module) -> dict[str, BitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


@pytest.fixture
def no_layer_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Module, *arguments: object, **options: object) -> None:
        raise AssertionError("a layer of transformers was made")

    monkeypatch.setattr(theirs.AutoBitLinear, "__init__", refuse)
    monkeypatch.setattr(theirs.BitLinear, "__init__", refuse)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(tmp_path: Path, form: str, request: pytest.FixtureRequest) -> None:
    pair = make_pair(tmp_path, SIZES, form)
    request.getfixturevalue("no_layer_of_theirs")
    model = load(tmp_path)
    layers = packed_layers(model)
    assert len(layers) == 7 * SIZES.layers
    for name, layer in layers.items():
        assert layer.layout == bitnet_ops.best_layout()
        assert torch.equal(layer.unpack(), pair.weights.ternary[name])
    assert not model.training
    assert torch.equal(model(IDS).logits, bitnet_ops.accelerate(pair.theirs)(IDS).logits)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear", "ternary", "online"])
def test_llamas_with_biases(tmp_path: Path, form: str, norms: bool) -> None:
    """The form "ternary" is "autobitlinear" as transformers saves it, unpacked."""
    pair = make_llama(tmp_path, form, norms=norms, attention_bias=True, mlp_bias=True, **LLAMA)
    model = load(tmp_path)
    assert len(packed_layers(model)) == 14
    assert torch.equal(model(IDS).logits, bitnet_ops.accelerate(pair.theirs)(IDS).logits)


def resaved(model: bitnet_ops.BitNet, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["tile16", "tile16_base3", "row"])
def test_our_folders(tmp_path: Path, layout: str) -> None:
    """Of any layout; one that this machine does not multiply is brought into one that it does."""
    pair = make_pair(tmp_path / "published", SIZES, "autobitlinear")
    bitnet_ops.repack(pair.ours, layout)
    model = load(resaved(pair.ours, tmp_path / "own"))
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.unpack(), pair.weights.ternary[name])
    assert torch.equal(model(IDS).logits, load(tmp_path / "published")(IDS).logits)


@pytest.mark.parametrize("norms", [False, True])
def test_our_folders_of_llamas(tmp_path: Path, norms: bool) -> None:
    pair = make_llama(
        tmp_path / "published", "bitlinear", norms=norms, attention_bias=True, mlp_bias=True, **LLAMA
    )
    model = load(resaved(pair.ours, tmp_path / "own"))
    assert torch.equal(model(IDS).logits, load(tmp_path / "published")(IDS).logits)


def test_our_folders_of_gemma(tmp_path: Path) -> None:
    """Ours hold the factors 1 + w of norms, transformers' class wants w."""
    fields = LLAMA | {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 3}
    pair = make_gemma(tmp_path / "published", "bitlinear", norms=True, **fields)
    model = load(resaved(pair.ours, tmp_path / "own"))
    reference = load(tmp_path / "published")
    norms = [name for name, _ in reference.named_parameters() if "norm" in name]
    assert len(norms) > 12
    for name in norms:
        # 1 + w was rounded once.
        difference = model.get_parameter(name) - reference.get_parameter(name)
        assert difference.abs().max() <= 2**-23
    assert (model(IDS).logits - reference(IDS).logits).abs().max() < 0.1 * reference(IDS).logits.abs().max()


def test_our_folders_with_groups(tmp_path: Path) -> None:
    """16-bit activations, a scale for 64 inputs: "quantization_config" says it, BitLinear does it."""
    fields = LLAMA | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    pair = make_ternary_floats(tmp_path / "floats", 64, config_class=Qwen3Config, **fields)
    folder = resaved(pair.ours, tmp_path / "own")
    model = load(folder)
    layers = packed_layers(model)
    assert {(layer.group_size, layer.activation_bits) for layer in layers.values()} == {(64, 16)}
    for name, layer in layers.items():
        assert torch.equal(layer.weight_scale, pair.ours.get_submodule(name).weight_scale)
    ours = bitnet_ops.from_pretrained(folder)(IDS)
    assert (model(IDS).logits - ours).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_our_folders_with_ternary_tables(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """As our own model, bit for bit; a tied head is the embedding and has no weights of its own."""
    fields = LLAMA | {
        "hidden_size": 128,
        "intermediate_size": 192,
        "head_dim": 32,
        "tie_word_embeddings": tied,
    }
    pair = make_ternary_floats(tmp_path / "floats", 64, tables=True, config_class=Qwen3Config, **fields)
    assert pair.ours.config.ternary_head
    folder = resaved(pair.ours, tmp_path / "own")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ours = bitnet_ops.from_pretrained(folder)
    assert type(model.get_input_embeddings()) is TernaryEmbedding
    assert [name for name in model.state_dict() if name.startswith("lm_head")] == (
        [] if tied else ["lm_head.packed_weight", "lm_head.weight_scale"]
    )
    for same in (model, copy.deepcopy(model)):
        same.tie_weights()
        logits = same(IDS).logits
        assert logits.dtype == torch.float32
        if dtype == torch.float32:
            assert torch.equal(logits, ours(IDS))
    options = {"max_new_tokens": 5, "do_sample": False}
    new = model.generate(IDS, **options)
    static = model.generate(IDS, **options, cache_implementation="static", disable_compile=True)
    if dtype == torch.float32:
        assert torch.equal(new, ours.generate(IDS, **options, eos_token_id=None))
    assert static.shape == new.shape
    slow = model(IDS, output_hidden_states=True).logits  # transformers' own decoder
    assert slow.dtype == torch.float32
    assert (slow - ours(IDS)).abs().max() < 0.1 * ours(IDS).abs().max()
    headless = AutoModel.from_pretrained(folder, dtype=dtype)
    assert type(headless.get_input_embeddings()) is TernaryEmbedding
    assert torch.equal(headless(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_settings_of_ternary_tables_that_do_not_fit_together(tmp_path: Path) -> None:
    fields = LLAMA | {
        "hidden_size": 128,
        "intermediate_size": 192,
        "head_dim": 32,
        "tie_word_embeddings": True,
    }
    pair = make_ternary_floats(tmp_path / "floats", 64, tables=True, config_class=Qwen3Config, **fields)
    folder = resaved(pair.ours, tmp_path / "own")
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"]["ternary_head"] = False
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="ternary_head: expected the same as ternary_embedding"):
        load(folder)


def test_parts_that_transformers_does_not_have(tmp_path: Path) -> None:
    config = bitnet_ops.DecoderConfig(vocab_size=97, hidden_size=48, intermediate_size=80,
                                      num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=64, residual_scale=0.5)  # fmt: skip
    with pytest.raises(ValueError, match=r"decoder_config: expected nothing.*got \['residual_scale'\]"):
        load(resaved(bitnet_ops.BitNet(config).eval(), tmp_path))


def test_the_shipped_model() -> None:
    """In its own dtype too, which is that of its embedding."""
    ours = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    model = load(bitnet_ops.DEFAULT_MODEL)
    shipped = shipped_model()
    shipped.set_attn_implementation("eager")
    assert torch.equal(model(IDS).logits, bitnet_ops.accelerate(shipped)(IDS).logits)
    plain = AutoModelForCausalLM.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    assert plain.dtype == ours.head_weight.dtype == torch.bfloat16
    assert all(layer.weight_scale.dtype == torch.float32 for layer in packed_layers(plain).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_body_that_an_older_version_loads(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors whose names change keep the file's dtype there; they have to get the one that was asked for."""
    from bitnet_ops.integrations.transformers_quantizers import BitNetQuantizer

    make_pair(tmp_path, SIZES, "autobitlinear")
    monkeypatch.setattr(BitNetQuantizer, "get_new_dtype", lambda *arguments: None, raising=False)
    monkeypatch.setattr(versions, "casts_renamed", lambda: False)
    for kind in (AutoModel, AutoModelForCausalLM):
        model = kind.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert {layer.weight_scale.dtype for layer in packed_layers(model).values()} == {torch.float32}


@pytest.mark.skipif(
    versions.numbers(transformers.__version__) < (5, 6),
    reason="this transformers takes no tensors of the caller for quantized models",
)
def test_a_state_dict_of_the_caller_stays_as_it_is(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, SIZES, "autobitlinear")
    tensors = load_file(tmp_path / "model.safetensors")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.BitNetForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, attn_implementation="eager"
    ).requires_grad_(False)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in tensors.items())
    assert torch.equal(model(IDS).logits, bitnet_ops.accelerate(pair.theirs)(IDS).logits)


NAME = "model.layers.1.mlp.up_proj"


def damaged(case: str, tensors: dict[str, torch.Tensor]) -> str:
    """Damages a published checkpoint; what the error says about it."""
    if case == "code 3":
        tensors[f"{NAME}.weight"][0, 0] = 0xFF
        return "got a code 3"
    if case == "no scale":
        del tensors[f"{NAME}.weight_scale"]
        return r"expected a weight_scale \[1\], got none"
    if case == "NaN":
        tensors[f"{NAME}.weight_scale"].fill_(float("nan"))
        return "expected a finite weight scale"
    if case == "rows":
        tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"][:-1].clone()
        return r"expected weights \[25, 60\]"
    del tensors[f"{NAME}.weight"], tensors[f"{NAME}.weight_scale"]
    return "expected its weights in the checkpoint, got none"


@pytest.mark.parametrize("case", ["code 3", "no scale", "NaN", "rows", "no layer"])
def test_damaged_checkpoints(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors = published_tensors(Weights.random(SIZES))
    text = damaged(case, tensors)
    # transformers collects errors of single layers in a report, which it logs.
    with pytest.raises((RuntimeError, ValueError)) as error:
        load(write_folder(tmp_path, SIZES.config(), tensors))
    assert re.search(f"{NAME}.*{text}", f"{error.value}\n{caplog.text}")


@pytest.mark.parametrize("case", ["bytes", "padding", "scale", "layout"])
def test_damaged_folders_of_ours(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    pair = make_pair(tmp_path / "published", SIZES, "autobitlinear")
    folder = resaved(bitnet_ops.repack(pair.ours, "tile16"), tmp_path / "own")
    tensors = load_file(folder / "model.safetensors")
    if case == "bytes":
        tensors[f"{NAME}.packed_weight"][0, 0, 0] = 0xFF
        text = f"{NAME}.*got a code 3"
    elif case == "padding":
        tensors[f"{NAME}.packed_weight"][-1].zero_()
        text = f"{NAME}.*weight 0 in the padding"
    elif case == "scale":
        tensors[f"{NAME}.weight_scale"] = tensors[f"{NAME}.weight_scale"][1:].clone()
        text = rf"{NAME}.*expected weight_scale \[100\]"
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["layout"] = "tile17"
        (folder / "config.json").write_text(json.dumps(config))
        text = "layout: expected 'tile16' or .*got 'tile17'"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)) as error:
        load(folder)
    assert re.search(text, f"{error.value}\n{caplog.text}")


@needs_page_map
def test_tables_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither generation nor scores of all tokens bring the table into memory."""
    for module in (tables, transformers_decoder):
        monkeypatch.setattr(module, "LEAST_BYTES", 0)
    pair = make_pair(tmp_path / "published", dataclasses.replace(SIZES, vocab=9000), "autobitlinear")
    model = AutoModelForCausalLM.from_pretrained(resaved(pair.ours, tmp_path / "own"))
    table = model.lm_head.weight
    assert table is model.model.embed_tokens.weight
    assert tables.file_place(table.data_ptr())[0] == str(tmp_path / "own" / "model.safetensors")
    assert not table.requires_grad
    expected = pair.ours(IDS)
    assert resident_pages(table) <= 2, "pages that other tensors share"
    assert torch.equal(model(IDS).logits, expected)
    new = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(new, pair.ours.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None))
    assert resident_pages(table) <= 2
    model.model.embed_tokens.weight.data[int(IDS[0, 0])] = 0.0  # what is written to memory counts
    assert not torch.equal(model(IDS).logits, expected)


@needs_page_map
def test_a_table_is_mapped_anew_only_where_the_file_has_it(tmp_path: Path) -> None:
    """Not where the file of that name is another one by now."""
    weight = torch.randn(3000, 600)
    save_file({"weight": weight}, tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        mapped = file.get_tensor("weight")
    if tables.file_place(mapped.data_ptr()) is None:
        pytest.skip("this safetensors reads files")

    class Model:
        def __init__(self) -> None:
            self.table = nn.Embedding.from_pretrained(mapped)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def get_output_embeddings(self) -> None:
            return None

    same, other = Model(), Model()
    tables.Tables().map_anew(same)
    assert same.table.weight.data_ptr() != mapped.data_ptr()
    assert torch.equal(same.table.weight, weight)
    save_file({"weight": weight + 1}, tmp_path / "two.safetensors")
    os.replace(tmp_path / "two.safetensors", tmp_path / "one.safetensors")
    tables.Tables().map_anew(other)
    assert other.table.weight.data_ptr() == mapped.data_ptr()
    assert torch.equal(other.table.weight, weight)


def test_cannot_be_saved_as_if_it_were_theirs(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="got one with the layers of bitnet_ops"):
        load(bitnet_ops.DEFAULT_MODEL).save_pretrained(tmp_path)


def test_registering_twice_and_taking_it_back() -> None:
    ours = auto.AUTO_QUANTIZER_MAPPING["bitnet"]
    assert ours.__module__.startswith("bitnet_ops.")
    with bitnet_ops.register_transformers():  # the fixture's call came first
        assert auto.AUTO_QUANTIZER_MAPPING["bitnet"] is ours
    assert auto.AUTO_QUANTIZER_MAPPING["bitnet"] is ours
    for _ in range(2):
        bitnet_ops.unregister_transformers()
        assert auto.AUTO_QUANTIZER_MAPPING["bitnet"].__module__.startswith("transformers.")
        assert "bitnet_ops" not in auto.AUTO_QUANTIZER_MAPPING
        assert "bitnet_ops" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def test_importing_changes_nothing() -> None:
    code = (
        "import bitnet_ops, sys; assert 'transformers' not in sys.modules;"
        "from transformers.quantizers import auto;"
        "assert auto.AUTO_QUANTIZER_MAPPING['bitnet'].__module__.startswith('transformers.')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_version_without_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    bitnet_ops.unregister_transformers()
    monkeypatch.delattr("transformers.quantizers.base.HfQuantizer.get_weight_conversions")
    with pytest.raises(ImportError, match=r"expected transformers 5.3 or later.*got \d"):
        bitnet_ops.register_transformers()


@pytest.mark.parametrize(("version", "works"), [("5.2.2", False), ("5.3.0", True), ("6.0.0.dev0", True)])
def test_the_oldest_version(monkeypatch: pytest.MonkeyPatch, version: str, works: bool) -> None:
    bitnet_ops.unregister_transformers()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    if works:
        bitnet_ops.register_transformers()
        return
    with pytest.raises(ImportError, match=r"expected transformers 5.3 or later.*got 5.2.2"):
        bitnet_ops.register_transformers()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    bitnet_ops.unregister_transformers()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="expected the package transformers, which is not installed"):
        bitnet_ops.register_transformers()
