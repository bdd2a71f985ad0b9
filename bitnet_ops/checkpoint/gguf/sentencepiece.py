"""SentencePiece BPE, which GGUF calls "llama": the tokenizers of Llama 2 and Gemma.

SentencePiece writes each space as "▁" and then joins, again and again, the two neighbours whose union is the
token with the highest score. A BPE with merges does the same if every way to cut a token into two tokens is
a merge, and merges are ordered by the score of what they make. The one difference: where two ways to make
the same token overlap ("ab a ba" has "aba" twice), SentencePiece takes the left one, and BPE the one that
comes first in its list.

Tokens of type 4 (user defined: in Gemma, runs of spaces or of line ends) are found before that, the longest
first, and never joined. A character without a token becomes the tokens of its bytes, ``<0x0A>``, or the
unknown token.
"""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from .token_list import BYTE_TOKEN, PREFIX, TokenList, TokenType

SPACE = "▁"
"""How a space is spelled inside a token."""

MAX_PIECE_LENGTH = 256
"""Characters of the longest token that is cut into merges; trained vocabularies have 16, or 31."""

MERGES_PER_TOKEN, MORE_MERGES = 4, 1 << 16
"""The most merges that are made of n tokens: ``4 n + 65536``. Gemma's 262144 tokens have 514000."""


def read_sentencepiece(tokens: TokenList) -> Tokenizer:
    """Builds the tokenizer, yet without added tokens.

    Raises:
        CheckpointError: the lists do not fit together, or ask for what is not supported.
    """
    _check_plain(tokens)
    scores = tokens.scores()
    unknown = _unknown(tokens)
    bytes_ = _check_bytes(tokens)
    if unknown is None and not bytes_:
        raise tokens.error(
            "unknown_token_id", "an unknown token, or the tokens of 256 bytes", "neither of the two"
        )
    prefix = space_prefix(tokens)
    vocabulary: dict[str, int] = {}
    for index, (token, type_) in enumerate(zip(tokens.tokens, tokens.types, strict=True)):
        if (
            type_ != TokenType.UNUSED
            and vocabulary.setdefault(added_text(token, type_, prefix), index) != index
        ):
            raise tokens.error("tokens", "tokens that differ in more than spaces", f"{token!r:.200}")
    normal = sorted(tokens.ids(TokenType.NORMAL), key=lambda index: -scores[index])
    longer = [index for index in normal if len(tokens.tokens[index]) > 1]
    if len(longer) > 1 and scores[longer[0]] == scores[longer[-1]]:
        # Converters that have no scores write one number for all.
        raise tokens.error("scores", "scores that order the tokens", f"{scores[longer[0]]} for all of them")
    merges = make_merges([tokens.tokens[index] for index in normal])
    if merges is None:
        raise tokens.error(
            "tokens",
            f"tokens of at most {MAX_PIECE_LENGTH} characters with {MERGES_PER_TOKEN} merges each or fewer",
            "a vocabulary that SentencePiece does not make",
        )
    name = None if unknown is None else tokens.tokens[unknown]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=name, fuse_unk=name is not None, byte_fallback=bytes_)
    )
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def space_prefix(tokens: TokenList) -> bool:
    """Whether a space is put in front of a text, and behind each added token."""
    return tokens.flag("add_space_prefix", True)


def added_text(token: str, type_: int, prefix: bool) -> str:
    """How a token is spelled in the tokenizer.

    User-defined tokens are spelled with spaces in a file ("▁" in old ones). They are looked for in text that
    is normalized, where that turns spaces into "▁" and does nothing else; and in the text as it is, where
    normalizing would put a space in front.
    """
    if type_ != TokenType.USER_DEFINED:
        return token
    return token.replace(SPACE, " ") if prefix else token.replace(" ", SPACE)


def make_merges(pieces: list[str]) -> list[tuple[str, str]] | None:
    """Every way to cut a token into two tokens.

    Args:
        pieces: normal tokens, best first.

    Returns:
        The merges, best first; those of one token begin with the longest left part, as in the tokenizer.json
        of Gemma. None for a vocabulary that would make far more of them than trained ones.
    """
    known = set(pieces)
    most = MERGES_PER_TOKEN * len(pieces) + MORE_MERGES
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        if len(piece) > MAX_PIECE_LENGTH:
            return None
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in known:
                right = piece[cut:]
                if right in known:
                    merges.append((left, right))
        if len(merges) > most:
            return None
    return merges


def _check_plain(tokens: TokenList) -> None:
    """Refuses the ways in which SentencePiece may change text, which no Llama or Gemma uses."""
    if tokens.metadata.get(PREFIX + "precompiled_charsmap"):
        raise tokens.error("precompiled_charsmap", "text that is not normalized", "a table of characters")
    for key in ("remove_extra_whitespaces", "treat_whitespace_as_suffix"):
        if tokens.flag(key, False):
            raise tokens.error(key, "false", "true")
    if not tokens.flag("escape_whitespaces", True):
        raise tokens.error("escape_whitespaces", "true", "false")


def _unknown(tokens: TokenList) -> int | None:
    named = tokens.token_id("unknown_token_id")
    if named is None:
        of_type = tokens.ids(TokenType.UNKNOWN)
        named = of_type[0] if len(of_type) == 1 else None
    if named is not None and tokens.types[named] in (TokenType.UNUSED, TokenType.USER_DEFINED):
        raise tokens.error("unknown_token_id", "a token that is in use and no text", f"{named}")
    return named


def _check_bytes(tokens: TokenList) -> bool:
    """Whether the vocabulary has the 256 bytes; raises where it has some of them."""
    found = tokens.ids(TokenType.BYTE)
    for index in found:
        if not BYTE_TOKEN.fullmatch(tokens.tokens[index]):
            raise tokens.error(
                "tokens", "bytes (token_type 6) spelled as <0x0A>", f"{tokens.tokens[index]!r:.200}"
            )
    if len(found) not in (0, 256):
        raise tokens.error("token_type", "0 or 256 tokens of type 6 (byte)", f"{len(found)}")
    return bool(found)


def sentencepiece_metadata(data: dict[str, Any], texts: list[str], types: list[int]) -> dict[str, Any]:
    """What GGUF says of a SentencePiece tokenizer beside the types of its tokens.

    Args:
        data: tokenizer.json.
        texts: the token of each id, without holes.
        types: a `TokenType` for each id; those of bytes and the unknown token are set here.

    Raises:
        ValueError: GGUF cannot express it.
    """
    model = data["model"]
    prefix = _prefix_of(data)
    unknown = model["unk_token"]
    for index, text in enumerate(texts):
        if text == unknown and types[index] == TokenType.CONTROL:
            types[index] = TokenType.UNKNOWN
        elif BYTE_TOKEN.fullmatch(text) and types[index] == TokenType.NORMAL:
            types[index] = TokenType.BYTE
    if model.get("ignore_merges"):
        raise ValueError("tokenizer: expected ignore_merges = false, got true, which GGUF cannot express")
    if model["byte_fallback"] != (types.count(TokenType.BYTE) == 256) or types.count(TokenType.BYTE) % 256:
        raise ValueError(
            "tokenizer: expected tokens for all 256 bytes with byte_fallback, or none without, got "
            f"{types.count(TokenType.BYTE)} and byte_fallback = {model['byte_fallback']}"
        )
    if not model["byte_fallback"] and (unknown is None or not model["fuse_unk"]):
        raise ValueError(
            "tokenizer: expected byte_fallback, or an unknown token with fuse_unk, got neither of the two"
        )
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(model["merges"], texts, types),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    for index, (text, type_) in enumerate(zip(texts, types, strict=True)):
        if type_ == TokenType.USER_DEFINED:
            texts[index] = text.replace(SPACE, " ")
    if len(set(texts)) < len(texts):
        raise ValueError("tokenizer: expected added tokens that differ in more than spaces")
    return metadata


def _scores(merges: list[list[str]], texts: list[str], types: list[int]) -> list[float]:
    """Scores whose order is that of the merges: 0 for the first token that is made, then -1, -2 ...

    Tokens that no merge makes come last, as SentencePiece has single characters.
    """
    normal = [text for text, type_ in zip(texts, types, strict=True) if type_ == TokenType.NORMAL]
    known = set(normal)
    # Gemma has merges that make user-defined tokens, too. In GGUF these are found in another way.
    given = [(left, right) for left, right in merges if left + right in known]
    pieces = list(dict.fromkeys([*(left + right for left, right in given), *normal]))
    rank = {piece: index for index, piece in enumerate(pieces)}
    ranks = [rank[left + right] for left, right in given]
    given.sort(key=lambda pair: (rank[pair[0] + pair[1]], -len(pair[0])))
    if ranks != sorted(ranks) or given != make_merges(pieces):
        raise ValueError(
            "tokenizer: expected the merges that SentencePiece stands for (every way to cut a normal token "
            "into two, those of one token side by side), got others"
        )
    return [-float(rank[text]) if text in known else 0.0 for text in texts]


def _prefix_of(data: dict[str, Any]) -> bool:
    """Whether a tokenizer puts a space in front of a text; raises where it is not one of SentencePiece."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    if data["normalizer"] not in (replace, prepend):
        raise ValueError(
            "tokenizer: expected a byte-level BPE, or a normalizer that turns spaces into '▁' and may put "
            f"one in front of a text, got {data['normalizer']!r:.200}"
        )
    # Gemma has one that splits at spaces, of which there are none left.
    split = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    if data["pre_tokenizer"] not in (None, split):
        raise ValueError(f"tokenizer: expected no pre-tokenizer, got {data['pre_tokenizer']!r:.200}")
    prefix: bool = data["normalizer"] == prepend
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if data["decoder"] != {"type": "Sequence", "decoders": steps}:
        raise ValueError(
            f"tokenizer: expected the decoder of a SentencePiece tokenizer, {steps}, "
            f"got {data['decoder']!r:.300}"
        )
    return prefix
