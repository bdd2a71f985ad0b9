"""Gemma 3: parity with transformers, ternary and dense, and that its parts obey the old contracts.

As in test_llama.py: module by module both get the same float32 input, and the difference is compared with a
bound on what rounding can do (u = 2^-24); end to end our mean error against float64 is at most twice theirs.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import assert_plan_is_the_modules, assert_same_bits_everywhere, assert_same_model
from torch import Tensor, nn

pytest.importorskip("transformers")
from their_gemma import GEMMA_FORMATS, GemmaPair, exact_gemma, make_gemma
from their_models import U, assert_within, biased_bound, layer_and_norm, median_error
from transformers import Gemma3TextConfig
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from bitnet_ops import (
    BitLinear,
    BitNet,
    CheckpointError,
    DecoderConfig,
    KVCache,
    RopeScaling,
    from_pretrained,
)
from bitnet_ops.checkpoint.config_json import parse_config
from bitnet_ops.decoder.cache import Context, rotation_tables

pytestmark = pytest.mark.usefixtures("eager")

BOTH_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3,
              "head_dim": 8, "sliding_window": 3, "sliding_window_pattern": 2},
    "wide heads": {
        "hidden_size": 60,  # no multiple of 16 or 20, nor a square: 60 ** 0.5 rounds
        "intermediate_size": 100,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "sliding_window": 7,
        "layer_types": LAYERS,
        "rope_parameters": BOTH_ROPES,
        "query_pre_attn_scalar": 30,
    },
    "biases": {
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "attention_bias": True,
        "layer_types": ["full_attention"] * 3,
        "tie_word_embeddings": False,
    },
    "norms": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 5,
        "layer_types": LAYERS,
        "rope_parameters": BOTH_ROPES,
        "norms": True,
    },
}  # fmt: skip

LENGTH = 40  # longer than every window


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the model has."""
    return {"num_hidden_layers": 3, **CASES[request.param]}


@pytest.fixture(params=GEMMA_FORMATS)
def pair(request: pytest.FixtureRequest, tmp_path: Path, case: dict[str, Any]) -> GemmaPair:
    """A model of each case in each format."""
    if request.param == "dense" and case.get("norms"):
        case = {name: value for name, value in case.items() if name != "norms"}
    return make_gemma(tmp_path / "published", request.param, **case)


@pytest.fixture
def gemma(tmp_path: Path, case: dict[str, Any]) -> GemmaPair:
    """A ternary model of each case in one format."""
    return make_gemma(tmp_path / "published", "bitlinear", **case)


def prompts(count: int, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(97, (count, length), generator=torch.Generator().manual_seed(seed))


def fields(**changes: Any) -> dict[str, Any]:
    """A config.json; a change of None leaves a field out."""
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=60, intermediate_size=100, num_hidden_layers=7, num_attention_heads=5,
        num_key_value_heads=1, head_dim=20, max_position_embeddings=64,
    )  # fmt: skip
    quantization = {"quant_method": "bitnet"}
    data = json.loads(config.to_json_string(use_diff=False)) | {"quantization_config": quantization} | changes
    return {name: value for name, value in data.items() if name not in changes or changes[name] is not None}


def parse(**changes: Any) -> DecoderConfig:
    return parse_config(fields(**changes), Path("config.json"))


def test_the_config(gemma: GemmaPair, case: dict[str, Any]) -> None:
    config, theirs = gemma.ours.config, gemma.theirs.config
    local = tuple(n for n, kind in enumerate(theirs.layer_types) if kind == "sliding_attention")
    rope = theirs.rope_parameters
    scaled = rope["full_attention"]["rope_type"] == "linear"
    assert config == DecoderConfig(
        vocab_size=97,
        hidden_size=case["hidden_size"],
        intermediate_size=case["intermediate_size"],
        num_hidden_layers=3,
        num_attention_heads=case["num_attention_heads"],
        num_key_value_heads=case["num_key_value_heads"],
        max_position_embeddings=64,
        head_dim=case["head_dim"],
        rms_norm_eps=1e-5,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        projection_norms=case.get("norms", False),
        projection_norm_eps=1e-4 if "norms" in case else None,
        attention_bias=case.get("attention_bias", False),
        rope_theta=1e6,
        rope_scaling=RopeScaling("linear", 8.0) if scaled else None,
        local_rope_theta=rope["sliding_attention"]["rope_theta"] if local else None,
        window=case["sliding_window"] if local else 0,
        local_layers=local,
        query_scale=case.get("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=case["hidden_size"] ** 0.5,
        tie_word_embeddings=case.get("tie_word_embeddings", True),
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


def test_both_styles_of_the_config() -> None:
    """Transformers 4 wrote the fields of kinds of layers one by one; 5 writes rope_parameters.

    Some versions of 5 put more beside the kinds, which counts for nothing.
    """
    old = {"rope_parameters": None, "rope_theta": 500.0, "rope_local_base_freq": 70.0,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        }
    }
    more = {"rope_parameters": {**new["rope_parameters"], "rope_theta": 3.0, "rope_type": "default"}}
    pattern = {"layer_types": None, "sliding_window_pattern": 3}
    configs = [parse(**rope, **kinds) for rope in (old, new, more) for kinds in ({}, pattern)]
    for config in configs:
        assert config.rope_theta == 500.0
        assert config.rope_scaling == RopeScaling("linear", 8.0)
        assert config.local_rope_theta == 70.0
    assert [config.local_layers for config in configs] == [(0, 1, 2, 3, 4, 6), (0, 1, 3, 4, 6)] * 3


def test_absent_fields_are_as_in_transformers() -> None:
    """The defaults of Gemma3TextConfig."""
    names = ("hidden_activation", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
             "eos_token_id", "pad_token_id", "head_dim", "layer_types", "sliding_window", "attention_bias",
             "query_pre_attn_scalar")  # fmt: skip
    config = parse(**dict.fromkeys(names))
    theirs = Gemma3TextConfig(num_attention_heads=5, hidden_size=60, num_hidden_layers=7)
    for name in ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
                 "head_dim", "attention_bias"):  # fmt: skip
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.activation == "gelu_tanh"
    assert theirs.hidden_activation == "gelu_pytorch_tanh"
    assert config.window == theirs.sliding_window
    assert config.score_scale == theirs.query_pre_attn_scalar**-0.5
    kinds = [
        "sliding_attention" if n in config.local_layers else "full_attention"
        for n in range(config.num_hidden_layers)
    ]
    assert kinds == theirs.layer_types
    assert config.rope_theta == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert config.local_rope_theta == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gemma3"}, "model_type.*'gemma3' .a model of text and other media"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["sliding_attention"] * 6}, "layer_types: expected 7 times"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({"layer_types": "sliding_attention"}, "layer_types"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"layer_types": None, "num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": "7"}, "num_hidden_layers"),
        ({"hidden_size": "60"}, "hidden_size"),
        ({"hidden_size": -60}, "hidden_size"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": 2.5}, "sliding_window"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"query_pre_attn_scalar": [256]}, "query_pre_attn_scalar"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"sliding_attention": 3}}, "rope_parameters.sliding_attention"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention",
        ),
        ({"rope_parameters": {"full_attention": None, "chunked": None}}, "rope_parameters: expected"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 3.0}}, "rope_local_base_freq": 4.0},
            "rope_local_base_freq",
        ),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {field}"):
        parse(**changes)


def test_norms(gemma: GemmaPair) -> None:
    """As in test_llama.py; the sum 1 + w rounds once more, on both sides."""
    count = 0
    for name, theirs in gemma.theirs.named_modules():
        if isinstance(theirs, Gemma3RMSNorm):
            x = torch.randn(3, 5, *theirs.weight.shape) * torch.tensor([7.0, 0.1, 1e-3]).reshape(3, 1, 1)
            mean = x.double().square().mean(-1, keepdim=True)
            exact = x.double() / (mean + theirs.eps).sqrt() * (1 + theirs.weight.double())
            bound = 2 * ((x.shape[-1] + 1) / 2 + 9) * U * exact.abs()
            assert_within(gemma.ours.get_submodule(name)(x), theirs(x), bound, name)
            count += 1
    assert count == 3 * 6 + 1


def linear_error(x: Tensor, layer: Any) -> Tensor:
    """How far two correct projections may lie apart, [..., N]; of a dense one, a sum of K and a bias."""
    if isinstance(layer, BitLinear):
        return biased_bound(x, layer)
    bias = 0.0 if layer.bias is None else layer.bias.double().abs()
    return 2 * (layer.in_features + 1) * U * (x.double().abs() @ layer.weight.double().abs().T + bias)


def test_projections(pair: GemmaPair) -> None:
    """Packing, the direction of the scale, biases, and norms inside, whose weights have no offset."""
    for index in range(3):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
            name = f"model.layers.{index}.{part}"
            module, theirs = pair.ours.get_submodule(name), pair.theirs.get_submodule(name)
            norm = None
            if pair.ours.config.projection_norms:
                module, norm = layer_and_norm(module)
                assert torch.equal(norm.weight, theirs.rms_norm.weight)
                theirs.rms_norm = None
            x = torch.randn(2, 4, module.in_features) * torch.tensor([0.01, 30.0]).reshape(2, 1, 1)
            assert_within(module(x), theirs(x), linear_error(x, module), name)


def rotations(pair: GemmaPair, layer: int, positions: Tensor) -> tuple[tuple[Tensor, Tensor], Any]:
    """(cos, sin) of a layer on both sides."""
    table = int(layer in pair.ours.config.local_layers)
    cos, sin = rotation_tables(pair.ours.config, positions)
    kind = pair.theirs.config.layer_types[layer]
    return (cos[table], sin[table]), pair.theirs.model.rotary_emb(torch.zeros(1), positions[None], kind)


def test_rotary_embedding(gemma: GemmaPair) -> None:
    """The bound is that of test_llama.py."""
    for layer in range(3):
        for mine, theirs in zip(*rotations(gemma, layer, torch.arange(60)), strict=True):
            assert_within(torch.cat((mine, mine), -1), theirs[0], 60 * 20 * U + 8 * U, f"rotary {layer}")


def their_mask(pair: GemmaPair, layer: int) -> Tensor:
    """What transformers adds to the scores of a layer, from its own function of positions."""
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    if pair.theirs.config.layer_types[layer] == "sliding_attention":
        sees = sliding_window_causal_mask_function(pair.theirs.config.sliding_window)
        time = torch.arange(LENGTH)
        mask = torch.zeros(LENGTH, LENGTH).masked_fill(~sees(0, 0, time[:, None], time[None]), float("-inf"))
    return mask.expand(2, 1, LENGTH, LENGTH)


def captured(module: Any, run: Any, *args: object) -> Tensor:
    """The input that ``module`` gets while ``run`` runs."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        run(*args)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("form", ["bitlinear", "dense"])
@pytest.mark.parametrize("case", ["plain", "wide heads", "biases"], indirect=True)
def test_attention(tmp_path: Path, case: dict[str, Any], form: str) -> None:
    """What enters o_proj, with windows, two rotary bases, and norms over heads.

    Where a query differs by e of its length q, its norm over the head differs by 2 e / q of sqrt(d) times the
    largest factor, beside the roundings of test_norms. Then as in test_parity_transformers.py.
    """
    pair = make_gemma(tmp_path, form, **case)
    config = pair.ours.config
    x = torch.randn(2, LENGTH, config.hidden_size)
    for layer, (ours, theirs) in enumerate(
        zip(pair.ours.model.layers, pair.theirs.model.layers, strict=True)
    ):
        ours, theirs = ours.self_attn, theirs.self_attn
        _, their_rotation = rotations(pair, layer, torch.arange(LENGTH))
        context = Context(*rotation_tables(config, torch.arange(LENGTH)))
        got = captured(ours.o_proj, ours, x, context, 0)
        expected = captured(theirs.o_proj, theirs, x, their_rotation, their_mask(pair, layer))

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, config.head_dim))

        lengths, errors = [], []
        for projection, norm in ((ours.q_proj, ours.q_norm), (ours.k_proj, ours.k_norm)):
            value, error = heads(projection(x).double()), heads(linear_error(x, projection))
            relative = (error.norm(dim=-1) / value.norm(dim=-1)).max()
            length = config.head_dim**0.5 * norm.weight.double().abs().max()
            roundings = 2 * ((config.head_dim + 1) / 2 + 9) + 60 * 20 + 4
            lengths.append(length)
            errors.append(2 * length * relative + roundings * U * length)
        score = errors[0] * lengths[1] + lengths[0] * errors[1]
        score += 2 * (config.head_dim + 4) * U * lengths[0] * lengths[1]
        spread = torch.expm1(2 * score * config.score_scale)
        largest = ours.v_proj(x).abs().max().double()
        value_error = linear_error(x, ours.v_proj).max()
        bound = 2 * spread * largest + value_error + 2 * (2 * LENGTH + 16) * U * largest
        assert bound < 0.05 * expected.abs().max(), "the bound proves nothing"
        assert_within(got, expected, bound, f"attention {layer}")


@pytest.mark.parametrize("form", ["bitlinear", "dense"])
@pytest.mark.parametrize("case", ["plain", "wide heads", "biases"], indirect=True)
def test_feed_forward(tmp_path: Path, case: dict[str, Any], form: str) -> None:
    """What enters down_proj: gelu(g) * u with both factors off by `linear_error`.

    The slope of gelu is at most 1.13. Its argument, tanh and products err by 16 u of max(|g|, 1) on each
    side: 1 + tanh(...) cancels for negative gates, so that the error is one of g, not of gelu(g).
    """
    pair = make_gemma(tmp_path, form, **case)
    x = torch.randn(2, LENGTH, pair.ours.config.hidden_size)
    for ours, theirs in zip(pair.ours.model.layers, pair.theirs.model.layers, strict=True):
        got = captured(ours.mlp.down_proj, ours.mlp, x)
        expected = captured(theirs.mlp.down_proj, theirs.mlp, x)
        gate, up = ours.mlp.gate_proj(x).double().abs(), ours.mlp.up_proj(x).double().abs()
        gate_error, up_error = linear_error(x, ours.mlp.gate_proj), linear_error(x, ours.mlp.up_proj)
        bound = (1.13 * gate_error + 2 * 16 * U * gate.clamp(min=1)) * (up + up_error) + gate * up_error
        assert_within(got, expected, bound, "feed-forward")


def test_the_embedding_is_scaled_in_float32(gemma: GemmaPair) -> None:
    ids = prompts(2)
    ours = captured(gemma.ours.model.layers[0], gemma.ours, ids)
    assert torch.equal(ours, gemma.theirs.model.embed_tokens(ids))


def test_end_to_end_without_flips(pair: GemmaPair) -> None:
    """In short texts through small models the median sequence has no flip: there both differ by rounding."""
    ids = prompts(15, 12)
    exact = exact_gemma(pair.theirs, ids)
    limit = 2 * median_error(pair.theirs(ids).logits, exact)
    assert limit < 1e-5 * exact.abs().max(), "most sequences have a flip"
    assert median_error(pair.ours(ids), exact) <= limit
    cache = KVCache(pair.ours.config, len(ids), 12)
    steps = [pair.ours(piece, cache=cache) for piece in ids.split([5, 1, 1, 5], dim=1)]
    assert median_error(torch.cat(steps, dim=1), exact) <= limit


def test_dense_end_to_end(tmp_path: Path) -> None:
    """Mean errors over cases, seeds and prompts, of texts longer than the windows."""
    ours, theirs, size = [], [], 0.0
    for number, case in enumerate(CASES.values()):
        case = {name: value for name, value in case.items() if name != "norms"}
        for seed in range(3):
            pair = make_gemma(tmp_path / f"{number}-{seed}", "dense", seed, num_hidden_layers=3, **case)
            ids = prompts(4, LENGTH, seed)
            exact = exact_gemma(pair.theirs, ids)
            ours.append((pair.ours(ids) - exact).abs().mean())
            theirs.append((pair.theirs(ids).logits - exact).abs().mean())
            size = max(size, exact.abs().max().item())
            assert all(type(layer.mlp.up_proj) is nn.Linear for layer in pair.ours.model.layers)
    ours_mean, theirs_mean = torch.stack(ours).mean(), torch.stack(theirs).mean()
    assert theirs_mean < 1e-5 * size, "the float64 model is not the same model"
    assert ours_mean <= 2 * theirs_mean


# The old contracts


def test_the_plan_is_the_modules(gemma: GemmaPair) -> None:
    assert_plan_is_the_modules(gemma.ours, prompts(2, 20))


def test_the_same_bits_everywhere(tmp_path: Path, isa: str, threads: None, case: dict[str, Any]) -> None:
    assert_same_bits_everywhere(make_gemma(tmp_path / "a", "bitlinear", **case).ours, prompts(3, 20))


def test_a_packed_folder(gemma: GemmaPair, tmp_path: Path, case: dict[str, Any]) -> None:
    """Bit for bit the same, with the family's fields; norms are stored as they multiply."""
    model = gemma.ours
    model.save_pretrained(tmp_path / "packed")
    assert_same_model(from_pretrained(tmp_path / "packed"), model, prompts(2, 20))
    data = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert data["model_type"] == "gemma3_text"
    assert data["hidden_activation"] == "gelu_pytorch_tanh"
    assert "decoder_config" not in data
    theirs = Gemma3TextConfig(**data)
    assert theirs.layer_types == gemma.theirs.config.layer_types
    for name in ("query_pre_attn_scalar", "head_dim", "rope_parameters"):
        assert getattr(theirs, name) == getattr(gemma.theirs.config, name), name


def test_a_scale_that_no_whole_number_says_is_kept(tmp_path: Path) -> None:
    for scale in (0.3, 1e-200, 1e11, None):
        config = parse().replace(query_scale=scale, num_hidden_layers=2, local_layers=(0,))
        BitNet(config, lambda *sizes, **options: nn.Identity()).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        assert parse_config(json.loads(file.read_text()), file) == config
        assert json.loads(file.read_text())["model_type"] == "gemma3_text"


# Pooled: slow


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear", "online"])
def test_end_to_end(tmp_path: Path, form: str) -> None:
    """Mean errors over cases, seeds and prompts; flips make them, so that few models prove nothing."""
    ours, theirs, size = [], [], 0.0
    for number, case in enumerate(CASES.values()):
        case = {name: value for name, value in case.items() if name != "layer_types"}
        for seed in range(3):
            pair = make_gemma(
                tmp_path / f"{number}-{seed}", form, seed, num_hidden_layers=5, sliding_window_pattern=3,
                **{name: value for name, value in case.items() if name != "sliding_window_pattern"},
            )  # fmt: skip
            ids = prompts(40, LENGTH, seed)
            exact = exact_gemma(pair.theirs, ids)
            ours.append((pair.ours(ids) - exact).abs().mean())
            theirs.append((pair.theirs(ids).logits - exact).abs().mean())
            size = max(size, exact.abs().max().item())
    ours_mean, theirs_mean = torch.stack(ours).mean(), torch.stack(theirs).mean()
    print(f"{form}: ours {ours_mean:.4g}, transformers {theirs_mean:.4g}, largest logit {size:.4g}")
    assert theirs_mean < 0.02 * size, "the float64 model is not the same model"
    assert ours_mean <= 2 * theirs_mean
