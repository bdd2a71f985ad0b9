"""The arguments of generation: where their values come from, and their checks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ..decoder.cache import CACHE_DTYPES
from ..decoder.config import DecoderConfig
from .sampling import SamplingConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_NEW_TOKENS = 64
"""Length of a text where neither the caller nor the checkpoint asks for one: a few sentences."""

DEFAULT_DRAFT_TOKENS = 10
"""Most tokens of a draft; more would hardly be faster, because a pass over so many is bound by arithmetic."""

SAMPLING_NAMES = tuple(field.name for field in dataclasses.fields(SamplingConfig))


class GenerationArguments(TypedDict, total=False):
    """What `BitNet.generate`, `BitNet.stream` and `BitNet.stream_tokens` share; see `BitNet.generate`."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    seed: int | None
    prompt_lookup_num_tokens: int | None
    cache_dtype: torch.dtype | None


@dataclass(frozen=True)
class GenerationSettings:
    """Every argument of generation, filled in and checked.

    An argument that is not given comes from the checkpoint's generation_config.json, then from its
    config.json, then from the defaults.

    Attributes:
        max_new_tokens: number of tokens after which a text ends; None for the default length, or less if the
            context has less room.
        sampling: how a token is chosen.
        eos_token_ids: ids that end a text.
        pad_token_id: fills the rows that ended before the others; None if nobody names one.
        stop_strings: strings that end a text.
        seed: of the random streams, or None.
        prompt_lookup_num_tokens: tokens of a draft at most, 0 for none.
        cache_dtype: of keys and values, or None for that of the cache at hand, or float32.
    """

    max_new_tokens: int | None
    sampling: SamplingConfig
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    stop_strings: tuple[str, ...]
    seed: int | None
    prompt_lookup_num_tokens: int
    cache_dtype: torch.dtype | None

    @classmethod
    def resolve(
        cls,
        config: DecoderConfig,
        generation_config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        arguments: GenerationArguments,
    ) -> GenerationSettings:
        """Fills in what is not given, and checks everything.

        Args:
            config: of the model.
            generation_config: content of generation_config.json, or empty.
            tokenizer: of the model; stop strings need one.
            arguments: what the caller gave; None counts as not given.

        Raises:
            TypeError: an argument that does not exist.
            ValueError: a value is wrong; the text names it, what was expected and what was given.
        """
        unknown = arguments.keys() - GenerationArguments.__annotations__.keys()
        if unknown:
            raise TypeError(
                f"unexpected argument {min(unknown)!r}: expected one of "
                f"{', '.join(GenerationArguments.__annotations__)}"
            )
        given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
        from_file = {name: value for name, value in generation_config.items() if value is not None}
        try:
            sampling = SamplingConfig(
                **{name: from_file[name] for name in SAMPLING_NAMES if name in from_file}
            )
            file_eos = _token_ids("eos_token_id", from_file.get("eos_token_id", ()), config.vocab_size)
            file_pad = _token_ids("pad_token_id", from_file.get("pad_token_id", ()), config.vocab_size)
            file_length = _check_length(from_file.get("max_new_tokens"))
            file_drafts = _draft_tokens(from_file.get("prompt_lookup_num_tokens", DEFAULT_DRAFT_TOKENS))
        except ValueError as error:
            raise ValueError(f"generation_config: {error}") from None
        sampling = dataclasses.replace(sampling, **{n: given[n] for n in SAMPLING_NAMES if n in given})
        if not sampling.do_sample:
            idle = [name for name in ("temperature", "top_k", "top_p", "min_p") if name in given]
            if idle:
                warnings.warn(
                    f"{', '.join(idle)}: no effect while do_sample is False; give do_sample=True to sample",
                    stacklevel=4,  # resolve <- prepare <- generate <- the caller
                )
        if "eos_token_id" in given:
            eos = _token_ids("eos_token_id", given["eos_token_id"], config.vocab_size)
        else:
            eos = file_eos or config.eos_token_ids
        config_pad = () if config.pad_token_id is None else (config.pad_token_id,)
        pad: int | None
        if "pad_token_id" in given:
            (pad,) = _token_ids("pad_token_id", [given["pad_token_id"]], config.vocab_size)
        else:
            pad = next(iter((*file_pad, *config_pad, *eos)), None)
        return cls(
            max_new_tokens=_check_length(given["max_new_tokens"])
            if "max_new_tokens" in given
            else file_length,
            sampling=sampling,
            eos_token_ids=eos,
            pad_token_id=pad,
            stop_strings=_stop_strings(given.get("stop_strings", ()), tokenizer),
            seed=_seed(given.get("seed")),
            prompt_lookup_num_tokens=_draft_tokens(given.get("prompt_lookup_num_tokens", file_drafts)),
            cache_dtype=_cache_dtype(given.get("cache_dtype")),
        )


def _check_length(value: int | None) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"max_new_tokens: expected a positive int, got {value!r}")
    return value


def _token_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, (int, str)) or not isinstance(value, Sequence) else tuple(value)
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"{name}: expected token ids in [0, {vocab_size}), got {token!r}")
    return ids


def _stop_strings(value: Any, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop_strings: expected a string or several, none of them empty, got {value!r}")
    if strings and tokenizer is None:
        raise ValueError(
            "stop_strings: expected a model with a tokenizer, got one without (model.tokenizer is None)"
        )
    return tuple(strings)


def _seed(value: int | None) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < 2**63):
        raise ValueError(f"seed: expected an int in [0, 2**63), got {value!r}")
    return value


def _draft_tokens(value: int) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"prompt_lookup_num_tokens: expected an int >= 0 (0 for no drafts), got {value!r}")
    return value


def _cache_dtype(value: torch.dtype | None) -> torch.dtype | None:
    if value is not None and value not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype: expected one of {', '.join(map(str, CACHE_DTYPES))}, got {value!r}")
    return value
