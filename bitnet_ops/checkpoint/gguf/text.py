"""What a GGUF file says about text besides its tokenizer: special tokens, conversations, embeddings."""

from typing import Any

from ...decoder.config import DecoderConfig
from ...decoder.pooling import EmbeddingSettings
from ..errors import CheckpointError
from ..pooling import BITNET_EMBEDDING
from .header import GgufFile

TOKENS_KEY = "tokenizer.ggml.tokens"
MODEL_KEY = "tokenizer.ggml.model"
PRE_KEY = "tokenizer.ggml.pre"
TEMPLATE_KEY = "tokenizer.chat_template"
BOS_KEY = "tokenizer.ggml.bos_token_id"
PAD_KEY = "tokenizer.ggml.padding_token_id"
END_KEYS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
"""Ids that end a text, a turn or a message: texts stop at each of them."""

NO_TOKEN = 2**32 - 1
"""-1 as u32: some files have it for a token that there is not."""

ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
"""Tokens at which texts stop though no key names them, as in llama.cpp: many files name one of several."""

POOLINGS = {1: "mean", 2: "cls", 3: "last"}
"""Values of "pooling_type"."""

BITNET_ARCHITECTURES = ("bitnet-b1.58", "bitnet-25")
BITNET_PRE = "llama-bpe"
BITNET_END = "<|eot_id|>"
BITNET_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""microsoft/bitnet-b1.58-2B-4T-gguf has neither a pre-tokenizer nor a template. Its tokenizer is Llama 3's;
conversations look like ``User: Hello<|eot_id|>Assistant: ``, as its Hugging Face folder says."""


def token_ids(files: GgufFile, vocab_size: int) -> dict[str, Any]:
    """The fields of `DecoderConfig` that are ids: each that the file has a key for, and None for others.

    Raises:
        CheckpointError: one is no id below ``vocab_size``.
    """
    ends = [_token_id(files, key, vocab_size) for key in END_KEYS]
    distinct = tuple(dict.fromkeys(token for token in ends if token is not None))
    return {
        "bos_token_id": _token_id(files, BOS_KEY, vocab_size),
        "eos_token_id": distinct if len(distinct) > 1 else next(iter(distinct), None),
        "pad_token_id": _token_id(files, PAD_KEY, vocab_size),
    }


def generation_config(files: GgufFile, config: DecoderConfig) -> dict[str, Any]:
    """The defaults of generation: the ids of the configuration, and all at which a text stops."""
    tokens = _tokens(files)
    named = [token for token, text in enumerate(tokens[: config.vocab_size]) if text in ENDS]
    ends = list(dict.fromkeys((*config.eos_token_ids, *named)))
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": config.pad_token_id,
    }


def chat_template(files: GgufFile, architecture: str) -> str | None:
    """The Jinja template of a conversation, or None.

    Raises:
        CheckpointError: it is no text.
    """
    template = files.metadata.get(TEMPLATE_KEY)
    if template is None and architecture in BITNET_ARCHITECTURES and BITNET_END in _tokens(files):
        return BITNET_TEMPLATE
    if template is not None and not isinstance(template, str):
        raise CheckpointError.at(
            files.file, f"key {TEMPLATE_KEY!r}", "a string", f"{type(template).__name__}"
        )
    return template


def embedding_settings(files: GgufFile, architecture: str, config: DecoderConfig) -> EmbeddingSettings | None:
    """How vectors are made of texts, or None where the file does not say it.

    Files of BitNet-embedding, which are those with norms inside projections, say another pooling than that of
    their models (pooling.py), so that is not looked at there. Their tokenizers append the last token.

    Raises:
        CheckpointError: a kind of pooling that is not supported.
    """
    if config.projection_norms:
        return BITNET_EMBEDDING
    kind = files.metadata.get(f"{architecture}.pooling_type", 0)
    if type(kind) is not int or kind not in (0, *POOLINGS):
        raise CheckpointError.at(
            files.file,
            f"key '{architecture}.pooling_type'",
            f"0 (none), {', '.join(f'{number} ({name})' for number, name in POOLINGS.items())}",
            f"{kind!r:.200}",
        )
    return EmbeddingSettings(pooling=POOLINGS[kind]) if kind else None


def with_pre_tokenizer(files: GgufFile, architecture: str) -> dict[str, Any]:
    """The file's metadata with what `BITNET_ARCHITECTURES` leave out about the tokenizer."""
    absent = architecture in BITNET_ARCHITECTURES and files.metadata.get(MODEL_KEY) == "gpt2"
    return {PRE_KEY: BITNET_PRE, **files.metadata} if absent else files.metadata


def _tokens(files: GgufFile) -> list[Any]:
    tokens = files.metadata.get(TOKENS_KEY, [])
    if not isinstance(tokens, list):
        raise CheckpointError.at(files.file, f"key {TOKENS_KEY!r}", "an array", f"{type(tokens).__name__}")
    return tokens


def _token_id(files: GgufFile, key: str, vocab_size: int) -> int | None:
    token = files.metadata.get(key)
    if token is None or token in (-1, NO_TOKEN):
        return None
    if type(token) is not int or not 0 <= token < vocab_size:
        raise CheckpointError.at(
            files.file, f"key {key!r}", f"a token id in [0, {vocab_size})", f"{token!r:.200}"
        )
    return token
