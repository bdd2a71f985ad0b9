"""`bitnet_ops.integrations.torchao`: packed layers through torchao's ``quantize_``."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bitnet_ops
from bitnet_ops import BitLinear, BitLinearQAT

pytest.importorskip("torchao")
from torchao.quantization import quantize_

from bitnet_ops.integrations.torchao import TernaryWeightInt8ActConfig


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 20, bias=False))


X = torch.randn(5, 48, generator=torch.Generator().manual_seed(7))


def test_every_linear_layer() -> None:
    model, expected = net(), net()
    quantize_(model, TernaryWeightInt8ActConfig())
    bitnet_ops.replace_linear(expected, BitLinear)
    assert [type(layer) for layer in model] == [BitLinear, nn.ReLU, BitLinear]
    assert model[0].layout == bitnet_ops.best_layout()
    assert torch.equal(model(X), expected(X))


def test_options_and_filter() -> None:
    model = net()
    config = TernaryWeightInt8ActConfig(layout="row", activation_bits=16)
    quantize_(model, config, filter_fn=lambda module, name: name == "0")
    assert (model[0].layout, model[0].activation_bits) == ("row", 16)
    assert type(model[2]) is nn.Linear
    quantize_(model, config)  # what is packed stays
    assert isinstance(model[2], BitLinear)


def test_trained_layers() -> None:
    model = nn.Sequential(BitLinearQAT.from_linear(nn.Linear(48, 80)))
    expected = model(X)
    quantize_(model, TernaryWeightInt8ActConfig())
    assert type(model[0]) is BitLinear
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("rows", [False, True])
def test_weights_that_are_ternary_already(rows: bool) -> None:
    """Their scale is found, not estimated: the mean of their magnitudes is smaller, by the zeros."""
    layer = nn.Linear(48, 80)
    w = torch.randint(-1, 2, (80, 48))
    w[3] = 0
    scale = torch.rand(80 if rows else 1, 1) + 0.1
    layer.weight = nn.Parameter(w * scale)
    model = nn.Sequential(layer)
    quantize_(model, TernaryWeightInt8ActConfig())
    assert torch.equal(model[0].unpack(), w.to(torch.int8))
    used = torch.arange(80) != 3
    assert torch.equal(model[0].weight_scale[used], scale.expand(80, 1)[used, 0])


@pytest.mark.parametrize("make", [net, lambda seed: net(seed).to("meta")])
def test_saving_and_loading(make: Callable[[int], nn.Module]) -> None:
    model = net()
    quantize_(model, TernaryWeightInt8ActConfig())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = make(1)
    quantize_(again, TernaryWeightInt8ActConfig())
    again.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(again(X), model(X))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected a filter_fn that chooses nn\.Linear layers.*ReLU"):
        quantize_(net(), TernaryWeightInt8ActConfig(), filter_fn=lambda module, name: name == "1")
    with pytest.raises(ValueError, match="activation_bits: expected 8 or 16, got 4"):
        quantize_(net(), TernaryWeightInt8ActConfig(activation_bits=4))
