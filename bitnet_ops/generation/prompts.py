"""Prompts as tensors: encoded, padded on the left, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..decoder.config import DecoderConfig


def need_tokenizer(tokenizer: Tokenizer | None, purpose: str) -> Tokenizer:
    """The tokenizer, or a ValueError that says what it is missing for."""
    if tokenizer is None:
        raise ValueError(
            f"{purpose}: expected a model with a tokenizer, got one without (model.tokenizer is None)"
        )
    return tokenizer


def encode_prompt(
    config: DecoderConfig,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int],
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """The token ids of a text, or ids as they are, checked.

    Args:
        config: of the model; gives the range of ids and the BOS token that stands for an empty text.
        tokenizer: of the model; texts need one.
        prompt: a text, or token ids.
        add_special_tokens: whether a text gets what the tokenizer puts around it.

    Raises:
        ValueError: no tokenizer, no token, or an id or character out of range.
    """
    if isinstance(prompt, str):
        tokenizer = need_tokenizer(tokenizer, "prompt")
        try:
            prompt.encode()
        except (
            UnicodeEncodeError
        ) as error:  # half of a surrogate pair: bytes of a terminal that are not UTF-8
            bad = error.object[error.start]
            raise ValueError(f"prompt: expected text that UTF-8 can encode, got {bad!r}") from None
        ids: list[int] = list(tokenizer.encode(prompt, add_special_tokens=add_special_tokens).ids)
        if not ids and config.bos_token_id is not None:
            ids = [config.bos_token_id]
    else:
        ids = list(prompt)
    if not ids:
        raise ValueError("prompt: expected at least one token, got none (and no BOS token stands for it)")
    for token in ids:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise ValueError(f"prompt: expected token ids in [0, {config.vocab_size}), got {token!r}")
    return ids


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Makes a batch of rows of different lengths.

    Args:
        rows: token ids, at least one in each row.
        pad_token_id: stands in front of shorter rows; any id will do, because the mask hides it.

    Returns:
        ``(input_ids, attention_mask)``, int64 [B, T] both; the mask is 0 where a row is padded.
    """
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    return input_ids, attention_mask


def check_input_ids(input_ids: Tensor, vocab_size: int, device: torch.device) -> None:
    """Raises where ``input_ids`` is not an int64 [B, T] of token ids on ``device``."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: expected a tensor int64 [B, T], got {type(input_ids).__name__}")
    if input_ids.dtype != torch.int64 or input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            "input_ids: expected int64 [B, T] with at least one row and one token, "
            f"got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if input_ids.device != device:
        raise ValueError(f"input_ids: expected device {device}, as the model has, got {input_ids.device}")
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids: expected ids in [0, {vocab_size}), got {low if low < 0 else high}")


def check_attention_mask(mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The mask as bool, or None where nothing is padded, which is the faster path."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape or mask.device != input_ids.device:
        given = f"{list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected a tensor of the shape of input_ids {list(input_ids.shape)} on "
            f"{input_ids.device}, got {given}"
        )
    visible = mask != 0
    if not bool((visible == mask).all()):
        raise ValueError("attention_mask: expected only 0 (padding) and 1 (token), got other values")
    if not bool(visible[:, -1].all()) or bool((visible[:, :-1] & ~visible[:, 1:]).any()):
        raise ValueError(
            "attention_mask: expected padding on the left only and at least one token in every row, "
            "got padding behind a token"
        )
    return None if bool(visible.all()) else visible
