"""A checkpoint that is open: what there is to know before its weights are read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer

from ..decoder.config import DecoderConfig
from ..decoder.pooling import EmbeddingSettings
from .tensor_source import TensorSource
from .weights import WeightReader


@dataclass
class OpenCheckpoint(AbstractContextManager["OpenCheckpoint"]):
    """What a folder or file says about a model; its weights are read inside a ``with`` block.

    Attributes:
        settings_file: names the place of settings in errors.
        config: as the settings have it; `WeightReader.complete` has yet to see the weights.
        files: where the tensors lie.
        weights: how they are stored.
        tokenizer: or None.
        chat_template: or None.
        generation_config: defaults of generation.
        embedding_settings: how vectors are made of texts, or None.
        certified_table: the name of the head's table where the files hold a copy for `ScreenedHead` that
            belongs to it (`head_copy.is_bound`); then the table is known to be finite.
    """

    settings_file: Path
    config: DecoderConfig
    files: TensorSource
    weights: WeightReader
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    embedding_settings: EmbeddingSettings | None = None
    certified_table: str | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.__exit__(kind, error, trace)
