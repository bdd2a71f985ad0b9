"""How a GGUF file stretches the rotary embedding.

Keys behind the architecture::

    rope.scaling.type                       "none", "linear", "yarn"; "linear" where only a factor is given
    rope.scaling.factor                     or rope.scale_linear, its name in old files
    rope.scaling.original_context_length    "yarn"; context_length where it is absent
    rope.scaling.yarn_beta_fast, yarn_beta_slow, attn_factor, yarn_attn_factor

Llama 3's way has no keys. It is a tensor "rope_freqs.weight", float32 [head_dim / 2]: what each frequency is
divided by. The factors follow from four constants (`bitnet_ops.reference.rotary_frequencies`), of which files
lose all; where the published ones give the tensor they are used, so that the model is the one that the
Hugging Face folder gives, to the last bit. Keys of ours say it where two of them are others::

    bitnet_ops.rope.low_freq_factor, bitnet_ops.rope.high_freq_factor      float32
"""

import math
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...decoder.config import DecoderConfig, RopeScaling
from ..errors import CheckpointError
from .floats import decimal
from .header import GgufFile
from .names import ROPE_FACTORS

LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""Of every Llama 3; the first factor differs, and is the largest of the tensor."""

CONTEXT_KEY = "rope.scaling.original_context_length"
LOW_KEY, HIGH_KEY = "bitnet_ops.rope.low_freq_factor", "bitnet_ops.rope.high_freq_factor"

TOLERANCE = 1e-5
"""Converters compute the factors in float32, in a few steps of half an ulp (6e-8) each; the factors of other
constants differ by more than a hundredth somewhere."""

UNSUPPORTED = {
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0,),
}
"""Keys that are known and not supported, and the values with which they ask for nothing."""


def read_rope_scaling(files: GgufFile, architecture: str, config: DecoderConfig) -> RopeScaling | None:
    """How frequencies are stretched, or None.

    Args:
        files: the file.
        architecture: in front of its keys.
        config: of the model, without a scaling.

    Raises:
        CheckpointError: a kind that is not supported, or a factor that makes no sense.
    """
    reader = _Keys(files, architecture)
    scaling = _from_keys(reader, config)
    if ROPE_FACTORS not in files.tensors:
        return scaling
    if scaling is not None:
        raise files.error(ROPE_FACTORS, "no such tensor beside rope.scaling.type", "both")
    files.expect(ROPE_FACTORS, ("F32",), (config.head_dim // 2,))
    factors = files.read(ROPE_FACTORS)
    if not (factors.isfinite() & (factors > 0)).all():
        raise files.error(ROPE_FACTORS, "finite numbers above 0", "others")
    return _from_factors(files, factors, config, reader)


def _from_keys(reader: "_Keys", config: DecoderConfig) -> RopeScaling | None:
    for name, harmless in UNSUPPORTED.items():
        value = reader.number(name, harmless[0])
        if value not in harmless:
            raise reader.error(name, " or ".join(map(str, harmless)), value)
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 1.0)) or 1.0
    kind = reader.get("rope.scaling.type")
    attention = reader.number("rope.scaling.attn_factor", 1.0) * reader.number(
        "rope.scaling.yarn_attn_factor", 1.0
    )
    if kind != "yarn" and attention != 1.0:
        raise reader.error(
            "rope.scaling.attn_factor", "1.0, because rope.scaling.type is not 'yarn'", attention
        )
    if kind == "yarn":
        context = reader.number(CONTEXT_KEY, float(config.max_position_embeddings))
        growth = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
        return reader.scaling(
            kind,
            factor=factor,
            original_max_position_embeddings=int(context),
            beta_fast=reader.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=reader.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=None if attention == 1.0 else attention * growth,
        )
    if kind not in (None, "none", "linear"):
        raise reader.error("rope.scaling.type", "'none', 'linear' or 'yarn'", kind)
    return None if kind == "none" or factor == 1.0 else reader.scaling("linear", factor=factor)


def _from_factors(
    files: GgufFile, factors: Tensor, config: DecoderConfig, reader: "_Keys"
) -> RopeScaling | None:
    if (factors == 1.0).all():
        return None
    plain = reference.rotary_frequencies(config.head_dim, config.rope_theta)
    try:
        llama3 = RopeScaling(
            "llama3",
            float(factors.max()),
            reader.ours(LOW_KEY, LLAMA3_LOW),
            reader.ours(HIGH_KEY, LLAMA3_HIGH),
            original_max_position_embeddings=int(reader.number(CONTEXT_KEY, float(LLAMA3_CONTEXT))),
        )
        stretched = reference.rotary_frequencies(config.head_dim, config.rope_theta, llama3)
        if torch.allclose(plain / factors, stretched, rtol=TOLERANCE, atol=0.0):
            return llama3
        return RopeScaling("factors", 1.0, factors=tuple(factors.tolist()))
    except (ValueError, TypeError) as error:
        raise files.error(ROPE_FACTORS, "factors of a scaling", f"{error!s:.200}") from None


def llama3_factors(config: DecoderConfig, scaling: RopeScaling) -> Tensor:
    """The tensor "rope_freqs.weight" of a file, float32 [head_dim / 2].

    llama.cpp's converter computes it in float32, step by step; these are its steps, so that files agree bit
    by bit. With turns = context * f / (2 pi) in the context that the model was trained with::

        1                                        where turns > high
        factor                                   where turns < low
        1 / ((1 - s) / factor + s)               between, with s = (turns - low) / (high - low)
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_theta ** (pairs / config.head_dim))
    wavelength = 2 * math.pi / frequencies
    context, factor = scaling.original_max_position_embeddings, float(scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - kept) / factor + kept)
    return torch.where(
        wavelength < context / high, 1.0, torch.where(wavelength > context / low, factor, between)
    )


class _Keys:
    """Keys of an architecture."""

    def __init__(self, files: GgufFile, architecture: str) -> None:
        self.files, self.architecture = files, architecture

    def get(self, name: str) -> Any:
        """A value, or None."""
        return self.files.metadata.get(f"{self.architecture}.{name}")

    def number(self, name: str, default: float) -> float:
        """A finite number of at least -1, or the default."""
        value = self.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not -1 <= value < 2**31:
            raise self.error(name, "a finite number", value)
        return decimal(float(value))

    def ours(self, key: str, default: float) -> float:
        """A number that our writer has put in, or the default where it is none."""
        value = self.files.metadata.get(key)
        return decimal(value) if type(value) is float and math.isfinite(value) else default

    def scaling(self, kind: str, **fields: Any) -> RopeScaling:
        """A `RopeScaling` of checked fields."""
        try:
            return RopeScaling(kind, **fields)
        except ValueError as error:
            raise self.error(
                "rope.scaling.type", "the factors of a scaling", f"{kind}: {error!s:.200}"
            ) from None

    def error(self, name: str, expected: str, given: Any) -> CheckpointError:
        """The error to raise about a key."""
        return CheckpointError.at(
            self.files.file, f"key '{self.architecture}.{name}'", expected, f"{given!r:.200}"
        )
