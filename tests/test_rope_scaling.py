"""Stretched rotary embeddings against transformers, and that a folder keeps them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_llama import full_config

pytest.importorskip("transformers")
from their_models import U, assert_within
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitnet_ops import BitNet, DecoderConfig, RopeScaling, reference
from bitnet_ops.checkpoint.config_json import parse_config
from bitnet_ops.decoder.cache import rotation_tables
from bitnet_ops.families import family_to_write
from bitnet_ops.families.llama import LLAMA

YARNS: dict[str, dict[str, Any]] = {
    "Bonsai 8B": {"factor": 4.0, "original_max_position_embeddings": 16384},
    "Qwen3": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "other borders": {"factor": 32, "original_max_position_embeddings": 512,
                      "beta_fast": 8, "beta_slow": 2.5},
    "not truncated": {"factor": 3.0, "original_max_position_embeddings": 1000, "truncate": False},
    "one border": {"factor": 3.0, "original_max_position_embeddings": 100, "beta_fast": 4.0, "beta_slow": 4.0,
                   "truncate": False},
    "borders outside": {"factor": 3.0, "original_max_position_embeddings": 4},
    "no longer": {"factor": 1.0, "original_max_position_embeddings": 64},
    "attention factor": {"factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 0.7},
    "mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
               "mscale_all_dim": 1.2},
    "mscale alone": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707},
    "mscale of 0": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0,
                    "mscale_all_dim": 1},
}  # fmt: skip

SHAPES = ((128, 1e6), (20, 1e4), (6, 77.0))  # head_dim, theta


def theirs(kind: str, head_dim: int, theta: float, fields: dict[str, Any]) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **fields},
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    return frequencies, scale


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
@pytest.mark.parametrize("name", YARNS)
def test_yarn_is_that_of_transformers(name: str, head_dim: int, theta: float) -> None:
    """A power (2 u there), two quotients, two shares and their sum: 8 u there, 3 u here.

    The share that is kept is a quotient of numbers up to head_dim, off by 3 u of itself there, and of at most
    u of 1 where it is taken from 1: 4 u of either term.
    """
    fields = YARNS[name]
    expected, their_scale = theirs("yarn", head_dim, theta, fields)
    scaling = RopeScaling("yarn", **fields)
    ours = reference.rotary_frequencies(head_dim, theta, scaling)
    largest = reference.rotary_frequencies(head_dim, theta)
    assert ours.dtype == torch.float32
    assert_within(ours, expected, 15 * U * largest.double(), name)
    assert scaling.rotation_scale == pytest.approx(their_scale, rel=1e-15)


def test_yarn_keeps_stretches_and_blends() -> None:
    """The three parts of the formula are there, so that the comparison above is one of all of them."""
    plain = reference.rotary_frequencies(128, 1e6)
    ratio = plain / reference.rotary_frequencies(128, 1e6, RopeScaling("yarn", **YARNS["Bonsai 8B"]))
    assert ratio[0] == 1
    assert ratio[-1] == 4
    between = (ratio > 1.01) & (ratio < 3.99)
    assert between.sum() > 5


@pytest.mark.parametrize(("head_dim", "theta"), SHAPES)
def test_factors_are_those_of_longrope(head_dim: int, theta: float) -> None:
    """Its frequencies are ``1 / (factors * theta^(2i / d))``; a power (2 u), a product and a quotient."""
    factors = [1.0 + 0.37 * i for i in range(head_dim // 2)]
    fields = {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 32,
              "attention_factor": 1.25, "factor": 2.0}  # fmt: skip
    expected, their_scale = theirs("longrope", head_dim, theta, fields)
    scaling = RopeScaling("factors", 1.0, factors=tuple(factors), attention_factor=1.25)
    ours = reference.rotary_frequencies(head_dim, theta, scaling)
    assert_within(ours, expected, 8 * U * expected.double(), "frequencies")
    assert scaling.rotation_scale == their_scale


def test_factors_divide_the_frequencies() -> None:
    factors = torch.rand(10, generator=torch.Generator().manual_seed(0)) + 0.5
    scaling = RopeScaling("factors", 1.0, factors=tuple(factors.tolist()))
    plain = reference.rotary_frequencies(20, 1e4)
    assert torch.equal(reference.rotary_frequencies(20, 1e4, scaling), plain / factors)
    assert scaling.rotation_scale == 1


@pytest.mark.parametrize("kind", ["yarn", "factors"])
def test_cosines_and_sines_are_scaled(kind: str) -> None:
    """Each is rounded once more; 3 u of at most 1.5."""
    factors = (2.0,) * 10 if kind == "factors" else ()
    scaling = RopeScaling(kind, 2.0, attention_factor=1.5, factors=factors)
    plain = dataclasses.replace(scaling, attention_factor=1.0)
    positions = torch.arange(50)
    for scaled, unscaled in zip(
        reference.rotary_embedding(positions, 20, 1e4, scaling),
        reference.rotary_embedding(positions, 20, 1e4, plain),
        strict=True,
    ):
        assert_within(scaled, 1.5 * unscaled.double(), 3 * 1.5 * U, "table")
        assert scaled.abs().max() > 1


def test_local_layers_are_not_scaled() -> None:
    scaling = RopeScaling("yarn", 8.0, original_max_position_embeddings=16)
    config = full_config(rope_scaling=scaling)
    cos, _ = rotation_tables(config, torch.arange(3))
    assert cos[:, 0, 0].tolist() == [pytest.approx(scaling.rotation_scale), 1.0]


SCALINGS = {
    **{name: RopeScaling("yarn", **fields) for name, fields in YARNS.items()},
    "factors": RopeScaling("factors", 1.0, factors=tuple(0.3 + i for i in range(10)), attention_factor=1.1),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_packed_folder_keeps_every_field(tmp_path: Path, name: str) -> None:
    """In the family's own fields, and beside them where it has none."""
    for config in (
        full_config(rope_scaling=SCALINGS[name]),
        DecoderConfig(**dict.fromkeys(full_config().__dict__.keys() & SIZES, 2), head_dim=20,
                      rope_scaling=SCALINGS[name]),
    ):  # fmt: skip
        BitNet(config, lambda *sizes, **options: torch.nn.Identity()).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        data = json.loads(file.read_text())
        assert parse_config(data, file) == config
        assert ("rope_scaling" in data) == (SCALINGS[name].kind in family_to_write(config).rope_kinds)


SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings"}  # fmt: skip


def settings(**fields: Any) -> Any:
    return LLAMA.settings(dict.fromkeys(SIZES, 32) | fields).get("rope_scaling")


def test_the_original_context_has_the_order_of_transformers() -> None:
    """Outside of the object, then inside, then max_position_embeddings."""
    yarn = {"rope_type": "yarn", "factor": 2.0}
    within = yarn | {"original_max_position_embeddings": 16}
    outside = {"original_max_position_embeddings": 8}
    for fields, expected in (
        ({"rope_scaling": yarn}, 32),
        ({"rope_scaling": within}, 16),
        ({"rope_scaling": within, **outside}, 8),
    ):
        assert settings(**fields) == RopeScaling("yarn", 2.0, original_max_position_embeddings=expected)


def test_null_is_absent() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    nulls = dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"))
    assert settings(rope_scaling=yarn | nulls) == settings(rope_scaling=yarn)
    assert RopeScaling("yarn", 2.0).beta_fast == 32


def test_factors_have_to_be_as_many_as_pairs() -> None:
    with pytest.raises(ValueError, match="10 factors, got 9"):
        full_config(rope_scaling=RopeScaling("factors", 1.0, factors=(1.0,) * 9))
    with pytest.raises(ValueError, match="rope_theta"):
        full_config(rope_scaling=RopeScaling("yarn", 2.0), rope_theta=1.0)
