"""Tokenizers of GGUF files against the tokenizers that the files were made of, and other readers.

Files are described as llama.cpp's converter does it (`converted`), not by our writer. The tokenizers are
small, but have the form of the published ones: `HF_FORMS` holds parts of their tokenizer.json.
"""

import itertools
import json
import random
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
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
from transformers.integrations.gguf import convert_gguf_tokenizer
from transformers.tokenization_utils_base import generate_merges

from bitnet_ops.checkpoint.errors import CheckpointError
from bitnet_ops.checkpoint.gguf import token_list
from bitnet_ops.checkpoint.gguf.pre_tokenizers import BY_NAME
from bitnet_ops.checkpoint.gguf.sentencepiece import make_merges
from bitnet_ops.checkpoint.gguf.tokenizer import read_tokenizer, tokenizer_metadata
from bitnet_ops.decoder.config import DecoderConfig

FILE = Path("model.gguf")
DEFAULT_TOKENIZER = Path(__file__).parent.parent / "bitnet_ops" / "default_model" / "tokenizer.json"

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


# --- reading ---


@pytest.mark.parametrize("name", HF_FORMS)
def test_a_byte_level_file_reads_as_the_tokenizer_that_it_was_made_of(name: str) -> None:
    theirs = byte_level(name)
    for same in (name, *SAME_FORM.get(name, ())):
        ours = read(converted(theirs, pre=same, add_bos_token=False))
        assert_equal(ours, theirs, SAMPLES if same == name else SAMPLES[::20])
    assert BY_NAME.keys() == {*HF_FORMS, *itertools.chain(*SAME_FORM.values())}


def test_the_forms_of_pre_tokenizers_differ_in_the_texts_of_these_tests() -> None:
    """Otherwise the test above could not tell them apart."""
    ours = {
        name: read(converted(byte_level("llama-bpe"), pre=name, add_bos_token=False)) for name in HF_FORMS
    }
    for one, other in itertools.combinations(ours.values(), 2):
        assert any(one.encode(text).ids != other.encode(text).ids for text in SAMPLES)


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_file_reads_as_the_tokenizer_that_it_was_made_of(
    prefix: bool, byte_fallback: bool
) -> None:
    theirs, scores = sentencepiece(prefix=prefix, byte_fallback=byte_fallback)
    ours = read(converted(theirs, scores, add_space_prefix=prefix))
    assert_equal(ours, theirs, SAMPLES)
    assert any("\ufffd" in ours.decode(ours.encode(text).ids[:-1]) for text in SAMPLES) == byte_fallback


@pytest.mark.parametrize("prefix", [True, False])
def test_merges_by_score_are_what_sentencepiece_does(prefix: bool) -> None:
    theirs, scores = sentencepiece(prefix=prefix)
    ours = read(converted(theirs, scores, add_space_prefix=prefix))
    defined = [] if prefix else ["▁" * n for n in range(7, 1, -1)] + ["\n" * n for n in range(5, 0, -1)]
    merged = 0
    for text in SAMPLES:
        text = text.replace("<", "(")  # SentencePiece does not look for special tokens
        expected = reference_sentencepiece(text, scores, defined, prefix, ours.get_vocab())
        assert ours.encode(text, add_special_tokens=False).ids == expected, repr(text)
        merged += len(expected) < len(text)
    assert merged > 50


def reference_sentencepiece(
    text: str, scores: dict[str, float], defined: list[str], prefix: bool, ids: dict[str, int]
) -> list[int]:
    """What SentencePiece's BPE is: always join the neighbours of highest score, the left ones first."""
    text = ("▁" if prefix and text else "") + text.replace(" ", "▁")
    symbols: list[str] = []
    frozen = set(defined)
    while text:
        symbol = next((one for one in defined if text.startswith(one)), text[0])
        symbols.append(symbol)
        text = text[len(symbol) :]
    while True:
        best = None
        for index, (left, right) in enumerate(itertools.pairwise(symbols)):
            score = scores.get(left + right)
            known = score is not None and left not in frozen and right not in frozen
            if known and (best is None or score > best[0]):
                best = score, index
        if best is None:
            break
        symbols[best[1] : best[1] + 2] = [symbols[best[1]] + symbols[best[1] + 1]]
    found: list[int] = []
    for symbol in symbols:
        known_id = ids.get(symbol)
        found += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()] if known_id is None else [known_id]
    return found


def test_sentencepiece_itself_gives_the_same_ids(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs the package protobuf")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 3), encoding="utf-8")
    for prefix in (True, False):
        # With a prefix, readers of GGUF put it behind user-defined tokens, too; SentencePiece does not.
        defined = [] if prefix else ["▁▁", "▁▁▁", "\n", "\n\n", "\t"]
        library.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus.txt"),
            model_prefix=str(tmp_path / "model"),
            model_type="bpe",
            vocab_size=500,
            byte_fallback=True,
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=defined,
            minloglevel=2,
        )
        theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "model.model"))
        pieces = proto.ModelProto.FromString((tmp_path / "model.model").read_bytes()).pieces
        metadata = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [
                piece.piece.replace("▁", " ") if piece.type == 4 else piece.piece for piece in pieces
            ],
            "tokenizer.ggml.scores": [piece.score for piece in pieces],
            "tokenizer.ggml.token_type": [piece.type for piece in pieces],
            "tokenizer.ggml.add_space_prefix": prefix,
            "tokenizer.ggml.add_bos_token": False,
        }
        ours = read(metadata)
        for text in SAMPLES:
            text = text.replace("<", "(")  # SentencePiece does not look for special tokens
            ids = theirs.encode(text)
            assert ours.encode(text).ids == ids, repr(text)
            assert ours.decode(ids) == theirs.decode(ids)


def test_transformers_reads_the_same_where_it_is_right() -> None:
    """Where it differs, the tokenizer that the file was made of shows which of the two is right."""
    wrong = {
        "llama-bpe": "words that are tokens are merged",
        "qwen2": "text is not normalized",
        "olmo": "text is not normalized",
        "smollm": "digits are not apart",
        "spaces": "tokens of white space are not found in byte-level vocabularies",
        "llama": "no prefix in front of a space, nor behind a special token",
    }
    cases = {}
    for name in (*HF_FORMS, "spaces"):
        original = byte_level("gpt-2" if name == "spaces" else name, spaces=name == "spaces")
        cases[name] = original, converted(original, pre="gpt-2" if name == "spaces" else name)
    for name, prefix in (("llama", True), ("gemma3", False)):
        original, scores = sentencepiece(prefix=prefix)
        cases[name] = original, converted(original, scores, add_space_prefix=prefix)
    for name, (original, metadata) in cases.items():
        theirs = transformers_reading(metadata, "gemma3" if name == "gemma3" else "llama")
        ours = read(metadata)
        differ = 0
        for text in SAMPLES:
            ids = ours.encode(text, add_special_tokens=False).ids
            assert ids == original.encode(text, add_special_tokens=False).ids
            differ += ids != theirs.encode(text, add_special_tokens=False).ids
        assert (differ > 0) == (name in wrong), (name, differ)
        assert differ < 0.9 * len(SAMPLES)


def transformers_reading(metadata: dict[str, Any], architecture: str) -> Tokenizer:
    named = {
        "model": "tokenizer_type",
        "pre": "pre_tokenizer_type",
        "unknown_token_id": "unk_token_id",
        "padding_token_id": "pad_token_id",
        "add_space_prefix": "add_prefix_space",
    }
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokenizer, _ = convert_gguf_tokenizer(
        architecture, {named.get(key, key): value for key, value in fields.items()}
    )
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HF_FORMS, "falcon3", "llama", "gemma"])
def test_llama_cpp_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    """Of both what we read and what we write."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")
    if name in ("llama", "gemma"):
        original, scores = sentencepiece(prefix=name == "llama")
        metadata = converted(original, scores, add_space_prefix=name == "llama")
    else:
        original = put_around(byte_level("llama-bpe" if name == "falcon3" else name), bos=True)
        metadata = converted(original, pre=name, add_bos_token=True)
    size = len(metadata["tokenizer.ggml.tokens"])
    ids = {key: original.token_to_id(text) for key, text in (("bos", "<s>"), ("eos", "</s>"))}
    settings = config(size, **{f"{key}_token_id": index for key, index in ids.items()})
    for form in (metadata, tokenizer_metadata(original, settings, size)):
        write_vocabulary(tmp_path / "vocabulary.gguf", form)
        theirs = llama_cpp.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
        ours = read(form)
        for text in SAMPLES:
            if any(unicodedata.category(one) == "Cn" for one in text):
                continue  # its tables of Unicode have another age
            if not unicodedata.is_normalized("NFC", text) and HF_FORMS.get(name, (0, 0))[1]:
                continue  # it never normalizes
            assert ours.encode(text).ids == theirs.tokenize(text.encode(), special=True), repr(text)


def write_vocabulary(file: Path, metadata: dict[str, Any]) -> None:
    """A GGUF file without tensors, by the package of llama.cpp."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_what_comes_around_a_text() -> None:
    """BOS by default where llama.cpp has it, if the file names one; EOS only where it is asked for."""
    text = "a man"
    for name in HF_FORMS:
        original = byte_level(name)
        plain = original.encode(text).ids
        bos, eos = original.token_to_id("<s>"), original.token_to_id("</s>")
        assert read(converted(original, pre=name)).encode(text).ids == [bos] * (name == "llama-bpe") + plain
        around = read(converted(original, pre=name, add_bos_token=True, add_eos_token=True))
        assert around.encode(text).ids == [bos, *plain, eos]
        assert around.encode(text, text).ids == [bos, *plain, eos, bos, *plain, eos]
        assert around.encode("").ids == [bos, eos]
        unnamed = converted(original, pre=name)
        del unnamed["tokenizer.ggml.bos_token_id"]
        assert read(unnamed).encode(text).ids == plain  # llama.cpp would take token 11
    original, scores = sentencepiece(prefix=True)
    metadata = converted(original, scores)
    plain = original.encode(text, add_special_tokens=False).ids
    assert read(metadata).encode(text).ids == [1, *plain]
    del metadata["tokenizer.ggml.bos_token_id"]
    assert read(metadata).encode(text).ids == [1, *plain]
    assert read(metadata | {"tokenizer.ggml.add_bos_token": False}).encode(text).ids == plain


def test_the_official_2b4t_file_has_no_pre_tokenizer_and_gets_that_of_llama_3() -> None:
    original = byte_level("llama-bpe")
    for architecture in ("bitnet-b1.58", "bitnet-25"):
        metadata = converted(original, add_bos_token=False) | {"general.architecture": architecture}
        assert_equal(read(metadata), original, SAMPLES[::10])


def test_a_file_without_a_tokenizer_gives_none() -> None:
    assert read_tokenizer({"general.architecture": "llama"}, FILE, 100) is None
    for model in ("none", "no_vocab"):
        assert read_tokenizer({"tokenizer.ggml.model": model}, FILE, 100) is None


def test_a_file_without_token_types_has_control_tokens_where_keys_name_ids() -> None:
    llama, gpt2 = sentencepiece(prefix=True), byte_level("gpt-2")
    for original, metadata in ((llama[0], converted(*llama)), (gpt2, converted(gpt2, pre="gpt-2"))):
        del metadata["tokenizer.ggml.token_type"]
        ours = read(metadata)
        assert ours.token_to_id("[PAD9]") is not None  # nothing says that it is not in use
        for text in ("a man 🙂 naïve <s> here", "</s>\x01"):
            expected = original.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, add_special_tokens=False).ids == expected


def test_unused_and_empty_tokens_are_left_out() -> None:
    original = byte_level("gpt-2")
    metadata = converted(original, pre="gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["", ""]
    metadata["tokenizer.ggml.token_type"] += [1, 3]
    ours = read(metadata)
    assert ours.get_vocab() == original.get_vocab()
    assert ours.decode([300, original.get_vocab_size() + 1]) == original.decode([300])


# --- writing, and back ---


@pytest.mark.parametrize("name", HF_FORMS)
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_byte_level_tokenizer_comes_back(name: str, bos: bool, eos: bool) -> None:
    original = put_around(byte_level(name), bos=bos, eos=eos)
    size = original.get_vocab_size() + 7
    ids = [original.token_to_id(text) for text in ("<s>", "<|end|>", "</s>", "<pad>")]
    settings = config(size, bos_token_id=ids[0], eos_token_id=(ids[1], ids[2]), pad_token_id=ids[3])
    metadata = tokenizer_metadata(original, settings, size)
    ours = read_tokenizer(metadata, FILE, size)
    assert ours is not None
    assert_equal(ours, original, SAMPLES[::4])
    assert ours.get_vocab() == original.get_vocab()
    assert metadata["tokenizer.ggml.pre"] == name
    assert [metadata[f"tokenizer.ggml.add_{key}_token"] for key in ("bos", "eos")] == [bos, eos]
    ends = [metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]]
    assert ends == ([ids[2], ids[1]] if eos else [ids[1], ids[2]])
    assert metadata["tokenizer.ggml.bos_token_id"] == ids[0]
    assert metadata["tokenizer.ggml.padding_token_id"] == ids[3]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == size
    assert types.count(5) == 7
    assert types.count(3) == 4
    assert types.count(4) == 3


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(prefix: bool, byte_fallback: bool) -> None:
    original, _ = sentencepiece(prefix=prefix, byte_fallback=byte_fallback)
    size = original.get_vocab_size() + 3
    metadata = tokenizer_metadata(original, config(size, bos_token_id=1, eos_token_id=2), size)
    ours = read_tokenizer(metadata, FILE, size)
    assert ours is not None
    assert_equal(ours, original, SAMPLES)
    again = tokenizer_metadata(ours, config(size, bos_token_id=1, eos_token_id=2), size)
    assert again == metadata


def test_the_tokenizer_of_the_shipped_model_comes_back() -> None:
    original = Tokenizer.from_file(str(DEFAULT_TOKENIZER))
    settings = config(4096, bos_token_id=0, eos_token_id=0)
    metadata = tokenizer_metadata(original, settings, 4096)
    ours = read_tokenizer(metadata, FILE, 4096)
    assert ours is not None
    assert_equal(ours, original, SAMPLES)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    data = json.loads(tokenizer.to_str())
    change(data)
    return Tokenizer.from_str(json.dumps(data))


INEXPRESSIBLE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "dropout": ("gpt-2", lambda data: data["model"].update(dropout=0.5), "dropout"),
    "end of word": ("gpt-2", lambda data: data["model"].update(end_of_word_suffix="</w>"), "end_of_word"),
    "no pre-tokenizer": ("gpt-2", lambda data: data.update(pre_tokenizer=None), "pre-tokenizer"),
    "another expression": (
        "qwen2",
        lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\\w+"}),
        "pre-tokenizer",
    ),
    "space in front": (
        "gpt-2",
        lambda data: data["pre_tokenizer"].update(add_prefix_space=True),
        "pre-tokenizer",
    ),
    "Qwen without NFC": ("qwen2", lambda data: data.update(normalizer=None), "normalizer"),
    "lower case": ("gpt-2", lambda data: data.update(normalizer={"type": "Lowercase"}), "normalizer"),
    "ignore_merges": ("gpt-2", lambda data: data["model"].update(ignore_merges=True), "ignore_merges"),
    "stripping token": ("gpt-2", lambda data: data["added_tokens"][0].update(rstrip=True), "rstrip"),
    "another decoder": ("gpt-2", lambda data: data.update(decoder={"type": "Fuse"}), "byte-level"),
    "two tokens in front": (
        "gpt-2",
        lambda data: data["post_processor"]["single"].insert(0, data["post_processor"]["single"][0]),
        "at most one token",
    ),
    "Metaspace": (
        "llama",
        lambda data: data.update(
            normalizer=None,
            pre_tokenizer={
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "first",
                "split": False,
            },
        ),
        "normalizer",
    ),
    "a merge less": ("llama", lambda data: data["model"]["merges"].pop(5), "merges"),
    "merges of one token far apart": ("llama", lambda data: data["model"]["merges"].sort(), "merges"),
    "a byte less": ("llama", lambda data: data["model"].update(byte_fallback=False), "byte_fallback"),
    "an added token of spaces": (
        "llama",
        lambda data: (
            data["model"]["vocab"].update({"▁▁": len(data["model"]["vocab"])}),
            data["added_tokens"].append(
                data["added_tokens"][-1] | {"content": "▁▁", "id": len(data["model"]["vocab"]) - 1}
            ),
        ),
        "that spaces become",
    ),
    "a normalized token": (
        "llama",
        lambda data: data["added_tokens"][-1].update(normalized=True),
        "normalized",
    ),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_gguf_cannot_express_is_refused_with_the_reason(case: str) -> None:
    name, change, reason = INEXPRESSIBLE[case]
    original = sentencepiece(prefix=True)[0] if name == "llama" else put_around(byte_level(name), bos=True)
    size = original.get_vocab_size() + 5
    settings = config(size, bos_token_id=original.token_to_id("<s>"))
    assert tokenizer_metadata(original, settings, size)
    with pytest.raises(ValueError, match=reason):
        tokenizer_metadata(changed(original, change), settings, size)


def test_what_does_not_fit_the_model_is_refused() -> None:
    original = put_around(byte_level("gpt-2"), bos=True, eos=True)
    size = original.get_vocab_size()
    with pytest.raises(ValueError, match="ids below vocab_size"):
        tokenizer_metadata(original, config(size - 1), size - 1)
    with pytest.raises(ValueError, match="begin with bos_token_id = 5"):
        tokenizer_metadata(original, config(size, bos_token_id=5), size)
    with pytest.raises(ValueError, match="end with eos_token_id"):
        tokenizer_metadata(original, config(size, eos_token_id=(5, 6)), size)
    with pytest.raises(ValueError, match="expected a BPE, got WordLevel"):
        tokenizer_metadata(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), config(9), 9)


# --- hostile files ---

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
    "bos is missing": ("bos_token_id", {"bos_token_id": None, "add_bos_token": True}),
}

BYTE_LEVEL_DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
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
    pieces = ["".join(bits) for size in range(1, 19) for bits in itertools.product("ab", repeat=size)]
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
    begin = time.perf_counter()
    assert read_tokenizer(metadata, FILE, 262144) is not None
    assert time.perf_counter() - begin < 30  # 3 s on a quiet machine
