"""config.json: what a family has published there (bitnet_ops/families), and what only our own folders have.

A folder of ours has the fields of its family, so that people and other programs can read it. In
"quantization_config" are, where they are not the usual ones,

    use_rms_norm, rms_norm_eps      of the norms inside projections, as transformers calls them
    activation_bits, group_size,
    ternary_embedding, ternary_head as in `DecoderConfig`

and what the family has no field for is in the object "decoder_config", as `DecoderConfig` calls it.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import families
from ..decoder.config import DecoderConfig, RopeScaling
from ..families import Family, SettingError
from .errors import CheckpointError

QUANT_METHOD = "bitnet_ops"

EXTRAS = "decoder_config"

THEIR_EPS = 1e-6
"""What "rms_norm_eps" of "quantization_config" is to transformers where it is absent."""

OF_MATRICES = ("activation_bits", "group_size", "ternary_embedding", "ternary_head")
"""Fields of `DecoderConfig` that "quantization_config" has, and that float weights show themselves."""

ONLY_TRAINING = {"dropout", "initializer_range"}
"""Fields of `DecoderConfig` that change nothing in a model that is done."""


def parse_config(data: dict[str, Any], file: Path) -> DecoderConfig:
    """Turns the content of config.json into a checked `DecoderConfig` (`BitNetConfig` for "bitnet").

    Raises:
        CheckpointError: a field is missing, out of range, or asks for something that is not supported.
    """
    try:
        config = _config(data)
        head_dim = data.get("head_dim")
        if head_dim is not None and head_dim != config.head_dim:
            raise SettingError(
                "head_dim", f"hidden_size / num_attention_heads = {config.head_dim}", f"{head_dim!r:.200}"
            )
    except SettingError as error:
        raise CheckpointError.at(file, error.field, error.expected, error.given) from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return config


def family_of(data: dict[str, Any], file: Path) -> Family:
    """The family that the content of config.json names.

    Raises:
        CheckpointError: it is not known.
    """
    try:
        return families.family_of(data)
    except SettingError as error:
        raise CheckpointError.at(file, error.field, error.expected, error.given) from None


def config_to_json(config: DecoderConfig, quantization: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for a model whose weights are stored as ``quantization`` says."""
    quantization = dict(quantization)
    if config.projection_norms:
        quantization |= {"use_rms_norm": True, "rms_norm_eps": config.projection_norm_eps}
    for name in OF_MATRICES:
        if getattr(config, name) not in (_default(name), False):  # None is the default of what may be False
            quantization[name] = getattr(config, name)
    family = families.family_to_write(config)
    data = family.write(config) | {"quantization_config": quantization}
    # From the beginning, because without it the other sizes may make no model at all.
    extras: dict[str, Any] = {"head_dim": config.head_dim}
    for _ in range(2):  # what a field is where it is absent follows from others, which may be among them
        extras |= _differences(config, _config(data | {EXTRAS: extras}))
    if "head_dim" in family.same or config.q_size == config.hidden_size:
        del extras["head_dim"]
    if extras:
        data[EXTRAS] = extras
    return data


def published_json(config: DecoderConfig, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The content of config.json in the published layouts, which have the fields of the family alone.

    Args:
        config: of the model.
        quantization: what "quantization_config" says, or None for float weights, which show themselves what
            is quantised in which groups.

    Raises:
        ValueError: the family has no field for what the model has; the text says what.
    """
    family = families.family_to_write(config)
    data = family.write(config)
    found = set(OF_MATRICES)
    if quantization is not None:
        found = set()
        data["quantization_config"] = dict(quantization)
        if config.projection_norms:
            data["quantization_config"] |= {"use_rms_norm": True, "rms_norm_eps": config.projection_norm_eps}
    try:
        again = _config(data)
    except ValueError as error:
        raise ValueError(f"config.json of model_type {family.model_type!r} cannot say it: {error}") from None
    lost = [
        f"{name}={value!r}"
        for name, value in _differences(config, again)
        if name not in found | ONLY_TRAINING
    ]
    if lost:
        raise ValueError(
            f"config.json of model_type {family.model_type!r} has no field for {', '.join(lost)}"
        )
    return data


def _config(data: dict[str, Any]) -> DecoderConfig:
    family = families.family_of(data)
    fields = family.settings(data)
    quantization = data.get("quantization_config")
    if isinstance(quantization, dict):  # what else it may be is for the loader of weights to say
        own = quantization.get("quant_method") == QUANT_METHOD
        fields |= _quantization_fields(quantization, family, own)
        if own:
            fields |= _extras(data.get(EXTRAS, {}))
    return family.config(**fields)


def _quantization_fields(quantization: dict[str, Any], family: Family, own: bool) -> dict[str, Any]:
    names = OF_MATRICES if own else ()
    fields = {name: quantization[name] for name in names if name in quantization}
    norms = quantization.get("use_rms_norm")
    if not isinstance(norms, (bool, type(None))):
        raise SettingError("quantization_config.use_rms_norm", "true or false", f"{norms!r:.200}")
    if not norms:
        return fields
    if not own and not family.projection_norms:
        raise SettingError(
            "quantization_config.use_rms_norm",
            "false (the norms of this architecture have names of their own)",
            f"{norms!r:.200}",
        )
    eps = quantization.get("rms_norm_eps")
    return fields | {"projection_norms": True, "projection_norm_eps": THEIR_EPS if eps is None else eps}


def _extras(extras: Any) -> dict[str, Any]:
    if not isinstance(extras, dict):
        raise SettingError(EXTRAS, "an object", f"{extras!r:.200}")
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    unknown = sorted(extras.keys() - known)
    if unknown:
        raise SettingError(EXTRAS, "fields of DecoderConfig", f"also {unknown!r:.200}")
    scaling = extras.get("rope_scaling")
    if scaling is None:
        return extras
    try:
        return extras | {"rope_scaling": RopeScaling(**scaling)}
    except TypeError:  # no object, or with other fields
        raise SettingError(f"{EXTRAS}.rope_scaling", "a RopeScaling", f"{scaling!r:.200}") from None


def _differences(config: DecoderConfig, other: DecoderConfig) -> Iterator[tuple[str, Any]]:
    """Fields in which ``config`` differs, as JSON has them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(other, field.name):
            yield field.name, dataclasses.asdict(value) if isinstance(value, RopeScaling) else value


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(DecoderConfig) if field.name == name)
