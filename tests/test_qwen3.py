"""Qwen3-class ternary models: parity with transformers, and that they obey the old contracts.

The checkpoints are plain float ones whose values are ternary, as Ternary-Bonsai's. transformers multiplies
with these floats; our activations are rounded to 16 bits, so that the bounds have a term of that size. The
same folder is also loaded with ``linear=torch.nn.Linear``, where both sides differ by float32's roundings
only (u = 2^-24; see test_parity_transformers.py).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import assert_plan_is_the_modules, assert_same_bits_everywhere, assert_same_model
from test_llama import captured, prompts
from torch import Tensor, nn

pytest.importorskip("transformers")
from their_models import (
    LLAMA_FORMATS,
    LlamaPair,
    U,
    assert_within,
    biased_bound,
    exact_llama,
    make_llama,
    make_ternary_floats,
    median_error,
)
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from bitnet_ops import (
    BitNet,
    DecoderConfig,
    RopeScaling,
    from_pretrained,
    packing,
    reference,
)
from bitnet_ops.decoder.cache import Context, rotation_tables
from bitnet_ops.families.qwen3 import QWEN3
from bitnet_ops.layers.matrix import TernaryMatrix

pytestmark = pytest.mark.usefixtures("eager")

YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}

CASES: dict[str, dict[str, Any]] = {
    "rows": {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1,
             "head_dim": 20, "group": 0},
    "64": {"hidden_size": 140, "intermediate_size": 200, "num_attention_heads": 6, "num_key_value_heads": 2,
           "head_dim": 26, "tie_word_embeddings": True, "group": 64},
    "128, YaRN": {"hidden_size": 200, "intermediate_size": 300, "num_attention_heads": 5, "head_dim": 32,
                  "num_key_value_heads": 5, "rope_parameters": YARN, "group": 128},
    "256, biases": {"hidden_size": 260, "intermediate_size": 300, "num_attention_heads": 9, "head_dim": 32,
                    "num_key_value_heads": 3, "attention_bias": True, "group": 256},
    "128, all ternary": {"hidden_size": 200, "intermediate_size": 260, "num_attention_heads": 5,
                         "head_dim": 32, "num_key_value_heads": 1, "group": 128, "tables": True},
    "64, all ternary, tied": {"hidden_size": 140, "intermediate_size": 200, "num_attention_heads": 3,
                              "head_dim": 26, "num_key_value_heads": 3, "tie_word_embeddings": True,
                              "group": 64, "tables": True},
    "rows, all ternary": {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 3,
                          "head_dim": 20, "num_key_value_heads": 1, "group": 0, "tables": True},
}  # fmt: skip

LENGTH = 40
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the model has."""
    return {"num_hidden_layers": 2, **CASES[request.param]}


@pytest.fixture
def pair(tmp_path: Path, case: dict[str, Any]) -> LlamaPair:
    """A model of each case."""
    return make_ternary_floats(tmp_path / "floats", **case)


@pytest.fixture
def dense(pair: LlamaPair) -> LlamaPair:
    """The same with float projections on both sides."""
    return dataclasses.replace(pair, ours=from_pretrained(pair.folder, linear=nn.Linear))


def test_the_config(pair: LlamaPair, case: dict[str, Any]) -> None:
    yarn = case.get("rope_parameters")
    assert pair.ours.config == DecoderConfig(
        vocab_size=97,
        hidden_size=case["hidden_size"],
        intermediate_size=case["intermediate_size"],
        num_hidden_layers=2,
        num_attention_heads=case["num_attention_heads"],
        num_key_value_heads=case["num_key_value_heads"],
        max_position_embeddings=64,
        head_dim=case["head_dim"],
        rms_norm_eps=1e-5,
        activation="silu",
        qk_norm=True,
        attention_bias=case.get("attention_bias", False),
        activation_bits=16,
        group_size=case["group"],
        ternary_embedding=case.get("tables", False),
        ternary_head=case.get("tables", False),
        rope_theta=1000.0 if yarn else 10000.0,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=32) if yarn else None,
        tie_word_embeddings=case.get("tie_word_embeddings", False),
    )


SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
         "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 64}  # fmt: skip


def test_absent_fields_are_as_in_transformers() -> None:
    """The defaults of Qwen3Config."""
    config, theirs = DecoderConfig(**QWEN3.settings(SIZES)), Qwen3Config(**SIZES)
    for name in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
                 "pad_token_id", "attention_bias", "initializer_range"):  # fmt: skip
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.activation == theirs.hidden_act
    assert {"rope_theta": config.rope_theta, "rope_type": "default"} == theirs.rope_parameters
    assert theirs.sliding_window is None


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 4096},  # from the 28th layer on
        {"layer_types": ["full_attention"] * 2},
    ],
)
def test_a_window_that_no_layer_has(fields: dict[str, Any]) -> None:
    assert QWEN3.settings(SIZES | fields) == QWEN3.settings(SIZES)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 4096, "num_hidden_layers": 29}, "use_sliding_window"),
        ({"use_sliding_window": 1, "sliding_window": 9, "max_window_layers": "2"}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"head_dim": 33}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_other_models_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=rf"{word}: expected .* got"):
        DecoderConfig(**QWEN3.settings(SIZES | fields))


def test_norms(pair: LlamaPair) -> None:
    """Those of heads, too. As in test_llama.py: (K + 1) / 2 + 8 roundings on each side."""
    count = 0
    for name, theirs in pair.theirs.named_modules():
        if isinstance(theirs, Qwen3RMSNorm):
            x = torch.randn(3, 5, *theirs.weight.shape) * torch.tensor([7.0, 0.1, 1e-3]).reshape(3, 1, 1)
            mean = x.double().square().mean(-1, keepdim=True)
            exact = x.double() / (mean + theirs.variance_epsilon).sqrt() * theirs.weight
            bound = 2 * ((x.shape[-1] + 1) / 2 + 8) * U * exact.abs()
            assert_within(pair.ours.get_submodule(name)(x), theirs(x), bound, name)
            count += 1
    assert count == 2 * 4 + 1


def test_the_weights_are_exact(pair: LlamaPair, case: dict[str, Any]) -> None:
    """Weights times scales are the floats in the file, bit for bit."""
    names = [f"model.layers.{index}.{part}" for index in range(2) for part in PARTS]
    if case.get("tables"):
        names += ["model.embed_tokens"] + ["lm_head"] * (not case.get("tie_word_embeddings", False))
    for name in names:
        layer, theirs = pair.ours.get_submodule(name), pair.theirs.get_submodule(name)
        assert isinstance(layer, TernaryMatrix)
        scale = layer.weight_scale.unsqueeze(0) if case["group"] == 0 else layer.scales()
        every_input = scale.repeat_interleave(case["group"] or layer.in_features, 0)[: layer.in_features]
        assert torch.equal(layer.unpack() * every_input.T, theirs.weight)
        assert torch.equal(layer.dense(), theirs.weight)


def test_projections(pair: LlamaPair) -> None:
    """Against the product with the floats.

    An input is off by half a step x_scale of its row, and by u of the rounded quotient, less than 0.01 of a
    step (32639 * 3 u). The sums of K terms there and of G groups here round K + G + 10 times at most.
    """
    for index in range(2):
        for part in PARTS:
            name = f"model.layers.{index}.{part}"
            layer, theirs = pair.ours.get_submodule(name), pair.theirs.get_submodule(name)
            x = torch.randn(2, 4, layer.in_features) * torch.tensor([0.01, 30.0]).reshape(2, 1, 1)
            x[1, 3] = 0
            size = theirs.weight.double().abs()
            step = x.double().abs().amax(-1, keepdim=True) / reference.LARGEST_Q[16]
            rounds = layer.in_features + -(-layer.in_features // 64) + 10
            bound = 0.51 * step * size.sum(1) + rounds * U * (x.double().abs() @ size.T)
            if theirs.bias is not None:
                bound = bound + 4 * U * (theirs.bias.double().abs() + theirs(x).double().abs())
            assert_within(layer(x), theirs(x), bound, name)
            assert bound[1].max() < 2e-3 * theirs(x[1]).abs().max(), "the bound proves nothing"
            assert (layer.bias is not None) == (theirs.bias is not None)


def test_embedding_and_head(pair: LlamaPair) -> None:
    """Rows are theirs, bit for bit; scores of a ternary head are bounded as in test_projections."""
    ids = torch.arange(97).view(1, -1)
    assert torch.equal(pair.ours.model.embed_tokens(ids), pair.theirs.model.embed_tokens(ids))
    hidden = torch.randn(2, 4, pair.ours.config.hidden_size) * torch.tensor([0.1, 5.0]).reshape(2, 1, 1)
    size = pair.theirs.lm_head.weight.double().abs()
    step = hidden.double().abs().amax(-1, keepdim=True) / reference.LARGEST_Q[16]
    of_activations = 0.51 * step * size.sum(1) if pair.ours.config.ternary_head else 0.0
    bound = of_activations + 2 * (size.shape[1] + 14) * U * (hidden.double().abs() @ size.T)
    scores = pair.ours.score(hidden)
    assert scores.dtype == torch.float32
    assert_within(scores, pair.theirs.lm_head(hidden), bound, "scores")
    assert bound.max() < 2e-3 * scores.abs().max(), "the bound proves nothing"


def rotations(pair: LlamaPair, positions: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(cos, sin) of both sides."""
    cos, sin = rotation_tables(pair.ours.config, positions)
    return (cos[0], sin[0]), pair.theirs.model.rotary_emb(torch.zeros(1), positions[None])


def test_rotary_embedding(pair: LlamaPair) -> None:
    """Frequencies err by 15 u (test_rope_scaling.py), cosines by as much times the position and 3 ulp."""
    for mine, theirs in zip(*rotations(pair, torch.arange(60)), strict=True):
        assert_within(torch.cat((mine, mine), -1), theirs[0], 1.2 * (60 * 15 * U + 8 * U), "rotary embedding")
    if pair.ours.config.rope_scaling is not None:
        cos = rotation_tables(pair.ours.config, torch.arange(1))[0]
        assert cos.min() > 1.1, "the attention factor"


def test_attention(dense: LlamaPair) -> None:
    """What enters o_proj, with float projections.

    How far queries, keys and values lie apart in front of the rotation is measured, for test_projections and
    test_norms have bounds on that. The rotation adds 60 * 15 u of their size. Both factors of a score err;
    the softmax amplifies by exp(2 * error); see test_parity_transformers.py.
    """
    config = dense.ours.config
    x = torch.randn(2, LENGTH, config.hidden_size)
    (cos, sin), their_rotation = rotations(dense, torch.arange(LENGTH))
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1).expand(2, 1, LENGTH, LENGTH)
    turn = cos.square().add(sin.square()).sqrt().max().double()
    for ours, theirs in zip(dense.ours.model.layers, dense.theirs.model.layers, strict=True):
        ours, theirs = ours.self_attn, theirs.self_attn
        got = captured(ours.o_proj, ours, x, Context(cos[None], sin[None]), 0)
        expected = captured(theirs.o_proj, theirs, x, their_rotation, mask)
        sizes, errors = {}, {}
        for part in "qkv":
            mine, other = (getattr(side, f"{part}_proj")(x) for side in (ours, theirs))
            mine, other = (y.unflatten(-1, (-1, config.head_dim)) for y in (mine, other))
            if part != "v":
                mine, other = getattr(ours, f"{part}_norm")(mine), getattr(theirs, f"{part}_norm")(other)
            sizes[part] = mine.double().norm(dim=-1).max()
            errors[part] = (mine.double() - other.double()).norm(dim=-1).max() + 60 * 15 * U * sizes[part]
        q, k, v = sizes["q"], sizes["k"], sizes["v"]
        score = errors["q"] * k + q * errors["k"] + 2 * (config.head_dim + 4) * U * q * k
        spread = torch.expm1(2 * turn**2 * score / config.head_dim**0.5)
        bound = 2 * spread * v + errors["v"] + 2 * (2 * LENGTH + 16) * U * v
        assert bound < 0.05 * expected.abs().max(), "the bound proves nothing"
        assert_within(got, expected, bound, "attention")


def mean_error(logits: list[Tensor], exact: list[Tensor]) -> float:
    return float((torch.cat(logits).double() - torch.cat(exact)).abs().mean())


def test_end_to_end(tmp_path: Path, case: dict[str, Any]) -> None:
    """Pooled over seeds; activations of 16 bits cost no more than twice what they cost in float64."""
    ours, dense, theirs, exact, rounded = [], [], [], [], []
    for seed in range(3):
        pair = make_ternary_floats(tmp_path, seed=seed, **case)
        ids = prompts(2, LENGTH, seed)
        ours.append(pair.ours(ids))
        dense.append(from_pretrained(pair.folder, linear=nn.Linear)(ids))
        theirs.append(pair.theirs(ids).logits)
        exact.append(exact_llama(pair.theirs, ids))
        rounded.append(
            exact_llama(pair.theirs, ids, reference.LARGEST_Q[16], rounded_head=pair.ours.config.ternary_head)
        )
    largest = torch.cat(exact).abs().max()
    limit = 2 * mean_error(theirs, exact)
    assert limit < 1e-5 * largest
    assert mean_error(dense, exact) <= limit
    limit = 2 * mean_error(rounded, exact)
    assert limit < 1e-3 * largest
    assert mean_error(ours, exact) <= limit


# The published "bitnet" layouts

SMALL = {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1,
         "head_dim": 20, "num_hidden_layers": 2, "config_class": Qwen3Config}  # fmt: skip


@pytest.mark.parametrize("form", LLAMA_FORMATS)
def test_published_layouts(tmp_path: Path, form: str) -> None:
    """Their Qwen3 with their bitnet layers; as in test_llama.py."""
    pair = make_llama(tmp_path, form, attention_bias=form == "bitlinear", **SMALL)
    assert (pair.ours.config.activation_bits, pair.ours.config.group_size) == (8, 0)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer, theirs = pair.ours.get_submodule(name), pair.theirs.get_submodule(name)
        x = torch.randn(2, 4, layer.in_features)
        assert_within(layer(x), theirs(x), biased_bound(x, layer), name)
    ids = prompts(15, 12)
    exact = exact_llama(pair.theirs, ids)
    limit = 2 * median_error(pair.theirs(ids).logits, exact)
    assert limit < 1e-5 * exact.abs().max(), "most sequences have a flip"
    assert median_error(pair.ours(ids), exact) <= limit


def test_norms_inside_projections(tmp_path: Path) -> None:
    """Their names are those that transformers gives them in any family."""
    pair = make_llama(tmp_path, "bitlinear", norms=True, **SMALL)
    assert pair.ours.config.projection_norms
    assert "model.layers.0.self_attn.q_proj.rms_norm.weight" in dict(pair.theirs.named_parameters())


# The old contracts


def test_the_plan_is_the_modules(pair: LlamaPair) -> None:
    assert_plan_is_the_modules(pair.ours, prompts(2, 20))


def test_the_same_bits_everywhere(pair: LlamaPair, isa: str, threads: None) -> None:
    assert_same_bits_everywhere(pair.ours, prompts(3, 12))


def test_a_packed_folder(pair: LlamaPair, tmp_path: Path, case: dict[str, Any]) -> None:
    """Bit for bit the same, and config.json in the published fields."""
    pair.ours.save_pretrained(tmp_path / "packed")
    assert_same_model(from_pretrained(tmp_path / "packed"), pair.ours, prompts(2, 20))
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert fields["model_type"] == "qwen3"
    assert fields["architectures"] == ["Qwen3ForCausalLM"]
    assert "decoder_config" not in fields
    theirs = Qwen3Config(**fields)
    assert theirs.head_dim == case["head_dim"]
    assert theirs.rope_parameters == pair.theirs.config.rope_parameters
    assert theirs.attention_bias == case.get("attention_bias", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_bytes_a_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    """Scales are the stored numbers; embedding and head stay as stored."""
    case = CASES["128, YaRN"] | {"num_hidden_layers": 1}
    pair = make_ternary_floats(tmp_path, dtype=dtype, **case)
    assert pair.ours.config.group_size == 128
    layer = pair.ours.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight_scale.to(dtype).float(), layer.weight_scale)
    assert pair.ours.head_weight.dtype == dtype
    ids = prompts(4, LENGTH)
    exact = exact_llama(pair.theirs, ids)
    limit = 2 * mean_error([exact_llama(pair.theirs, ids, reference.LARGEST_Q[16])], [exact])
    assert mean_error([pair.ours(ids)], [exact]) <= limit


def test_it_is_made_from_a_config() -> None:
    """A fresh model has norms of queries and keys, and group scales, in the places of a loaded one."""
    config = DecoderConfig(**SIZES, qk_norm=True, group_size=64, activation_bits=16)
    attention = BitNet(config).model.layers[0].self_attn
    assert attention.q_norm is not None
    assert attention.q_proj.packed_weight.shape == packing.packed_shape(24, 24)
