"""replace_linear: any model trains ternary, packs, saves and loads; what cannot be replaced is told."""

import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from bitnet_ops import BitLinear, BitLinearQAT, pack, packing, replace_linear

EXAMPLE = str(Path(__file__).parent.parent / "examples/vision_transformer.py")
_names = runpy.run_path(EXAMPLE)
VisionTransformer, stripes = _names["VisionTransformer"], _names["stripes"]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Products this small lose more to handing out work than they gain."""
    torch.set_num_threads(1)


def vision_transformer() -> nn.Module:
    return VisionTransformer(width=48, depth=2, heads=3)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)
    )


def all_but_the_last(name: str, layer: nn.Module) -> bool:
    return layer.out_features != 4


@pytest.mark.parametrize("make", [pytest.param(vision_transformer, marks=pytest.mark.slow), mlp])
def test_train_pack_save_load(make: Callable[[], nn.Module]) -> None:
    model = replace_linear(make(), BitLinearQAT, filter=all_but_the_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        images, labels = stripes(32)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = stripes(400)
    model.eval()
    with torch.no_grad():
        scores = model(images)
        # Four classes: chance is a quarter.
        assert (scores.argmax(1) == labels).float().mean() > 0.9
        pack(model)
        ternary = [module for module in model.modules() if isinstance(module, BitLinear)]
        assert len(ternary) == (8 if make is vision_transformer else 2)
        assert not any(isinstance(module, BitLinearQAT) for module in model.modules())
        assert torch.equal(model(images), scores)

        torch.save(model.state_dict(), "model.pt")
        save_file(model.state_dict(), "model.safetensors")
        for state in (torch.load("model.pt", weights_only=True), load_file("model.safetensors")):
            fresh = replace_linear(make(), BitLinear, filter=all_but_the_last, layout="tile16_base3")
            fresh.load_state_dict(state)
            assert torch.equal(fresh.eval()(images), scores)

            with torch.device("meta"):
                empty = replace_linear(make(), BitLinear, filter=all_but_the_last)
            empty.load_state_dict(state, assign=True)
            assert torch.equal(empty.eval()(images), scores)


def test_quantising_after_training_gives_what_training_starts_from() -> None:
    trained = mlp()
    images = torch.randn(3, 1, 16, 16)
    qat = mlp()
    qat.load_state_dict(trained.state_dict())
    expected = replace_linear(qat, BitLinearQAT)(images)
    assert replace_linear(trained, BitLinear, layout="row") is trained
    assert {m.layout for m in trained.modules() if isinstance(m, BitLinear)} == {"row"}
    assert torch.equal(trained(images), expected)


def test_parameters_and_modes_are_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6, bias=False, dtype=torch.bfloat16))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    parameters = dict(model.named_parameters())
    replace_linear(model, BitLinearQAT)
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert (model[0].training, model[1].training) == (True, False)
    assert repr(model[0]) == "BitLinearQAT(in_features=8, out_features=6, bias=True)"
    model[1](model[0](torch.randn(2, 8)).bfloat16()).sum().backward()
    assert [p.grad is None for p in parameters.values()] == [True, False, False]
    # Replaced again: nothing is left to choose. And on to packed, without pack().
    with pytest.raises(ValueError, match="expected one that chooses at least one"):
        replace_linear(model, BitLinearQAT)
    replace_linear(model, BitLinear)
    assert [type(layer) for layer in model] == [BitLinear, BitLinear]
    assert (model[0].training, model[1].training) == (True, False)


def test_no_random_numbers_are_used() -> None:
    model = mlp()
    before = torch.get_rng_state()
    replace_linear(model, BitLinearQAT)
    pack(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("target", [BitLinear, BitLinearQAT])
def test_a_model_that_is_a_layer(target: type[nn.Module]) -> None:
    layer = nn.Linear(5, 3)
    names: list[str] = []
    new = replace_linear(layer, target, filter=lambda name, module: names.append(name) or module is layer)
    assert type(new) is target
    assert names == [""]


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()), nn.Linear(4, 4))
    replace_linear(model, BitLinearQAT)
    assert model[0] is model[1][0]
    replace_linear(model, BitLinear)
    assert type(model[0]) is BitLinear
    assert model[0] is model[1][0]
    assert model[2] is not model[0]


def test_the_filter_decides_for_each_place() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    replace_linear(model, BitLinearQAT, filter=lambda name, _: name == "b")
    assert type(model["a"]) is nn.Linear
    assert type(model["b"]) is BitLinearQAT
    assert model["a"].weight is model["b"].weight


def test_a_tied_weight_trains_in_both_places() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["table"].weight
    replace_linear(model, BitLinearQAT)
    assert model["head"].weight is model["table"].weight
    assert len(list(model.parameters())) == 1


class TestWhatCannotBeReplaced:
    def test_hooks(self) -> None:
        for register in (
            nn.Module.register_forward_hook,
            nn.Module.register_forward_pre_hook,
            nn.Module.register_full_backward_hook,
            nn.Module.register_full_backward_pre_hook,
        ):
            model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
            handle = register(model[1][0], lambda *_: None)
            with pytest.raises(ValueError, match=r"layer '1\.0': expected one without hooks.*got.*hooks"):
                replace_linear(model, BitLinearQAT)
            assert type(model[0]) is nn.Linear, "half of the model was replaced"
            replace_linear(model, BitLinearQAT, filter=lambda name, _: name == "0")
            handle.remove()
            replace_linear(model, BitLinearQAT)
            register(model[1][0], lambda *_: None)
            with pytest.raises(ValueError, match=r"layer '1\.0'.*hooks"):
                pack(model)

    def test_parametrizations(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match=r"layer '0'.*got one with parametrizations"):
            replace_linear(model, BitLinearQAT)
        nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        assert type(replace_linear(model, BitLinearQAT)[0]) is BitLinearQAT

    def test_the_output_projection_of_torchs_attention(self) -> None:
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
        with pytest.warns(UserWarning, match=r"attention\.out_proj \(NonDynamicallyQuantizableLinear\)"):
            replace_linear(model, BitLinearQAT)
        assert not isinstance(model["attention"].out_proj, BitLinearQAT)
        assert type(model["mlp"]) is BitLinearQAT
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replace_linear(model, BitLinear, filter=lambda name, _: "attention" not in name)
        with (
            pytest.warns(UserWarning, match="subclasses"),
            pytest.raises(ValueError, match=r"at least one nn\.Linear, got none"),
        ):
            replace_linear(model["attention"], BitLinear)

    @pytest.mark.parametrize("target", [nn.Linear, nn.Conv2d, "BitLinear", None])
    def test_other_targets(self, target: object) -> None:
        with pytest.raises(TypeError, match="target: expected BitLinear or BitLinearQAT, got"):
            replace_linear(mlp(), target)

    def test_bad_options_change_nothing(self) -> None:
        model = mlp()
        with pytest.raises(ValueError, match="layout must be one of"):
            replace_linear(model, BitLinear, layout="tile8")
        assert type(model[1]) is nn.Linear


@pytest.mark.filterwarnings("ignore:replace_linear leaves subclasses")
@pytest.mark.parametrize("target", [BitLinear, BitLinearQAT])
def test_torchs_encoder_does_not_go_round_the_new_layers(
    target: type[BitLinear] | type[BitLinearQAT],
) -> None:
    """In eval mode it would compute from the weights of linear1 and linear2, without calling them."""
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2)
    x, padding = (
        torch.randn(3, 5, 16),
        torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3]),
    )
    replace_linear(model, target)
    with torch.no_grad():
        slow = model.train()(x, src_key_padding_mask=padding)
        model.eval()
        calls: list[nn.Module] = []
        forward = target.forward
        try:
            target.forward = lambda self, x: calls.append(self) or forward(self, x)
            fast = model(x, src_key_padding_mask=padding)
        finally:
            target.forward = forward
    assert len(calls) == 4
    assert torch.equal(fast[~padding], slow[~padding])


def test_every_layout_is_an_option() -> None:
    images = torch.randn(2, 1, 16, 16)
    model = mlp()
    results = []
    for layout in packing.LAYOUTS:
        fresh = mlp()
        fresh.load_state_dict(model.state_dict())
        results.append(replace_linear(fresh, BitLinear, layout=layout, activation_bits=16)(images))
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE, "--steps", "2"])
    runpy.run_path(EXAMPLE, run_name="__main__")
    *_, trained, packed, loaded = capsys.readouterr().out.splitlines()
    right = [line.split()[1] for line in (trained, packed, loaded)]
    assert right[0] == right[1] == right[2]
    assert Path("vision_transformer.pt").exists()
