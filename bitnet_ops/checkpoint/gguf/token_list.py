"""The list of tokens in a GGUF file, checked.

Four lists describe a vocabulary; entry i of each belongs to the token with id i::

    tokenizer.ggml.tokens       string   how the token is spelled
    tokenizer.ggml.token_type   int32    `TokenType`
    tokenizer.ggml.scores       float32  only in SentencePiece vocabularies
    tokenizer.ggml.merges       string   "left right", best first; only in byte-level ones (not one per token)

Other keys name ids: tokenizer.ggml.bos_token_id, eos_token_id, unknown_token_id, padding_token_id.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

PREFIX = "tokenizer.ggml."

MAX_TOKEN_LENGTH = 1024
"""Characters of the longest token that is read; published vocabularies stay below 520."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""How SentencePiece spells the token of one byte."""

ID_KEYS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "eot_token_id")


class TokenType(IntEnum):
    """What a token is for."""

    NORMAL = 1
    UNKNOWN = 2  # stands for text that no other token covers
    CONTROL = 3  # an added token that gives no text, such as the end of a text
    USER_DEFINED = 4  # an added token that is text
    UNUSED = 5  # fills the list up to the size of the embedding matrix
    BYTE = 6  # of SentencePiece: one byte of a character that has no token


@dataclass(frozen=True)
class TokenList:
    """The vocabulary of a file.

    Attributes:
        file: names the place in errors.
        metadata: of the file.
        tokens: as the file spells them; empty where there is no token.
        types: a `TokenType` for each; UNUSED where ``tokens`` is empty.
    """

    file: Path
    metadata: dict[str, Any]
    tokens: list[str]
    types: list[int]

    def ids(self, *types: TokenType) -> list[int]:
        """The ids of the tokens that have one of these types."""
        return [index for index, type in enumerate(self.types) if type in types]

    def error(self, key: str, expected: str, given: str) -> CheckpointError:
        """An error that names the file and the key ``tokenizer.ggml.KEY``."""
        return CheckpointError.at(self.file, PREFIX + key, expected, given)

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no; ``default`` where the file says nothing."""
        value = self.metadata.get(PREFIX + key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false", f"{value!r:.200}")
        return value

    def token_id(self, key: str) -> int | None:
        """The id that a key names, or None where the file says nothing."""
        value = self.metadata.get(PREFIX + key)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.error(key, f"a token id in [0, {len(self.tokens)})", f"{value!r:.200}")
        return value

    def scores(self) -> list[float]:
        """A finite score for each token."""
        values = _check_length(self.file, "scores", self.metadata.get(PREFIX + "scores"), self.tokens)
        for index, value in enumerate(values):
            if type(value) not in (float, int) or not math.isfinite(value):
                raise self.error("scores", "finite numbers", f"{value!r:.200} for token {index}")
        return values

    def merges(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        """The pairs of tokens that make another one, best first, each once.

        Args:
            vocabulary: the tokens that may occur.
        """
        values = self.metadata.get(PREFIX + "merges")
        if not isinstance(values, list):
            raise self.error("merges", "a list of strings", type(values).__name__)
        pairs: dict[tuple[str, str], None] = {}  # a pair that comes again changes nothing
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error("merges", "a list of strings", f"{value!r:.200} at {index}")
            left, space, right = value.partition(" ")
            if not space or left not in vocabulary or right not in vocabulary:
                raise self.error(
                    "merges", "two tokens with a space between them", f"{value!r:.200} at {index}"
                )
            if left + right not in vocabulary:
                raise self.error(
                    "merges", "pairs that make a token", f"{value!r:.200} at {index}, which makes none"
                )
            pairs[left, right] = None
        return list(pairs)


def read_token_list(metadata: dict[str, Any], file: Path, vocab_size: int) -> TokenList:
    """Reads tokens and their types.

    A file without types has control tokens where other keys name ids, and the bytes of SentencePiece.

    Args:
        metadata: of the file.
        file: names the place in errors.
        vocab_size: number of rows of the embedding matrix, which every id must have.

    Raises:
        CheckpointError: a list is missing, too long, or has entries of another kind.
    """
    tokens = metadata.get(PREFIX + "tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= vocab_size:
        given = f"{len(tokens)} tokens" if isinstance(tokens, list) else type(tokens).__name__
        expected = f"a list of 1 to vocab_size = {vocab_size} tokens"
        raise CheckpointError.at(file, PREFIX + "tokens", expected, given)
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not isinstance(token, str) or len(token) > MAX_TOKEN_LENGTH:
            expected = f"strings of at most {MAX_TOKEN_LENGTH} characters"
            raise CheckpointError.at(file, PREFIX + "tokens", expected, f"{token!r:.200} for token {index}")
        if token and seen.setdefault(token, index) != index:
            given = f"{token!r:.200} for tokens {seen[token]} and {index}"
            raise CheckpointError.at(file, PREFIX + "tokens", "a spelling of its own for each token", given)
    types = metadata.get(PREFIX + "token_type")
    listed = TokenList(file, metadata, tokens, [TokenType.NORMAL] * len(tokens) if types is None else types)
    if types is None:
        if metadata.get(PREFIX + "model") == "llama":
            for token, index in seen.items():
                if BYTE_TOKEN.fullmatch(token):
                    listed.types[index] = TokenType.BYTE
        for key in ID_KEYS:
            named = listed.token_id(key)
            if named is not None:
                listed.types[named] = TokenType.CONTROL
    _check_length(file, "token_type", listed.types, tokens)
    for index, type_ in enumerate(listed.types):
        if type(type_) not in (int, TokenType) or not 1 <= type_ <= 6:
            raise listed.error("token_type", "numbers from 1 to 6", f"{type_!r:.200} for token {index}")
    used = [type_ if token else TokenType.UNUSED for token, type_ in zip(tokens, listed.types, strict=True)]
    return TokenList(file, metadata, tokens, used)


def _check_length(file: Path, key: str, values: Any, tokens: Sequence[str]) -> list[Any]:
    if not isinstance(values, list) or len(values) != len(tokens):
        given = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise CheckpointError.at(
            file, PREFIX + key, f"a list with one entry for each of {len(tokens)} tokens", given
        )
    return values
