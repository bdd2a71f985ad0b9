"""What a checkpoint folder says about text: tokenizer, chat template and how it likes to generate.

All three are optional. They are read before the weights, so that a mistake in them shows at once.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..decoder.config import DecoderConfig
from .errors import CheckpointError
from .files import read_bytes, read_json, read_text

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"

MAX_TOKENIZER_BYTES = 256 << 20
"""Largest tokenizer.json that is parsed; those of vocabularies of 256000 tokens have about 35 MB."""

TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that config.json and generation_config.json share; the second wins."""

NUMBER_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
)
"""Generation fields that must be numbers where they are present; what range makes
sense is for the sampler to say."""


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads tokenizer.json.

    Args:
        folder: the checkpoint.
        vocab_size: number of rows of the embedding matrix, which every id of the tokenizer must have.

    Raises:
        CheckpointError: the file is damaged, or its ids do not fit the model.
    """
    file = folder / TOKENIZER_FILE
    if not file.exists():
        return None
    try:
        # from_buffer says ValueError to a damaged file, from_file a bare Exception.
        data = read_bytes(file, MAX_TOKENIZER_BYTES)
        tokenizer = Tokenizer.from_buffer(data)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError.at(file, "file", "a tokenizer of the tokenizers library", f"{error}") from None
    if _ids_are_below(vocab_size, tokenizer, data):
        return tokenizer
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise CheckpointError.at(file, "token ids", f"ids below vocab_size = {vocab_size}", f"{largest}")
    return tokenizer


def _ids_are_below(vocab_size: int, tokenizer: Tokenizer, data: bytes) -> bool:
    """Whether it is clear from the text of a tokenizer.json that all ids are below a number.

    Where it is not, the vocabulary has to tell, which takes as long as reading the file did. The ids of a
    vocabulary either count its entries, or are written behind colons.
    """
    added = tokenizer.get_added_tokens_decoder()
    if max(tokenizer.get_vocab_size(with_added_tokens=False) - 1, *added, -1) >= vocab_size:
        return False
    digits = str(vocab_size).encode()
    # An integer in JSON has no zeros in front, so what is longer is larger.
    numbers = re.finditer(rb":\s*([0-9]{%d,})" % len(digits), data)
    return all(len(number[1]) == len(digits) and number[1] < digits for number in numbers)


def load_chat_template(folder: Path) -> str | None:
    """The Jinja template of a conversation: chat_template.jinja, or a field of tokenizer_config.json.

    Where the field lists several named templates, the one named "default".
    """
    if (folder / TEMPLATE_FILE).exists():
        return read_text(folder / TEMPLATE_FILE)
    file = folder / TOKENIZER_CONFIG_FILE
    if not file.exists():
        return None
    template = read_json(file).get("chat_template")
    if isinstance(template, list):
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError.at(file, "chat_template", "a string", type(template).__name__)
    return template


def load_generation_config(folder: Path, config: DecoderConfig) -> dict[str, Any]:
    """The defaults of generation: generation_config.json over the token ids of config.json.

    Returns:
        The fields of the file as they are, and always the three of `TOKEN_FIELDS`.

    Raises:
        CheckpointError: a token id is outside the vocabulary, or a number is none.
    """
    values: dict[str, Any] = {name: _as_json(getattr(config, name)) for name in TOKEN_FIELDS}
    file = folder / GENERATION_FILE
    if not file.exists():
        return values
    values |= read_json(file)
    for name in TOKEN_FIELDS:
        ids = values[name]
        if ids is None:
            continue
        for token in ids if name == "eos_token_id" and isinstance(ids, list) else [ids]:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise CheckpointError.at(
                    file, name, f"a token id in [0, {config.vocab_size})", f"{token!r:.200}"
                )
    for name in NUMBER_FIELDS:
        value = values.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise CheckpointError.at(file, name, "a finite number", f"{value!r:.200}")
    if not isinstance(values.get("do_sample", False), (bool, type(None))):
        raise CheckpointError.at(file, "do_sample", "true or false", f"{values['do_sample']!r:.200}")
    return values


def save_text_files(
    folder: Path, tokenizer: Tokenizer | None, chat_template: str | None, generation_config: dict[str, Any]
) -> None:
    """Writes what is there of the three; `load_tokenizer` and its siblings read it back equal."""
    if tokenizer is not None:
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    if chat_template is not None:
        # newline="": a template's line ends are part of the prompt.
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8", newline="")
    (folder / GENERATION_FILE).write_text(json.dumps(generation_config, indent=2) + "\n", encoding="utf-8")


def _as_json(ids: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(ids) if isinstance(ids, tuple) else ids
