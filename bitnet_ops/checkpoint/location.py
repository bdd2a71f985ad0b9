"""What users name a model by: a folder, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from .errors import CheckpointError
from .gguf.open import is_gguf


class HubName(NamedTuple):
    """``owner/repo``, ``owner/repo@revision``, ``owner/repo:file.gguf`` or ``owner/repo@revision:file.gguf``.

    Attributes:
        repo: ``owner/repo``.
        revision: a branch, tag or commit; None for the newest of the main branch.
        file: a GGUF file in the repository, or None for its safetensors files.
    """

    repo: str
    revision: str | None
    file: str | None


_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?(?::([\w./ -]+\.gguf))?")


def locate(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or the .gguf file that ``model`` names, fetched from the hub where it is a name there.

    What exists on disk is taken from there. Only a string of the form of `HubName` goes to the hub, and not
    even that where its first part is a local folder: then a path was meant.

    Args:
        model: a folder, a .gguf file, or a hub name.
        revision: of a hub name; as ``@revision`` in it.

    Raises:
        CheckpointError: there is no such thing; the text says how to get it.
    """
    path = Path(model)
    name = hub_name(model) if isinstance(model, str) else None
    if path.exists() or name is None:
        if revision is not None:
            raise CheckpointError(
                f"revision: expected None, because only names on the hub have revisions and {str(model)!r} "
                f"is none, got {revision!r}"
            )
        return _local(path)
    if revision is not None:
        if name.revision not in (None, revision):
            raise CheckpointError(f"revision: expected that of {model!r}, got {revision!r}")
        name = name._replace(revision=revision)
    from .hub import fetch  # imports a web client

    return fetch(name)


def hub_name(text: str) -> HubName | None:
    """The parts of a name on the hub; None where ``text`` has another form or names a place on disk."""
    match = _HUB_NAME.fullmatch(text)
    if match is None or Path(text.partition("/")[0]).is_dir():
        return None
    name = HubName(*match.groups())
    return None if name.repo.endswith(".gguf") else name  # a path without a colon


def _local(path: Path) -> Path:
    if path.is_dir() or is_gguf(path):
        return path
    raise CheckpointError(
        f"model: expected a folder with a checkpoint, a .gguf file, or a name on the Hugging Face "
        f"hub such as 'microsoft/bitnet-b1.58-2B-4T' or 'owner/repo:file.gguf', got {str(path)!r}, which "
        f"{'is another file' if path.exists() else 'does not exist'}"
    )
