"""Vectors of texts: `BitNet.embed`, `SentenceEncoder` and the command, on a model like any other."""

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from text_models import EOS, USER, byte_level_tokenizer, tiny_model
from tokenizers import Tokenizer, processors
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitNet, EmbeddingSettings, SentenceEncoder
from bitnet_ops.decoder.pooling import POOLINGS, normalized, pool
from bitnet_ops.embedding import mixin
from bitnet_ops.embedding.mixin import batches
from bitnet_ops.embedding.tokens import TextReader

U = 2.0**-24

TEXTS = [
    "It is a truth universally acknowledged,",
    "a wife",
    "x",
    "that a single man in possession of a good fortune, must be in want of a wife. " * 3,
    "Größe und Übermaß",
    "a wife",
    "",
]


@pytest.fixture(scope="module")
def model() -> BitNet:
    return tiny_model()


def around(tokenizer: Tokenizer, single: str = f"{USER} $A {EOS}") -> Tokenizer:
    """The tokenizer with tokens around each text."""
    ids = [(token, tokenizer.token_to_id(token)) for token in (USER, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def exact(model: BitNet, text: str, pooling: str) -> Tensor:
    """A vector of length 1 by hand, float64: one text, no padding."""
    hidden = model.hidden_states(model.encode(text)["input_ids"])[0].double()
    vector = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pooling]
    return vector / vector.norm()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors(model: BitNet, pooling: str) -> None:
    """Of what float64 makes of the same hidden states; they are rounded at the end, and so is a mean."""
    vectors = model.embed(TEXTS, pooling=pooling)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (len(TEXTS), model.config.hidden_size)
    expected = torch.stack([exact(model, text, pooling) for text in TEXTS])
    assert ((vectors - expected).abs() <= 3 * U * expected.abs() + 1e-12).all()
    for one, other in ((0, 3), (0, 1), (2, 6)):
        assert not torch.equal(vectors[one], vectors[other])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_batch_has_the_bits_of_single_texts(
    isa: str, threads: None, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    single = torch.cat([model.embed(text, pooling=pooling) for text in TEXTS])
    for options in ({}, {"batch_size": 1}, {"batch_size": 2}, {"batch_size": 3}):
        assert torch.equal(model.embed(TEXTS, pooling=pooling, **options), single)
    assert torch.equal(model.embed(TEXTS[::-1], pooling=pooling), single.flip(0))
    with bitnet_ops.use_isa("scalar"):
        assert torch.equal(model.embed(TEXTS, pooling=pooling), single)
    torch.set_num_threads(1)
    assert torch.equal(model.embed(TEXTS, pooling=pooling), single)
    monkeypatch.setattr(mixin, "TOKENS_AT_A_TIME", 30)
    assert torch.equal(model.embed(TEXTS, pooling=pooling), single)


def test_the_sum_of_a_mean_does_not_depend_on_padding(threads: None) -> None:
    """Numbers that cancel, so that what is left of them is another in any other order."""
    large = torch.randn(150, 70) * 10 ** (30 * torch.rand(150, 70))
    hidden = torch.cat((large, -large))[torch.randperm(300)]
    one = pool(hidden[None], torch.tensor([0]), "mean")
    for padding in (1, 63, 64, 1000):
        filler = torch.full((padding, 70), torch.nan)
        rows = torch.stack([torch.cat((filler, hidden)), torch.ones(300 + padding, 70)])
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(pool(rows, torch.tensor([padding, 0]), "mean")[:1], one)
    total = torch.zeros(70, dtype=torch.float64)
    for row in hidden:
        total += row
    assert torch.equal(one[0], (total / 300).float())
    assert not torch.equal(one[0], hidden.double().mean(0).float()), "numbers that prove nothing"


def test_normalized_vectors() -> None:
    x = torch.randn(5, 300) * torch.tensor([1e-30, 1e30, 1.0, 3.0, 0.0])[:, None]
    lengths = normalized(x).double().norm(dim=-1)
    assert ((lengths[1:4] - 1).abs() <= 2 * U).all()
    assert torch.equal(normalized(x)[2], normalized(x[2]))
    assert torch.equal(normalized(x)[4], torch.zeros(300))
    assert normalized(torch.zeros(0, 4)).shape == (0, 4)


def test_batches_hold_rows_of_like_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixin, "TOKENS_AT_A_TIME", 20)
    rows: list[Any] = [[0] * length for length in (3, 50, 7, 1, 6, 5, 5)]
    assert list(batches(rows, 3)) == [[1], [2, 4], [5, 6, 0], [3]]
    assert list(batches([], 3)) == []


def test_no_text(model: BitNet) -> None:
    assert model.embed([]).shape == (0, 48)
    assert model.embed([], truncate_dim=5).shape == (0, 5)


def ids_of(model: BitNet, text: str, eos: int | None = None, length: int = 256) -> list[int]:
    [ids] = TextReader(model.config, model.tokenizer, eos, length).read([text])
    return list(ids)


def test_long_texts_lose_their_end() -> None:
    """But not the tokens around them."""
    model = tiny_model(context=16)
    plain = model.tokenizer.encode(TEXTS[3]).ids
    assert ids_of(model, TEXTS[3], length=16) == plain[:16]
    around(model.tokenizer)
    user, eos = model.tokenizer.token_to_id(USER), model.tokenizer.token_to_id(EOS)
    assert ids_of(model, TEXTS[3], length=16) == [user, *plain[:14], eos]
    assert ids_of(model, "a wife", length=16) == model.tokenizer.encode("a wife").ids
    assert ids_of(model, TEXTS[3], length=2) == [user, eos]
    assert ids_of(model, TEXTS[3], length=1) == [user]
    assert model.embed(TEXTS[3]).shape == (1, 48)  # longer than the context
    cut = model.tokenizer.decode(plain[:4])
    assert torch.equal(model.embed(TEXTS[3], max_length=6), model.embed(cut))


def test_the_eos_token() -> None:
    """Where the tokenizer has not put it there; a text that is cut keeps it."""
    model = tiny_model()
    assert ids_of(model, "a wife", 0) == [*ids_of(model, "a wife"), 0]
    plain = ids_of(model, TEXTS[3])
    assert ids_of(model, TEXTS[3], 0, length=9) == [*plain[:8], 0]
    assert ids_of(model, "", 0) == [0]
    bare = model.embed("a wife", pooling="last")
    model.embedding_settings = EmbeddingSettings(eos_token_id=0)
    assert not torch.equal(model.embed("a wife"), bare)
    appended = model.embed("a wife")
    around(model.tokenizer, f"$A {EOS}")
    assert ids_of(model, "a wife", 0) == model.tokenizer.encode("a wife").ids
    assert ids_of(model, TEXTS[3], 0, length=9) == [*plain[:8], 0]
    assert torch.equal(model.embed("a wife"), appended)


def test_lengths_in_the_tokenizer_itself_do_not_count() -> None:
    model = tiny_model()
    plain = ids_of(model, TEXTS[3])
    model.tokenizer.enable_truncation(5)
    model.tokenizer.enable_padding(length=7)
    assert ids_of(model, TEXTS[3]) == plain
    assert ids_of(model, "x") == byte_level_tokenizer().encode("x").ids
    assert model.tokenizer.truncation is not None, "the model's own tokenizer has changed"


def test_settings_and_arguments(model: BitNet) -> None:
    prompts = {"query": "It is a truth: ", "document": ""}
    settings = EmbeddingSettings("cls", False, prompts=prompts, default_prompt_name="query", max_length=4)
    other = tiny_model()
    other.embedding_settings = settings
    text = "good fortune"
    raw = model.embed(prompts["query"] + text, pooling="cls", normalize=False, max_length=4)
    assert torch.equal(other.embed(text), raw)
    assert torch.equal(other.embed(text, prompt_name="query"), raw)
    assert torch.equal(other.embed(text, prompt=prompts["query"]), raw)
    assert torch.equal(other.embed(text, normalize=True), normalized(raw))
    assert torch.equal(
        other.embed(text, prompt_name="document", pooling="mean", max_length=200),
        model.embed(text, pooling="mean", normalize=False),
    )
    assert torch.equal(
        model.embed(text, truncate_dim=7), normalized(model.embed(text, normalize=False)[:, :7])
    )
    assert torch.equal(model.embed(text), model.embed(text, pooling="mean", normalize=True))


@pytest.mark.parametrize(
    ("texts", "options", "expected"),
    [
        ("x", {"pooling": "max"}, "pooling: expected 'last' or 'mean' or 'cls', got 'max'"),
        ("x", {"prompt_name": "query"}, "prompt_name: expected None, because .* got 'query'"),
        ("x", {"truncate_dim": 49}, r"truncate_dim: expected an int in \[1, 48\], got 49"),
        ("x", {"truncate_dim": 0}, "truncate_dim"),
        ("x", {"max_length": 257}, r"max_length: expected an int in \[1, 256\], got 257"),
        ("x", {"batch_size": 0}, "batch_size: expected a positive int, got 0"),
        (["x", 3], {}, r"texts\[1\]: expected a text, got int"),
        (["\udc80"], {}, r"texts\[0\]: expected text that UTF-8 can encode"),
    ],
)
def test_wrong_arguments(model: BitNet, texts: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}"):
        model.embed(texts, **options)


def test_models_that_cannot() -> None:
    model = tiny_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="embed: expected a model with a tokenizer"):
        model.embed("x")
    dropping = BitNet(tiny_model().config.replace(dropout=0.1, bos_token_id=None))
    dropping.tokenizer = byte_level_tokenizer()
    with pytest.raises(ValueError, match=r"embed: expected the model in eval mode"):
        dropping.embed("x")
    with pytest.raises(ValueError, match=r"texts\[1\]: expected at least one token, got none"):
        dropping.eval().embed(["x", ""])
    dropping.embedding_settings = EmbeddingSettings(eos_token_id=405)
    with pytest.raises(ValueError, match="eos_token_id: expected an id below 405, got 405"):
        dropping.embed("x")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"pooling": []}, "pooling"),
        ({"normalize": 1}, "EmbeddingSettings.normalize"),
        ({"eos_token_id": -1}, "EmbeddingSettings.eos_token_id"),
        ({"max_length": 0}, "EmbeddingSettings.max_length"),
        ({"max_length": 2.0}, "EmbeddingSettings.max_length"),
        ({"prompts": {"query": 3}}, "EmbeddingSettings.prompts"),
        ({"prompts": []}, "EmbeddingSettings.prompts"),
        ({"default_prompt_name": "query"}, "EmbeddingSettings.default_prompt_name"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}: expected"):
        EmbeddingSettings(**fields)


# As in sentence-transformers


def encoder(**settings: Any) -> SentenceEncoder:
    model = tiny_model()
    model.embedding_settings = EmbeddingSettings(**settings)
    return SentenceEncoder(model)


def test_the_signature_is_that_of_sentence_transformers() -> None:
    """The parameters of SentenceTransformer.encode 2.7 to 6.2 that are supported, in its order."""
    parameters = inspect.signature(SentenceEncoder.encode).parameters
    assert {name: one.default for name, one in list(parameters.items())[2:]} == {
        "prompt_name": None,
        "prompt": None,
        "batch_size": 32,
        "show_progress_bar": None,
        "output_value": "sentence_embedding",
        "precision": "float32",
        "convert_to_numpy": True,
        "convert_to_tensor": False,
        "device": None,
        "normalize_embeddings": False,
        "truncate_dim": None,
    }


def test_what_encode_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    one = encoder(pooling="last")
    expected = one.model.embed(TEXTS)
    array = one.encode(TEXTS)
    assert isinstance(array, numpy.ndarray)
    assert array.dtype == numpy.float32
    assert torch.equal(torch.from_numpy(array), expected)
    assert one.encode(TEXTS[0]).shape == (48,)
    assert torch.equal(one.encode(TEXTS, convert_to_tensor=True), expected)
    assert torch.equal(one.encode(TEXTS[0], convert_to_tensor=True), expected[0])
    listed = one.encode(tuple(TEXTS), convert_to_numpy=False)
    assert isinstance(listed, list)
    assert torch.equal(torch.stack(listed), expected)
    assert torch.equal(torch.from_numpy(one.encode(numpy.array(TEXTS))), expected)
    assert one.encode([]).shape == (0, 48)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert torch.equal(one.encode(TEXTS), expected)


def test_normalisation_and_dimensions() -> None:
    """A model's own normalisation comes before the cut, that of the call behind it."""
    raw = encoder(normalize=False).encode(TEXTS, convert_to_tensor=True)
    one = encoder()
    assert torch.equal(one.encode(TEXTS, convert_to_tensor=True), normalized(raw))
    assert torch.equal(
        encoder(normalize=False).encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True),
        normalized(raw),
    )
    cut = one.encode(TEXTS, convert_to_tensor=True, truncate_dim=7)
    assert torch.equal(cut, normalized(raw)[:, :7])
    again = one.encode(TEXTS, convert_to_tensor=True, truncate_dim=7, normalize_embeddings=True)
    assert torch.equal(again, normalized(cut))
    assert one.get_sentence_embedding_dimension() == 48
    short = SentenceEncoder(one.model, truncate_dim=7)
    assert torch.equal(short.encode(TEXTS, convert_to_tensor=True), cut)
    assert short.get_sentence_embedding_dimension() == short.get_embedding_dimension() == 7


def test_prompts() -> None:
    prompts = {"query": "of a ", "passage": "want ", "corpus": "x"}
    one = encoder(prompts=prompts)
    text = "good fortune"

    def same(vector: Any, text: str) -> bool:
        return torch.equal(torch.as_tensor(vector), one.model.embed(text)[0])

    assert same(one.encode(text), text)
    assert same(one.encode(text, "query"), "of a good fortune")
    assert same(one.encode(text, prompt_name="query", prompt="x"), "xgood fortune")
    assert same(one.encode_query(text), "of a good fortune")
    assert same(one.encode_document(text), "want good fortune")
    assert same(one.encode_document(text, prompt_name="corpus"), "xgood fortune")
    assert same(one.encode_query(text, prompt=""), text)
    one.prompts["other"] = "a "
    assert same(one.encode(text, "other"), "a good fortune")
    default = SentenceEncoder(one.model, prompts={"p": "of a "}, default_prompt_name="p")
    assert same(default.encode(text), "of a good fortune")
    assert same(default.encode_query(text), "of a good fortune")
    with pytest.raises(ValueError, match=r"prompt_name: expected 'p', got 'query'"):
        default.encode(text, "query")
    with pytest.raises(ValueError, match="default_prompt_name"):
        SentenceEncoder(one.model, default_prompt_name="missing")


def test_similarity() -> None:
    a, b = torch.randn(3, 8), torch.randn(2, 8)
    one = encoder()
    expected = torch.nn.functional.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)
    assert (one.similarity(a, b) - expected).abs().max() < 20 * U
    assert torch.equal(one.similarity(a.numpy(), list(b.numpy())), one.similarity(a, b))
    assert one.similarity(a[0], b).shape == (1, 2)
    pairs = torch.nn.functional.cosine_similarity(a.double()[:2], b.double())
    assert (one.similarity_pairwise(a[:2], b) - pairs).abs().max() < 20 * U


def test_the_longest_text_can_be_set() -> None:
    one = encoder(max_length=100)
    assert one.max_seq_length == 100
    one.max_seq_length = 5
    assert torch.equal(
        one.encode(TEXTS[3], convert_to_tensor=True), one.model.embed(TEXTS[3], max_length=5)[0]
    )
    one.max_seq_length = 10**9
    assert one.max_seq_length == 256
    with pytest.raises(ValueError, match="max_seq_length: expected a positive int, got 0"):
        one.max_seq_length = 0


@pytest.mark.parametrize(
    "options",
    [{"output_value": "token_embeddings"}, {"precision": "int8"}, {"device": "meta"}, {"truncate_dim": 49}],
)
def test_what_is_not_supported_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        encoder().encode("x", **options)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    model.embedding_settings = EmbeddingSettings(prompts={"query": "of a "})
    model.save_pretrained(tmp_path_factory.mktemp("model"))
    return tmp_path_factory.getbasetemp() / "model0"


def run(*arguments: str | Path, code: int = 0, stdin: str | None = None) -> str:
    from bitnet_ops.cli.main import commands

    result = CliRunner().invoke(commands, ["embed", *map(str, arguments)], input=stdin)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def vectors_of(output: str) -> Tensor:
    return torch.tensor([json.loads(line) for line in output.splitlines()])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    model = bitnet_ops.from_pretrained(folder)
    texts = ["It is a truth", "", "a wife\f"]
    expected = model.embed(texts)
    assert torch.equal(vectors_of(run("--model", folder, *texts)), expected)
    (tmp_path / "lines").write_bytes(b"It is a truth\r\n\na wife\f\n")
    for name in ("a.jsonl", "a.npy", "a.safetensors"):
        assert run("--model", folder, "--file", tmp_path / "lines", "--out", tmp_path / name) == ""
    assert torch.equal(vectors_of((tmp_path / "a.jsonl").read_text()), expected)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["embeddings"], expected)
    numpy = pytest.importorskip("numpy")
    assert torch.equal(torch.from_numpy(numpy.load(tmp_path / "a.npy")), expected)
    assert torch.equal(vectors_of(run("--model", folder, "--file", "-", stdin="\n".join(texts))), expected)
    assert run("--model", folder, "--file", "-", stdin="") == ""


def test_options_of_the_command(folder: Path) -> None:
    model = bitnet_ops.from_pretrained(folder)
    for options, arguments in (
        (("--prompt-name", "query"), {"prompt_name": "query"}),
        (("--prompt", "want "), {"prompt": "want "}),
        (("--pooling", "mean", "--no-normalize"), {"pooling": "mean", "normalize": False}),
        (("--truncate-dim", "5", "--max-length", "2"), {"truncate_dim": 5, "max_length": 2}),
    ):
        expected = model.embed("good fortune", **arguments)  # type: ignore[arg-type]
        assert torch.equal(vectors_of(run("--model", folder, *options, "good fortune")), expected)


def test_wrong_use_of_the_command(folder: Path, tmp_path: Path) -> None:
    assert "expected TEXT or --file" in run(code=2)
    assert "expected TEXT or --file" in run("x", "--file", "-", code=2)
    assert "--prompt or --prompt-name" in run("x", "--prompt", "a", "--prompt-name", "b", code=2)
    assert "--out: expected" in run("x", "--out", "a.csv", code=2)
    assert "prompt_name: expected 'query'" in run("--model", folder, "x", "--prompt-name", "b", code=1)
    (tmp_path / "latin").write_bytes(b"\xe9")
    assert "codec can't decode" in run("--model", folder, "--file", tmp_path / "latin", code=1)


@pytest.mark.slow
def test_what_sentence_transformers_gives(tmp_path: Path) -> None:
    """The same folder in both: a dense body, prompts, texts beyond the longest, and each kind of pooling.

    Both compute hidden states in float32 in another order: errors grow by a few u a layer, 1e-5 is far above.
    """
    theirs = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 400, "hidden_size": 60, "intermediate_size": 100, "num_hidden_layers": 3,
        "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 20, "max_position_embeddings": 64,
        "sliding_window": 7, "sliding_window_pattern": 2, "initializer_range": 0.3,
    }  # fmt: skip
    folder = tmp_path / "body"
    transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**sizes)).save_pretrained(folder)
    tokenizer = around(byte_level_tokenizer(), f"$A {EOS}")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, model_max_length=64
    ).save_pretrained(folder)
    body = models.Transformer(str(folder), max_seq_length=30)
    texts = [text for text in TEXTS if text]  # they refuse an empty one
    for mode in ("lasttoken", "mean", "cls"):
        modules = [body, models.Pooling(60, mode), models.Normalize()]
        whole = theirs.SentenceTransformer(modules=modules, prompts={"query": "of a "}, device="cpu")
        whole.save(str(tmp_path / mode))
        ours = SentenceEncoder(bitnet_ops.from_pretrained(tmp_path / mode, linear=torch.nn.Linear))
        assert ours.max_seq_length == whole.max_seq_length == 30
        assert ours.prompts["query"] == whole.prompts["query"]
        for options in ({}, {"prompt_name": "query"}, {"truncate_dim": 7}, {"convert_to_tensor": True}):
            got, expected = ours.encode(texts, **options), whole.encode(texts, **options)
            assert type(got) is type(expected)
            assert torch.as_tensor(got).shape == torch.as_tensor(expected).shape
            assert (torch.as_tensor(got) - torch.as_tensor(expected)).abs().max() < 1e-5, (mode, options)
        got, expected = ours.encode_query(texts[0]), whole.encode_query(texts[0])
        assert abs(got - expected).max() < 1e-5
        assert (ours.similarity(got, expected) - whole.similarity(got, expected)).abs().max() < 1e-5
