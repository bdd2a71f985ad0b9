"""Byte-level BPE, which GGUF calls "gpt2": the tokenizers of GPT-2, Llama 3, Falcon 3, Qwen 2.

Each byte of a text is one of 256 printable characters (a space is "Ġ"). Normal tokens are spelled in these;
added tokens are spelled as they appear in text.
"""

from typing import Any

from tokenizers import Tokenizer, decoders, models

from .pre_tokenizers import BY_NAME, PreTokenizer, recognize
from .token_list import TokenList, TokenType

UNNAMED_LLAMA3 = ("bitnet-b1.58", "bitnet-25")
"""Architectures whose official file, that of BitNet 2B4T, has no ``tokenizer.ggml.pre``; it is Llama 3's."""


def read_byte_level(tokens: TokenList) -> tuple[Tokenizer, PreTokenizer]:
    """Builds the tokenizer, yet without added tokens.

    Raises:
        CheckpointError: the file names an unknown pre-tokenizer, or none, or its merges do not fit.
    """
    kind = _pre_tokenizer(tokens)
    vocabulary = {
        token: index
        for index, (token, type_) in enumerate(zip(tokens.tokens, tokens.types, strict=True))
        if type_ != TokenType.UNUSED
    }
    merges = tokens.merges(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind.whole_words))
    kind.set(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind


def _pre_tokenizer(tokens: TokenList) -> PreTokenizer:
    name = tokens.metadata.get("tokenizer.ggml.pre")
    architecture = tokens.metadata.get("general.architecture")
    if name is None and architecture in UNNAMED_LLAMA3:
        name = "llama-bpe"
    if not isinstance(name, str) or name not in BY_NAME:
        # llama.cpp takes an expression of its own for "default" and says that quality will suffer.
        raise tokens.error(
            "pre",
            "the name of a pre-tokenizer (" + ", ".join(BY_NAME) + ")",
            "nothing" if name is None else f"{name!r:.200}",
        )
    return BY_NAME[name]


def byte_level_metadata(data: dict[str, Any]) -> dict[str, Any]:
    """What GGUF says of a byte-level tokenizer beside its list of tokens.

    Args:
        data: tokenizer.json.

    Raises:
        ValueError: GGUF cannot express it.
    """
    kind = recognize(data)
    if kind is None:
        raise ValueError(
            "tokenizer: expected a normalizer and pre-tokenizer that GGUF has a name for "
            f"({', '.join(kind_name for kind_name in BY_NAME)}), got {data['normalizer']!r:.100} and "
            f"{data['pre_tokenizer']!r:.300} with ignore_merges = {data['model'].get('ignore_merges')}"
        )
    merges = data["model"]["merges"]
    for left, right in merges:
        if " " in left or " " in right:
            raise ValueError(
                f"tokenizer: expected merges of tokens without a space, got {left!r:.100} and {right!r:.100}"
            )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind.names[0],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
    }
