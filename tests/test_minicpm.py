"""MiniCPM-class models (BitCPM4) against what is published of them (public_models.py).

Weights are floats that are ternary already, so activations have 16 bits here. End to end, pooled over seeds:
with float projections our mean error against float64 is at most twice that of the published arithmetic in
float32; with ternary ones at most twice that of float64 with the same rounding of activations.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import assert_plan_is_the_modules, assert_same_bits_everywhere, assert_same_model
from public_models import PublicModel
from tiny_checkpoints import write_folder
from torch import Tensor, nn

pytest.importorskip("transformers")  # for the helpers' module
from their_models import ternary_floats

from bitnet_ops import BitLinear, BitNet, DecoderConfig, RopeScaling, from_pretrained, reference
from bitnet_ops.checkpoint import CheckpointError

HALF = 8  # pairs of a head
LENGTH = 40

# Fields of openbmb's config.json, and sizes that no tile divides.
MINICPM: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "bos_token_id": 1,
    "eos_token_id": [2, 94],
    "hidden_act": "silu",
    "hidden_size": 144,
    "initializer_range": 0.1,
    "intermediate_size": 148,
    "max_position_embeddings": 64,
    "num_attention_heads": 9,
    "num_hidden_layers": 2,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.3 * pair for pair in range(HALF)],
        "long_factor": [1.0 + 0.5 * pair for pair in range(HALF)],
        "original_max_position_embeddings": 64,
    },
    "torch_dtype": "bfloat16",
    "vocab_size": 97,
    "scale_emb": 12,
    "dim_model_base": 36,
    "scale_depth": 1.4,
}

SAME_FACTORS = MINICPM["rope_scaling"] | {"long_factor": MINICPM["rope_scaling"]["short_factor"]}
LONGER = {"rope_scaling": SAME_FACTORS | {"original_max_position_embeddings": 16}}

CASES: dict[str, dict[str, Any]] = {
    "longrope": {},
    "longer": LONGER | {"tie_word_embeddings": False},
    "plain": {"rope_scaling": None, "scale_emb": 1, "scale_depth": 3, "dim_model_base": 144},
}


def random_model(seed: int = 0, group: int = 128, **changes: Any) -> PublicModel:
    """Projections are ternary times a scale for each ``group`` inputs; all in bfloat16 as published."""
    model = PublicModel.random(MINICPM | changes, seed, lambda n, k, g: ternary_floats(n, k, group, g))
    model.tensors = {name: tensor.bfloat16() for name, tensor in model.tensors.items()}
    return model


def load(folder: Path, theirs: PublicModel, **options: Any) -> BitNet:
    return from_pretrained(write_folder(folder, theirs.data, theirs.tensors), **options)


def prompts(count: int, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(97, (count, length), generator=torch.Generator().manual_seed(seed))


def assert_refused(folder: Path, message: str, **changes: Any) -> None:
    theirs = random_model(num_hidden_layers=1)
    fields = {name: value for name, value in (theirs.data | changes).items() if value is not ...}
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(write_folder(folder, fields, theirs.tensors))


def test_the_config(tmp_path: Path) -> None:
    assert load(tmp_path, random_model()).config == DecoderConfig(
        vocab_size=97,
        hidden_size=144,
        intermediate_size=148,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        activation="silu",
        activation_bits=16,
        group_size=128,
        rope_scaling=RopeScaling(
            "factors", 1.0, factors=tuple(MINICPM["rope_scaling"]["short_factor"]), attention_factor=1.0
        ),
        embedding_scale=12.0,
        residual_scale=1.4 / math.sqrt(2),
        logit_scale=36 / 144,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=(2, 94),
        initializer_range=0.1,
    )


def test_absent_fields_mean_what_they_mean_to_the_published_code(tmp_path: Path) -> None:
    theirs = random_model(num_key_value_heads=9)
    names = (
        "model_type",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_scaling",
        "bos_token_id",
        "eos_token_id",
    )
    fields = {name: value for name, value in theirs.data.items() if name not in names}
    config = from_pretrained(write_folder(tmp_path, fields, theirs.tensors)).config
    assert (config.num_key_value_heads, config.rms_norm_eps, config.rope_theta) == (9, 1e-6, 10000.0)
    assert (config.rope_scaling, config.bos_token_id, config.eos_token_id) == (None, 1, 2)


@pytest.mark.parametrize(
    ("max_positions", "trained", "factor"),
    [(64, 64, 1.0), (64, 128, 1.0), (64, 16, math.sqrt(1 + math.log(4) / math.log(16)))],
)
def test_longrope_factors(tmp_path: Path, max_positions: int, trained: int, factor: float) -> None:
    scaling = SAME_FACTORS | {"original_max_position_embeddings": trained}
    theirs = random_model(max_position_embeddings=max_positions, rope_scaling=scaling)
    found = load(tmp_path, theirs).config.rope_scaling
    assert found is not None
    assert (found.kind, list(found.factors)) == ("factors", scaling["short_factor"])
    assert found.rotation_scale == pytest.approx(factor, rel=1e-15)


def test_longrope_that_would_change_within_a_text_is_refused(tmp_path: Path) -> None:
    scaling = MINICPM["rope_scaling"] | {"original_max_position_embeddings": 63}
    message = r"rope_scaling: expected equal short_factor and long_factor.* above 63, got others"
    assert_refused(tmp_path, message, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_factor": None}, r"short_factor: expected a list of numbers, got nothing"),
        ({"long_factor": "1"}, r"long_factor: expected a list of numbers, got '1'"),
        ({"short_factor": [1.0] * 7}, r"rope_scaling: expected head_dim / 2 = 8 factors, got 7"),
        ({"short_factor": [1.0] * 7 + [0.0]}, r"rope_scaling: expected .*got 0\.0"),
        ({"short_factor": [1.0] * 7 + ["x"]}, r"rope_scaling: expected .*got 'x'"),
        ({"short_factor": [1.0] * 7 + [math.nan]}, r"rope_scaling: expected .*got nan"),
        (
            {"original_max_position_embeddings": None},
            r"original_max.*of at least 2, got nothing",
        ),
        ({"original_max_position_embeddings": 1}, r"expected a number of at least 2, got 1"),
        ({"original_max_position_embeddings": True}, r"expected a number of at least 2, got True"),
        ({"factor": 4.0}, r"rope_scaling: expected rope_type and short_factor .*also \['factor'\]"),
        ({"rope_type": "yarn"}, r"rope_type: expected 'default' or 'longrope', got 'yarn'"),
    ],
    ids=str,
)
def test_damaged_longrope(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert_refused(tmp_path, message, rope_scaling=MINICPM["rope_scaling"] | changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scale_emb", ..., "scale_emb: expected a number above 0, got nothing"),
        ("scale_depth", None, "scale_depth: expected a number above 0, got nothing"),
        ("dim_model_base", ..., "dim_model_base: expected a number above 0, got nothing"),
        ("scale_emb", 0, "scale_emb: expected a number above 0, got 0"),
        ("scale_depth", -1.4, "scale_depth: expected a number above 0, got -1.4"),
        ("dim_model_base", 10**400, "dim_model_base: expected a number above 0, got 1000"),
        ("scale_emb", math.nan, "scale_emb: expected a number above 0, got nan"),
        ("scale_emb", "12", "scale_emb: expected a number above 0, got '12'"),
        ("scale_depth", True, "scale_depth: expected a number above 0, got True"),
        ("num_hidden_layers", "2", "num_hidden_layers: expected a number above 0, got '2'"),
        ("max_position_embeddings", [], r"max_position_embeddings: expected a number above 0, got \[\]"),
        ("use_mup", False, "use_mup: expected True or None, got False"),
        ("sparse_config", {"kernel_size": 32}, "sparse_config: expected None, got {'kernel_size': 32}"),
        ("attention_bias", True, "attention_bias: expected False or None, got True"),
        ("head_dim", 20, "head_dim: expected .* = 16, got 20"),
        ("num_experts", 8, "num_experts: expected at most 1, got 8"),
        ("hidden_act", "gelu", "hidden_act: expected 'silu', got 'gelu'"),
    ],
)
def test_fields_that_are_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    assert_refused(tmp_path, f"config.json: {message}", **{field: value})


def test_an_unquantized_checkpoint_is_named_so(tmp_path: Path) -> None:
    """Those that end in "-unquantized" have masters, which only their own code can round."""
    theirs = random_model()
    name = "model.layers.1.mlp.up_proj.weight"
    theirs.tensors[name] = torch.randn(148, 144).bfloat16()
    with pytest.raises(
        CheckpointError, match=rf"tensor '{name}': expected weights -s, 0 or s.*, got .* in row 0"
    ):
        load(tmp_path, theirs)


@pytest.mark.parametrize("group", [0, 64, 128, 256])
def test_the_weights_are_exact(tmp_path: Path, group: int) -> None:
    """Whatever the group size is; it is in no file."""
    theirs = random_model(
        group=group, hidden_size=272, intermediate_size=20, num_attention_heads=17, num_key_value_heads=1
    )
    ours = load(tmp_path, theirs)
    assert ours.config.group_size == group
    for name, module in ours.named_modules():
        if isinstance(module, BitLinear):
            scale = module.scales().T if group else module.weight_scale[:, None]
            scale = scale.repeat_interleave(group or module.in_features, dim=1)[:, : module.in_features]
            assert torch.equal(module.unpack() * scale, theirs.tensors[f"{name}.weight"].float()), name


def mean_error(logits: list[Tensor], exact: list[Tensor]) -> float:
    return float((torch.cat(logits).double() - torch.cat(exact)).abs().mean())


@pytest.mark.parametrize("case", CASES)
def test_end_to_end(tmp_path: Path, case: str) -> None:
    ours, dense, published, exact, rounded = [], [], [], [], []
    for seed in range(2):
        theirs = random_model(seed, **CASES[case])
        folder, ids = tmp_path / str(seed), prompts(2, seed=seed)
        ours.append(load(folder, theirs)(ids))
        dense.append(from_pretrained(folder, linear=nn.Linear)(ids))
        published.append(theirs.logits(ids, torch.float32))
        exact.append(theirs.logits(ids, torch.float64))
        theirs.largest_q = reference.LARGEST_Q[16]
        rounded.append(theirs.logits(ids, torch.float64))
    largest = torch.cat(exact).abs().max()
    limit = 2 * mean_error(published, exact)
    assert limit < 1e-5 * largest, "the float64 model is not the same model"
    assert mean_error(dense, exact) <= limit
    limit = 2 * mean_error(rounded, exact)
    assert limit < 1e-3 * largest
    assert mean_error(ours, exact) <= limit


@pytest.mark.parametrize("case", CASES)
def test_a_packed_folder(tmp_path: Path, case: str) -> None:
    ours, ids = load(tmp_path / "published", random_model(**CASES[case])), prompts(2)
    ours.save_pretrained(tmp_path / "packed")
    assert_same_model(from_pretrained(tmp_path / "packed"), ours, ids)
    if case != "plain":
        extras = json.loads((tmp_path / "packed" / "config.json").read_text())["decoder_config"]
        assert extras["embedding_scale"] == 12.0


def test_the_same_bits_everywhere(tmp_path: Path, isa: str, threads: None) -> None:
    assert_same_bits_everywhere(load(tmp_path, random_model(**LONGER)), prompts(3))


def test_the_plan_is_the_modules(tmp_path: Path) -> None:
    assert_plan_is_the_modules(load(tmp_path, random_model()), prompts(2))
