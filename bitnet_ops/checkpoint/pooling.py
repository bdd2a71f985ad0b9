"""What a folder says about embeddings, in the files of sentence-transformers.

    modules.json                        [{"type": "...Transformer", "path": ""},
                                        {"type": "...Pooling", "path": "1_Pooling"},
                                        {"type": "...Normalize", "path": "2_Normalize"}]
    1_Pooling/config.json               {"pooling_mode": "lasttoken"}; older ones have a field for each,
                                        {"pooling_mode_lasttoken": true, ...}
    config_sentence_transformers.json   {"prompts": {"query": "Instruct: ..."}, "default_prompt_name": null}
    sentence_bert_config.json           {"max_seq_length": 512}
    tokenizer_config.json               {"model_max_length": 512}, where the file above does not say it

Without modules.json a folder says nothing. Without Normalize in it vectors keep their lengths.

Folders of ours have one field more in config_sentence_transformers.json, "append_eos_token_id": a token that
ends each text where the tokenizer does not put it there. In others tokenizer_config.json may ask for it with
"add_eos_token".

A GGUF file has ``<arch>.pooling_type`` and ``tokenizer.ggml.add_eos_token``. Files of BitNet-embedding say 1,
mean, there, because their converter found no modules.json; the models are trained on the last token
(arXiv:2606.25674), and `BITNET_EMBEDDING` is for them. The vector that their pages print comes from llama.cpp
and this very field, so it is a mean: ``embed(..., pooling="mean")``.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..decoder.pooling import EmbeddingSettings
from .errors import CheckpointError
from .files import read_json, read_json_value
from .text_files import TOKENIZER_CONFIG_FILE

__all__ = ["BITNET_EMBEDDING", "EmbeddingSettings", "load_embedding_settings", "save_embedding_settings"]

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
POOLING_FOLDER, NORMALIZE_FOLDER = "1_Pooling", "2_Normalize"

EOS_FIELD = "append_eos_token_id"

POOLING_MODES = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
"""Our names by those of the field "pooling_mode"."""

OLD_POOLING_FIELDS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Values of "pooling_mode" by the older fields, one of which is true."""

BITNET_EMBEDDING = EmbeddingSettings(
    pooling="last",
    normalize=True,
    prompts={
        "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query: "
    },
)
"""Of BitNet-embedding-0.6B and -270M, whose folders and files need not say it. Queries want one sentence in
front that says what for, documents nothing; for another task than search give its own as ``prompt``."""


def load_embedding_settings(
    folder: Path, vocab_size: int, tokenizer: Tokenizer | None
) -> EmbeddingSettings | None:
    """Reads the files of sentence-transformers.

    Args:
        folder: of the checkpoint.
        vocab_size: every id is below it.
        tokenizer: of the checkpoint.

    Returns:
        None where there is no modules.json.

    Raises:
        CheckpointError: a file is damaged, or asks for something that is not supported.
    """
    file = folder / MODULES_FILE
    if not file.exists():
        return None
    pooling, normalize = _read_modules(file)
    fields: dict[str, Any] = {"pooling": pooling, "normalize": normalize}
    file = folder / PROMPTS_FILE
    if file.exists():
        data = read_json(file)
        prompts = data.get("prompts")
        if isinstance(prompts, dict):  # null stands for no prompt of that name
            prompts = {name: "" if text is None else text for name, text in prompts.items()}
        fields |= {
            "prompts": {} if prompts is None else prompts,
            "default_prompt_name": data.get("default_prompt_name"),
            "eos_token_id": data.get(EOS_FIELD),
        }
    if fields.get("eos_token_id") is None:
        fields["eos_token_id"] = appended_eos(folder, tokenizer)
    length_file = folder / LENGTH_FILE
    if length_file.exists():
        fields["max_length"] = read_json(length_file).get("max_seq_length")
    if fields.get("max_length") is None:
        fields["max_length"] = _tokenizer_length(folder)
    try:
        settings = EmbeddingSettings(**fields)
    except ValueError as error:
        raise CheckpointError(f"{length_file if 'max_length' in str(error) else file}: {error}") from None
    if settings.eos_token_id is not None and settings.eos_token_id >= vocab_size:
        raise CheckpointError.at(
            file, EOS_FIELD, f"a token id below {vocab_size}", f"{settings.eos_token_id}"
        )
    return settings


def appended_eos(folder: Path, tokenizer: Tokenizer | None) -> int | None:
    """The token that tokenizer_config.json wants behind each text ("add_eos_token"), or None.

    Raises:
        CheckpointError: the file is damaged, or the token is not in the tokenizer.
    """
    file = folder / TOKENIZER_CONFIG_FILE
    if tokenizer is None or not file.exists():
        return None
    data = read_json(file)
    if data.get("add_eos_token") is not True:
        return None
    token = data.get("eos_token")
    if isinstance(token, dict):  # an AddedToken
        token = token.get("content")
    found: int | None = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise CheckpointError.at(
            file, "eos_token", "a token of tokenizer.json, because of add_eos_token", f"{token!r:.200}"
        )
    return found


def _tokenizer_length(folder: Path) -> int | None:
    """The longest text as tokenizer_config.json has it, where it is no stand-in for "any"."""
    file = folder / TOKENIZER_CONFIG_FILE
    length = read_json(file).get("model_max_length") if file.exists() else None
    return length if type(length) is int and 0 < length < 2**31 else None


def save_embedding_settings(folder: Path, settings: EmbeddingSettings | None, size: int) -> None:
    """Writes the files; `load_embedding_settings` reads them back equal.

    Args:
        folder: where they go, a new one.
        settings: None writes nothing.
        size: of a vector.
    """
    if settings is None:
        return
    kind = "sentence_transformers.models."
    modules = [("Transformer", ""), ("Pooling", POOLING_FOLDER)]
    if settings.normalize:
        modules.append(("Normalize", NORMALIZE_FOLDER))
    _write(
        folder / MODULES_FILE,
        [
            {"idx": index, "name": str(index), "path": path, "type": kind + name}
            for index, (name, path) in enumerate(modules)
        ],
    )
    modes = {ours: theirs for theirs, ours in POOLING_MODES.items()}
    (folder / POOLING_FOLDER).mkdir()
    _write(
        folder / POOLING_FOLDER / "config.json",
        {
            "word_embedding_dimension": size,
            **{name: modes[settings.pooling] == mode for name, mode in OLD_POOLING_FIELDS.items()},
            "include_prompt": True,
        },
    )
    prompts: dict[str, Any] = {
        "prompts": dict(settings.prompts),
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": "cosine",
    }
    if settings.eos_token_id is not None:
        prompts[EOS_FIELD] = settings.eos_token_id
    _write(folder / PROMPTS_FILE, prompts)
    _write(folder / LENGTH_FILE, {"max_seq_length": settings.max_length})


def _read_modules(file: Path) -> tuple[str, bool]:
    """The pooling, and whether vectors are normalised."""
    modules = read_json_value(file)
    expected = "a list of Transformer, Pooling and perhaps Normalize"
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError.at(file, "file", expected, f"{modules!r:.200}")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError.at(file, "types of the modules", expected, f"{kinds!r:.200}")
    path = modules[1].get("path")
    # A plain name only: it must not lead out of the folder.
    if not isinstance(path, str) or path.startswith(".") or any(letter in path for letter in "/\\:\0"):
        raise CheckpointError.at(file, "path of Pooling", "the plain name of a folder", f"{path!r:.200}")
    return _read_pooling(file.parent / path / "config.json"), len(modules) == 3


def _read_pooling(file: Path) -> str:
    data = read_json(file)
    if data.get("include_prompt", True) is not True:
        raise CheckpointError.at(
            file,
            "include_prompt",
            "true (tokens of the prompt count, too)",
            f"{data['include_prompt']!r:.200}",
        )
    mode = data.get("pooling_mode")
    if mode is None:
        active = [name for field, name in OLD_POOLING_FIELDS.items() if data.get(field) is True]
        mode = active[0] if len(active) == 1 else active or "mean"
    if not isinstance(mode, str) or mode not in POOLING_MODES:
        known = " or ".join(map(repr, POOLING_MODES))
        raise CheckpointError.at(file, "pooling_mode", known, f"{mode!r:.200}")
    return POOLING_MODES[mode]


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
