"""Tokenizers: from the metadata of a GGUF file to one of the `tokenizers` library, and back.

GGUF knows a tokenizer by ``tokenizer.ggml.model``. Two kinds are read and written:

    "gpt2"    byte-level BPE       byte_level.py, with pre_tokenizers.py
    "llama"   SentencePiece BPE    sentencepiece.py

Both have the list of tokens that token_list.py describes, and what comes around a text::

    tokenizer.ggml.add_bos_token   bool   a text begins with the token bos_token_id
    tokenizer.ggml.add_eos_token   bool   a text ends with the token eos_token_id

A file without the first key has a BOS token in front if its kind says so (SentencePiece: always) and the file
names one. llama.cpp does the same, but takes token 11 where a byte-level file names none; a model such as
Falcon 3 has no BOS token.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from ...decoder.config import DecoderConfig
from ..errors import CheckpointError
from .byte_level import byte_level_metadata, read_byte_level
from .sentencepiece import SPACE, added_text, read_sentencepiece, sentencepiece_metadata, space_prefix
from .token_list import PREFIX, TokenList, TokenType, read_token_list

NO_TOKENIZER = ("none", "no_vocab")

MAX_ADDED_LENGTH = 1 << 20
"""Characters of all added tokens together; Gemma's 6414 have 76000. The library takes seconds for more."""


def read_tokenizer(metadata: dict[str, Any], file: Path, vocab_size: int) -> Tokenizer | None:
    """Builds the tokenizer of a GGUF file.

    Args:
        metadata: of the file; values are ints, floats, bools, strings and lists of these.
        file: names the place in errors.
        vocab_size: number of rows of the embedding matrix, which every id must have.

    Returns:
        The tokenizer, or None if the file says that it has none. Tokens of type 5 (unused) are left out, and
        ids may have holes there.

    Raises:
        CheckpointError: a tokenizer that is not supported, or metadata that does not fit together.
    """
    model = metadata.get(PREFIX + "model")
    if model in NO_TOKENIZER or (model is None and PREFIX + "tokens" not in metadata):
        return None
    if model not in ("gpt2", "llama"):
        raise CheckpointError.at(
            file,
            PREFIX + "model",
            "'gpt2' (byte-level BPE) or 'llama' (SentencePiece BPE)",
            "nothing" if model is None else f"{model!r:.200}",
        )
    tokens = read_token_list(metadata, file, vocab_size)
    if model == "gpt2":
        tokenizer, kind = read_byte_level(tokens)
        _add_tokens(tokenizer, tokens, tokens.tokens, normalized=False)
        _set_template(tokenizer, tokens, tokens.token_id("bos_token_id"), kind.adds_bos)
        return tokenizer
    tokenizer = read_sentencepiece(tokens)
    prefix = space_prefix(tokens)
    texts = [added_text(text, type_, prefix) for text, type_ in zip(tokens.tokens, tokens.types, strict=True)]
    _add_tokens(tokenizer, tokens, texts, normalized=not prefix)
    bos = tokens.token_id("bos_token_id")
    if bos is None and len(tokens.types) > 1 and tokens.types[1] == TokenType.CONTROL:
        bos = 1  # what Llama has, and llama.cpp takes
    _set_template(tokenizer, tokens, bos, adds_bos=True)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: TokenList, texts: list[str], *, normalized: bool) -> None:
    """Adds control tokens, which decoding skips, and user-defined ones, which it does not."""
    special = tokens.ids(TokenType.CONTROL, TokenType.UNKNOWN)
    defined = tokens.ids(TokenType.USER_DEFINED)
    length = sum(len(texts[index]) for index in (*special, *defined))
    if length > MAX_ADDED_LENGTH:
        raise tokens.error(
            "token_type", f"added tokens of at most {MAX_ADDED_LENGTH} characters together", f"{length}"
        )
    tokenizer.add_special_tokens([AddedToken(texts[index], normalized=False) for index in special])
    tokenizer.add_tokens([AddedToken(texts[index], normalized=normalized) for index in defined])


def _set_template(tokenizer: Tokenizer, tokens: TokenList, bos: int | None, adds_bos: bool) -> None:
    """Puts BOS and EOS around a text."""
    around = {
        "bos": bos if tokens.flag("add_bos_token", adds_bos and bos is not None) else -1,
        "eos": tokens.token_id("eos_token_id") if tokens.flag("add_eos_token", False) else -1,
    }
    for name, index in around.items():
        if index is None:
            raise tokens.error(f"{name}_token_id", f"a token id, because add_{name}_token is true", "nothing")
        if index >= 0 and tokens.types[index] == TokenType.UNUSED:
            raise tokens.error(f"{name}_token_id", "a token that is in use", f"{index}")
    used = {name: index for name, index in around.items() if index is not None and index >= 0}
    if not used:
        return
    single = ["bos"] * ("bos" in used) + ["$A"] + ["eos"] * ("eos" in used)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *(f"{part}:1".replace("$A", "$B") for part in single)],
        special_tokens=[
            {"id": name, "ids": [index], "tokens": [tokens.tokens[index]]} for name, index in used.items()
        ],
    )


def tokenizer_metadata(tokenizer: Tokenizer, config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer; `read_tokenizer` makes one of it with the same ids and text.

    Args:
        tokenizer: a byte-level BPE with a pre-tokenizer that GGUF has a name for, or one that SentencePiece
            could have made. Truncation and padding are not written.
        config: of the model; names the tokens at the beginning and end of a text, and for padding.
        vocab_size: number of rows of the embedding matrix; ids without a token become unused tokens.

    Returns:
        The keys ``tokenizer.ggml.*``. Numbers of ``token_type`` are int32 in GGUF, ``scores`` float32, ids
        uint32.

    Raises:
        ValueError: GGUF cannot express the tokenizer; the text says why.
    """
    data = json.loads(tokenizer.to_str())
    _check_model(data["model"])
    texts, types = _listed(data, vocab_size)
    if (data["decoder"] or {}).get("type") == "ByteLevel":
        _check_added(data, follows_normalizer=data["normalizer"] is None)
        metadata = byte_level_metadata(data)
    else:
        _check_added(data, follows_normalizer=(data["normalizer"] or {}).get("type") == "Replace")
        metadata = sentencepiece_metadata(data, texts, types)
        _check_spaces(tokenizer, data, prefix=metadata[PREFIX + "add_space_prefix"])
    metadata["tokenizer.ggml.tokens"] = texts
    metadata["tokenizer.ggml.token_type"] = [int(type_) for type_ in types]
    metadata.update(_ids(data, config))
    return metadata


def _check_model(model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer: expected a BPE, got {model['type']}, which GGUF cannot express")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise ValueError(f"tokenizer: expected no {name}, got {model[name]!r:.100}")


def _check_added(data: dict[str, Any], *, follows_normalizer: bool) -> None:
    """Refuses added tokens that are found in another way than GGUF's.

    Args:
        data: tokenizer.json.
        follows_normalizer: whether it makes no difference if they are looked for in text that is normalized.
    """
    for token in data["added_tokens"]:
        for name in ("single_word", "lstrip", "rstrip"):
            if token[name]:
                raise ValueError(
                    f"tokenizer: expected added tokens without {name}, got {token['content']!r:.100} with it"
                )
        # No normalizer changes what is around or inside of ASCII, except the one that puts a space in front.
        ascii_nfc = data["normalizer"] == {"type": "NFC"} and token["content"].isascii()
        if token["normalized"] and not (follows_normalizer or ascii_nfc):
            raise ValueError(
                "tokenizer: expected added tokens that are looked for in text as it is, got "
                f"{token['content']!r:.100} with normalized = true"
            )


def _check_spaces(tokenizer: Tokenizer, data: dict[str, Any], *, prefix: bool) -> None:
    """Refuses user-defined tokens with "▁" that spaces in a text do not become: in GGUF these are spaces."""
    for token in data["added_tokens"]:
        if SPACE in token["content"] and not token["special"]:
            text = token["content"].replace(SPACE, " ")
            if prefix or tokenizer.encode(text, add_special_tokens=False).ids != [token["id"]]:
                raise ValueError(
                    f"tokenizer: expected added tokens that spaces become, got {token['content']!r:.100}"
                )


def _listed(data: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The token and `TokenType` of each id."""
    by_id: dict[int, str] = {}
    vocabulary = data["model"]["vocab"]
    added = {token["content"]: token for token in data["added_tokens"]}
    for text, index in [*vocabulary.items(), *((text, token["id"]) for text, token in added.items())]:
        if not 0 <= index < vocab_size:
            raise ValueError(
                f"tokenizer: expected ids below vocab_size = {vocab_size}, got {index} for {text!r:.100}"
            )
        if by_id.setdefault(index, text) != text or (text in vocabulary and vocabulary[text] != index):
            raise ValueError(f"tokenizer: expected one token for each id, got another one for {text!r:.100}")
    texts, types = [], []
    spellings = set(by_id.values())
    for index in range(vocab_size):
        text = by_id.get(index)
        if text is None or text == "":
            text = f"[PAD{index}]"
            while text in spellings:
                text = f"[{text}]"
            type_ = TokenType.UNUSED
        elif text in added:
            type_ = TokenType.CONTROL if added[text]["special"] else TokenType.USER_DEFINED
        else:
            type_ = TokenType.NORMAL
        texts.append(text)
        types.append(int(type_))
    return texts, types


def _ids(data: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The ids that have a name, and which of them come around a text."""
    first, last = _around(data["post_processor"])
    bos, ends = config.bos_token_id, config.eos_token_ids
    if first is not None and bos not in (first, None):
        raise ValueError(f"tokenizer: expected texts that begin with bos_token_id = {bos}, got {first}")
    if last is not None and ends and last not in ends:
        raise ValueError(f"tokenizer: expected texts that end with eos_token_id = {ends}, got {last}")
    bos = bos if first is None else first
    ends = ends if last is None else (last, *(end for end in ends if end != last))
    unknown = data["model"]["vocab"].get(data["model"]["unk_token"])
    ids = {
        "bos_token_id": bos,
        # llama.cpp has two more names for ids that end a text: end of turn, and end of message.
        **dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False)),
        "unknown_token_id": unknown,
        "padding_token_id": config.pad_token_id,
    }
    metadata: dict[str, Any] = {PREFIX + name: index for name, index in ids.items() if index is not None}
    metadata[PREFIX + "add_bos_token"] = first is not None
    metadata[PREFIX + "add_eos_token"] = last is not None
    return metadata


def _around(processor: dict[str, Any] | None) -> tuple[int | None, int | None]:
    """The ids in front of a text and behind it."""
    kind = None if processor is None else processor["type"]
    if processor is None or kind == "ByteLevel":  # which changes offsets only
        return None, None
    if kind == "Sequence":
        found = [_around(part) for part in processor["processors"]]
        found = [around for around in found if around != (None, None)]
        if len(found) > 1:
            raise ValueError("tokenizer: expected one template for what comes around a text, got several")
        return found[0] if found else (None, None)
    if kind != "TemplateProcessing":
        raise ValueError(f"tokenizer: expected a template for what comes around a text, got {kind}")
    before: list[int] = []
    behind: list[int] = []
    side = before
    for part in processor["single"]:
        if "SpecialToken" in part:
            side += processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        else:
            side = behind
    if len(before) > 1 or len(behind) > 1:
        raise ValueError(
            "tokenizer: expected at most one token in front of a text and one behind it, "
            f"got {before} and {behind}"
        )
    return (before[0] if before else None), (behind[0] if behind else None)
