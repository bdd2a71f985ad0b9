"""The decoding loop: from a prompt to tokens, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..decoder.cache import KVCache
from ..decoder.head import ScreenedHead
from ..layers.linear import BitLinearQAT
from .drafts import PromptLookup
from .prompts import check_attention_mask, check_input_ids, need_tokenizer
from .sampling import Sampler
from .settings import DEFAULT_NEW_TOKENS, GenerationArguments, GenerationSettings
from .text_stream import IncrementalDecoder, StopStrings

if TYPE_CHECKING:
    from .mixin import GenerationMixin

PREFILL_TOKENS = 256
"""A longer prompt is read in pieces of so many tokens, all rows together, so that activations stay small (at
2B4T's sizes 50 MB). Enough for the products to run at full speed, and the text is the same for any size."""


@dataclass(frozen=True)
class Request:
    """What one run of the loop needs, all of it checked."""

    input_ids: Tensor
    attention_mask: Tensor | None
    cache: KVCache
    max_new_tokens: int
    settings: GenerationSettings


def prepare(
    model: GenerationMixin,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    arguments: GenerationArguments,
) -> Request:
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
    if cache is None:
        needed = prompt_length + max_new_tokens - 1  # the last token is never fed back
        dtype = settings.cache_dtype or torch.float32
        cache = KVCache(model.config, batch, needed, dtype=dtype, device=model.device)
    else:
        if settings.cache_dtype not in (None, cache.dtype):
            raise ValueError(f"cache_dtype: expected {cache.dtype}, as cache has, got {settings.cache_dtype}")
        if cache.batch_size != batch:
            raise ValueError(f"cache: expected {batch} rows, as input_ids has, got {cache.batch_size}")
        if cache.length >= prompt_length:
            raise ValueError(
                f"cache: expected fewer tokens than the {prompt_length} of input_ids, got {cache.length}"
            )
        cache.reserve(prompt_length)  # it grows with the text, which may end long before max_new_tokens
    return Request(input_ids, attention_mask, cache, max_new_tokens, settings)


def decode(model: GenerationMixin, request: Request, watch_stop_strings: bool = True) -> Iterator[Tensor]:
    """The loop: yields int64 [B] per step, until every row has ended.

    Whenever it does, the cache holds all tokens but the ones it yields. No mode of PyTorch (no_grad) is on
    then: a generator that is alive when the program ends would leave it after PyTorch is gone.
    """
    settings, cache, input_ids = request.settings, request.cache, request.input_ids
    batch, vocab_size = input_ids.shape[0], model.config.vocab_size
    sampler = Sampler(settings.sampling, batch, settings.seed)
    sampler.observe(input_ids, vocab_size, request.attention_mask)
    head = model.screened_head() if sampler.best_are_enough(vocab_size) else None
    lookup = _prompt_lookup(model, request)
    eos = frozenset(settings.eos_token_ids)
    watchers = _watchers(model, request) if watch_stop_strings and settings.stop_strings else []
    running = [True] * batch  # in Python: each operator of PyTorch takes 20 us or more here

    new_ids, mask = _read_prompt(model, request)
    drafting = False  # not in the pass that ends the prompt
    left = request.max_new_tokens
    while left > 0:
        draft = lookup.draft(left - 1) if lookup is not None and drafting else []
        begin = time.perf_counter()
        held = cache.length + new_ids.shape[1]
        # Not in inference mode, whose tensors could not be written to outside of it.
        cache.reserve(held + len(draft))
        chosen = _choose(model, cache, sampler, head, new_ids, mask, draft)
        if lookup is not None:
            seconds = time.perf_counter() - begin if drafting else None
            lookup.note(len(draft), chosen[0].tolist(), seconds)
        drafting = True
        left -= chosen.shape[1]
        for count, tokens in enumerate(chosen.unbind(1)):
            cache.length = held + count  # what was drafted in vain is forgotten
            # Without a padding token no row can end before the others.
            if settings.pad_token_id is not None and not all(running):
                still = torch.tensor(running, device=tokens.device)
                tokens = torch.where(still, tokens, settings.pad_token_id)
            for row, token in enumerate(tokens.tolist()):
                running[row] = running[row] and token not in eos
                if watchers and running[row]:
                    decoder, stop = watchers[row]
                    stop.push(decoder.push(token))
                    running[row] = stop.found is None
            yield tokens
            if not any(running):
                return
        new_ids, mask = tokens.unsqueeze(1), None  # the cache remembers what is padding


def _read_prompt(model: GenerationMixin, request: Request) -> tuple[Tensor, Tensor | None]:
    """Puts the prompt into the cache, all but its last piece, which is returned with its mask."""
    ids, mask, cache = request.input_ids[:, request.cache.length :], request.attention_mask, request.cache
    if mask is not None:
        mask = mask[:, cache.length :]
    piece = max(PREFILL_TOKENS // len(ids), 1)
    while ids.shape[1] > piece:
        with torch.inference_mode():
            first = None if mask is None else mask[:, :piece]
            model.hidden_states(ids[:, :piece], attention_mask=first, cache=cache)
        ids = ids[:, piece:]
        mask = None if mask is None else mask[:, piece:]
    return ids, mask


@torch.no_grad()  # not inference_mode as a whole: the tokens that come out may be used in training
def _choose(
    model: GenerationMixin,
    cache: KVCache,
    sampler: Sampler,
    head: ScreenedHead | None,
    ids: Tensor,
    mask: Tensor | None,
    draft: list[int],
) -> Tensor:
    """Runs the model over new tokens with a draft behind them, and chooses what follows them, int64 [B, n].

    That is one token a row, or, of a single row, one more than are right of the draft.
    """
    if draft:
        ids = torch.cat((ids, torch.tensor([draft], device=ids.device)), dim=1)
    positions = 1 + len(draft)
    with torch.inference_mode():  # spares each operator a call into PyTorch's autograd, 5 us apiece
        if head is None:
            scores = model(ids, attention_mask=mask, cache=cache, logits_to_keep=positions)
        else:
            hidden = model.hidden_states(ids, attention_mask=mask, cache=cache)[:, -positions:]
    if not draft:
        tokens = sampler(scores[:, -1]) if head is None else sampler.from_head(head, hidden[:, -1])
        return tokens.unsqueeze(1)
    if head is None:
        return sampler.follow(scores[0], draft).unsqueeze(0)
    return sampler.follow_from_head(head, hidden[0], draft).unsqueeze(0)


def _prompt_lookup(model: GenerationMixin, request: Request) -> PromptLookup | None:
    """What makes drafts, where they change nothing but the speed."""
    most = request.settings.prompt_lookup_num_tokens
    if most == 0 or len(request.input_ids) > 1 or not _passes_agree(model):
        return None
    ids = request.input_ids[0]
    if request.attention_mask is not None:
        ids = ids[request.attention_mask[0]]
    return PromptLookup(ids.tolist(), most)


def _passes_agree(model: GenerationMixin) -> bool:
    """Whether a token's scores are the same bits alone and among others, as this package's operators see to.

    BLAS makes no such promise, so not where it computes more than the exact sums of `BitLinearQAT`: in
    training mode, on another device, and with plain linear layers.
    """
    if model.training or model.device.type != "cpu":
        return False
    return not any(
        isinstance(module, nn.Linear)
        and not isinstance(module, BitLinearQAT)
        and module.weight is not model.head_weight
        for module in model.modules()
    )


def _watchers(model: GenerationMixin, request: Request) -> list[tuple[IncrementalDecoder, StopStrings]]:
    tokenizer = need_tokenizer(model.tokenizer, "stop_strings")
    mask = request.attention_mask
    watchers = []
    for row, ids in enumerate(request.input_ids):
        context = ids if mask is None else ids[mask[row].bool()]
        decoder = IncrementalDecoder(tokenizer, context.tolist())
        watchers.append((decoder, StopStrings(request.settings.stop_strings)))
    return watchers
