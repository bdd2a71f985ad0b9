"""Texts as the token ids that an embedding model reads: cut to what fits, and ended as the model wants."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..generation.prompts import need_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..decoder.config import DecoderConfig


class TextReader:
    """Makes token ids of texts.

    A text that is too long loses its end, not the tokens that the tokenizer puts around it: so do
    sentence-transformers, and the last token is what many models are pooled on.
    """

    def __init__(
        self, config: DecoderConfig, tokenizer: Tokenizer | None, eos_token_id: int | None, max_length: int
    ) -> None:
        """Takes what all texts have in common.

        Args:
            config: of the model.
            tokenizer: of the model.
            eos_token_id: ends each text, where the tokenizer has not put it there; None for none.
            max_length: of each text, in tokens.

        Raises:
            ValueError: no tokenizer, or an id out of range.
        """
        self._tokenizer = own_tokenizer(need_tokenizer(tokenizer, "embed"))
        self._config = config
        if eos_token_id is not None and eos_token_id >= config.vocab_size:
            raise ValueError(f"eos_token_id: expected an id below {config.vocab_size}, got {eos_token_id}")
        self._eos = eos_token_id
        self._max_length = max_length
        self._around: int = self._tokenizer.num_special_tokens_to_add(False)

    def read(self, texts: Sequence[str], prompt: str = "") -> list[array[int]]:
        """The token ids of each text, at least one.

        Args:
            texts: any number of them.
            prompt: goes in front of each.

        Raises:
            ValueError: names the text that is none, or that makes no token the model has.
        """
        return [self._ids(number, text, prompt) for number, text in enumerate(texts)]

    def _ids(self, number: int, text: str, prompt: str) -> array[int]:
        if not isinstance(text, str):
            raise ValueError(f"texts[{number}]: expected a text, got {type(text).__name__}")
        text = prompt + text
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            bad = error.object[error.start]
            raise ValueError(f"texts[{number}]: expected text that UTF-8 can encode, got {bad!r}") from None
        ids = self._cut(text, self._max_length)
        if self._eos is not None and ids[-1:] != [self._eos]:
            ids = [*self._cut(text, self._max_length - 1), self._eos]
        if not ids and self._config.bos_token_id is not None:
            ids = [self._config.bos_token_id]
        if not ids:
            raise ValueError(
                f"texts[{number}]: expected at least one token, got none (and no BOS token stands for it)"
            )
        if max(ids) >= self._config.vocab_size:
            raise ValueError(
                f"texts[{number}]: expected token ids below vocab_size = {self._config.vocab_size}, "
                f"got {max(ids)}"
            )
        return array("i", ids)

    def _cut(self, text: str, length: int) -> list[int]:
        """The ids of as much of a text as fits, with what belongs around it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        room = max(length - self._around, 0)
        if len(encoding.ids) > room:
            encoding.truncate(room)
        ids: list[int] = self._tokenizer.post_process(encoding, None, True).ids
        return ids[:length]


def own_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself, or a copy without the lengths that a file may have set."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
