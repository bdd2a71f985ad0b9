"""Damaged tokenizers in GGUF files: each is an error that names the key, and takes no time."""

import itertools
import random
import time
from typing import Any

import pytest
from gguf_tokenizers import FILE, byte_level, converted, read, sentencepiece

from bitnet_ops.checkpoint.errors import CheckpointError
from bitnet_ops.checkpoint.gguf import token_list
from bitnet_ops.checkpoint.gguf.sentencepiece import make_merges
from bitnet_ops.checkpoint.gguf.tokenizer import read_tokenizer

KEY = "tokenizer.ggml."

DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("model", {"model": "bert"}),
    "t5": ("model", {"model": "t5"}),
    "rwkv": ("model", {"model": "rwkv"}),
    "plamo2": ("model", {"model": "plamo2"}),
    "gemma4": ("model", {"model": "gemma4"}),
    "no model": ("model", {"model": None}),
    "a number as model": ("model", {"model": 3}),
    "a list as model": ("model", {"model": ["gpt2"]}),
    "tokens are a string": ("tokens", {"tokens": "abc"}),
    "no tokens": ("tokens", {"tokens": []}),
    "tokens are missing": ("tokens", {"tokens": None}),
    "a number as token": ("tokens", {"tokens": [1, 2]}),
    "a long token": ("tokens", {"tokens": ["a" * 10_000_000]}),
    "types are a number": ("token_type", {"token_type": 1}),
    "too few types": ("token_type", {"token_type": [1, 1, 1]}),
    "add_bos_token is a number": ("add_bos_token", {"add_bos_token": 1}),
    "add_eos_token is a string": ("add_eos_token", {"add_eos_token": "yes"}),
    "bos is out of range": ("bos_token_id", {"bos_token_id": 1 << 40}),
    "bos is negative": ("bos_token_id", {"bos_token_id": -1}),
    "bos is a bool": ("bos_token_id", {"bos_token_id": True}),
    "eos is missing": ("eos_token_id", {"eos_token_id": None, "add_eos_token": True}),
}

BYTE_LEVEL_DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "bos is missing": ("bos_token_id", {"bos_token_id": None, "add_bos_token": True}),
    "pre is default": ("pre", {"pre": "default"}),
    "pre is unknown": ("pre", {"pre": "tekken"}),
    "pre is missing": ("pre", {"pre": None}),
    "pre is a list": ("pre", {"pre": ["gpt-2"]}),
    "merges are missing": ("merges", {"merges": None}),
    "merges are a string": ("merges", {"merges": "a b"}),
    "a number as merge": ("merges", {"merges": [1]}),
    "a merge without a space": ("merges", {"merges": ["ab"]}),
    "a merge of three": ("merges", {"merges": ["a b c"]}),
    "a merge of an unknown token": ("merges", {"merges": ["a nowhere"]}),
    "a merge that makes an unknown token": ("merges", {"merges": ["Z Z"]}),
}

SENTENCEPIECE_DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "scores are missing": ("scores", {"scores": None}),
    "too few scores": ("scores", {"scores": [0.0]}),
    "add_space_prefix is a number": ("add_space_prefix", {"add_space_prefix": 1}),
    "unknown is out of range": ("unknown_token_id", {"unknown_token_id": 1 << 31}),
    "unknown is not in use": ("unknown_token_id", {"unknown_token_id": -1 << 40}),
    "a table of characters": ("precompiled_charsmap", {"precompiled_charsmap": [1, 2, 3]}),
    "white space is removed": ("remove_extra_whitespaces", {"remove_extra_whitespaces": True}),
}


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_damage_to_a_key_is_an_error_that_names_it(model: str) -> None:
    if model == "gpt2":
        good, damage = converted(byte_level("gpt-2"), pre="gpt-2"), DAMAGE | BYTE_LEVEL_DAMAGE
    else:
        good, damage = converted(*sentencepiece(prefix=True)), DAMAGE | SENTENCEPIECE_DAMAGE
    read(good)
    for case, (key, changes) in damage.items():
        bad = good | {KEY + name: value for name, value in changes.items()}
        bad = {name: value for name, value in bad.items() if value is not None}
        with pytest.raises(CheckpointError) as caught:
            read_tokenizer(bad, FILE, len(good[KEY + "tokens"]))
        assert str(caught.value).startswith(f"{FILE}: {KEY}{key}: expected "), case
        assert len(str(caught.value)) < 800, case


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_damage_to_an_entry_is_an_error_that_names_the_list(model: str) -> None:
    if model == "gpt2":
        good = converted(byte_level("gpt-2"), pre="gpt-2")
    else:
        good = converted(*sentencepiece(prefix=False), add_space_prefix=False)
    tokens = good[KEY + "tokens"]
    damage: list[tuple[str, int, Any, str]] = [
        ("tokens", 400, tokens[401], "tokens"),
        ("tokens", 400, "x" * (token_list.MAX_TOKEN_LENGTH + 1), "tokens"),
        ("tokens", 400, None, "tokens"),
        ("token_type", 400, 0, "token_type"),
        ("token_type", 400, 7, "token_type"),
        ("token_type", 400, 1.0, "token_type"),
        ("token_type", 400, True, "token_type"),
    ]
    if model == "llama":
        damage += [
            ("scores", 400, float("nan"), "scores"),
            ("scores", 400, float("inf"), "scores"),
            ("scores", 400, "1", "scores"),
            ("token_type", 9, 1, "token_type"),  # 255 bytes
            ("tokens", 9, "<0x0g>", "tokens"),
            ("tokens", tokens.index("  "), "▁▁▁", "tokens"),  # equal to another one, as spaces
        ]
    for key, index, value, named in damage:
        bad = dict(good)
        bad[KEY + key] = [*good[KEY + key][:index], value, *good[KEY + key][index + 1 :]]
        with pytest.raises(CheckpointError, match=f"{KEY}{named}: expected"):
            read(bad)


def test_scores_that_are_all_the_same_are_refused() -> None:
    metadata = converted(*sentencepiece(prefix=True))
    metadata[KEY + "scores"] = [-1000.0] * len(metadata[KEY + "tokens"])
    with pytest.raises(CheckpointError, match="scores: expected scores that order the tokens, got -1000"):
        read(metadata)


def test_very_long_lists_of_added_tokens_are_refused() -> None:
    """The library would take minutes and gigabytes to look for them."""
    tokens = [f"{index:05}" + "a" * 1000 for index in range(20000)]
    metadata = {KEY + "model": "gpt2", KEY + "pre": "gpt-2", KEY + "tokens": tokens, KEY + "merges": []}
    for types in (3, 4):
        with pytest.raises(CheckpointError, match="token_type: expected added tokens of at most"):
            read(metadata | {KEY + "token_type": [types] * len(tokens)})


def test_more_tokens_than_rows_of_the_embedding_are_refused() -> None:
    metadata = converted(byte_level("gpt-2"), pre="gpt-2")
    size = len(metadata[KEY + "tokens"])
    assert read_tokenizer(metadata, FILE, size + 1) is not None
    with pytest.raises(CheckpointError, match=f"{KEY}tokens: expected a list of 1 to vocab_size"):
        read_tokenizer(metadata, FILE, size - 1)


def test_no_unknown_token_and_no_bytes_are_refused() -> None:
    metadata = converted(*sentencepiece(prefix=True, byte_fallback=False))
    del metadata[KEY + "unknown_token_id"]
    read(metadata)  # its type says which token it is
    metadata[KEY + "token_type"][0] = 3
    with pytest.raises(CheckpointError, match="unknown_token_id: expected an unknown token"):
        read(metadata)


def test_a_vocabulary_that_makes_very_many_merges_is_refused_soon() -> None:
    pieces = ["".join(bits) for size in range(1, 16) for bits in itertools.product("ab", repeat=size)]
    assert make_merges(pieces[:2000]) is not None
    assert make_merges(["a" * size for size in range(1, 200)]) is not None
    assert make_merges(["a" * 257, "a"]) is None
    # Every string of a and b: each can be cut anywhere.
    assert make_merges(sorted(pieces, key=len, reverse=True)) is None


def test_random_damage_never_gives_another_exception() -> None:
    rng = random.Random(0)
    values: list[Any] = [
        None,
        -1,
        0,
        1,
        3,
        1 << 63,
        0.5,
        float("nan"),
        "",
        "a b",
        "llama",
        True,
        [],
        ["a"],
        {},
    ]
    forms = [
        converted(byte_level("gpt-2"), pre="gpt-2"),
        converted(*sentencepiece(prefix=True)),
        converted(*sentencepiece(prefix=False), add_space_prefix=False),
    ]
    damaged = 0
    for _ in range(150):
        metadata = dict(rng.choice(forms))
        for key in rng.sample(sorted(metadata), 2):
            value = metadata[key]
            if isinstance(value, list) and value and rng.random() < 0.7:
                value = list(value)
                for _ in range(rng.randrange(1, 20)):
                    value[rng.randrange(len(value))] = rng.choice([*values, *value[:50]])
                metadata[key] = value
            else:
                metadata[key] = rng.choice(values)
        try:
            tokenizer = read_tokenizer(metadata, FILE, 5000)
        except CheckpointError:
            damaged += 1
        else:
            if tokenizer is not None:
                tokenizer.decode(tokenizer.encode("a man <s> 🙂").ids)
    assert damaged > 50


@pytest.mark.slow
def test_a_vocabulary_of_the_size_of_gemmas_is_read_within_seconds() -> None:
    rng = random.Random(0)
    pieces: dict[str, None] = dict.fromkeys("abcdefghijklmnopqrstuvwxyz▁")
    while len(pieces) < 262144 - 3:
        known = rng.choices(tuple(pieces), k=20000)
        pieces.update(dict.fromkeys(one + other for one, other in itertools.pairwise(known)))
        pieces = dict.fromkeys([piece for piece in pieces if len(piece) <= 16][: 262144 - 3])
    tokens = ["<unk>", "<s>", "</s>", *pieces]
    metadata = {
        KEY + "model": "llama",
        KEY + "tokens": tokens,
        KEY + "token_type": [2, 3, 3] + [1] * len(pieces),
        KEY + "scores": [-float(index) for index in range(len(tokens))],
    }
    begin = time.process_time()  # this machine has other work, too
    assert read_tokenizer(metadata, FILE, 262144) is not None
    assert time.process_time() - begin < 10
