"""The layers in one operator: the same bits as the modules one by one, and never a stale module."""

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import Sizes, tiny_folder
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook

import bitnet_ops
from bitnet_ops import (
    BitLinear,
    BitNet,
    BitNetConfig,
    DecoderConfig,
    KVCache,
    RopeScaling,
    from_pretrained,
    ops,
    packing,
)
from bitnet_ops.decoder.model import KNOWN
from bitnet_ops.decoder.plan import collect
from bitnet_ops.layers.matrix import TernaryMatrix
from bitnet_ops.layers.norm import RMSNorm
from bitnet_ops.ops._decoder import PreparedLayers

LAYOUTS = {"q_proj": "tile16_base3", "up_proj": "row", "down_proj": "column"}

# Sizes that fill no tile, block or register; heads that are not hidden_size / num_attention_heads wide.
SIZES = {
    "vocab_size": 61, "hidden_size": 60, "intermediate_size": 84, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 14,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "bitnet": BitNetConfig(**SIZES),
    "llama": DecoderConfig(**SIZES),
    "every norm and scale": DecoderConfig(
        **SIZES, activation="gelu_tanh", sub_norms=True, qk_norm=True, post_norms=True, projection_norms=True,
        embedding_scale=8.0, residual_scale=0.3, logit_scale=0.1, query_scale=0.5,
    ),
    "16 bits, biases": DecoderConfig(
        **SIZES, attention_bias=True, attention_output_bias=False, mlp_bias=True, activation_bits=16,
        rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=32),
    ),
    "groups": DecoderConfig(**{**SIZES, "hidden_size": 150}, qk_norm=True, activation_bits=16, group_size=64),
    "groups, Qwen3, 8 bits": DecoderConfig(
        **{**SIZES, "hidden_size": 200, "intermediate_size": 260}, qk_norm=True, group_size=128,
        ternary_embedding=True, ternary_head=True,
    ),
    "groups, Llama, 8 bits": DecoderConfig(
        **{**SIZES, "hidden_size": 150, "intermediate_size": 300}, attention_bias=True, mlp_bias=True,
        group_size=64, rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=32),
    ),
    "groups, Llama": DecoderConfig(
        **{**SIZES, "hidden_size": 300, "intermediate_size": 260}, activation_bits=16, group_size=256,
    ),
    "groups, Gemma 3": DecoderConfig(
        **{**SIZES, "hidden_size": 150, "intermediate_size": 140}, activation="gelu_tanh", qk_norm=True,
        post_norms=True, projection_norms=True, activation_bits=16, group_size=128, window=5,
        local_layers=(0,), local_rope_theta=100.0, query_scale=0.5, embedding_scale=8.0,
        tie_word_embeddings=True, ternary_embedding=True,
    ),
    "groups, Gemma 3, 8 bits": DecoderConfig(
        **{**SIZES, "hidden_size": 150, "intermediate_size": 140}, activation="gelu_tanh", qk_norm=True,
        post_norms=True, group_size=64, window=5, local_layers=(1,), local_rope_theta=100.0,
    ),
    "local layers": DecoderConfig(
        **SIZES, activation="gelu_tanh", window=5, local_layers=(0,), local_rope_theta=100.0,
    ),
}  # fmt: skip


def random_model(config: DecoderConfig) -> BitNet:
    model = BitNet(config)
    for module in model.modules():
        if isinstance(module, TernaryMatrix):
            w = torch.randint(-1, 2, (module.out_features, module.in_features), dtype=torch.int8)
            module.packed_weight = ops.pack_ternary(w)
            module.weight_scale.uniform_(0.05, 0.15)
            if module.group_size == 128:  # and others stay float32
                module.weight_scale = module.weight_scale.half()
            if module.bias is not None:
                module.bias.normal_()
        elif isinstance(module, RMSNorm):
            module.weight.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model(tmp_path: Path) -> BitNet:
    model = from_pretrained(tiny_folder(tmp_path, Sizes(hidden=64, intermediate=80, heads=4, kv_heads=2)))
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.repack(LAYOUTS.get(name.rsplit(".", 1)[-1], "tile16"))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, the number of tokens, for every call of consecutive layers at once."""
    seen: list[int] = []
    run = PreparedLayers.__call__

    def counted(self: PreparedLayers, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape[1])
        return run(self, x, *rest)

    monkeypatch.setattr(PreparedLayers, "__call__", counted)
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


def without_cache(model: BitNet) -> Tensor:
    return model.hidden_states(torch.arange(12).reshape(2, 6) % model.config.vocab_size)


def by_modules(model: BitNet, run: Callable[..., Tensor] = states, *rest: Any) -> Tensor:
    """The same, every module called: global hooks see them all."""
    seen = []
    handle = register_module_forward_hook(lambda module, _inputs, _output: seen.append(module))
    try:
        given = run(model, *rest)
    finally:
        handle.remove()
    assert {id(layer) for layer in model.model.layers} <= set(map(id, seen))
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_modules(isa: str, calls: list[int], kind: str, dtype: torch.dtype) -> None:
    model = random_model(CONFIGS[kind])
    expected = by_modules(model, states, dtype)
    assert not calls
    given = states(model, dtype)
    assert calls == [4, 1, 1]
    assert given[0].isfinite().all()
    # A row of padding holds what nobody defined.
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1, 2:], expected[1, 2:])
    del calls[:]
    alone = without_cache(model)
    assert calls == [6]
    assert torch.equal(alone, by_modules(model, without_cache))
    if dtype == torch.float32:
        assert torch.equal(alone[0], given[0])


@pytest.mark.parametrize("layout", [*packing.LAYOUTS, "mixed"])
def test_layouts(isa: str, model: BitNet, calls: list[int], layout: str) -> None:
    if layout != "mixed":
        bitnet_ops.repack(model, layout)
    expected = by_modules(model)
    given = states(model)
    assert calls == [4, 1, 1]
    assert torch.equal(given[0], expected[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_nothing(threads: None, count: int) -> None:
    model = random_model(BitNetConfig(**{**SIZES, "hidden_size": 240, "intermediate_size": 800}))
    torch.set_num_threads(1)
    expected = states(model)
    torch.set_num_threads(count)
    assert torch.equal(states(model)[0], expected[0])


def test_numbers_that_are_none_stay_in_their_row() -> None:
    model = random_model(CONFIGS["llama"])
    expected = without_cache(model)
    model.model.embed_tokens.weight[6:12] = torch.nan  # the tokens of row 1
    given = without_cache(model)
    assert torch.equal(given[0], expected[0])
    assert given[1].isnan().all()


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


def another_activation(model: BitNet) -> None:
    model.model.layers[1].mlp.activation = "silu"


def another_residual_scale(model: BitNet) -> None:
    model.model.layers[1].residual_scale = 0.5


def one_layer_less(model: BitNet) -> None:
    del model.model.layers[0]


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
        another_forward, a_hook, another_activation, another_residual_scale,
    ],
)  # fmt: skip
def test_a_change_is_seen(model: BitNet, change: Callable[[BitNet], None]) -> None:
    before = states(model)
    change(model)
    given, expected = states(model), by_modules(model)
    assert torch.equal(given[0], expected[0])
    assert given[0].isfinite().all()
    if change is not another_layout:
        assert not torch.equal(given[0], before[0])


def test_a_removed_hook_lets_the_operator_in_again(model: BitNet, calls: list[int]) -> None:
    states(model)
    handles = [layer.register_forward_hook(lambda *_: None) for layer in model.model.layers]
    del calls[:]
    states(model)
    assert not calls
    for handle in handles:
        handle.remove()
    states(model)
    assert len(calls) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_layers(model: BitNet, copied: Callable[[BitNet], BitNet]) -> None:
    before = states(model)
    twin = copied(model)
    another_weight(twin)
    assert torch.equal(states(twin)[0], by_modules(twin)[0])
    assert not torch.equal(states(twin)[0], before[0])
    assert torch.equal(states(model)[0], before[0])


def test_only_layers_that_are_watched_run_as_modules(model: BitNet, calls: list[int]) -> None:
    expected = states(model)
    del calls[:]
    seen: list[Tensor] = []
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert torch.equal(states(model)[0], expected[0])
    assert calls == [4, 1, 1]  # layer 0
    assert [output.shape[1] for output in seen] == [4, 1, 1]


def test_hooks_see_what_modules_give(model: BitNet) -> None:
    """A hook on a block sees what the block adds to the residual stream, as in transformers."""
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[0]

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: seen.__setitem__(name, output))

    for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        watch(name, getattr(layer, name))
    layer.register_forward_pre_hook(lambda _module, inputs: seen.__setitem__("in", inputs[0]))
    watch("out", layer)
    without_cache(model)
    middle = seen["in"] + seen["self_attn"]
    assert torch.equal(layer.post_attention_layernorm(middle), seen["post_attention_layernorm"])
    assert torch.equal(middle + seen["mlp"], seen["out"])


def test_dropout_alone_in_training_mode(model: BitNet, calls: list[int]) -> None:
    """As for Monte-Carlo dropout: every residual branch drops, and nothing else trains."""
    expected = states(model)
    del calls[:]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
            module.train()
    model.model.dropout.eval()  # that of the embedding would do by itself
    assert not torch.equal(states(model)[0], expected[0])
    assert not calls
    torch.manual_seed(1)
    one = states(model)
    torch.manual_seed(1)
    assert torch.equal(states(model)[0], one[0])


def test_a_layer_taken_away_while_a_cache_is_in_use(model: BitNet) -> None:
    """Layers use the place in the cache that they have now, by plan and by modules."""
    del model.model.layers[0]
    cache = KVCache(model.config, 1, 16)
    ids = torch.arange(6)[None]
    model.hidden_states(ids[:, :4], cache=cache)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    given = model.hidden_states(ids[:, 4:], cache=cache)
    assert torch.equal(given, model.hidden_states(ids)[:, 4:])
    assert given.isfinite().all()


def test_global_hooks_are_seen(model: BitNet, calls: list[int]) -> None:
    states(model)
    del calls[:]
    seen = []
    handle = register_module_forward_hook(lambda module, _inputs, _output: seen.append(type(module)))
    states(model)
    handle.remove()
    assert not calls
    assert seen.count(BitLinear) == 3 * 14


def test_gradients_go_through_the_layers(model: BitNet, calls: list[int]) -> None:
    model.model.layers[0].input_layernorm.weight.requires_grad_()
    states(model)
    assert calls == [] or model.model.plan().runs[0].number == 2
    without_cache(model).square().sum().backward()
    assert not calls
    assert model.model.layers[0].input_layernorm.weight.grad.any()
    with torch.no_grad():
        states(model)
    assert len(calls) == 3


def test_weights_that_are_not_contiguous(model: BitNet) -> None:
    """They are copied, and what is written to them is seen all the same."""
    scale = model.model.layers[0].self_attn.o_proj.weight_scale
    model.model.layers[0].self_attn.o_proj.weight_scale = torch.stack([scale, scale], 1)[:, 0]
    before = states(model)
    assert torch.equal(before[0], by_modules(model)[0])
    in_place(model)
    given = states(model)
    assert torch.equal(given[0], by_modules(model)[0])
    assert not torch.equal(given[0], before[0])


def test_weights_are_kept_no_longer_than_the_layers() -> None:
    model = random_model(CONFIGS["bitnet"])
    states(model)
    layer = model.model.layers[0].mlp.up_proj
    weight = weakref.ref(layer.packed_weight)
    layer.repack("row")
    assert weight() is None, "without another call"
    states(model)
    weight = weakref.ref(layer.packed_weight)
    bitnet_ops.repack(model, "column")
    assert weight() is None
    states(model)
    weight = weakref.ref(layer.packed_weight)
    del layer, model
    gc.collect()
    assert weight() is None


def test_a_released_number_is_refused(model: BitNet) -> None:
    number = torch.ops.bitnet_ops.prepare_layers(*lists(model))
    context = KVCache(model.config, 1, 64).context()
    given = [torch.randn(1, 2, 64), number, *context.arguments()]
    torch.ops.bitnet_ops.run_prepared_layers(*given)
    torch.ops.bitnet_ops.release_layers(number)
    torch.ops.bitnet_ops.release_layers(number)  # nothing happens
    with pytest.raises(RuntimeError, match=f"argument 'prepared': expected a number .*, got {number}"):
        torch.ops.bitnet_ops.run_prepared_layers(*given)


def test_a_plan_dropped_while_another_thread_runs(model: BitNet) -> None:
    expected = states(model)
    wrong: list[Tensor] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            given = states(model)
            if not torch.equal(given[0], expected[0]):
                wrong.append(given)

    worker = threading.Thread(target=run)
    worker.start()
    for _ in range(200):  # what repack does to a plan
        model.model.plan().drop()
    stop.set()
    worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_decodes(model: BitNet) -> None:
    expected = states(model)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            model.model.plan().drop()
            states(model)

    worker = threading.Thread(target=run)
    worker.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(1)
                    os._exit(0 if torch.equal(states(model)[0], expected[0]) else 1)
                finally:
                    os._exit(2)
            assert wait_for(child) == 0
    finally:
        stop.set()
        worker.join()


def wait_for(child: int, seconds: float = 60) -> int:
    """Exit status of a child; -1 where it hangs."""
    status: list[int] = []
    waiter = threading.Thread(target=lambda: status.append(os.waitpid(child, 0)[1]))
    waiter.start()
    waiter.join(seconds)
    if not status:
        os.kill(child, 9)
        waiter.join()
        return -1
    return os.waitstatus_to_exitcode(status[0])


def test_shapes_without_data(model: BitNet) -> None:
    """As memory is estimated: nothing of it is left behind."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(2, 6, dtype=torch.int64)
        given = model.hidden_states(ids, None, KVCache(model.config, 2, 16))
    assert isinstance(given, FakeTensor)
    assert given.shape == (2, 6, 64)
    assert torch.equal(states(model)[0], by_modules(model)[0])


# ---- the operator's arguments -----------------------------------------------------------------------


def lists(model: BitNet) -> tuple[list[Tensor], list[int], list[float]]:
    ((_, _, found),) = collect(model.model.layers, KNOWN)
    assert found is not None
    return found


def arguments(model: BitNet) -> dict[str, Any]:
    names = ("cos", "sin", "start", "keys", "values", "key_scale", "value_scale")
    context = KVCache(model.config, 1, 64).context().arguments()
    weights, structure, constants = lists(model)
    return {
        "x": torch.randn(1, 2, 64), "weights": weights, "structure": structure, "constants": constants,
        **dict(zip(names, context, strict=True)),
    }  # fmt: skip


def replaced(values: list[Any], place: int, value: Any) -> list[Any]:
    return [*values[:place], value, *values[place + 1 :]]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "fewer weights": (lambda a: {"weights": a["weights"][:-1]}, "'weights': expected as many elements"),
    "more weights": (
        lambda a: {"weights": [*a["weights"], a["x"]]},
        "'weights and constants': expected no more",
    ),
    "fewer constants": (lambda a: {"constants": []}, "'constants': expected as many elements"),
    "fewer numbers": (lambda a: {"structure": a["structure"][:-1]}, "'structure': expected as many elements"),
    "no layers": (
        lambda a: {"weights": [], "structure": [], "constants": []},
        "'structure': expected as many elements",
    ),
    "activation": (
        lambda a: {"structure": replaced(a["structure"], 3, 9)},
        r"'structure: layers\[0\].activation': expected a number from 0 to 2, got 9",
    ),
    "a size": (
        lambda a: {"structure": replaced(a["structure"], 14, 200)},
        r"'layers\[0\].q.packed': expected a CPU tensor uint8",
    ),
    "a negative size": (
        lambda a: {"structure": replaced(a["structure"], 14, -1)},
        "expected a size of at least 0",
    ),
    "a huge size": (
        lambda a: {"structure": replaced(a["structure"], 14, 1 << 40)},
        "expected a size below 2",
    ),
    "layout": (
        lambda a: {"structure": replaced(a["structure"], 15, 7)},
        r"layers\[0\].q.layout': expected a number from 0 to 3",
    ),
    "bits": (
        lambda a: {"structure": replaced(a["structure"], 16, 7)},
        r"layers\[0\].q.activation_bits': expected 8 or 16, got 7",
    ),
    "a weight's dtype": (
        lambda a: {"weights": replaced(a["weights"], 1, a["weights"][1].double())},
        r"layers\[0\].q.weight_scale': expected a CPU tensor float32 \[64\]",
    ),
    "epsilon": (
        lambda a: {"constants": replaced(a["constants"], 2, -1.0)},
        r"layers\[0\].input_norm.eps': expected a number of at least 0",
    ),
    "x": (lambda a: {"x": a["x"].double()}, r"'x': expected a tensor float32 \[batch, tokens, 64\]"),
    "cos": (lambda a: {"cos": a["cos"][0]}, r"'cos': expected a CPU tensor float32 \[tables, positions"),
    "sin": (lambda a: {"sin": a["sin"][:, 1:]}, "'sin': expected"),
    "head_dim": (
        lambda a: {"cos": a["cos"][..., 1:].contiguous(), "sin": a["sin"][..., 1:].contiguous()},
        "'structure': expected q and k of whole heads of 14",
    ),
    "keys": (
        lambda a: {"keys": a["keys"][1:]},
        r"'keys': expected a tensor \[layers, ...\] for at least 2 layers",
    ),
    "values": (lambda a: {"values": a["values"][1:]}, r"'values': expected a tensor \[layers, ...\]"),
    "no values": (lambda a: {"values": None}, "'values': expected a tensor where there are keys, got None"),
    "no keys": (lambda a: {"keys": None}, "'keys': expected a tensor where there are values"),
    "slot": (lambda a: {"slot": 1}, r"'keys': expected a tensor \[layers, ...\] for at least 3 layers"),
    "a negative slot": (lambda a: {"slot": -1}, "'slot': expected a number of at least 0, got -1"),
    "start": (lambda a: {"start": torch.tensor([63])}, "'start': expected positions from start to"),
    "start without a cache": (
        lambda a: {"keys": None, "values": None, "start": torch.tensor([1])},
        "'start': expected positions from start to",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(model: BitNet, what: str) -> None:
    given = arguments(model)
    ops.decoder_layers(**given)
    change, message = WRONG[what]
    with pytest.raises(RuntimeError, match=f"^bitnet_ops::decoder_layers: argument .*{message}"):
        ops.decoder_layers(**{**given, **change(given)})
