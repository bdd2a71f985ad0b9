"""From the scores of the next token to a token: the filters and the draw.

The filters and their order are those of transformers: repetition penalty, temperature, top-k, top-p,
min-p. They work on the few candidates that top-k leaves, sorted, instead of on the whole vocabulary. Where
no filter acts, the draw is an argmax of scores with Gumbel noise. Either way a few of the best tokens are all
that is needed of the vocabulary, and a `ScreenedHead` finds the same ones with half the memory traffic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..decoder.head import ScreenedHead

NUCLEUS = 1024
"""Tokens that top-p is tried on before all are sorted, which takes as long as the rest of a decoded token."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; names and defaults are those of transformers.

    Attributes:
        do_sample: draw from the filtered distribution; False takes the best-scored token.
        temperature: divides the scores; below 1 favours likely tokens.
        top_k: keep the k best tokens; 0 keeps all. Of tokens that tie for the last place only as many
            are kept as there are places.
        top_p: of those, keep the smallest set of best tokens whose probabilities sum to at least this.
        min_p: of those, drop tokens less likely than this fraction of the likeliest; None or 0 drops none.
        repetition_penalty: the scores of tokens already in the text are divided by this where positive and
            multiplied where negative (arXiv:1909.05858, section 4.1). Acts on greedy decoding too.

    Raises:
        ValueError: a value is out of range (TypeError for ``do_sample``); the text names it, what was
            expected and what was given.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample: expected True or False, got {self.do_sample!r}")
        if not _is_number(self.temperature) or not 0 < self.temperature < math.inf:
            hint = "; for the best-scored token use do_sample=False" if self.temperature == 0 else ""
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature!r}{hint}")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k: expected an int >= 0 (0 keeps all tokens), got {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in [0, 1], got {self.top_p!r}")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p: expected None or a number in [0, 1], got {self.min_p!r}")
        if not _is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty: expected a number above 0, got {self.repetition_penalty!r}"
            )


class Sampler:
    """Chooses one token per row, and remembers what each row has seen.

    Every row has its own random stream, and takes exactly one number from it per token. So a row's text
    depends on the seed and on its place in the batch, not on what the other rows do or how many there are,
    nor on whether its tokens are chosen one by one or several at once (`follow`).

    Example:
        >>> sampler = Sampler(SamplingConfig(do_sample=True), batch_size=1, seed=0)
        >>> sampler(torch.tensor([[0.0, 5.0, 1.0]]))
        tensor([1])
    """

    def __init__(self, config: SamplingConfig, batch_size: int, seed: int | None = None) -> None:
        """Prepares the random streams.

        Args:
            config: the filters.
            batch_size: number of rows.
            seed: for the same choices again; None takes a seed from torch's global generator, so that
                ``torch.manual_seed`` governs it.
        """
        self.config = config
        self._seen: Tensor | None = None
        self._generators: list[torch.Generator] = []
        if config.do_sample:
            source = None if seed is None else torch.Generator().manual_seed(seed)
            # One at a time: row 0 gets the same seed in a batch of 1 and in a batch of 64.
            row_seeds = [int(torch.randint(2**63 - 1, (), generator=source)) for _ in range(batch_size)]
            self._generators = [torch.Generator().manual_seed(row_seed) for row_seed in row_seeds]

    def observe(self, ids: Tensor, vocab_size: int, mask: Tensor | None = None) -> None:
        """Notes tokens as part of the text, for the repetition penalty.

        Args:
            ids: int64 [B, T].
            vocab_size: size of the rows of scores to come.
            mask: [B, T], 0 where a token is padding and does not count.
        """
        if self.config.repetition_penalty == 1.0:
            return
        if self._seen is None:
            self._seen = torch.zeros(ids.shape[0], vocab_size, dtype=torch.bool, device=ids.device)
        if mask is None:
            self._seen.scatter_(1, ids, True)
        else:
            # Padding may carry the id of a real token, so it goes to a spare column that is cut off again.
            spare = torch.where(mask.bool(), ids, vocab_size)
            wide = torch.nn.functional.pad(self._seen, (0, 1)).scatter_(1, spare, True)
            self._seen = wide[:, :vocab_size].contiguous()

    def __call__(self, logits: Tensor) -> Tensor:
        """Chooses a token per row.

        Args:
            logits: float [B, V].

        Returns:
            int64 [B].

        Raises:
            FloatingPointError: a row holds NaN or +Inf, or nothing but -Inf.
        """
        best, token = logits.max(dim=-1)  # NaN and +Inf come out on top
        check_finite(best)
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, self.config.repetition_penalty)
        vocab_size = logits.shape[-1]
        numbers = self._numbers(vocab_size)
        if numbers is None:
            token = token if self._seen is None else logits.argmax(dim=-1)
        elif self._unfiltered(vocab_size):
            noise = ops.gumbel_noise(numbers, vocab_size).to(logits.device)
            token = (logits.double() / self.config.temperature + noise).argmax(dim=-1)
        else:
            probabilities, ids = candidates(logits, self.config)
            token = draw(probabilities, numbers.to(logits.device))
            token = token if ids is None else ids.gather(1, token.unsqueeze(1)).squeeze(1)
        if self._seen is not None:
            self._seen.scatter_(1, token.unsqueeze(1), True)
        return token

    def best_are_enough(self, vocab_size: int) -> bool:
        """Whether `from_head` can choose: no filter needs more of the vocabulary than its best tokens."""
        config = self.config
        few = 0 < config.top_k < vocab_size
        return self._seen is None and (not config.do_sample or few or self._unfiltered(vocab_size))

    def from_head(self, head: ScreenedHead, hidden: Tensor) -> Tensor:
        """Chooses the tokens that the call with all logits would choose, where `best_are_enough`.

        Args:
            head: the table that makes logits.
            hidden: float [B, K].

        Returns:
            int64 [B].

        Raises:
            FloatingPointError: as for the call.
        """
        best, tokens = self._from_head(head, hidden, self._numbers(head.weight.shape[0]))
        check_finite(best)
        return tokens

    def follow(self, logits: Tensor, draft: Sequence[int]) -> Tensor:
        """Chooses the tokens of several positions of one row: those that one call after another would choose.

        Scores were computed for a text that goes on with ``draft``, so they hold up to the first token that
        turns out to be another one.

        Args:
            logits: float [P, V], of P = ``len(draft) + 1`` positions.
            draft: guesses of all tokens but the last.

        Returns:
            int64 [n], 1 <= n <= P: the first n - 1 of the draft, and the token behind them. Fewer where a
            later position has bad scores, so that these raise when it is the first.

        Raises:
            FloatingPointError: as for the call, about the first position.
        """
        sound = logits.amax(dim=-1).isfinite().tolist()
        tokens = [self(logits[:1])]
        while (count := len(tokens)) <= len(draft) and int(tokens[-1]) == draft[count - 1] and sound[count]:
            tokens.append(self(logits[count : count + 1]))
        return torch.cat(tokens)

    def follow_from_head(self, head: ScreenedHead, hidden: Tensor, draft: Sequence[int]) -> Tensor:
        """Chooses the tokens that `follow` with all logits would choose, where `best_are_enough`.

        Args:
            head: the table that makes logits.
            hidden: float [P, K].
            draft: as for `follow`.

        Returns:
            int64 [n], as `follow`.

        Raises:
            FloatingPointError: as for `follow`.
        """
        vocab_size = head.weight.shape[0]
        # The table is read once for all positions, so their numbers are needed before it is known how many
        # will count: they are taken from a copy of the stream, and those that count then from the stream.
        streams = self._generators
        self._generators = [stream.clone_state() for stream in streams]
        ahead = [self._numbers(vocab_size) for _ in range(hidden.shape[0])]
        self._generators = streams
        numbers = [number for number in ahead if number is not None]
        best, tokens = self._from_head(head, hidden, torch.cat(numbers) if numbers else None)
        check_finite(best[:1])
        chosen, sound = tokens.tolist(), best.isfinite().tolist()
        count = 1
        while count <= len(draft) and chosen[count - 1] == draft[count - 1] and sound[count]:
            count += 1
        for _ in range(count):
            self._numbers(vocab_size)
        return tokens[:count]

    def _from_head(self, head: ScreenedHead, hidden: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best logit of each row of ``hidden``, and the token that its number chooses."""
        vocab_size, temperature = head.weight.shape[0], self.config.temperature
        if numbers is None:
            logits, ids = head.top_k(hidden, 1)
        elif self._unfiltered(vocab_size):
            logits, ids = head.top_k(hidden, 1, temperature, ops.gumbel_noise(numbers, vocab_size))
        else:
            logits, ids = head.top_k(hidden, self.config.top_k)
            sound = logits[:, :1].isfinite()  # of other rows nobody wants the token
            probabilities = (torch.where(sound, logits, 0.0).double() / temperature).softmax(dim=-1)
            ids = ids.gather(1, draw(filtered(probabilities, self.config), numbers).unsqueeze(1))
        return logits[:, 0], ids[:, 0]

    def _unfiltered(self, vocab_size: int) -> bool:
        """Whether the draw is from the softmax over all tokens."""
        config = self.config
        all_tokens = config.top_k == 0 or config.top_k >= vocab_size
        return config.do_sample and all_tokens and config.top_p == 1 and not config.min_p

    def _numbers(self, vocab_size: int) -> Tensor | None:
        """The next number of every row's stream [B]: None where the best token is taken, int64 seeds of noise
        where no filter acts, else float64 points in [0, 1) of a cumulative distribution.
        """
        if not self.config.do_sample:
            return None
        if self._unfiltered(vocab_size):
            return torch.stack([torch.randint(2**63 - 1, (), generator=g) for g in self._generators])
        return torch.stack([torch.rand((), dtype=torch.float64, generator=g) for g in self._generators])


def check_finite(best: Tensor) -> None:
    """Raises FloatingPointError unless the best score of every row [B] is a finite number."""
    if not all(map(math.isfinite, best.tolist())):  # isfinite() takes 0.2 ms with cold caches
        row = int(best.isfinite().logical_not().nonzero()[0])
        raise FloatingPointError(
            f"logits: expected finite scores of the next token, got {float(best[row])} in row {row}: "
            "the model's weights or activations hold NaN or Inf"
        )


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens already seen less likely: ``l / penalty`` where l > 0, else ``l * penalty``.

    Args:
        logits: float [B, V].
        seen: bool [B, V].
        penalty: above 1 discourages repetition.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Applies temperature, top-k, top-p and min-p.

    Args:
        logits: float [B, V], the repetition penalty applied.
        config: the filters.

    Returns:
        ``(probabilities, ids)``: float64 [B, C], 0 for a token that is filtered out, each row proportional
        to the probabilities (its sum is below 1 where top-p or min-p dropped something); and the token ids
        int64 [B, C] of these columns, or None where column v is token v.
    """
    vocab_size = logits.shape[-1]
    if 0 < config.top_k < vocab_size:
        logits, ids = top_k(logits, config.top_k)
        return filtered((logits.double() / config.temperature).softmax(dim=-1), config), ids
    probabilities = (logits.double() / config.temperature).softmax(dim=-1)
    if config.top_p == 1:
        return filtered(probabilities, config), None
    if vocab_size > NUCLEUS:
        _, ids = top_k(logits, NUCLEUS)
        best = probabilities.gather(1, ids)
        if bool((best.cumsum(dim=-1)[:, -1] >= config.top_p).all()):
            return filtered(best, config), ids
    ids = logits.sort(dim=-1, descending=True, stable=True).indices
    return filtered(probabilities.gather(1, ids), config), ids


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(k)``, and of equals the token with the smaller id comes first, which torch leaves open.

    Args:
        logits: float [B, V].
        k: below V.

    Returns:
        ``(logits, ids)``: [B, k], best first, as from `ops.lm_head_top_k`.
    """
    best, ids = logits.topk(k + 1, dim=-1)
    last = best[:, k - 1 : k]
    if bool((last == best[:, k:]).any()):  # equals on both sides of the last place
        tied = logits == last
        places = k - (logits > last).sum(dim=-1, keepdim=True)
        chosen = (logits > last) | (tied & (tied.cumsum(dim=-1) <= places))
        ids = chosen.nonzero()[:, 1].view(-1, k)
    ids = ids[:, :k].sort(dim=-1).values  # in the order of the vocabulary, which a stable sort respects
    best, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


def filtered(probabilities: Tensor, config: SamplingConfig) -> Tensor:
    """The probabilities, and 0 for tokens that top-p or min-p drops.

    Args:
        probabilities: float64 [B, C], in descending order where top-p acts.
        config: the filters.
    """
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if config.top_p < 1:
        # Of the tokens before, summed in their order, so that it does not matter how many follow.
        better = torch.nn.functional.pad(probabilities.cumsum(dim=-1)[:, :-1], (1, 0))
        keep = better < config.top_p
        keep[:, 0] = True
    if config.min_p:
        keep &= probabilities >= config.min_p * probabilities.amax(dim=-1, keepdim=True)
    return probabilities * keep


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draws a column per row by inverting the cumulative distribution.

    Args:
        probabilities: float64 [B, C], non-negative, each row with a positive sum.
        uniform: float64 [B] in [0, 1).

    Returns:
        int64 [B], column c with probability ``probabilities[b, c] / sum(probabilities[b])``; never a column
        of probability 0.
    """
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The product can round up to the total itself, beyond every column.
    point = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
