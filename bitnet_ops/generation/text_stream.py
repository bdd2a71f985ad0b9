"""From tokens to text, piece by piece: whole characters only, and stop strings that never leak."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes an incomplete UTF-8 character to."""

CONTEXT_TOKENS = 8
"""Tokens of the prompt that the first pieces are decoded after: a character has at most 4 bytes, so at most
4 byte tokens, and decoders that treat the first word of a text in a special way look at one word."""


class IncrementalDecoder:
    """Turns tokens into text as they come.

    A token may end in the middle of a UTF-8 character; what it begins is held back until a later token
    completes it. The pieces, with `flush` at the end, add up to the text of all tokens at once.

    Example:
        >>> decoder = IncrementalDecoder(tokenizer)
        >>> "".join([*map(decoder.push, ids), decoder.flush()]) == tokenizer.decode(ids)
        True
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Starts a text.

        Args:
            tokenizer: decodes; special tokens give no text.
            context: ids before the first, whose own text is not repeated. Matters for decoders that strip
                the space in front of a text's first word.
        """
        self._tokenizer = tokenizer
        # Only a window of recent tokens is decoded at each step, or a long text would cost quadratic time.
        self._window = list(context[-CONTEXT_TOKENS:])
        self._old = len(self._window)  # tokens of the window whose text is out already
        self._sent = self._decode(self._window).rstrip(REPLACEMENT)

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain, possibly empty."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = text.rstrip(REPLACEMENT)
        piece = certain[len(self._sent) :]
        self._sent = certain if len(certain) > len(self._sent) else self._sent
        if certain == text:
            # All out: the tokens that were new become the context of the next ones, unless they have no
            # text of their own and so would make the next word look like the first.
            recent = self._window[self._old :]
            recent_text = self._decode(recent)
            if recent_text:
                self._window, self._old, self._sent = recent, len(recent), recent_text
        return piece

    def flush(self) -> str:
        """The text still held back, at the end: incomplete characters, as the replacement character."""
        text = self._decode(self._window)
        piece = text[len(self._sent) :]
        self._sent = text
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StopStrings:
    """Cuts a stream of text before the first of several strings.

    Text that may turn out to be the beginning of a stop string is held back until it is decided.

    Attributes:
        found: the string that was met, or None. Nothing is released after it.

    Example:
        >>> stop = StopStrings(["User:"])
        >>> stop.push("Well. Us"), stop.push("er: hello"), stop.found
        ('Well. ', '', 'User:')
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.strings = tuple(strings)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Adds text; returns what may be shown."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(at, string) for string in self.strings if (at := self._held.find(string)) >= 0]
        if places:
            # The one that a reader meets first, so that the cut does not depend on how the text is split.
            at, self.found = min(places, key=lambda place: (place[0] + len(place[1]), place[0]))
            shown, self._held = self._held[:at], ""
            return shown
        keep = self._undecided()
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        shown, self._held = self._held, ""
        return shown

    def _undecided(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = max(map(len, self.strings), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(string.startswith(tail) for string in self.strings):
                return length
        return 0
