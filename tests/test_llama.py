"""Llama-class ternary models: parity with transformers, and that the new parts obey the old contracts.

The checkpoints are made with transformers' own model. Module by module both get the same float32 input, and
the difference is compared with a bound on what rounding can do (u = 2^-24; see test_parity_transformers.py).
End to end both are compared with float64: our mean error is at most twice that of transformers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from contracts import assert_plan_is_the_modules, assert_same_bits_everywhere, assert_same_model
from text_models import assert_greedy, byte_level_tokenizer
from tiny_checkpoints import LLAMA3_ROPE, Sizes, Weights, published_tensors, untied, write_folder
from torch import Tensor

pytest.importorskip("transformers")
from their_models import (
    LLAMA_FORMATS,
    LlamaPair,
    U,
    assert_within,
    biased_bound,
    exact_llama,
    layer_and_norm,
    make_llama,
    median_error,
)
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import bitnet_ops
from bitnet_ops import (
    BitLinear,
    BitLinearQAT,
    BitNet,
    DecoderConfig,
    KVCache,
    RopeScaling,
    from_pretrained,
    packing,
    reference,
)
from bitnet_ops.checkpoint.config_json import parse_config
from bitnet_ops.decoder.cache import Context, rotation_tables
from bitnet_ops.evaluation.sparsity import LayerSparsity, layouts_for, measure_sparsity

pytestmark = pytest.mark.usefixtures("eager")

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = LLAMA3_ROPE | {"rope_theta": 10000.0}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "rope_parameters": ROPE},
    "wide heads": {
        "hidden_size": 60,  # no multiple of 16 or 20
        "intermediate_size": 100,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 20,  # 100 = 5 * 20 queries from 60
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": True,
    },
    "biases": {
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0},
    },
    "norms": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": LLAMA3,
        "norms": True,
    },
}

LENGTH = 40  # beyond the 16 positions that LLAMA3_ROPE keeps as they are


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the model has."""
    return {"num_hidden_layers": 2, **CASES[request.param]}


@pytest.fixture(params=LLAMA_FORMATS)
def pair(request: pytest.FixtureRequest, tmp_path: Path, case: dict[str, Any]) -> LlamaPair:
    """A model of each case in each format."""
    return make_llama(tmp_path / "published", request.param, **case)


@pytest.fixture
def llama(tmp_path: Path, case: dict[str, Any]) -> LlamaPair:
    """A model of each case in one format."""
    return make_llama(tmp_path / "published", "bitlinear", **case)


def prompts(count: int, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(97, (count, length), generator=torch.Generator().manual_seed(seed))


def test_the_config(llama: LlamaPair, case: dict[str, Any]) -> None:
    config, theirs = llama.ours.config, llama.theirs.config
    rope = case["rope_parameters"]
    factors = {name: rope[name] for name in rope if name not in ("rope_type", "rope_theta")}
    assert config == DecoderConfig(
        vocab_size=97,
        hidden_size=case["hidden_size"],
        intermediate_size=case["intermediate_size"],
        num_hidden_layers=2,
        num_attention_heads=case["num_attention_heads"],
        num_key_value_heads=theirs.num_key_value_heads,
        max_position_embeddings=64,
        head_dim=theirs.head_dim,
        rms_norm_eps=1e-5,
        activation="silu",
        projection_norms=case.get("norms", False),
        projection_norm_eps=1e-4 if "norms" in case else None,
        attention_bias=case.get("attention_bias", False),
        mlp_bias=case.get("mlp_bias", False),
        rope_scaling=RopeScaling(rope["rope_type"], **factors) if factors else None,
        tie_word_embeddings=case.get("tie_word_embeddings", False),
        bos_token_id=1,
        eos_token_id=2,
    )


def test_both_styles_of_the_config(tmp_path: Path) -> None:
    """Transformers 4 wrote rope_theta and rope_scaling, some with "type"; 5 writes rope_parameters."""
    sizes = Sizes(llama=True)
    tensors = published_tensors(Weights.random(sizes), reciprocal=True)
    old_type = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_type"}
    old = {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}
    configs = [
        from_pretrained(write_folder(tmp_path, sizes.config(**fields), tensors)).config
        for fields in (
            old,
            old | {"rope_scaling": old_type | {"type": "llama3"}},
            old | {"rope_scaling": LLAMA3_ROPE | {"rope_theta": 500.0}},
            {
                "rope_theta": None,
                "rope_scaling": None,
                "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500.0},
            },
            {"rope_theta": 500.0, "rope_scaling": None, "rope_parameters": LLAMA3_ROPE},
        )
    ]
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
    assert {(config.rope_theta, config.rope_scaling) for config in configs} == {(500.0, scaling)}


def test_absent_fields_are_as_in_transformers(tmp_path: Path) -> None:
    """The defaults of LlamaConfig."""
    sizes = Sizes(llama=True)
    names = ("hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings",
             "bos_token_id", "eos_token_id", "head_dim", "num_key_value_heads")  # fmt: skip
    tensors = published_tensors(untied(Weights.random(sizes)), reciprocal=True)
    config = from_pretrained(write_folder(tmp_path, sizes.config(**dict.fromkeys(names)), tensors)).config
    theirs = LlamaConfig(num_attention_heads=3, hidden_size=24)
    for name in (*names[1:2], *names[4:]):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.activation == theirs.hidden_act
    assert {"rope_theta": config.rope_theta, "rope_type": "default"} == theirs.rope_parameters
    assert config.rope_scaling is None


def test_norms(llama: LlamaPair) -> None:
    """As in test_parity_transformers.py: (K + 1) / 2 + 8 roundings on each side."""
    count = 0
    for name, theirs in llama.theirs.named_modules():
        if isinstance(theirs, LlamaRMSNorm):
            x = torch.randn(3, 5, *theirs.weight.shape) * torch.tensor([7.0, 0.1, 1e-3]).reshape(3, 1, 1)
            mean = x.double().square().mean(-1, keepdim=True)
            exact = x.double() / (mean + theirs.variance_epsilon).sqrt() * theirs.weight
            bound = 2 * ((x.shape[-1] + 1) / 2 + 8) * U * exact.abs()
            ours = llama.ours.get_submodule(name.replace(".rms_norm", ".norm"))
            assert_within(ours(x), theirs(x), bound, name)
            count += 1
    assert count == 2 * 2 + 1 + (14 if llama.ours.config.projection_norms else 0)


def projections(pair: LlamaPair) -> Iterator[tuple[str, Any, Any]]:
    """(name, our layer, their layer without the norm inside it, so that both get the same input)."""
    for index in range(2):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
            name = f"model.layers.{index}.{part}"
            layer, _ = layer_and_norm(pair.ours.get_submodule(name))
            theirs = pair.theirs.get_submodule(name)
            norm, theirs.rms_norm = theirs.rms_norm, None
            yield name, layer, theirs
            theirs.rms_norm = norm


def test_projections(pair: LlamaPair) -> None:
    """Packing, the direction of the scale, biases and what multiplies them."""
    for name, layer, theirs in projections(pair):
        x = torch.randn(2, 4, layer.in_features) * torch.tensor([0.01, 30.0]).reshape(2, 1, 1)
        x[1, 3] = 0
        bound = biased_bound(x, layer)
        assert_within(layer(x), theirs(x), bound, name)
        assert (layer.bias is not None) == (theirs.bias is not None)
        if layer.bias is not None:
            assert bound[0].max() < 0.1 * layer.bias.abs().max(), "the bound would not see a wrong bias"


def rotations(pair: LlamaPair, positions: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(cos, sin) of both sides."""
    cos, sin = rotation_tables(pair.ours.config, positions)
    return (cos[0], sin[0]), pair.theirs.model.rotary_emb(torch.zeros(1), positions[None])


def test_rotary_embedding(llama: LlamaPair) -> None:
    """A frequency is a power (2 u), a quotient, and stretched: turns err by 3 u more.

    With factors 1 and 4 the share that is kept errs by 4/3 of that and 2 u. So at most 20 u in all, of an
    angle of at most p; a changed angle changes a cosine by as much at most, beside 2 ulp on both sides.
    """
    for mine, theirs in zip(*rotations(llama, torch.arange(60)), strict=True):
        assert_within(torch.cat((mine, mine), -1), theirs[0], 60 * 20 * U + 8 * U, "rotary embedding")


NO_NORMS_INSIDE = pytest.mark.parametrize("case", ["plain", "wide heads", "biases"], indirect=True)
"""A last bit of a norm can flip an int8 rounding; test_norms and test_projections have those one by one."""


def captured(module: Any, run: Any, *args: object, **kwargs: object) -> Tensor:
    """The input that ``module`` gets while ``run`` runs."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        run(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0]


@NO_NORMS_INSIDE
def test_attention(llama: LlamaPair) -> None:
    """What enters o_proj; the bound is that of test_parity_transformers.py."""
    config = llama.ours.config
    x = torch.randn(2, LENGTH, config.hidden_size)
    (cos, sin), their_rotation = rotations(llama, torch.arange(LENGTH))
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1).expand(2, 1, LENGTH, LENGTH)
    for ours, theirs in zip(llama.ours.model.layers, llama.theirs.model.layers, strict=True):
        ours, theirs = ours.self_attn, theirs.self_attn
        got = captured(ours.o_proj, ours, x, Context(cos[None], sin[None]), 0)
        expected = captured(theirs.o_proj, theirs, x, their_rotation, mask)

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, config.head_dim))

        norms, errors = {}, {}
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = getattr(ours, name)
            norms[name] = heads(layer(x).double()).norm(dim=-1).max()
            errors[name] = (
                2 * heads(biased_bound(x, layer)).norm(dim=-1).max() + (60 * 20 + 4) * U * norms[name]
            )
        q, k = norms["q_proj"], norms["k_proj"]
        score = errors["q_proj"] * k + q * errors["k_proj"] + 2 * (config.head_dim + 4) * U * q * k
        spread = torch.expm1(2 * score / config.head_dim**0.5)
        largest = ours.v_proj(x).abs().max().double()
        bound = 2 * spread * largest + errors["v_proj"] + 2 * (2 * LENGTH + 16) * U * largest
        assert bound < 0.05 * expected.abs().max(), "the bound proves nothing"
        assert_within(got, expected, bound, "attention")


@NO_NORMS_INSIDE
def test_feed_forward(llama: LlamaPair) -> None:
    """What enters down_proj: silu(g) * u with both factors off by `biased_bound`.

    The slope of silu is at most 1.1. Its exponential errs by 2 ulp on either side, the sum, quotient and two
    products by u each: 8 u of the size on each side.
    """
    x = torch.randn(2, LENGTH, llama.ours.config.hidden_size)
    for ours, theirs in zip(llama.ours.model.layers, llama.theirs.model.layers, strict=True):
        got = captured(ours.mlp.down_proj, ours.mlp, x)
        expected = captured(theirs.mlp.down_proj, theirs.mlp, x)
        gate, up = ours.mlp.gate_proj(x).double(), ours.mlp.up_proj(x).double().abs()
        gate_error, up_error = biased_bound(x, ours.mlp.gate_proj), biased_bound(x, ours.mlp.up_proj)
        silu = (gate * gate.sigmoid()).abs()
        bound = 1.1 * gate_error * (up + up_error) + silu * up_error + 2 * 8 * U * silu * up
        assert_within(got, expected, bound, "feed-forward")


def test_end_to_end_without_flips(pair: LlamaPair) -> None:
    """In short texts through small models the median sequence has no flip: there both differ by rounding."""
    ids = prompts(15, 20)
    exact = exact_llama(pair.theirs, ids)
    limit = 2 * median_error(pair.theirs(ids).logits, exact)
    assert limit < 1e-5 * exact.abs().max(), "most sequences have a flip"
    assert median_error(pair.ours(ids), exact) <= limit
    cache = KVCache(pair.ours.config, len(ids), 20)
    steps = [pair.ours(piece, cache=cache) for piece in ids.split([5, 1, 1, 13], dim=1)]
    assert median_error(torch.cat(steps, dim=1), exact) <= limit
    accelerated = bitnet_ops.accelerate(pair.theirs)
    assert median_error(accelerated(ids).logits, exact) <= limit


# The old contracts


def test_the_plan_is_the_modules(llama: LlamaPair) -> None:
    assert_plan_is_the_modules(llama.ours, prompts(2, 20))


def test_the_same_bits_everywhere(tmp_path: Path, isa: str, threads: None, case: dict[str, Any]) -> None:
    assert_same_bits_everywhere(make_llama(tmp_path / "a", "bitlinear", **case).ours, prompts(3, 20))


def test_a_packed_folder(llama: LlamaPair, tmp_path: Path, case: dict[str, Any]) -> None:
    """Bit for bit the same, and config.json in the published fields."""
    model = llama.ours
    model.save_pretrained(tmp_path / "packed")
    assert_same_model(from_pretrained(tmp_path / "packed"), model, prompts(2, 20))
    assert_same_model(from_pretrained(tmp_path / "packed", mmap=False), model, prompts(2, 20))
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert fields["model_type"] == "llama"
    assert fields["hidden_act"] == "silu"
    assert fields["head_dim"] == model.config.head_dim
    assert "decoder_config" not in fields
    rope = {name: value for name, value in case["rope_parameters"].items() if name != "rope_theta"}
    assert fields.get("rope_scaling", ROPE) == (ROPE if len(rope) == 1 else rope)


def test_layouts_of_a_packed_folder(llama: LlamaPair, tmp_path: Path, isa: str) -> None:
    """Every layout, those of sparse matrices too, gives the same bits."""
    model, ids = llama.ours, prompts(1, 5)
    logits = model(ids)
    for layout in packing.LAYOUTS:
        bitnet_ops.repack(model, layout).save_pretrained(tmp_path / layout)
        again = from_pretrained(tmp_path / layout)
        assert torch.equal(again(ids), logits), layout
        assert torch.equal(again(ids[:, :1]), logits[:, :1]), layout


def full_config(**changes: Any) -> DecoderConfig:
    """Every field is another than its default, but those that `changes` sets."""
    fields = {
        "vocab_size": 61,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "head_dim": 20,
        "rms_norm_eps": 1e-4,
        "activation": "gelu_tanh",
        "sub_norms": True,
        "qk_norm": True,
        "post_norms": True,
        "projection_norms": True,
        "projection_norm_eps": 1e-3,
        "attention_bias": True,
        "attention_output_bias": False,
        "mlp_bias": True,
        "activation_bits": 16,
        "group_size": 64,
        "rope_theta": 123.0,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        "local_rope_theta": 77.0,
        "window": 7,
        "local_layers": (1,),
        "query_scale": 0.3,
        "embedding_scale": 2.0,
        "residual_scale": 0.5,
        "logit_scale": 0.25,
        "tie_word_embeddings": True,
        "bos_token_id": 4,
        "eos_token_id": (1, 2),
        "pad_token_id": 3,
        "initializer_range": 0.3,
        "dropout": 0.1,
    }
    return DecoderConfig(**(fields | changes))


def random_packed(config: DecoderConfig) -> BitNet:
    model = BitNet(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, BitLinear):
            w = torch.randint(-1, 2, (module.out_features, module.in_features), dtype=torch.int8)
            module.packed_weight = packing.pack(w)
            module.set_scales(torch.empty(module.scale_shape).uniform_(0.05, 0.2))
            if module.bias is not None:
                module.bias.normal_()
    return model


@pytest.mark.parametrize("config_type", [DecoderConfig, bitnet_ops.BitNetConfig])
def test_every_field_is_kept(tmp_path: Path, config_type: type[DecoderConfig]) -> None:
    """All at once, and one by one."""
    default, full = full_config().__dict__, full_config()
    sizes = {name: default[name] for name in list(default)[:7]} | {"bos_token_id": 0, "eos_token_id": 0}
    together = {"window": full.window, "local_layers": full.local_layers}
    changes = [{}, default, together] + [
        {name: value} for name, value in default.items() if name not in together
    ]
    for change in changes:
        config = config_type(**(sizes | change))
        model = BitNet(config, lambda *sizes, **options: torch.nn.Identity())  # no weights: a config's test
        model.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        assert parse_config(json.loads(file.read_text()), file) == config, change


def test_group_scales_and_wide_activations(tmp_path: Path) -> None:
    for changes in ({"activation_bits": 8, "group_size": 0}, {"activation_bits": 16}, {"activation_bits": 8}):
        model = random_packed(full_config(**changes))
        for layer in model.modules():
            if isinstance(layer, BitLinear) and layer.group_size:  # as most files have them
                layer.weight_scale = layer.weight_scale.half()
        model.save_pretrained(tmp_path)
        again = from_pretrained(tmp_path)
        assert_same_model(again, model, torch.randint(61, (1, 9)))
        layouts = layouts_for(model, [LayerSparsity(0.1, 0.1)] * 2)
        if model.config.group_size:
            assert set(layouts.values()) == {"tile16"}
        else:
            assert layouts["model.layers.1.mlp.down_proj.linear"] == "column"


def test_sparsity(llama: LlamaPair) -> None:
    """SiLU closes no gate; what down_proj multiplies with is counted behind the norm inside it."""
    model, ids = llama.ours, prompts(2, 20)
    seen: list[Tensor] = []
    handles = [
        layer_and_norm(layer.mlp.down_proj)[0].register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0])
        )
        for layer in model.model.layers
    ]
    measured = measure_sparsity(model, ids)
    for handle in handles:
        handle.remove()
    used = [(reference.quantize_activations(x)[0] != 0).float().mean().item() for x in seen]
    assert measured == [LayerSparsity(1.0, share) for share in used]
    assert "row" not in layouts_for(model, [LayerSparsity(1.0, 0.1)] * 2).values()


def test_train_and_pack(llama: LlamaPair, tmp_path: Path) -> None:
    """The parts of a Llama train, and what is packed gives what was trained."""
    config = llama.ours.config.replace(initializer_range=0.3)
    model = BitNet(config, BitLinearQAT)
    ids = prompts(2, 12)
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    trained = model.eval().requires_grad_(False)(ids)
    bitnet_ops.pack(model).save_pretrained(tmp_path / "packed")
    assert_same_model(from_pretrained(tmp_path / "packed"), model, prompts(2, 20))
    # A last bit can flip an int8 rounding; the median of the differences is that of rounding alone.
    assert (model(ids) - trained).abs().median() < 1000 * U * trained.abs().max()


def test_a_projection_that_is_not_as_configured_is_not_saved(llama: LlamaPair, tmp_path: Path) -> None:
    layer, _ = layer_and_norm(llama.ours.model.layers[1].mlp.up_proj)
    layer.activation_bits = 16
    with pytest.raises(ValueError, match=r"activation_bits=8, .* got another at 'model.layers.1.mlp.up_proj"):
        llama.ours.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_generate(llama: LlamaPair) -> None:
    """Greedy text is that of passes over the whole text; drafts change nothing."""
    model, ids = llama.ours, prompts(1, 12)
    new = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert_greedy(model, ids[0].tolist(), new[0, 12:].tolist())
    for drafts in (0, 5):
        options = {"max_new_tokens": 24, "do_sample": False, "prompt_lookup_num_tokens": drafts}
        assert torch.equal(model.generate(ids, eos_token_id=None, **options), new)
    sampled = {"max_new_tokens": 8, "do_sample": True, "seed": 1, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, **sampled), model.generate(ids, prompt_lookup_num_tokens=0, **sampled)
    )


def run(*arguments: str | Path) -> str:
    from bitnet_ops.cli.main import commands

    result = CliRunner().invoke(commands, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands(tmp_path: Path, case: dict[str, Any]) -> None:
    """Convert, info, generate and eval of a folder of this family."""
    fields = {name: value for name, value in case.items() if name != "norms"}
    tokenizer = byte_level_tokenizer()
    pair = make_llama(
        tmp_path / "a", "autobitlinear", norms=case.get("norms", False), vocab_size=400, **fields
    )
    tokenizer.save(str(pair.folder / "tokenizer.json"))
    run("convert", pair.folder, tmp_path / "b")
    converted = from_pretrained(tmp_path / "b")
    assert {module.layout for module in converted.modules() if isinstance(module, BitLinear)} == {
        bitnet_ops.best_layout()
    }
    assert torch.equal(converted(prompts(2)), pair.ours(prompts(2)))
    run("convert", tmp_path / "b", tmp_path / "c", "--layout", "tile16")
    assert torch.equal(from_pretrained(tmp_path / "c")(prompts(2)), pair.ours(prompts(2)))
    assert f"size {pair.ours.config.head_dim}" in run("info", "--model", tmp_path / "b")
    options = ("--max-new-tokens", "4", "It is a truth")
    assert run("generate", "--model", tmp_path / "b", *options).startswith("It is a truth")
    (tmp_path / "text").write_text("It is a truth universally acknowledged")
    assert "perplexity" in run("eval", "--model", tmp_path / "b", "--text", tmp_path / "text")


# Pooled: slow


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear", "online"])  # "ternary" is the same numbers
def test_end_to_end(tmp_path: Path, form: str) -> None:
    """Mean errors over cases, seeds and prompts; flips make them, so that few models prove nothing."""
    ours, theirs, size = [], [], 0.0
    for number, case in enumerate(CASES.values()):
        for seed in range(3):
            pair = make_llama(tmp_path / f"{number}-{seed}", form, seed, num_hidden_layers=5, **case)
            ids = prompts(40, LENGTH, seed)
            exact = exact_llama(pair.theirs, ids)
            ours.append((pair.ours(ids) - exact).abs().mean())
            theirs.append((pair.theirs(ids).logits - exact).abs().mean())
            size = max(size, exact.abs().max().item())
    ours_mean, theirs_mean = torch.stack(ours).mean(), torch.stack(theirs).mean()
    print(f"{form}: ours {ours_mean:.4g}, transformers {theirs_mean:.4g}, largest logit {size:.4g}")
    assert theirs_mean < 0.02 * size, "the float64 model is not the same model"
    assert ours_mean <= 2 * theirs_mean
