"""Text from a model: the decoding loop, whole (`generate`), token by token and as a stream of text.

`GenerationMixin` gives `BitNet` its methods; the loop itself is `bitnet_ops.generation.loop`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..decoder.cache import KVCache
from .loop import Request, decode, prepare
from .prompts import encode_prompt, need_tokenizer, pad_left
from .settings import GenerationArguments
from .text_stream import IncrementalDecoder, StopStrings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from typing_extensions import Unpack

    from ..decoder.config import DecoderConfig
    from ..decoder.head import ScreenedHead


class Streamer(Protocol):
    """What `generate` tells about its progress; ``transformers.TextStreamer`` is one."""

    def put(self, value: Tensor) -> None:
        """Takes the prompt int64 [B, T] first, then new tokens int64 [B] step by step."""

    def end(self) -> None:
        """Is called after the last token."""


class GenerationMixin(nn.Module):
    """The methods of `BitNet` that write text."""

    config: DecoderConfig
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any] | None
    hidden_states: Callable[..., Tensor]

    screened_head: Callable[..., ScreenedHead | None]

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
        prompt_lookup_num_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
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
            prompt_lookup_num_tokens: tokens at most that are guessed ahead, where the text repeats what it
                said before, and computed in one pass; default 10, and 0 guesses none. It changes nothing but
                the speed, and acts on a single row only.
            cache_dtype: of keys and values: torch.float32, the default; bfloat16, half the memory; or int8, a
                quarter. The smaller ones are faster in long texts, and round, so scores differ a little.
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
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            cache_dtype=cache_dtype,
        )
        steps = decode(self, prepare(self, input_ids, attention_mask, None, arguments))
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
        request = prepare(self, input_ids, attention_mask, cache, arguments)
        return decode(self, request)

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
        request = prepare(self, input_ids, None, cache, arguments)
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

    def __init__(self, model: GenerationMixin, tokenizer: Tokenizer, request: Request) -> None:
        self.prompt_ids: list[int] = request.input_ids[0].tolist()
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.prompt_seconds = 0.0
        self.decode_seconds = 0.0
        self._eos = request.settings.eos_token_ids
        self._stop = StopStrings(request.settings.stop_strings)
        self._decoder = IncrementalDecoder(tokenizer, self.prompt_ids)
        # Stop strings are cut out of the text here; the loop need not look for them as well.
        self._steps = decode(model, request, watch_stop_strings=False)

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
