"""Stub until h-gtok lands."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


def read_tokenizer(metadata: dict[str, Any], file: Path, vocab_size: int) -> Tokenizer | None:
    return None
