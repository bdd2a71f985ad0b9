"""What users name a model by, and where it lies on disk."""

import os
from pathlib import Path

from .errors import CheckpointError
from .gguf.open import is_gguf


def locate(model: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; an error that says how to get one where it is not there."""
    path = Path(model)
    if not path.is_dir() and not is_gguf(path):
        raise CheckpointError(
            f"folder: expected a local folder with a checkpoint, got {os.fspath(model)!r}, which "
            f"{'is a file' if path.exists() else 'does not exist'}. bitnet_ops downloads nothing by itself; "
            "to get a model from the Hugging Face hub run, for example, "
            "`hf download microsoft/bitnet-b1.58-2B-4T --local-dir bitnet-2b4t` and pass 'bitnet-2b4t'"
        )
    return path
