"""All layers in one operator: the same bits as one by one, and never a stale module."""

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import Sizes, tiny_folder
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bitnet_ops import BitNet, KVCache, from_pretrained, ops
from bitnet_ops.decoder.model import FUSIBLE
from bitnet_ops.decoder.plan import FusedLayers, LayerArguments, layer_arguments
from bitnet_ops.layers.linear import BitLinear

LAYOUTS = {"q_proj": "tile16_base3", "up_proj": "row", "down_proj": "column"}


@pytest.fixture
def model(tmp_path: Path) -> BitNet:
    model = from_pretrained(tiny_folder(tmp_path, Sizes(hidden=64, intermediate=80, heads=4, kv_heads=2)))
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.repack(LAYOUTS.get(name.rsplit(".", 1)[-1], "tile16"))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of all layers at once."""
    seen: list[int] = []
    run = FusedLayers.run

    def counted(self: FusedLayers, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape[1])
        return run(self, x, *rest)

    monkeypatch.setattr(FusedLayers, "run", counted)
    return seen


def states(model: BitNet, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a prompt and two single tokens give, two rows of which one is padded."""
    cache = KVCache(model.config, 2, 16, dtype=dtype)
    ids = torch.arange(12).reshape(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    parts = [model.hidden_states(ids[:, :4], mask[:, :4], cache)]
    parts += [model.hidden_states(ids[:, i : i + 1], None, cache) for i in (4, 5)]
    return torch.cat(parts, 1)


def one_by_one(model: BitNet, dtype: torch.dtype = torch.float32) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerArguments, "apply_to", lambda self, x: False)
        return states(model, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_equal_to_the_layers_one_by_one(
    isa: str, model: BitNet, calls: list[int], dtype: torch.dtype
) -> None:
    expected = one_by_one(model, dtype)
    assert not calls
    given = states(model, dtype)
    assert calls == [4, 1, 1]
    # A row of padding holds what nobody defined.
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1, 2:], expected[1, 2:])


def another_weight(model: BitNet) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.packed_weight = torch.flip(layer.packed_weight, (0,))


def another_layout(model: BitNet) -> None:
    model.model.layers[1].mlp.up_proj.repack("tile16")


def in_place(model: BitNet) -> None:
    model.model.layers[0].self_attn.o_proj.weight_scale.mul_(2)


def other_memory(model: BitNet) -> None:
    """Behind the back of the module: the tensor is the same object."""
    scale = model.model.layers[0].self_attn.o_proj.weight_scale
    scale.data = 2 * scale


def another_dtype(model: BitNet) -> None:
    """In place as well: the parameter is the same object."""
    norm = model.model.layers[1].input_layernorm
    norm.weight.data.mul_(1.5)
    norm.bfloat16()


def another_module(model: BitNet) -> None:
    attention = model.model.layers[1].self_attn
    attention.o_proj = BitLinear.from_ternary(attention.o_proj.unpack().neg(), 0.5)


def sixteen_bits(model: BitNet) -> None:
    model.model.layers[0].mlp.gate_proj.activation_bits = 16


def a_bias(model: BitNet) -> None:
    model.model.layers[0].mlp.gate_proj.bias = torch.ones(80)


def another_eps(model: BitNet) -> None:
    model.model.layers[1].input_layernorm.eps = 0.5


def one_layer_less(model: BitNet) -> None:
    del model.model.layers[1]


def a_layer_norm(model: BitNet) -> None:
    """Has weight and eps too, and is another function."""
    model.model.layers[0].input_layernorm = nn.LayerNorm(64)


def a_wrapped_projection(model: BitNet) -> None:
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = nn.Sequential(mlp.gate_proj, nn.Tanh())


def another_forward(model: BitNet) -> None:
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args: 2 * forward(*args)


def a_hook(model: BitNet) -> None:
    model.model.layers[1].self_attn.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize(
    "change",
    [
        another_weight, another_layout, in_place, other_memory, another_dtype, another_module,
        sixteen_bits, a_bias, another_eps, one_layer_less, a_layer_norm, a_wrapped_projection,
        another_forward, a_hook,
    ],
)  # fmt: skip
def test_a_change_is_seen(model: BitNet, change: Callable[[BitNet], None]) -> None:
    before = states(model)
    change(model)
    given, expected = states(model), one_by_one(model)
    assert torch.equal(given[0], expected[0])
    if change is not another_layout:
        assert not torch.equal(given[0], before[0])


def test_a_removed_hook_lets_the_operator_in_again(model: BitNet, calls: list[int]) -> None:
    states(model)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    del calls[:]
    states(model)
    assert not calls
    handle.remove()
    states(model)
    assert len(calls) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_layers(model: BitNet, copied: Callable[[BitNet], BitNet]) -> None:
    before = states(model)
    twin = copied(model)
    another_weight(twin)
    assert torch.equal(states(twin)[0], one_by_one(twin)[0])
    assert not torch.equal(states(twin)[0], before[0])
    assert torch.equal(states(model)[0], before[0])


def test_gradients_go_through_the_layers(model: BitNet, calls: list[int]) -> None:
    model.model.layers[0].input_layernorm.weight.requires_grad_()
    # No gradients flow through a cache; what matters is that the operator, which has none at all, keeps out.
    arguments = layer_arguments(model.model.layers, FUSIBLE)
    assert arguments is not None
    assert not arguments.apply_to(torch.zeros(1, 1, 64))
    states(model)
    assert not calls
    with torch.no_grad():
        states(model)
    assert len(calls) == 3


def test_weights_that_are_not_contiguous(model: BitNet) -> None:
    """They are copied, and what is written to them is seen all the same."""
    scale = model.model.layers[0].self_attn.o_proj.weight_scale
    model.model.layers[0].self_attn.o_proj.weight_scale = torch.stack([scale, scale], 1)[:, 0]
    before = states(model)
    assert torch.equal(before[0], one_by_one(model)[0])
    in_place(model)
    given = states(model)
    assert torch.equal(given[0], one_by_one(model)[0])
    assert not torch.equal(given[0], before[0])


def test_weights_are_kept_no_longer_than_the_model(model: BitNet) -> None:
    states(model)
    fused = model.model._fused_layers
    assert fused is not None
    assert fused._prepared is not None
    number = fused._prepared._number
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.packed_weight)
    given = [torch.randn(1, 2, 64), number, *KVCache(model.config, 1, 64).arguments(torch.tensor([0]))]
    torch.ops.bitnet_ops.run_decoder_layers(*given)
    another_weight(model)
    model.model.layers[0].mlp.up_proj = None
    del fused
    model.model._fused_layers = None
    assert weight() is None
    with pytest.raises(RuntimeError, match=f"argument 'prepared': expected a number .*, got {number}"):
        torch.ops.bitnet_ops.run_decoder_layers(*given)


def test_shapes_without_data(model: BitNet) -> None:
    """As memory is estimated: nothing of it is left behind."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 6, dtype=torch.int64)
        given = model.hidden_states(ids, None, KVCache(model.config, 2, 16))
    assert isinstance(given, FakeTensor)
    assert given.shape == (2, 6, 64)
    assert torch.equal(states(model)[0], one_by_one(model)[0])


def arguments(model: BitNet) -> list[object]:
    cache = KVCache(model.config, 1, 64)
    collected = layer_arguments(model.model.layers, FUSIBLE)
    assert collected is not None
    start = torch.tensor([0])
    return [torch.randn(1, 2, 64), *collected, cache.cos, cache.sin, start, cache.keys, cache.values]


@pytest.mark.parametrize(
    ("place", "name"),
    [(1, "norm_weight"), (3, "packed"), (4, "weight_scale"), (5, "layouts")],
)
def test_a_list_of_the_wrong_length(model: BitNet, place: int, name: str) -> None:
    given = arguments(model)
    ops.decoder_layers(*given)  # type: ignore[arg-type]
    given[place] = given[place][1:]  # type: ignore[index]
    with pytest.raises(RuntimeError, match=f"decoder_layers: argument '{name}': expected .* elements, got"):
        ops.decoder_layers(*given)  # type: ignore[arg-type]


def test_wrong_arguments(model: BitNet) -> None:
    given = arguments(model)
    with pytest.raises(
        RuntimeError, match="decoder_layers: argument 'norm_weight': expected four tensors for each layer"
    ):
        ops.decoder_layers(given[0], [], *given[2:])  # type: ignore[arg-type]
    for place, name in ((9, "keys"), (10, "values")):
        short = [*given[:place], given[place][1:], *given[place + 1 :]]  # type: ignore[index]
        with pytest.raises(
            RuntimeError,
            match=f"decoder_layers: argument '{name}': expected a tensor .layers, .* for at least 2 layers",
        ):
            ops.decoder_layers(*short)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="decoder_layers: argument 'x': expected a tensor float32"):
        ops.decoder_layers(given[0].double(), *given[1:])  # type: ignore
    given[4] = [scale.unsqueeze(0) for scale in given[4]]  # type: ignore
    with pytest.raises(
        RuntimeError, match="decoder_layers: argument 'weight_scale': expected a tensor float32"
    ):
        ops.decoder_layers(*given)  # type: ignore[arg-type]
