"""How well a model predicts a text: `perplexity`, by a window that slides over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..generation.prompts import encode_prompt

if TYPE_CHECKING:
    from ..model import BitNet

MOST_LOGITS = 1 << 23
"""Scores held at a time: 32 MB in float32, and as much again for their softmax. All scores of a window of
4096 tokens and 128256 ids would take 2 GB."""

TOKENS_AT_ONCE = 2048
"""Tokens of several short windows that run as one batch; more is not faster."""


@dataclass(frozen=True)
class TextLoss:
    """What a text costs a model.

    Attributes:
        nats: sum of ``-ln p(token | tokens before it)`` over the scored tokens.
        tokens: how many were scored.
        size_bytes: of the text in UTF-8, or None where only ids were given.
    """

    nats: float
    tokens: int
    size_bytes: int | None = None

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``: between how many equally likely tokens the model wavers on average."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The same in bits and per byte of text, comparable between tokenizers; None without a text."""
        return None if not self.size_bytes else self.nats / math.log(2) / self.size_bytes


def perplexity(
    model: BitNet,
    text: str | Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: bool = False,
) -> TextLoss:
    """Perplexity of a text under a model.

    Every token but the first is scored once. A window of ``context`` tokens moves by ``stride``, and scores
    the tokens that were not scored before (the first window all of its own), so each is predicted from
    ``context - stride`` tokens before it at least; the last window ends with the text and is a whole one,
    too. A smaller stride gives a lower perplexity and takes longer. With ``stride`` equal to ``context``
    windows do not overlap, as in lm-eval's rolling log-likelihood.

    Args:
        model: with a tokenizer, if ``text`` is one.
        text: a text, which gets what the tokenizer puts around it (a BOS token, say, by which all of the text
            is scored), or token ids.
        context: tokens that the model sees at most; default ``config.max_position_embeddings``.
        stride: from 1 to ``context``; default half of it.
        progress: show a progress bar where stderr is a terminal.

    Returns:
        The sum of losses; ``.perplexity``, ``.nats_per_token`` and ``.bits_per_byte`` are derived from it.

    Raises:
        ValueError: an argument is out of range, or there are fewer than two tokens.
        FloatingPointError: the model gave NaN or Inf as scores.

    Example:
        >>> loss = bitnet_ops.perplexity(model, Path("novel.txt").read_text(encoding="utf-8"), stride=512)
        >>> print(f"{loss.perplexity:.2f} per token, {loss.bits_per_byte:.3f} bits per byte")
    """
    most = model.config.max_position_embeddings
    if context is None:
        context = most
    if not 1 <= context <= most:
        raise ValueError(f"context: expected 1 to {most} tokens, as many as the model takes, got {context}")
    if stride is None:
        stride = max(1, context // 2)
    if not 1 <= stride <= context:
        raise ValueError(f"stride: expected 1 to {context} tokens, the context, got {stride}")
    ids = torch.tensor(encode_prompt(model.config, model.tokenizer, text))
    if len(ids) < 2:
        raise ValueError(
            f"text: expected at least two tokens, of which the second is predicted, got {len(ids)}"
        )
    nats = sum_of_losses(model, ids, context, stride, progress=progress)
    if not math.isfinite(nats):
        raise FloatingPointError("perplexity: expected finite scores, the model gave NaN or Inf")
    return TextLoss(nats, len(ids) - 1, len(text.encode()) if isinstance(text, str) else None)


def sum_of_losses(model: BitNet, ids: Tensor, context: int, stride: int, *, progress: bool = False) -> float:
    """Sum of the cross-entropies of ``ids[1:]`` in windows as `perplexity` describes them, in nats.

    Args:
        model: packed or float; it runs in eval mode, and its mode is restored.
        ids: int64 [tokens], at least two.
        context: at least 1.
        stride: 1 to ``context``.
        progress: show a progress bar where stderr is a terminal.
    """
    length = min(context, len(ids) - 1)
    ends = torch.arange(length, len(ids), stride)
    if ends[-1] < len(ids) - 1:
        ends = torch.cat((ends, torch.tensor([len(ids) - 1])))
    fresh = torch.cat((torch.tensor([length]), ends.diff()))  # tokens that a window is the first to score
    windows_at_once = max(1, TOKENS_AT_ONCE // length)
    device = model.device
    training = model.training
    model.eval()
    nats = 0.0
    try:
        with (
            torch.inference_mode(),
            tqdm(
                total=len(ids) - 1,
                desc="reading",
                unit="token",
                disable=None if progress else True,
                leave=False,
            ) as bar,
        ):
            for some_ends, some_fresh in zip(
                ends.split(windows_at_once), fresh.split(windows_at_once), strict=True
            ):
                windows = ids[some_ends.unsqueeze(1) + torch.arange(-length, 1)].to(device)
                scored = (torch.arange(length) >= length - some_fresh.unsqueeze(1)).to(device)
                hidden = model.hidden_states(windows[:, :-1])[scored]
                losses, _ = token_losses(model, hidden, windows[:, 1:][scored])
                nats += losses.sum().item()
                bar.update(int(some_fresh.sum()))
    finally:  # a notebook goes on after Ctrl-C
        model.train(training)
    return nats


def token_losses(model: BitNet, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of single tokens, holding the scores of few of them at a time.

    Args:
        model: whose head makes scores.
        hidden: [N, hidden_size], from ``model.hidden_states``.
        targets: int64 [N], the tokens that came next.

    Returns:
        ``(losses, best)``: float64 [N] in nats, and int64 [N], the best-scored tokens.
    """
    losses, best = [], []
    rows = max(1, MOST_LOGITS // model.config.vocab_size)
    for some_hidden, some_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = model.score(some_hidden)
        losses.append(F.cross_entropy(logits, some_targets, reduction="none").double())
        best.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(best)
