"""Sparsity as it is measured, layouts as they are chosen, and the command that writes them."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_checkpoints import Sizes, tiny_folder

from bitnet_ops import BitLinear, BitNet, from_pretrained, reference
from bitnet_ops.cli.main import commands
from bitnet_ops.evaluation.sparsity import LayerSparsity, layouts_for, measure_sparsity
from bitnet_ops.layers.linear import best_layout

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def convert(*arguments: str | Path) -> str:
    result = CliRunner().invoke(commands, ["convert", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def layouts(model: BitNet) -> dict[str, str]:
    return {name: module.layout for name, module in model.named_modules() if isinstance(module, BitLinear)}


def test_sparsity_is_what_the_layers_compute(tmp_path: Path) -> None:
    model = from_pretrained(tiny_folder(tmp_path))
    ids = torch.arange(12).reshape(1, 12) % model.config.vocab_size
    measured = measure_sparsity(model, ids)
    assert len(measured) == model.config.num_hidden_layers
    # The first layer once more, step by step.
    layer = model.model.layers[0]
    seen: list[torch.Tensor] = []
    handle = layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(ids)
    handle.remove()
    n = seen[0]
    gate = layer.mlp.gate_proj(n)
    assert measured[0].open_gates == pytest.approx(float((gate > 0).float().mean()))
    y = layer.mlp.ffn_sub_norm(gate.relu().square() * layer.mlp.up_proj(n))
    q, _ = reference.quantize_activations(y)
    assert measured[0].used_inputs == pytest.approx(float((q != 0).float().mean()))
    assert not layer.mlp.gate_proj._forward_hooks
    assert not layer.mlp.down_proj._forward_pre_hooks


def test_sparsity_of_no_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="input_ids: expected at least one token, got none"):
        measure_sparsity(from_pretrained(tiny_folder(tmp_path)), torch.empty(1, 0, dtype=torch.int64))


def test_layouts_follow_the_sparsity(tmp_path: Path) -> None:
    model = from_pretrained(tiny_folder(tmp_path, Sizes(layers=2)))
    dense = layouts_for(model, [LayerSparsity(0.9, 0.9)] * 2)
    assert set(dense.values()) == {best_layout()}
    sparse = layouts_for(model, [LayerSparsity(0.9, 0.9), LayerSparsity(0.2, 0.1)])
    assert {name for name in dense if dense[name] != sparse[name]} == {UP, DOWN}
    assert sparse[UP] == "row"
    assert sparse[DOWN] == "column"


@pytest.mark.parametrize("tokenizer", [True, False])
def test_convert_keeps_the_model(tmp_path: Path, tokenizer: bool) -> None:
    source = tiny_folder(tmp_path / "a", Sizes(vocab=300))
    model = from_pretrained(source)
    if tokenizer:
        from tiny_checkpoints import byte_tokenizer

        model.tokenizer = byte_tokenizer(300)
    model.save_pretrained(tmp_path / "b")
    output = convert(tmp_path / "b", tmp_path / "c")
    converted = from_pretrained(tmp_path / "c")
    ids = torch.arange(9).reshape(1, 9)
    assert torch.equal(converted(ids), model(ids))
    assert len(output.splitlines()) == model.config.num_hidden_layers + 2
    assert f"{len(layouts(model))} matrices" in output


def test_convert_to_one_layout(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "a")
    assert "tile16" in convert(source, tmp_path / "b", "--layout", "tile16")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "bitnet_ops", "layout": "tile16"}
    assert set(layouts(from_pretrained(tmp_path / "b")).values()) == {"tile16"}


def test_convert_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(commands, ["convert", str(tmp_path / "empty"), str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "config.json" in result.output
    assert len(result.output.splitlines()) == 1
    text = tmp_path / "text.txt"
    text.write_text("x")
    source = tiny_folder(tmp_path / "a")
    result = CliRunner().invoke(commands, ["convert", str(source), str(tmp_path / "b"), "--text", str(text)])
    assert result.exit_code == 2
    assert "tokenizer.json" in result.output
