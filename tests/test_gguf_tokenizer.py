"""Tokenizers of GGUF files against the tokenizers that the files were made of, and against other readers."""

import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_tokenizers import (
    CORPUS,
    FILE,
    HF_FORMS,
    SAME_FORM,
    SAMPLES,
    assert_equal,
    byte_level,
    config,
    converted,
    put_around,
    read,
    sentencepiece,
)
from tokenizers import (
    Tokenizer,
    models,
)

from bitnet_ops.checkpoint.gguf.pre_tokenizers import BY_NAME
from bitnet_ops.checkpoint.gguf.tokenizer import read_tokenizer, tokenizer_metadata

DEFAULT_TOKENIZER = Path(__file__).parent.parent / "bitnet_ops" / "default_model" / "tokenizer.json"


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
        "gemma3": "runs of spaces that are longer than the longest token",
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
    reader = pytest.importorskip("transformers.integrations.gguf", reason="needs transformers 5.24")
    named = {
        "model": "tokenizer_type",
        "pre": "pre_tokenizer_type",
        "unknown_token_id": "unk_token_id",
        "padding_token_id": "pad_token_id",
        "add_space_prefix": "add_prefix_space",
    }
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokenizer, _ = reader.convert_gguf_tokenizer(
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
