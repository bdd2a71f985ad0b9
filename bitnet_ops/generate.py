"""Text from a model: the decoding loop, whole (`generate`), token by token and as a stream of text.

`GenerationMixin` gives `BitNet` its methods. The loop itself is `_decode`; everything else is built on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .generation_settings import (
    DEFAULT_NEW_TOKENS,
    GenerationArguments,
    GenerationSettings,
)
from .kv_cache import KVCache
from .prompts import (
    check_attention_mask,
    check_input_ids,
    encode_prompt,
    need_tokenizer,
    pad_left,
)
from .sampling import Sampler
from .screened_head import LEAST_BYTES, ScreenedHead
from .text_stream import IncrementalDecoder, StopStrings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Unpack

    from .config import BitNetConfig


PREFILL_TOKENS = 512
"""A longer prompt is read in pieces of so many tokens, all rows together, so that activations stay small (at
2B4T's sizes 100 MB): enough for the products to run at full speed. The text is the same for any size."""


class Streamer(Protocol):
    """What `generate` tells about its progress; ``transformers.TextStreamer`` is one."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt int64 [B, T] first, then new tokens int64 [B] step by step."""

    def end(self) -> None:
        """Is called after the last token."""


class GenerationMixin(nn.Module):
    """The methods of `BitNet` that write text."""

    config: BitNetConfig
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any] | None
    hidden_states: Callable[..., Tensor]

    certified_head: bool | None = None
    """Whether texts are written with `screened_head`, which changes nothing but their speed and takes three
    eighths of the memory of a bfloat16 head once more. None leaves it to the size of the head
    (`screened_head.LEAST_BYTES`)."""

    _screened_head: ScreenedHead | None = None

    @property
    def head_weight(self) -> Tensor:
        """The table that makes scores."""
        raise NotImplementedError

    def screened_head(self, done: Callable[[Tensor], None] = lambda rows: None) -> ScreenedHead | None:
        """The head as `generate` uses it, made at the first call and anew when the weights have changed.

        None where it does not apply: `certified_head` says so, in training mode, or on another device.
        ``done`` is called with rows of the table that are not needed for now (see `ScreenedHead`).
        """
        weight = self.head_weight
        wanted = self.certified_head
        if wanted is None:
            wanted = weight.nbytes >= LEAST_BYTES
        if not wanted or self.training or weight.device.type != "cpu":
            return None
        if self._screened_head is None or not self._screened_head.is_current(weight):
            self._screened_head = ScreenedHead(weight, done)
        return self._screened_head

    @property
    def device(self) -> torch.device:
        """Where the model's tensors live."""
        return next(self.parameters()).device

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
    ) -> Tensor:
        """Continues a batch of prompts.

        Argument names, their meaning and their order of action are those of transformers. What is not given
        (None) comes from the checkpoint's generation_config.json, then from the defaults named here.

        Args:
            input_ids: int64 [B, T], the prompts.
            attention_mask: [B, T], 1 for a token and 0 for padding, where prompts differ in length. Padding
                stands on the left; `encode` makes both tensors.
            max_new_tokens: length of the continuation, 64 (less where the context ends before). T and this
                must fit into ``config.max_position_embeddings``.
            do_sample: False takes the best-scored token; True draws from the distribution that the next four
                leave. Default False.
            temperature: divides the scores; default 1.0.
            top_k: keep the k best tokens; default 50, and 0 keeps all.
            top_p: of those, the smallest set whose probabilities sum to this; default 1.0, all.
            min_p: of those, tokens at least this fraction as likely as the likeliest; default 0, all.
            repetition_penalty: above 1 makes tokens that are in the prompt or the text less likely; default
                1.0. Padding does not count.
            eos_token_id: id or ids that end a row; default those of the config; ``()`` for none.
            pad_token_id: fills rows that ended before others; default that of the config, else the first
                eos id.
            stop_strings: a row ends with the token that completes one of these in its new text. Needs
                ``model.tokenizer``.
            seed: for the same text again; by default torch's global generator decides. Each row has a random
                stream of its own.
            streamer: is shown the prompt and every step's tokens.

        Returns:
            int64 [B, T + new]: prompts and continuations, the ending token included; ``new`` is below
            ``max_new_tokens`` where all rows ended before.

        Raises:
            ValueError: an argument is wrong; the text names it, what was expected and what was given.
            FloatingPointError: the model gave NaN or Inf as scores.

        Example:
            >>> batch = model.encode(["It is a truth", "Emma"])
            >>> ids = model.generate(**batch, max_new_tokens=32, do_sample=True, temperature=0.8, seed=1)
        """
        arguments = GenerationArguments(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            stop_strings=stop_strings,
            seed=seed,
        )
        steps = _decode(self, _prepare(self, input_ids, attention_mask, None, arguments))
        if streamer is not None:
            streamer.put(input_ids)
        new: list[Tensor] = []
        for tokens in steps:
            new.append(tokens)
            if streamer is not None:
                streamer.put(tokens)
        if streamer is not None:
            streamer.end()
        return torch.cat((input_ids, torch.stack(new, dim=1)), dim=1)

    def stream_tokens(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        **arguments: Unpack[GenerationArguments],
    ) -> Iterator[Tensor]:
        """Continues a batch of prompts, one token per row at a time.

        Args:
            input_ids: as for `generate`.
            attention_mask: as for `generate`.
            cache: holds the first ``cache.length`` tokens of ``input_ids`` already, fewer than all; only the
                others are computed. Filled in place, so that a later call can go on from it: by then it
                holds everything but the last token.
            **arguments: as for `generate`.

        Returns:
            An iterator of int64 [B]. Arguments are checked at once, tokens computed as they are asked for.

        Example:
            >>> for tokens in model.stream_tokens(ids, max_new_tokens=8):
            ...     print(tokens.tolist())
        """
        request = _prepare(self, input_ids, attention_mask, cache, arguments)
        return _decode(self, request)

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor,
        *,
        cache: KVCache | None = None,
        **arguments: Unpack[GenerationArguments],
    ) -> TextStream:
        """Continues one prompt and gives the text as it appears.

        Args:
            prompt: text, or token ids (a sequence, or an int64 tensor [T] or [1, T]).
            cache: as for `stream_tokens`.
            **arguments: as for `generate`.

        Returns:
            An iterator over pieces of text: whole characters, without special tokens, ended before a stop
            string. Arguments are checked at once.

        Raises:
            ValueError: also where the model has no tokenizer.

        Example:
            >>> for piece in model.stream("It is a truth", max_new_tokens=40):
            ...     print(piece, end="", flush=True)
        """
        tokenizer = need_tokenizer(self.tokenizer, "stream")
        if isinstance(prompt, Tensor):
            input_ids = prompt.unsqueeze(0) if prompt.dim() == 1 else prompt
            if input_ids.shape[:1] != (1,):
                raise ValueError(
                    f"prompt: expected one prompt, [T] or [1, T], got shape {list(prompt.shape)}"
                )
        else:
            ids = encode_prompt(self.config, tokenizer, prompt)
            input_ids = torch.tensor([ids], device=self.device)
        request = _prepare(self, input_ids, None, cache, arguments)
        return TextStream(self, tokenizer, request)

    def encode(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        add_special_tokens: bool = True,
    ) -> dict[str, Tensor]:
        """Makes a batch of prompts, padded on the left to the longest.

        Args:
            prompts: a text, several texts, or several sequences of token ids.
            add_special_tokens: whether texts get what the tokenizer puts around them (a BOS token, say). An
                empty text is the BOS token in any case.

        Returns:
            ``{"input_ids": int64 [B, T], "attention_mask": int64 [B, T]}``, the arguments of `generate`.

        Raises:
            ValueError: no prompt, an empty one without a BOS token to stand for it, or no tokenizer.

        Example:
            >>> model.encode([[5, 6, 7], [8]])["attention_mask"]
            tensor([[1, 1, 1],
                    [0, 0, 1]])
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        if not several:
            raise ValueError("prompts: expected at least one, got none")
        rows = [
            encode_prompt(
                self.config,
                self.tokenizer,
                prompt,
                add_special_tokens=add_special_tokens,
            )
            for prompt in several
        ]
        input_ids, attention_mask = pad_left(rows, self.config.pad_token_id or 0)
        device = self.device
        return {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
        }


class TextStream(Iterator[str]):
    """One text as it appears: an iterator over its pieces, and an account of it.

    Attributes:
        prompt_ids: the tokens of the prompt.
        token_ids: the new tokens so far, an ending token included.
        finish_reason: None while the text goes on, then "eos", "stop" (a stop string) or "length".
        prompt_seconds: time spent until the first token was there.
        decode_seconds: time spent on the other tokens; what the caller does between pieces does not count.
    """

    def __init__(self, model: GenerationMixin, tokenizer: Tokenizer, request: _Request) -> None:
        self.prompt_ids: list[int] = request.input_ids[0].tolist()
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.prompt_seconds = 0.0
        self.decode_seconds = 0.0
        self._eos = request.settings.eos_token_ids
        self._stop = StopStrings(request.settings.stop_strings)
        self._decoder = IncrementalDecoder(tokenizer, self.prompt_ids)
        # Stop strings are cut out of the text here; the loop need not look for them as well.
        self._steps = _decode(model, request, watch_stop_strings=False)

    def __next__(self) -> str:
        """The next piece of text, never empty."""
        while self.finish_reason is None:
            piece = self._advance()
            if piece:
                return piece
        raise StopIteration

    def _advance(self) -> str:
        begin = time.perf_counter()
        tokens = next(self._steps, None)
        elapsed = time.perf_counter() - begin
        if tokens is None:
            return self._finish("length")
        if self.token_ids:
            self.decode_seconds += elapsed
        else:
            self.prompt_seconds = elapsed
        token = int(tokens[0])
        self.token_ids.append(token)
        if token in self._eos:
            return self._finish("eos")
        piece = self._stop.push(self._decoder.push(token))
        if self._stop.found is not None:
            self.finish_reason = "stop"
        return piece

    def _finish(self, reason: str) -> str:
        piece = self._stop.push(self._decoder.flush())
        self.finish_reason = reason if self._stop.found is None else "stop"
        return piece + self._stop.flush()


@dataclass(frozen=True)
class _Request:
    """What one run of the loop needs, all of it checked."""

    input_ids: Tensor
    attention_mask: Tensor | None
    cache: KVCache
    max_new_tokens: int
    settings: GenerationSettings


def _prepare(
    model: GenerationMixin,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    arguments: GenerationArguments,
) -> _Request:
    """Checks the arguments of the loop and makes its cache."""
    settings = GenerationSettings.resolve(
        model.config, model.generation_config or {}, model.tokenizer, arguments
    )
    check_input_ids(input_ids, model.config.vocab_size, model.device)
    attention_mask = check_attention_mask(attention_mask, input_ids)
    if model.training and model.config.dropout > 0:
        raise ValueError(
            "generate: expected the model in eval mode, because training mode drops activations "
            "at random, got training mode; call model.eval() first"
        )
    batch, prompt_length = input_ids.shape
    context = model.config.max_position_embeddings
    room = context - prompt_length
    wanted = settings.max_new_tokens
    # An explicit length that does not fit is an error, the default one gives way.
    explicit = arguments.get("max_new_tokens") is not None
    if room < 1 or (explicit and wanted is not None and wanted > room):
        raise ValueError(
            f"max_new_tokens: expected the prompt and the new tokens to fit into max_position_embeddings = "
            f"{context}, got {prompt_length} + {wanted or 1}"
        )
    max_new_tokens = min(wanted or DEFAULT_NEW_TOKENS, room)
    if settings.pad_token_id is None and settings.stop_strings and batch > 1:
        raise ValueError(
            "pad_token_id: expected a token id, because stop_strings can end one row before another and "
            "neither pad_token_id nor eos_token_id is known, got None"
        )
    needed = prompt_length + max_new_tokens - 1  # the last token is never fed back
    if cache is None:
        cache = KVCache(model.config, batch, needed, device=model.device)
    else:
        if cache.batch_size != batch:
            raise ValueError(f"cache: expected {batch} rows, as input_ids has, got {cache.batch_size}")
        if cache.length >= prompt_length:
            raise ValueError(
                f"cache: expected fewer tokens than the {prompt_length} of input_ids, got {cache.length}"
            )
        cache.reserve(needed)
    return _Request(input_ids, attention_mask, cache, max_new_tokens, settings)


@torch.no_grad()  # not inference_mode: the tokens that come out may be used in training
def _decode(model: GenerationMixin, request: _Request, watch_stop_strings: bool = True) -> Iterator[Tensor]:
    """The decoding loop: yields int64 [B] per step, until every row has ended."""
    settings, cache, input_ids = request.settings, request.cache, request.input_ids
    batch, vocab_size = input_ids.shape[0], model.config.vocab_size
    sampler = Sampler(settings.sampling, batch, settings.seed)
    sampler.observe(input_ids, vocab_size, request.attention_mask)
    head = model.screened_head() if sampler.best_are_enough(vocab_size) else None
    eos = torch.tensor(settings.eos_token_ids, dtype=torch.int64, device=input_ids.device)
    watchers = _watchers(model, request) if watch_stop_strings and settings.stop_strings else []
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    mask = request.attention_mask
    new_ids = input_ids[:, cache.length :]
    if mask is not None:
        mask = mask[:, cache.length :]
    piece = max(PREFILL_TOKENS // batch, 1)
    while new_ids.shape[1] > piece:
        first = None if mask is None else mask[:, :piece]
        with torch.inference_mode():
            if head is None:
                model(new_ids[:, :piece], attention_mask=first, cache=cache, logits_to_keep=1)
            else:
                model.hidden_states(new_ids[:, :piece], attention_mask=first, cache=cache)
        new_ids = new_ids[:, piece:]
        mask = None if mask is None else mask[:, piece:]
    for _ in range(request.max_new_tokens):
        with torch.inference_mode():  # spares each operator a call into PyTorch's autograd, 5 us apiece
            if head is None:
                scores = model(new_ids, attention_mask=mask, cache=cache, logits_to_keep=1)[:, -1]
            else:
                hidden = model.hidden_states(new_ids, attention_mask=mask, cache=cache)[:, -1]
        tokens = sampler(scores) if head is None else sampler.from_head(head, hidden)
        if settings.pad_token_id is not None:  # without one no row can end before the others
            tokens = torch.where(running, tokens, settings.pad_token_id)
        running = running & ~torch.isin(tokens, eos)
        for row, (decoder, stop) in enumerate(watchers):
            if running[row]:
                stop.push(decoder.push(int(tokens[row])))
                running[row] = stop.found is None
        yield tokens
        if not bool(running.any()):
            return
        new_ids, mask = tokens.unsqueeze(1), None  # the cache remembers what is padding


def _watchers(model: GenerationMixin, request: _Request) -> list[tuple[IncrementalDecoder, StopStrings]]:
    tokenizer = need_tokenizer(model.tokenizer, "stop_strings")
    mask = request.attention_mask
    watchers = []
    for row, ids in enumerate(request.input_ids):
        context = ids if mask is None else ids[mask[row].bool()]
        decoder = IncrementalDecoder(tokenizer, context.tolist())
        watchers.append((decoder, StopStrings(request.settings.stop_strings)))
    return watchers
