"""config.json: the published fields, in the form of transformers 4 and of transformers 5, and back."""

import dataclasses
from pathlib import Path
from typing import Any

from ..decoder.config import BitNetConfig
from .errors import CheckpointError

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
"""Fields without which a model has no shape. transformers would fall back to the sizes of 2B4T, and the
first tensor would then not fit: naming the field helps more."""

DEFAULTS = {"tie_word_embeddings": False}
"""Where transformers' default, which counts for an absent field, is not that of BitNetConfig."""

ONLY: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("model_type", "bitnet", ("bitnet",)),
    ("hidden_act", "relu2", ("relu2",)),
    ("attention_bias", False, (False, None)),
    ("mlp_bias", False, (False, None)),
    ("rope_scaling", None, (None, {}, {"rope_type": "default"}, {"type": "default"})),
)
"""(field, value where it is absent, values that this architecture supports)."""


def parse_config(data: dict[str, Any], file: Path) -> BitNetConfig:
    """Turns the content of config.json into a checked `BitNetConfig`.

    Raises:
        CheckpointError: a field is missing, out of range, or asks for something that is not supported.
    """
    for name, default, supported in ONLY:
        value = data.get(name, default)
        # `in` would take 0 for False.
        if not any(value == one and type(value) is type(one) for one in supported):
            raise CheckpointError.at(
                file, name, " or ".join(repr(one) for one in supported), f"{value!r:.200}"
            )
    for name in REQUIRED:
        if name not in data:
            raise CheckpointError.at(file, name, "this field", "nothing")
    known = {field.name for field in dataclasses.fields(BitNetConfig)}
    fields = DEFAULTS | {name: value for name, value in data.items() if name in known}
    if fields["num_key_value_heads"] is None:  # as transformers reads it: as many as query heads
        fields["num_key_value_heads"] = data["num_attention_heads"]
    fields.update(_rope_theta(data, file))
    try:
        config = BitNetConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    head_dim = data.get("head_dim")
    if head_dim is not None and head_dim != config.head_dim:
        raise CheckpointError.at(
            file, "head_dim", f"hidden_size / num_attention_heads = {config.head_dim}", f"{head_dim!r:.200}"
        )
    return config


def config_to_json(config: BitNetConfig, quantization: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model whose weights are stored as ``quantization`` says."""
    return {
        "architectures": ["BitNetForCausalLM"],
        **{name: default for name, default, _ in ONLY if default is not None},
        **dataclasses.asdict(config),
        "quantization_config": quantization,
    }


def _rope_theta(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """``rope_theta`` from either style: a field (transformers 4) or inside rope_parameters (5)."""
    parameters = data.get("rope_parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise CheckpointError.at(file, "rope_parameters", "an object", f"{parameters!r:.200}")
    for name, supported in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)):
        if parameters.get(name, supported) != supported:
            raise CheckpointError.at(
                file, f"rope_parameters.{name}", repr(supported), f"{parameters[name]!r:.200}"
            )
    unknown = parameters.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if unknown:
        raise CheckpointError.at(
            file, "rope_parameters", "rope_theta and rope_type", f"also {sorted(unknown)!r:.200}"
        )
    if "rope_theta" not in parameters:
        return {}
    theta = parameters["rope_theta"]
    if data.get("rope_theta") not in (None, theta):
        raise CheckpointError.at(
            file, "rope_theta", f"rope_parameters.rope_theta = {theta!r:.200}", f"{data['rope_theta']!r:.200}"
        )
    return {"rope_theta": theta}
