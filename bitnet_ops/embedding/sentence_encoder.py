"""`SentenceEncoder`: an embedding model with the methods of ``sentence_transformers.SentenceTransformer``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..decoder.pooling import EmbeddingSettings, normalized
from .mixin import WITHOUT_SETTINGS

if TYPE_CHECKING:
    from .mixin import EmbeddingMixin

DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompt of `SentenceEncoder.encode_document`, the first that the model has."""


class SentenceEncoder:
    """Makes vectors of texts as ``sentence_transformers.SentenceTransformer`` does.

    Arguments, their defaults and what comes back are those of sentence-transformers, so that programs need
    no change. `BitNet.embed` is the same in fewer words.

    Args:
        model: any model with a tokenizer.
        prompts: texts that go in front of others, by name; None for those of the model.
        default_prompt_name: the one that `encode` uses where none is given; None for the model's.
        truncate_dim: keep only so many first numbers of each vector.

    Attributes:
        model: as given.
        prompts: texts by name; may be changed.
        default_prompt_name: a name, or None.
        truncate_dim: a size, or None.

    Example:
        >>> encoder = bitnet_ops.SentenceEncoder(bitnet_ops.from_pretrained("bitnet-embedding-0.6b"))
        >>> documents = encoder.encode(["The cat sleeps on the sofa.", "Revenue grew by 12 %."])
        >>> encoder.similarity(encoder.encode_query("where does the cat sleep?"), documents)
    """

    def __init__(
        self,
        model: EmbeddingMixin,
        *,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        settings = model.embedding_settings or WITHOUT_SETTINGS
        self.model = model
        self.prompts = dict(settings.prompts if prompts is None else prompts)
        self.default_prompt_name = default_prompt_name
        if default_prompt_name is None and settings.default_prompt_name in self.prompts:
            self.default_prompt_name = settings.default_prompt_name
        self.truncate_dim = truncate_dim
        self._settings()  # checks them
        self._max_seq_length: int | None = None

    @property
    def max_seq_length(self) -> int:
        """Longer texts lose their end; in tokens. May be set."""
        context = self.model.config.max_position_embeddings
        settings = self.model.embedding_settings
        stated = self._max_seq_length or (settings.max_length if settings is not None else None)
        return min(stated or context, context)

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if type(value) is not int or value < 1:
            raise ValueError(f"max_seq_length: expected a positive int, got {value!r}")
        self._max_seq_length = value

    @property
    def device(self) -> torch.device:
        """Where the model's tensors live."""
        return next(self.model.parameters()).device

    def get_sentence_embedding_dimension(self) -> int:
        """The size of a vector."""
        return self.truncate_dim or self.model.config.hidden_size

    def get_embedding_dimension(self) -> int:
        """The size of a vector, by its newer name."""
        return self.get_sentence_embedding_dimension()

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Makes a vector of each text.

        Args:
            sentences: a text, or several (a list, a tuple, an array of texts).
            prompt_name: name of a prompt that goes in front of each text.
            prompt: the prompt itself; wins over a name.
            batch_size: texts at a time, at most.
            show_progress_bar: None shows one on a terminal.
            output_value: "sentence_embedding"; no other.
            precision: "float32"; no other.
            convert_to_numpy: give a numpy.ndarray; a tensor where NumPy is not installed.
            convert_to_tensor: give a tensor; wins over ``convert_to_numpy``.
            device: None, or that of the model.
            normalize_embeddings: give vectors length 1, whether the model does so by itself or not.
            truncate_dim: keep only so many first numbers of each vector.

        Returns:
            float32 [n, d], or [d] for a single text; with neither conversion a list of tensors [d].

        Raises:
            ValueError: an argument is wrong; see `BitNet.embed`.
        """
        for name, value, only in (
            ("output_value", output_value, "sentence_embedding"),
            ("precision", precision, "float32"),
        ):
            if value != only:
                raise ValueError(f"{name}: expected {only!r}, got {value!r:.200}")
        if device is not None and torch.device(device) != self.device:
            raise ValueError(f"device: expected None or {self.device}, as the model has, got {device!s:.200}")
        front = self._settings().prompt(prompt_name) if prompt is None else prompt
        single = isinstance(sentences, str)
        vectors = self.model.embed(
            [sentences] if isinstance(sentences, str) else list(sentences),
            prompt=front,
            batch_size=batch_size,
            max_length=self.max_seq_length,
            progress=show_progress_bar,
        )
        kept = self.truncate_dim if truncate_dim is None else truncate_dim
        if kept is not None:
            size = vectors.shape[1]
            if type(kept) is not int or not 0 < kept <= size:
                raise ValueError(f"truncate_dim: expected an int in [1, {size}], got {kept!r:.200}")
            vectors = vectors[:, :kept].contiguous()
        if normalize_embeddings:
            vectors = normalized(vectors)
        if convert_to_tensor or (convert_to_numpy and importlib.util.find_spec("numpy") is None):
            return vectors[0] if single else vectors
        if convert_to_numpy:
            return vectors[0].cpu().numpy() if single else vectors.cpu().numpy()
        return vectors[0] if single else list(vectors)

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt "query", where the model has one and no other is asked for.

        Args:
            sentences: as for `encode`.
            **options: likewise.
        """
        return self.encode(sentences, **self._with_prompt(("query",), options))

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt "document", "passage" or "corpus", likewise.

        Args:
            sentences: as for `encode`.
            **options: likewise.
        """
        return self.encode(sentences, **self._with_prompt(DOCUMENT_PROMPTS, options))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The cosine of the angle between any two vectors.

        Args:
            embeddings1: [n, d] or [d]: tensors, arrays, or lists of them.
            embeddings2: [m, d] or [d].

        Returns:
            float32 [n, m].
        """
        return normalized(_matrix(embeddings1)) @ normalized(_matrix(embeddings2)).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The cosine of the angle between the first vectors, the second vectors, and so on.

        Args:
            embeddings1: [n, d], as for `similarity`.
            embeddings2: [n, d].

        Returns:
            float32 [n].
        """
        return (normalized(_matrix(embeddings1)) * normalized(_matrix(embeddings2))).sum(-1)

    def _settings(self) -> EmbeddingSettings:
        settings = self.model.embedding_settings or WITHOUT_SETTINGS
        return replace(settings, prompts=self.prompts, default_prompt_name=self.default_prompt_name)

    def _with_prompt(self, names: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        known = [name for name in names if name in self.prompts]
        if not known or options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        return {**options, "prompt_name": known[0]}


def _matrix(vectors: Any) -> Tensor:
    """float32 [n, d] of what users have."""
    if isinstance(vectors, (list, tuple)):
        vectors = torch.stack([torch.as_tensor(vector) for vector in vectors])
    matrix = torch.as_tensor(vectors).float()
    return matrix.unsqueeze(0) if matrix.dim() == 1 else matrix
