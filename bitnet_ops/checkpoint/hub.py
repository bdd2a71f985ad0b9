"""Models from the Hugging Face hub, through huggingface_hub: its cache, its progress bars, its settings.

``HF_HOME`` moves the cache, ``HF_HUB_OFFLINE=1`` keeps everything local, ``HF_TOKEN`` opens gated models.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from .errors import CheckpointError
from .location import HubName

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    # of embedding models, as sentence-transformers has them
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
"""What a model needs of a repository; other formats of the same weights stay where they are."""

BY_HAND = ("*.safetensors", "*.json", "*.jinja", "1_Pooling/*")
"""The same in fewer words, for people."""


def fetch(name: HubName) -> Path:
    """The folder or GGUF file in the local cache, with what is missing there downloaded first.

    Says on stderr what was taken, with its revision.

    Raises:
        CheckpointError: it is not there, or the hub cannot be reached and the cache has not got it.
    """
    # One file comes this way too: hf_hub_download tries for half a minute where there is no network.
    wanted = [name.file] if name.file is not None else [*WEIGHT_FILES, *OTHER_FILES]
    try:
        folder = Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted))
    except GatedRepoError:
        raise CheckpointError(
            f"{name.repo}: expected access to this gated model, got none: accept its terms at "
            f"{_page(name)} and log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name.repo}: expected a model on the hub, got no such repository (or a private one: log in "
            "with `hf auth login`, or set HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name.repo}: expected a revision of it, got {name.revision!r}") from None
    except Exception as error:  # also the web client's, whose types depend on the version of huggingface_hub
        raise _unreachable(name, error) from None
    path = folder if name.file is None else folder / name.file
    if not path.exists():
        raise CheckpointError(f"{name.repo}: expected a file of it, got {name.file!r}; {_choice(name)}")
    if name.file is None and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{name.repo}: expected model.safetensors or several files with model.safetensors.index.json, "
            f"got none; {_choice(name)}"
        )
    print(f"{name.repo}: revision {folder.name}, {path}", file=sys.stderr)
    return path


def _choice(name: HubName) -> str:
    """The GGUF files of a repository, to choose from."""
    try:
        files = HfApi().list_repo_files(name.repo, revision=name.revision)
    except Exception:  # this is about another error already
        files = []
    names = [f"{name.repo}:{file}" for file in files if file.endswith(".gguf")]
    return f"its GGUF files are {', '.join(names)}" if names else f"see {_page(name)}"


def _unreachable(name: HubName, error: Exception) -> CheckpointError:
    """The error where neither hub nor cache has a model: what to fetch by hand, and where to put it."""
    folder = name.repo.rpartition("/")[2]
    what = name.file or " ".join(f"'{pattern}'" for pattern in BY_HAND)
    files = name.file or f"{', '.join(BY_HAND)} (those that there are)"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    revision = f" --revision {name.revision}" if name.revision else ""
    return CheckpointError(
        f"{name.repo}: expected it in the cache {constants.HF_HUB_CACHE} or a reachable hub, got neither "
        f"({reason}). By hand: run `hf download {name.repo} {what}{revision} --local-dir {folder}` where "
        f"there is a network, or fetch {files} from {_page(name)} into a folder {folder!r}; then pass "
        f"{f'{folder}/{name.file}' if name.file else folder!r}"
    )


def _page(name: HubName) -> str:
    return f"{constants.ENDPOINT}/{name.repo}/tree/{name.revision or 'main'}"
