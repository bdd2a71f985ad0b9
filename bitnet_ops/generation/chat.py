"""Conversations: a checkpoint's chat template, and sessions that compute only what is new.

The template is a Jinja program from a file of unknown origin, so it runs in a sandbox (template_sandbox.py):
it sees the messages and a few functions, can reach neither Python's objects nor the file system, and has a
bound on its time and on the texts it makes.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import torch
from jinja2.exceptions import SecurityError

from ..decoder.cache import KVCache
from . import template_bounds
from .prompts import need_tokenizer
from .template_sandbox import Sandbox

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..model import BitNet
    from .mixin import TextStream
    from .settings import GenerationArguments

Message = Mapping[str, str]
"""``{"role": "user", "content": "Hello"}``; roles are "system", "user" and "assistant"."""

FIRST_TOKENS = 1024
"""Room for tokens that a conversation begins with; it doubles as it fills. A context of 131072 tokens in
float32 takes 20 GB at 2B4T's sizes, which few conversations need and not every system promises."""

TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a faulty template can raise: Jinja's own errors, those of the expressions in it, and what Python has
against the program that Jinja makes of it."""

MOST_PATTERN = 200
"""Characters of a date's pattern."""


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    r"""Writes a conversation in the form that a model was trained on.

    Args:
        template: Jinja source, as in tokenizer_config.json or chat_template.jinja.
        messages: the turns so far.
        add_generation_prompt: end with the words that open the assistant's turn.
        **variables: further names the template may use, ``bos_token`` and ``eos_token`` above all.

    Returns:
        The text, special tokens included: encode it with ``add_special_tokens=False``.

    Raises:
        ValueError: the template is faulty or refuses these messages, or a message is malformed.

    Example:
        >>> render_chat("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        ...             [{"role": "user", "content": "Hello"}])
        'user: Hello\n'
    """
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"messages: expected mappings with texts 'role' and 'content', got {message!r}")
    try:
        # Templates ask `tools is not none`, as transformers always defines these two.
        names = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        template_bounds.start()
        return _compiled(template).render(messages=[dict(message) for message in messages], **names)
    except TEMPLATE_FAULTS as error:
        line = getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateError) else None
        where = "" if line is None else f" in line {line}"
        raise ValueError(f"chat_template: {type(error).__name__}{where}: {error}") from error


@functools.lru_cache(maxsize=8)  # a program has one model, perhaps a few
def _compiled(template: str) -> jinja2.Template:
    sandbox = Sandbox()
    # These names are what published templates are written against.
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox.compiled(template)


def _raise_exception(message: Any) -> NoReturn:
    template_bounds.take_whole(message)
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > MOST_PATTERN:
        raise SecurityError(f"expected a pattern of at most {MOST_PATTERN} characters, got {len(pattern)}")
    return datetime.datetime.now().strftime(pattern)


class Conversation:
    """What a conversation with any model has: the model, and a cache of the tokens it has read already.

    Attributes:
        last: the latest reply, with its tokens and times; None before the first.
    """

    def __init__(self, model: BitNet) -> None:
        self.model = model
        self.tokenizer = need_tokenizer(model.tokenizer, "model")
        self.last: TextStream | None = None
        self._cache: KVCache | None = None

    @property
    def context(self) -> int:
        """Number of tokens that fit."""
        return self.model.config.max_position_embeddings

    def _stream(self, ids: list[int], arguments: GenerationArguments) -> TextStream:
        """Continues ``ids``, computing only those that are not in the cache from the turns before."""
        if self._cache is None:
            dtype = arguments.get("cache_dtype") or torch.float32
            room = min(FIRST_TOKENS, self.context)
            self._cache = KVCache(self.model.config, 1, room, dtype=dtype, device=self.model.device)
        known: list[int] = []
        if self.last is not None:
            known = (self.last.prompt_ids + self.last.token_ids)[: self._cache.length]
        same = 0
        while same < min(len(known), len(ids) - 1) and known[same] == ids[same]:
            same += 1
        self._cache.length = same
        self.last = self.model.stream(ids, cache=self._cache, **arguments)
        return self.last

    def _fit(self, arguments: GenerationArguments, length: int) -> GenerationArguments:
        """The arguments with ``max_new_tokens`` lowered to what the context has left."""
        wanted = arguments.get("max_new_tokens") or self.context
        return {**arguments, "max_new_tokens": min(wanted, self.context - length)}


class ChatSession(Conversation):
    """A conversation in the form of the model's chat template.

    Attributes:
        messages: the turns so far; append a system message before the first reply to set the scene.

    Example:
        >>> session = ChatSession(model)
        >>> for piece in session.reply("Who are you?", max_new_tokens=200):
        ...     print(piece, end="", flush=True)
    """

    def __init__(self, model: BitNet, system: str | None = None) -> None:
        """Opens a conversation.

        Args:
            model: has a tokenizer and a chat template.
            system: content of the system message, if any.

        Raises:
            ValueError: the model has no tokenizer or no chat template.
        """
        super().__init__(model)
        if model.chat_template is None:
            raise ValueError(
                "model: expected a model with a chat template, got one without (model.chat_template is None)"
            )
        self.template = model.chat_template
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: the turns.
            add_generation_prompt: go on to where the model's next turn begins.
        """
        special = {
            "bos_token": self._token(self.model.config.bos_token_id),
            "eos_token": self._token(next(iter(self.model.config.eos_token_ids), None)),
        }
        return render_chat(self.template, messages, add_generation_prompt=add_generation_prompt, **special)

    def reply(self, text: str, **arguments: Unpack[GenerationArguments]) -> Generator[str, None, None]:
        """Says something and gives the answer as it appears.

        The turn enters ``messages`` when the answer ends, or is broken off: then with what there was of it.

        Args:
            text: the user's words.
            **arguments: as for `BitNet.generate`. ``max_new_tokens`` is an upper limit: it gives way where
                the context ends, and without it an answer may take all that is left.

        Returns:
            An iterator over pieces of the answer.

        Raises:
            ValueError: the conversation has outgrown the context, or the template refuses it.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids: list[int] = self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids
        if len(ids) >= self.context:
            raise ValueError(
                f"conversation: expected fewer than {self.context} tokens (the context), got {len(ids)}"
            )
        return self._record(messages, self._stream(ids, self._fit(arguments, len(ids))))

    def _record(self, messages: list[Message], stream: TextStream) -> Generator[str, None, None]:
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            self.messages = [
                *messages,
                {"role": "assistant", "content": "".join(pieces)},
            ]

    def _token(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.id_to_token(token) or ""


class Continuation(Conversation):
    """A text written in turns with a model that was not trained to chat: each goes on where it stands.

    Attributes:
        ids: the text so far, as tokens. When it no longer fits the context, its older half is forgotten.
    """

    def __init__(self, model: BitNet) -> None:
        """Opens an empty text; the model needs a tokenizer."""
        super().__init__(model)
        self.ids: list[int] = []

    def reply(self, text: str, **arguments: Unpack[GenerationArguments]) -> Generator[str, None, None]:
        """Appends a paragraph to the text and gives the continuation as it appears.

        Args:
            text: appended as it is, behind a blank line if the text has begun already.
            **arguments: as for `BitNet.generate`; ``max_new_tokens`` gives way where the context ends.
        """
        if self.ids:
            ids = self.ids + self.tokenizer.encode("\n\n" + text, add_special_tokens=False).ids
        else:
            ids = self.model.encode(text)["input_ids"][0].tolist()
        half = self.context // 2
        # By halves, not token by token: what stays keeps its place and with it the cache for many turns.
        ids = ids if len(ids) <= half + half // 2 else ids[-half:]
        return self._record(ids, self._stream(ids, self._fit(arguments, len(ids))))

    def _record(self, ids: list[int], stream: TextStream) -> Generator[str, None, None]:
        try:
            yield from stream
        finally:
            # An ending token would have to be followed by a new text; without it this one goes on.
            ended = stream.finish_reason == "eos"
            self.ids = ids + (stream.token_ids[:-1] if ended else stream.token_ids)
