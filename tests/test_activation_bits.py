"""8-bit blocks: activations with a scale for each group of inputs, in models of float activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from random_models import FAMILIES, random_model, with_tokenizer
from torch import Tensor, nn

from bitnet_ops import BitLinear, BitNet, from_pretrained, reference, save_gguf, save_published
from bitnet_ops.cli.main import commands
from bitnet_ops.layers.matrix import TernaryMatrix

GROUPS = FAMILIES["qwen3"].replace(rope_scaling=None, group_size=64)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Models are so small that threads would wait for one another."""
    torch.set_num_threads(1)


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))


def saved(folder: Path, **changes: Any) -> Path:
    random_model(GROUPS.replace(**changes)).save_pretrained(folder)
    return folder


def widths(model: BitNet) -> set[int]:
    return {module.activation_bits for module in model.modules() if isinstance(module, TernaryMatrix)}


def test_all_matrices_have_it(tmp_path: Path) -> None:
    """16 bits stay the default; the weights are the same."""
    saved(tmp_path, ternary_embedding=True, ternary_head=True)
    wide, narrow = from_pretrained(tmp_path), from_pretrained(tmp_path, activation_bits=8)
    for model, bits in ((wide, 16), (narrow, 8)):
        assert model.config.activation_bits == bits
        assert widths(model) == {bits}
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, narrow.state_dict()[name])
    error = (narrow(ids()) - wide(ids())).abs().mean()
    assert 0 < error < 0.1 * wide(ids()).std()


def test_it_is_what_the_reference_says(tmp_path: Path) -> None:
    model = from_pretrained(saved(tmp_path), activation_bits=8)
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, BitLinear)
    x = torch.randn(3, layer.in_features)
    expected = reference.ternary_linear(x, layer.unpack(), layer.scales(), activation_bits=8, group_size=64)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("form", ["packed", "gguf"])
def test_a_saved_model_keeps_it(tmp_path: Path, form: str) -> None:
    """And it can be asked for the other width again, either way."""
    saved(tmp_path / "a", ternary_embedding=True, ternary_head=True)
    wide, narrow = from_pretrained(tmp_path / "a"), from_pretrained(tmp_path / "a", activation_bits=8)
    target = tmp_path / ("b.gguf" if form == "gguf" else "b")
    for model, other, bits in ((narrow, wide, 16), (wide, narrow, 8)):
        if form == "gguf":
            save_gguf(model, target)
        else:
            model.save_pretrained(target)
        again = from_pretrained(target)
        assert again.config == model.config
        assert torch.equal(again(ids()), model(ids()))
        back = from_pretrained(target, activation_bits=bits)
        assert back.config == other.config
        assert torch.equal(back(ids()), other(ids()))


def test_the_published_layout_does_not_say_it(tmp_path: Path) -> None:
    narrow = from_pretrained(saved(tmp_path / "a"), activation_bits=8)
    save_published(narrow, tmp_path / "b")
    assert from_pretrained(tmp_path / "b").config.activation_bits == 16
    assert torch.equal(from_pretrained(tmp_path / "b", activation_bits=8)(ids()), narrow(ids()))


@pytest.mark.parametrize(
    ("changes", "bits", "reason"),
    [
        (
            {"group_size": 0},
            8,
            "expected None or 16 for this model, because 8 bits need a scale for each group",
        ),
        ({"group_size": 0, "activation_bits": 8}, 16, "expected None or 8 .* trained with 8-bit activations"),
        ({}, 4, "expected None, 8 or 16, got 4"),
        ({}, "8", "expected None, 8 or 16, got '8'"),
    ],
)
def test_where_it_does_not_apply(tmp_path: Path, changes: dict[str, int], bits: Any, reason: str) -> None:
    saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"^activation_bits: {reason}"):
        from_pretrained(tmp_path, activation_bits=bits)


def test_the_width_that_a_model_has(tmp_path: Path) -> None:
    for changes in ({"group_size": 0}, {"group_size": 0, "activation_bits": 8}, {}):
        bits = from_pretrained(saved(tmp_path, **changes)).config.activation_bits
        assert from_pretrained(tmp_path, activation_bits=bits).config.activation_bits == bits


def test_float_projections_have_none(tmp_path: Path) -> None:
    save_published(random_model(GROUPS), tmp_path)
    with pytest.raises(ValueError, match=r"activation_bits: expected None with linear=torch.nn.Linear"):
        from_pretrained(tmp_path, linear=nn.Linear, activation_bits=8)


def test_the_command_line(tmp_path: Path) -> None:
    with_tokenizer(random_model(GROUPS)).save_pretrained(tmp_path / "a")
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged", encoding="utf-8")
    source = ("--model", str(tmp_path / "a"))
    bits = ("--activation-bits", "8")

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(commands, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    for command in (
        ("generate", "--max-new-tokens", 3, "It"),
        ("eval", "--text", tmp_path / "text.txt"),
        ("embed", "It"),
    ):
        assert run(command[0], *source, *bits, *command[1:]) != run(command[0], *source, *command[1:])
    assert "8 bits, a scale for each 64 inputs" in run("info", *source, *bits)
    assert "16 bits, a scale for each token" in run("info", *source)
    run("convert", tmp_path / "a", tmp_path / "b", *bits)
    assert from_pretrained(tmp_path / "b").config.activation_bits == 8
    assert "has no effect with --to safetensors" in run(
        "convert", tmp_path / "a", tmp_path / "c", *bits, "--to", "safetensors", code=2
    )
    assert "activation_bits: expected None or 8" in run("info", "--activation-bits", "16", code=1)
    assert "'8', '16'" in run("info", "--activation-bits", "4", code=2)
