"""Prompt lookup: guesses of the next tokens, copied from where the text ran alike before.

A decoded token reads every weight, and a pass over a few tokens takes hardly longer than over one. So where
the last tokens have stood in the text before, the tokens that followed them there are drafted and computed
together with the last one, and as many of them count as the model then chooses itself: the text is the same
without drafts. (Prompt lookup decoding, A. Saxena 2023; arXiv:2304.04487.)

What a draft costs depends on the machine and on the model, what it saves on the text. Both are measured on
the way: costs by the clock, and how often guesses are right by making one for every token, drafted or not.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

LONGEST_MATCH = 3
"""Tokens that are compared to find a place. A place that proves right is kept, so that in a long repetition
little depends on this; on texts of several kinds more gained nothing (bench/LOG.md)."""

TOKEN_BITS = 32
"""Enough for every vocabulary."""

PRIOR_WEIGHT = 2.0
"""How many guesses the experience with shorter matches counts for."""

MOST_TRIALS = 32.0
"""Experience is halved when it reaches this, because a text may begin or cease to repeat itself."""

FIRST_SLOPE = 0.4
"""Time of a drafted token as a share of a pass without a draft, until it has been measured: what it takes
where instructions are the limit, twice what was seen here (bench/LOG.md), so that first drafts are short."""

LEAST_SLOPE = 0.01
"""The same where the clock cannot tell: a drafted token is not free."""

CREDIT_PASSES = 0.5
CREDIT_SHARE = 0.01
"""What drafts may lose altogether: half a pass, and so much of the time of a text."""

MEASURED_PASSES = 15
"""Times are medians of so many passes, which something else on the machine now and then does not move."""


class TextMatches:
    """Guesses how a text goes on by its last place that ran alike, and counts how often that is right.

    Example:
        >>> matches = TextMatches([1, 2, 3, 1, 2])
        >>> matches.guess(5)  # as if the text went round from that place on
        [3, 1, 2, 3, 1]
    """

    def __init__(self, ids: Iterable[int] = ()) -> None:
        """Reads the beginning of a text."""
        self._text: list[int] = []
        self._behind: dict[int, int] = {}  # the place behind the last occurrence of each short run of tokens
        self._place = 0  # of the token that is expected next
        self._match = 0  # how many tokens before it equal the end of the text; 0 where nothing is expected
        # Guesses so far, by the match that they were made from.
        self._right = [0.0] * (LONGEST_MATCH + 1)
        self._trials = [0.0] * (LONGEST_MATCH + 1)
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Adds a token to the text."""
        text, behind, match = self._text, self._behind, self._match
        if match:
            right = text[self._place] == token
            self._count(match, right)
            self._place += 1
            match = min(match + 1, LONGEST_MATCH) if right else 0
        text.append(token)
        end = len(text)
        run = 1
        for length in range(1, min(end, LONGEST_MATCH) + 1):
            # A number instead of a tuple, of which thousands would set off Python's garbage collector.
            run = run << TOKEN_BITS | text[-length]
            if length > match and run in behind:
                self._place, match = behind[run], length
            behind[run] = end
        self._match = match

    def guess(self, count: int) -> list[int]:
        """The next ``count`` tokens; none where the last one is new to the text."""
        if not self._match:
            return []
        period = len(self._text) - self._place
        return [self._text[self._place + i % period] for i in range(count)]

    def chances(self, count: int) -> list[float]:
        """How likely each of ``guess(count)`` is right if those before it are."""
        if not self._match or not count:
            return []
        by_match = [0.0]
        for right, trials in zip(self._right[1:], self._trials[1:], strict=True):
            by_match.append((right + PRIOR_WEIGHT * by_match[-1]) / (trials + PRIOR_WEIGHT))
        return [by_match[min(self._match + i, LONGEST_MATCH)] for i in range(count)]

    def _count(self, match: int, right: bool) -> None:
        self._trials[match] += 1
        self._right[match] += right
        if self._trials[match] >= MOST_TRIALS:
            self._trials[match] /= 2
            self._right[match] /= 2


class PassTimes:
    """How long passes take, as multiples of a pass without a draft.

    Attributes:
        known: whether a pass without a draft has been measured.
        slope: what each drafted token adds.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.known = False
        self.slope = FIRST_SLOPE
        self._plain: deque[float] = deque(maxlen=MEASURED_PASSES)
        self._slopes: deque[float] = deque(maxlen=MEASURED_PASSES)

    def note(self, drafted: int, seconds: float) -> None:
        """Takes the time of a pass."""
        if not drafted:
            self._plain.append(seconds)
            self.known = True
        elif self.known:
            self._slopes.append((seconds / median(self._plain) - 1) / drafted)
            self.slope = max(median(self._slopes), LEAST_SLOPE)


class PromptLookup:
    """Drafts for one text: how many tokens pay, by what is known so far.

    Whatever that is, drafts lose no more than their credit, in time: one is only made where the credit and
    what drafts have saved would pay for it if it were all wrong.

    Attributes:
        most: tokens of a draft at most.
        drafted: tokens drafted so far.
        accepted: how many of them the model has chosen.
    """

    def __init__(self, ids: Iterable[int], most: int) -> None:
        """Reads the prompt."""
        self.most = most
        self.drafted = 0
        self.accepted = 0
        self._matches = TextMatches(ids)
        self._times = PassTimes()
        self._tokens = 0
        self._saved = 0.0  # passes without a draft that drafts have spared, less what they took

    def draft(self, room: int) -> list[int]:
        """A guess of the next tokens, as many as pay: often none, ``room`` or ``most`` at most."""
        if not self._times.known:
            return []
        slope = self._times.slope
        credit = CREDIT_PASSES + CREDIT_SHARE * self._tokens + self._saved
        affordable = min(room, self.most, int(credit / slope))
        tokens, chance, count, best = 1.0, 1.0, 0, 1.0
        for drafted, right in enumerate(self._matches.chances(affordable), 1):
            chance *= right
            tokens += chance
            per_time = tokens / (1 + slope * drafted)
            if per_time > best:
                count, best = drafted, per_time
        return self._matches.guess(count)

    def note(self, drafted: int, tokens: Sequence[int], seconds: float | None) -> None:
        """Takes what came of a pass.

        Args:
            drafted: how many tokens were drafted.
            tokens: those that the model chose, the drafted ones among them.
            seconds: how long it took; None for a pass that is not like others.
        """
        for token in tokens:
            self._matches.push(token)
        if seconds is not None:
            self._times.note(drafted, seconds)
        accepted = len(tokens) - 1
        self.drafted += drafted
        self.accepted += accepted
        self._tokens += len(tokens)
        # At the usual cost, for the clock may tell anything of a single pass.
        self._saved += accepted - self._times.slope * drafted
