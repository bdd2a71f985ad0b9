"""BitLinear and BitLinearQAT: same outputs packed and in training, gradients, conversion, state_dict."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitnet_ops
from bitnet_ops import BitLinear, BitLinearQAT, pack, packing, reference

SIZES = [(1, 1), (15, 17), (16, 16), (33, 20), (100, 70), (256, 192)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), SIZES)
def test_packed_equals_training_forward(isa, n_in, n_out, bias):
    trained = BitLinearQAT(n_in, n_out, bias=bias)
    packed = pack(trained)
    assert isinstance(packed, BitLinear)
    for shape in [(n_in,), (1, n_in), (2, 3, n_in), (0, n_in)]:
        x = torch.randn(shape)
        assert torch.equal(packed(x), trained(x)), shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_takes_the_dtype_of_the_input(dtype):
    layer = BitLinear.from_linear(nn.Linear(64, 48))
    x = torch.randn(5, 64, dtype=dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_from_linear_quantises_by_absmean():
    linear = nn.Linear(40, 24)
    w, scale = reference.quantize_weight(linear.weight)
    layer = BitLinear.from_linear(linear)
    assert torch.equal(layer.unpack(), w)
    assert torch.equal(layer.weight_scale, scale.expand(24))
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), reference.ternary_linear(x, w, scale.expand(24), linear.bias))


def test_from_ternary_takes_a_scale_per_row():
    w = torch.randint(-1, 2, (5, 7), dtype=torch.int8)
    scale = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3])
    layer = BitLinear.from_ternary(w, scale)
    x = torch.randn(4, 7)
    assert torch.equal(layer(x), reference.ternary_linear(x, w, scale))


@pytest.mark.parametrize(
    ("w", "scale", "bias", "names"),
    [
        (torch.zeros(4, dtype=torch.int8), 1.0, None, "w"),
        (torch.full((4, 4), 2, dtype=torch.int8), 1.0, None, "w"),
        (torch.zeros(4, 4), 1.0, None, "w"),
        (torch.zeros(4, 4, dtype=torch.int8), torch.ones(3), None, "weight_scale"),
        (torch.zeros(4, 4, dtype=torch.int8), 1.0, torch.zeros(5), "bias"),
    ],
)
def test_from_ternary_refuses_what_does_not_fit(w, scale, bias, names):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=rf"\b{names}\b.*expected.*got"):
        BitLinear.from_ternary(w, scale, bias)


def test_state_dict_round_trip(tmp_path):
    layer = BitLinear.from_linear(nn.Linear(50, 30))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = BitLinear(50, 30, bias=True)
    x = torch.randn(2, 50)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="packed_weight"):
        BitLinear(50, 50, bias=True).load_state_dict(layer.state_dict())


def test_fresh_layer_is_zero():
    assert torch.equal(BitLinear(20, 10)(torch.randn(3, 20)), torch.zeros(3, 10))


def test_deepcopy_and_casts_keep_the_scales():
    layer = BitLinear.from_linear(nn.Linear(32, 16))
    x = torch.randn(2, 32)
    y = layer(x)
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).half()):
        assert other.weight_scale.dtype == other.bias.dtype == torch.float32
        assert torch.equal(other(x), y)


def test_gradients_are_those_of_a_linear_layer_of_the_quantised_values():
    torch.manual_seed(0)
    layer = BitLinearQAT(24, 12)
    x = torch.randn(5, 24, requires_grad=True)
    target = torch.randn(5, 12)
    F.mse_loss(layer(x), target).backward()

    # The same chain rule in float64, from the definition: both quantisers are the identity going back.
    q, x_scale = reference.quantize_activations(x.detach())
    w, scale = reference.quantize_weight(layer.weight.detach())
    x_quantised = (q.double() * x_scale.double().unsqueeze(-1)).requires_grad_()
    w_quantised = (w.double() * scale.double()).requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()
    F.mse_loss(F.linear(x_quantised, w_quantised, bias), target.double()).backward()
    for got, wanted, terms in [
        (x.grad, x_quantised.grad, 12),
        (layer.weight.grad, w_quantised.grad, 5),
        (layer.bias.grad, bias.grad, 5),
    ]:
        # Each sum of `terms` products, and the up to 26-term sums below it, is rounded once a term; no
        # term exceeds the largest entry by more than the 24 x 12 entries together.
        bound = (terms + 26) * torch.finfo(torch.float32).eps * 24 * wanted.abs().max()
        assert (got.double() - wanted).abs().max() <= bound


def test_autocast_rounds_only_the_result():
    layer = BitLinearQAT(64, 32, bias=False)
    x = torch.randn(4, 64)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    # One rounding of the integer sum to bfloat16's 8 bits, half a unit in the last place; one more float32
    # rounding of the product with the scale.
    assert ((rounded - exact).abs() <= exact.abs() * (2**-8) * 1.0001).all()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    layer, teacher = BitLinearQAT(32, 8), BitLinear.from_linear(nn.Linear(32, 8))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(256, 32)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(layer(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_pack_replaces_every_layer_and_keeps_sharing():
    shared = BitLinearQAT(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), shared, nn.ReLU(), nn.Sequential(shared, BitLinearQAT(16, 4)))
    x = torch.randn(3, 16)
    before = model(x)
    assert pack(model) is model
    assert not any(isinstance(module, BitLinearQAT) for module in model.modules())
    assert type(model[0]) is nn.Linear
    assert model[1] is model[3][0]
    assert torch.equal(model(x), before)


def test_nan_and_inf_rows_stay_alone(isa):
    layer = BitLinear.from_linear(nn.Linear(40, 20))
    x = torch.randn(4, 40)
    clean = layer(x)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = layer(x)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


class TestLayouts:
    @pytest.mark.parametrize("layout", packing.LAYOUTS)
    def test_results_and_state_do_not_depend_on_the_layout(self, layout: str) -> None:
        w, bias = torch.randint(-1, 2, (40, 70), dtype=torch.int8), torch.randn(40)
        plain = BitLinear.from_ternary(w, 0.5, bias)
        layer = BitLinear.from_ternary(w, 0.5, bias, layout=layout)
        x = torch.randn(3, 70)
        assert torch.equal(layer(x), plain(x))
        assert torch.equal(layer.unpack(), w)
        for name, value in plain.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value)

        empty = BitLinear(70, 40, bias=True, layout=layout)
        assert (empty(x) == 0).all()
        empty.load_state_dict(plain.state_dict())
        assert empty.layout == layout
        assert torch.equal(empty(x), plain(x))
        meta = BitLinear(70, 40, bias=True, layout=layout, device="meta")
        meta.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(meta(x), plain(x))

    def test_a_wrong_shape_is_still_reported(self) -> None:
        with pytest.raises(RuntimeError, match="packed_weight"):
            BitLinear(70, 40, layout="row").load_state_dict(BitLinear(70, 49).state_dict())

    def test_repack(self) -> None:
        model = nn.Sequential(BitLinear.from_linear(nn.Linear(100, 300)), nn.ReLU(), BitLinear(300, 10))
        x = torch.randn(2, 100)
        expected = model(x)
        for layout in (*packing.LAYOUTS, None):
            assert bitnet_ops.repack(model, layout) is model
            assert model[0].layout == (layout or bitnet_ops.best_layout())
            assert torch.equal(model(x), expected)
        with pytest.raises(ValueError, match="layout must be one of"):
            bitnet_ops.repack(model, "rows")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("bits", [8, 16])
    @pytest.mark.parametrize("tokens", [1, 3, 9])
    def test_groups(self, isa: str, bits: int, dtype: torch.dtype, tokens: int) -> None:
        w, scale = torch.randint(-1, 2, (40, 150), dtype=torch.int8), torch.rand(3, 40).to(dtype)
        layer = BitLinear.from_ternary(w, scale, activation_bits=bits, group_size=64)
        assert layer.weight_scale.dtype == dtype
        assert torch.equal(layer.scales(), scale)
        assert torch.equal(layer.state_dict()["weight_scale"], scale)
        x = torch.randn(tokens, 150)
        assert torch.equal(layer(x), reference.ternary_linear(x, w, scale, None, bits, 64))
        other = BitLinear(150, 40, activation_bits=bits, group_size=64)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
        assert layer.bfloat16().weight_scale.dtype == dtype
        assert "group_size=64" in repr(layer)
        assert bitnet_ops.repack(layer).layout == "tile16"

    def test_a_large_activation_costs_only_its_own_group(self) -> None:
        w, scale = torch.randint(-1, 2, (40, 128), dtype=torch.int8), torch.rand(2, 40)
        x = torch.randn(1, 128)
        x[0, 3] = 1e4
        exact = x.double() @ (w * scale.repeat_interleave(64, 0).T).double().T
        error = BitLinear.from_ternary(w, scale, group_size=64)(x) - exact
        x[0, :64] = 0
        other_half = BitLinear.from_ternary(w, scale, group_size=64)(x)
        # Of the first group at most half a step for each input; nothing of it in the second.
        assert (error.abs() <= 64 * 1e4 / 254 * scale[0]).all()
        assert torch.equal(other_half, BitLinear.from_ternary(w[:, 64:], scale[1:], group_size=64)(x[:, 64:]))

    def test_options_that_do_not_exist(self) -> None:
        with pytest.raises(ValueError, match="activation_bits: expected 8 or 16, got 4"):
            BitLinear(64, 64, activation_bits=4)
        with pytest.raises(ValueError, match="group_size: expected 0, or 64, 128 or 256"):
            BitLinear(64, 64, group_size=32)
        with pytest.raises(ValueError, match="with layout 'row'"):
            BitLinear(64, 64, group_size=64, layout="row")
        with pytest.raises(ValueError, match="layout must be one of"):
            BitLinear(64, 64, layout="tile8")
