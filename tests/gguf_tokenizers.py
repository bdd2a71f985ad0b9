"""Small tokenizers in the form of the published ones, and the metadata of GGUF files that hold them.

The metadata is described as llama.cpp's converter does it (`converted`), not by our writer. `HF_FORMS` holds
parts of the tokenizer.json of published models.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.tokenization_utils_base import generate_merges

from bitnet_ops.checkpoint.gguf.tokenizer import read_tokenizer
from bitnet_ops.decoder.config import DecoderConfig

FILE = Path("model.gguf")

CORPUS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in",
    "want of a wife. However little known the feelings or views of such a man may be, I'll say don't and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "we've 1234. Größe und Übermaß, naïve façade, 你好世界, здравствуй мир, 🙂🙃🚀 banana bandana ananas",
    "aaaa aaaaaaaa 2024 1999\t\tx",
]

WORDS = [
    *(
        "the",
        "truth",
        "man",
        "don't",
        "I'LL",
        "we'Ve",
        "123",
        "4567",
        "12345678",
        "x=3.14",
        "f(n)",
        "return",
        "naïve",
    ),
    *(
        "Größe",
        "你好世界",
        "здравствуй",
        "🙂🙃🚀",
        "नमस्ते",
        "banana",
        "anananas",
        "aaaaa",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " \t",
    ),
    *(
        "½",
        "Ⅻ",
        "١٢٣",
        "...",
        "'''",
        "---",
        "{}",
        "<s>",
        "</s>",
        "<think>",
        "<|end|>",
        "<pad>",
        "<0x0A>",
        "[PAD9]",
    ),
    *("\u00a0", "\u3000", "#!", "unmerged", "mustbe", "`", "<", "|>"),
]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    """The pre-tokenizer of Llama 3 and Qwen 2, each with its own expression."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])


HF_FORMS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "llama-bpe": (lambda: split(LLAMA3), False, True),
    "smaug-bpe": (lambda: split(LLAMA3), False, False),
    "qwen2": (lambda: split(QWEN2), True, False),
    "gpt-2": (gpt2, False, False),
    "olmo": (gpt2, True, False),
    "smollm": (digits, False, False),
}
"""Name in GGUF -> pre-tokenizer, whether text is normalized (NFC), ignore_merges."""

SAME_FORM = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon_e", "falcon-h1", "lfm2"),
    "smaug-bpe": ("dbrx",),
}


def texts(number: int, seed: int = 0) -> Iterator[str]:
    """Words, code, numbers, scripts, white space, special tokens, and characters that nobody meant."""
    rng = random.Random(seed)
    yield from (
        "",
        " ",
        "  ",
        "   a",
        " a ",
        "\n",
        "\n\n a",
        "a\tb\t\tc",
        " " * 40 + "x" + "\n" * 40,
        "<s> a</s>  b",
    )
    for _ in range(number):
        kind = rng.random()
        if kind < 0.6:
            gaps = ("", " ", " ", " ", "  ", "   ", "\n")
            yield "".join(rng.choice(WORDS) + rng.choice(gaps) for _ in range(rng.randrange(1, 25)))
        elif kind < 0.8:
            yield "".join(rng.choice("abnA \n\t.,'12é") for _ in range(rng.randrange(1, 40)))
        else:
            ranges = [
                (0x20, 0x7F),
                (0xA0, 0x250),
                (0x370, 0x530),
                (0x5D0, 0x5EB),
                (0x4E00, 0x9FA6),
                (0x1F600, 0x1F640),
            ]
            yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 30)))


def wild_texts(number: int) -> Iterator[str]:
    """Any characters at all, also combining and unassigned ones."""
    rng = random.Random(1)
    for _ in range(number):
        yield "".join(
            chr(rng.choice((rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(20)
        )
        yield "".join(rng.choice("eéaÅ\u0301\u030a\u0327 한ᄒ\u1161") for _ in range(12))


def byte_level(name: str, *, spaces: bool = True) -> Tokenizer:
    """A byte-level tokenizer in the form that the models have whose GGUF files name ``name``.

    Args:
        name: as in ``tokenizer.ggml.pre``.
        spaces: whether runs of white space are among the added tokens.
    """
    pre_tokenizer, nfc, ignore_merges = HF_FORMS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    # Words without the merges that lead to them: whether they are found depends on ignore_merges.
    vocabulary = data["model"]["vocab"]
    for word in ("Ġunmerged", "mustbe"):
        vocabulary[word] = len(vocabulary)
    data["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>", "<pad>"])
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<think>", "   ", "\t\t")[: 3 if spaces else 1]]
    )
    return tokenizer


def put_around(tokenizer: Tokenizer, *, bos: bool = False, eos: bool = False) -> Tokenizer:
    """Makes texts begin with <s> or end with </s>."""
    single = "<s> " * bos + "$A" + " </s>" * eos
    pairs = [(text, tokenizer.token_to_id(text)) for text in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=pairs
    )
    return tokenizer


def sentencepiece(*, prefix: bool, byte_fallback: bool = True) -> tuple[Tokenizer, dict[str, float]]:
    """A tokenizer in the form of Llama 2 (with ``prefix``) or Gemma (without), and its tokens' scores."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁+"), behavior="isolated")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    defined = (
        ["<think>"]
        if prefix
        else ["<think>", *("▁" * n for n in range(2, 8)), *("\n" * n for n in range(1, 6))]
    )
    control = ["<unk>", "<s>", "</s>", "<|end|>", "<pad>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    # White space is not inside of tokens of Llama and Gemma, other than at their beginning.
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = [text for text, _ in learned if len(text) > 1 and "\n" not in text and "▁" not in text[1:]]
    alphabet = [text for text, _ in learned if len(text) == 1 and text != "\n"]
    tokens = [*control, *bytes_, *defined, *pieces, *alphabet]
    vocabulary = {text: index for index, text in enumerate(tokens)}
    scores = {text: -float(index) for index, text in enumerate([*pieces, *alphabet])}
    of_spaces = {text: 1.0 + len(text) for text in defined if set(text) <= set("▁\n") and len(text) > 1}
    merges = generate_merges(vocabulary, {**of_spaces, **scores})
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    )
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return put_around(tokenizer, bos=True), scores


def converted(tokenizer: Tokenizer, scores: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """The metadata of a file, as llama.cpp's converter writes it."""
    data = json.loads(tokenizer.to_str())
    added = {token["content"]: token for token in data["added_tokens"]}
    tokens, types = [], []
    for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        type_ = 1
        if text in added:
            type_ = 3 if added[text]["special"] else 4
        elif text.startswith("<0x"):
            type_ = 6
        tokens.append(text.replace("▁", " ") if type_ == 4 else text)
        types.append(2 if text == "<unk>" else type_)
    tokens += ["[PAD9]", "[PAD10]"]
    types += [5, 5]
    metadata: dict[str, Any] = {"general.architecture": "llama", "tokenizer.ggml.tokens": tokens}
    metadata["tokenizer.ggml.token_type"] = types
    for key, text in (("bos", "<s>"), ("eos", "</s>"), ("unknown", "<unk>"), ("padding", "<pad>")):
        if tokenizer.token_to_id(text) is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = tokenizer.token_to_id(text)
    if scores is None:
        metadata["tokenizer.ggml.model"] = "gpt2"
        metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    else:
        metadata["tokenizer.ggml.model"] = "llama"
        metadata["tokenizer.ggml.pre"] = "default"
        metadata["tokenizer.ggml.scores"] = [scores.get(text, -1000.0) for text in tokens]
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def read(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = read_tokenizer(metadata, FILE, len(metadata["tokenizer.ggml.tokens"]))
    assert tokenizer is not None
    return tokenizer


def config(vocab_size: int, **fields: Any) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=16,
        **fields,
    )


def assert_equal(ours: Tokenizer, theirs: Tokenizer, samples: list[str]) -> None:
    """Both give the same ids, with and without what comes around, and the same text back."""
    for text in samples:
        ids = theirs.encode(text).ids
        assert ours.encode(text).ids == ids, repr(text)
        plain = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == plain, repr(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        # From the middle of a text, where characters may be cut in two.
        assert ours.decode(plain[1:]) == theirs.decode(plain[1:])


SAMPLES = [*texts(400), *wild_texts(40)]
