"""A `BitNet` for EleutherAI's lm-evaluation-harness, which is an optional dependency (``bitnet_ops[eval]``).

    import lm_eval
    from bitnet_ops.evaluation.lm_eval import BitNetLM

    lm_eval.simple_evaluate(BitNetLM("bitnet-b1.58-2B-4T", batch_size=8), tasks=["arc_easy"])

Importing this module also registers the name "bitnet_ops", for ``simple_evaluate(model="bitnet_ops",
model_args={"pretrained": folder})``. Models of transformers go through lm-eval's own ``HFLM``, accelerated
(`bitnet_ops.integrations.transformers`) or not.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..generation.chat import ChatSession
from ..generation.prompts import encode_prompt, need_tokenizer, pad_left
from ..model import BitNet, from_pretrained
from .perplexity import token_losses

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts of a request or None, and the ids of context and continuation."""

AUTO_BATCH_SIZE = 8
"""What "auto" stands for: on a CPU the products of a few hundred tokens are as fast as those of thousands."""

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Arguments of a task's ``generation_kwargs`` that `BitNet.generate` knows, too."""


@register_model("bitnet_ops")
class BitNetLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Answers lm-eval's three kinds of requests. Results do not depend on the batch size, to the last bit."""

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | BitNet,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
    ) -> None:
        """Takes a model, or loads one.

        Args:
            pretrained: a model with a tokenizer, or the folder of one.
            batch_size: requests that run together; "auto" is `AUTO_BATCH_SIZE`.
            max_batch_size: an upper limit of it.
            max_length: tokens that the model sees at most; default ``config.max_position_embeddings``.
                Contexts that are too long lose their beginning.
            max_gen_toks: length of an answer where the task does not say it.
            device: "cpu" or None.

        Raises:
            ValueError: an argument is out of range, or the model has no tokenizer or neither BOS nor EOS.
        """
        super().__init__()
        if device not in (None, "cpu"):
            raise ValueError(f"device: expected 'cpu', got {device!r}")
        self.model = pretrained if isinstance(pretrained, BitNet) else from_pretrained(pretrained)
        config = self.model.config
        self._tokenizer = need_tokenizer(self.model.tokenizer, "BitNetLM")
        if config.bos_token_id is None and not config.eos_token_ids:
            raise ValueError("BitNetLM: expected a model with a BOS or EOS token, got one with neither")
        size = AUTO_BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self.batch_size = min(size, max_batch_size or size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        most = config.max_position_embeddings
        self.max_length = most if max_length is None else int(max_length)
        if not 2 <= self.max_length <= most:
            raise ValueError(f"max_length: expected 2 to {most} tokens, got {max_length}")
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        config = self.model.config
        return next(token for token in (*config.eos_token_ids, config.bos_token_id) if token is not None)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without context is predicted from."""
        bos = self.model.config.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; by default with what the tokenizer puts around a text that does not begin so already."""
        if add_special_tokens is None:
            prefix = self._tokenizer.id_to_token(self.prefix_token_id)
            add_special_tokens = prefix is None or not string.startswith(prefix)
        if not string:
            return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)
        return encode_prompt(
            self.model.config, self._tokenizer, string, add_special_tokens=add_special_tokens
        )

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        # Requests that differ in their last token only, as in multiple choice by letters, are one pass.
        waiting: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            waiting.setdefault(self._inputs(context, continuation), []).append(index)
        rows = sorted(waiting, key=len, reverse=True)  # what may fail for want of memory fails at once
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                input_ids, mask = pad_left(batch, 0)
                with torch.inference_mode():
                    hidden = self.model.hidden_states(input_ids, None if bool(mask.all()) else mask)
                    for row, inputs in enumerate(batch):
                        for index in waiting[inputs]:
                            text, _, continuation = requests[index]
                            targets = torch.tensor(continuation)
                            losses, best = token_losses(
                                self.model, hidden[row, -len(continuation) :], targets
                            )
                            answers[index] = -losses.sum().item(), torch.equal(best, targets)
                            if text is not None:
                                self.cache_hook.add_partial("loglikelihood", text, answers[index])
                            bar.update()
        return [answers[index] for index in range(len(requests))]

    def _inputs(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads to predict the continuation; the beginning gives way where it is too long."""
        if not 1 <= len(continuation) <= self.max_length or not context:
            raise ValueError(
                f"loglikelihood: expected a context and a continuation of 1 to {self.max_length} tokens, "
                f"got {len(context)} and {len(continuation)}"
            )
        return tuple((context + continuation)[-self.max_length - 1 : -1])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts behind the prefix token, in windows that do not overlap."""
        windows: list[TokenRequest] = []
        owners = []
        for owner, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (likelihood, _) in zip(owners, answers, strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until one of the task's stop strings, which is cut off."""
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: -len(arguments[0]),
            group_fn=lambda arguments: arguments[1],
            group_by="gen_kwargs",
        )
        texts = []
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for batch in collator.get_batched(n=self.batch_size):
                for (context, options), text in zip(batch, self._continue(batch), strict=True):
                    texts.append(text)
                    self.cache_hook.add_partial("generate_until", (context, options), text)
                    bar.update()
        return list(collator.get_original(texts))

    def _continue(self, batch: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """The continuations of contexts with the same options."""
        options = dict(normalize_gen_kwargs(batch[0][1], self.max_gen_toks))
        stop = [text for text in options.pop("until", []) if text]
        most = options.pop("max_gen_toks")
        if not 1 <= most < self.max_length:
            raise ValueError(
                f"max_gen_toks: expected 1 to {self.max_length - 1}, so that a context has room, got {most}"
            )
        if unknown := sorted(options.keys() - set(SAMPLING)):
            raise ValueError(f"generation_kwargs: expected some of {', '.join(SAMPLING)}, got {unknown[0]!r}")
        if not options["do_sample"]:
            options.pop("temperature", None)  # 0.0, which stands for greedy
        prompts = [self.tok_encode(context)[most - self.max_length :] for context, _ in batch]
        input_ids, mask = pad_left([prompt or [self.prefix_token_id] for prompt in prompts], 0)
        ids = self.model.generate(
            input_ids, attention_mask=mask, max_new_tokens=most, stop_strings=stop or None, **options
        )
        texts = []
        for row in ids[:, input_ids.shape[1] :].tolist():
            ends = [row.index(token) for token in self.model.config.eos_token_ids if token in row]
            text = self._tokenizer.decode(row[: min(ends, default=len(row))])
            texts.append(postprocess_generated_text(text, stop, think_end_token=None))
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of tokenised requests apart."""
        return "bitnet_ops-" + hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template, or None where none is asked for."""
        return ChatSession(self.model).template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without the generation prompt it ends inside the last turn, to go on."""
        text = ChatSession(self.model).render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]
