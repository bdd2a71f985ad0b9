"""MiniCPM4-class models with ternary projections: a Llama whose streams are scaled.

Checkpoints: openbmb/BitCPM4-0.5B and -1B, openbmb/BitCPM4-CANN-0.5B, -1B, -3B, -8B (float weights that are
ternary already). Those that end in "-unquantized" are not ternary as they lie there. Some say no
"model_type"; "architectures" tells. With d = hidden_size and L = num_hidden_layers::

    embeddings            times scale_emb
    what a block adds     times scale_depth / sqrt(L)
    what the head reads   times dim_model_base / d

RoPE of kind "longrope" has a divisor for each frequency, ``short_factor`` for texts of up to
original_max_position_embeddings tokens and ``long_factor`` for all of a longer one. With the second, keys in
the cache would have to be turned anew, so only models are read that never need both lists. Cosines and sines
are multiplied by ``sqrt(1 + log(r) / log(original_max_position_embeddings))``, where r > 1 is how many times
as long max_position_embeddings is.
"""

import math
from typing import Any

from ..decoder.config import DecoderConfig, RopeScaling
from .family import SAME_NAMES, Family, SettingError

SCALES = ("scale_emb", "scale_depth", "dim_model_base")
"""Their defaults are 1 in the code that comes with the models, but 12, 1.4 and 256 in transformers: they have
to be there."""

LONGROPE_FIELDS = ("short_factor", "long_factor", "original_max_position_embeddings")


def _read(data: dict[str, Any]) -> dict[str, Any]:
    values = {name: _number(name, data.get(name)) for name in (*SCALES, "hidden_size", "num_hidden_layers")}
    return {
        "embedding_scale": values["scale_emb"],
        "residual_scale": values["scale_depth"] / math.sqrt(values["num_hidden_layers"]),
        "logit_scale": values["dim_model_base"] / values["hidden_size"],
    }


def _longrope(name: str, given: dict[str, Any], data: dict[str, Any]) -> RopeScaling:
    unknown = given.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LONGROPE_FIELDS}
    if unknown:
        expected = " and ".join(("rope_type", *LONGROPE_FIELDS))
        raise SettingError(name, expected, f"also {sorted(unknown)!r:.200}")
    short, long = (_factors(f"{name}.{field}", given.get(field)) for field in ("short_factor", "long_factor"))
    field = "original_max_position_embeddings"
    context = data[field] if data.get(field) is not None else given.get(field)
    trained = _number(f"{name}.{field}", context, least=2)
    times = _number("max_position_embeddings", data["max_position_embeddings"]) / trained
    if times <= 1:
        return RopeScaling("factors", 1.0, factors=short, attention_factor=1.0)
    if short != long:
        raise SettingError(
            name,
            f"equal short_factor and long_factor, because max_position_embeddings is above {trained:g}",
            "others (a text that grows beyond that would need all its keys turned anew)",
        )
    growth = math.sqrt(1 + math.log(times) / math.log(trained))
    return RopeScaling("factors", 1.0, factors=short, attention_factor=growth)


def _factors(field: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise SettingError(field, "a list of numbers", "nothing" if value is None else f"{value!r:.200}")
    return tuple(value)


def _number(field: str, value: Any, least: float = 0.0) -> float:
    """A number that can be calculated with; whether it makes sense is for the configuration to say."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not least <= value < 1e9 or value == 0:
        given = "nothing" if value is None else f"{value!r:.200}"
        raise SettingError(field, f"a number of at least {least:g}" if least else "a number above 0", given)
    return float(value)


MINICPM = Family(
    model_type="minicpm",
    architecture="MiniCPMForCausalLM",
    config=DecoderConfig,
    activations={"silu": "silu"},
    defaults={"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True},
    same=SAME_NAMES,
    only=(
        ("attention_bias", False, (False, None)),
        ("mlp_bias", False, (False, None)),
        ("use_mup", True, (True, None)),
        ("sparse_config", None, (None,)),  # attention that skips blocks of long texts
    ),
    optional=("num_key_value_heads",),
    rope_readers={"longrope": _longrope},
    read=_read,
)
