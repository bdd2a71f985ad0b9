"""Vectors of texts: `EmbeddingMixin` gives `BitNet` its method `embed`."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..decoder.pooling import EmbeddingSettings, check_pooling, normalized, pool
from ..generation.prompts import pad_left
from .tokens import TextReader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..decoder.config import DecoderConfig

TOKENS_AT_A_TIME = 4096
"""Of a batch, padding included, so that activations stay small: 250 MB at the sizes of a 0.6B model, whatever
the number of rows. Products run at full speed with far fewer. A single longer text is read at once."""

WITHOUT_SETTINGS = EmbeddingSettings(pooling="mean")
"""For a model whose checkpoint says nothing about embeddings, as in sentence-transformers."""


class EmbeddingMixin(nn.Module):
    """The method of `BitNet` that makes vectors."""

    config: DecoderConfig
    tokenizer: Tokenizer | None
    embedding_settings: EmbeddingSettings | None
    hidden_states: Callable[..., Tensor]

    @torch.no_grad()  # not inference_mode: the vectors may be used in training
    def embed(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        progress: bool | None = None,
    ) -> Tensor:
        """Makes a vector of each text.

        What is not given (None) is as ``embedding_settings`` says: the checkpoint of an embedding model has
        them. For other models it is the mean of all tokens, of length 1.

        A text has the same vector, bit for bit, alone and in any batch.

        Args:
            texts: a text, or several.
            prompt_name: name of a prompt of ``embedding_settings`` that goes in front of each text: most
                embedding models want one for queries and none for documents.
            prompt: the prompt itself, in place of a name.
            pooling: "last" for the hidden state of the last token, "mean" for the mean of all, "cls" for that
                of the first.
            normalize: whether vectors get length 1, so that a dot product is their similarity.
            truncate_dim: keep only so many first numbers of each vector, before it gets length 1.
            max_length: texts of more tokens lose their end.
            batch_size: texts at a time, at most; long ones are fewer.
            progress: show a bar; None does so on a terminal.

        Returns:
            float32 [n, hidden_size or truncate_dim]; a single text is n = 1, no text n = 0.

        Raises:
            ValueError: an argument is wrong, a text makes no token, or the model has no tokenizer.

        Example:
            >>> model = bitnet_ops.from_pretrained("bitnet-embedding-0.6b")
            >>> query = model.embed("where does the cat sleep?", prompt_name="query")
            >>> query @ model.embed(["On the sofa.", "Revenue grew by 12 %."]).T
        """
        settings = self.embedding_settings or WITHOUT_SETTINGS
        pooling = settings.pooling if pooling is None else pooling
        check_pooling(pooling)
        size, context = self.config.hidden_size, self.config.max_position_embeddings
        if truncate_dim is not None and (type(truncate_dim) is not int or not 0 < truncate_dim <= size):
            raise ValueError(f"truncate_dim: expected an int in [1, {size}], got {truncate_dim!r}")
        if max_length is None:
            max_length = min(settings.max_length or context, context)
        if type(max_length) is not int or not 0 < max_length <= context:
            raise ValueError(f"max_length: expected an int in [1, {context}], got {max_length!r}")
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: expected a positive int, got {batch_size!r}")
        if self.training and self.config.dropout > 0:
            raise ValueError(
                "embed: expected the model in eval mode, because training mode drops activations at random, "
                "got training mode; call model.eval() first"
            )
        reader = TextReader(self.config, self.tokenizer, settings.eos_token_id, max_length)
        front = settings.prompt(prompt_name) if prompt is None else prompt
        rows = reader.read([texts] if isinstance(texts, str) else texts, front)
        device = next(self.parameters()).device
        vectors = torch.empty(len(rows), truncate_dim or size, device=device)
        with tqdm(
            total=len(rows),
            desc="embedding",
            unit="text",
            disable=None if progress is None else not progress,
            leave=False,
        ) as bar:
            for numbers in batches(rows, batch_size):
                ids, mask = pad_left([rows[number] for number in numbers], self.config.pad_token_id or 0)
                padding = (mask == 0).sum(1).to(device)
                ids, mask = ids.to(device), mask.to(device)
                hidden = self.hidden_states(ids, mask if bool(padding.any()) else None)
                pooled = pool(hidden, padding, pooling)[:, :truncate_dim]
                if settings.normalize if normalize is None else normalize:
                    pooled = normalized(pooled)
                vectors[torch.tensor(numbers, device=device)] = pooled
                bar.update(len(numbers))
        return vectors


def batches(rows: Sequence[array[int]], most: int) -> Iterator[list[int]]:
    """Numbers of rows of like lengths, the longest first, so that little is padded.

    Args:
        rows: token ids.
        most: rows of a batch.
    """
    waiting = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    begin = 0
    while begin < len(waiting):
        longest = len(rows[waiting[begin]])
        count = max(1, min(most, TOKENS_AT_A_TIME // longest))
        yield waiting[begin : begin + count]
        begin += count
