"""A real model: gemma-3-270m as a GGUF file, dense, against transformers' classes with the file's numbers.

It is the pretrained model, without a chat template. Its embedding has type Q8_0, of which our reader makes
float16. So the reference has that embedding for what is computed with it, and the file's own for what the
rounding costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

pytest.importorskip("gguf")
pytest.importorskip("transformers")
import gguf
from gemma_270m import gemma_file, their_gemma_270m
from their_gemma import exact_gemma
from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer

from bitnet_ops import BitNet, DecoderConfig, KVCache, from_pretrained
from bitnet_ops.cli.main import commands
from bitnet_ops.generation.chat import ChatSession

pytestmark = pytest.mark.slow

PROSE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is "
    "considered the rightful property of some one or other of their daughters."
)
CODE = """\
def fib(n: int) -> int:
    return n if n < 2 else fib(n - 1) + fib(n - 2)


for i in range(10):
\tprint(f"{i:>3}: {fib(i)}")
"""
LANGUAGES = (
    "Die Hauptstadt von Frankreich ist Paris. 法国的首都是巴黎。 Столица Франции — Париж. "
    "フランスの首都はパリです。 عاصمة فرنسا هي باريس. 🙂 naïve café"
)
LIST = "\n".join(f"{n}. The square of {n} is {n * n}, and its cube is {n**3}." for n in range(1, 60))

TEXTS = {"prose": PROSE, "code": CODE, "languages": LANGUAGES, "long": LIST}
LONG = 700  # longer than the window of 512
LAST = 32
"""Tokens of the long text whose logits are compared; the others take half a minute in float64."""

MORE_TEXTS = [
    *TEXTS.values(), "", " ", "a", "Hello  world", " Hello", "Hello ", "\n", "\n\n\n\tx\r\n", "3.14159e-10",
    "12345678901234567890", "I'll don't WE'VE", "HTTP/1.1 404 Not Found", "user@example.com",
    "<b>bold</b><br/>", "https://example.com/a?b=c&d=%20#e", "  four\n    spaces\n        more",
    "| a | b |\n|---|---|\n| 1 | 2 |", "Zażółć gęślą jaźń", "Ελληνικά", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "안녕하세요 세계", "שלום עולם", "👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈🇫🇷", "e\u0301 é \ufb01 \u216b ½",
    "\u00a0\u200b\u2028", "\U0001d518\U0001d52b \U0010fffd", "∑∫√≠≤ → ⇒ ∀x∈M", "CamelCase snake_case",
    "a" * 100, "-" * 70, "▁ is U+2581", "aa bb  cc   dd    ee",
]  # fmt: skip

TEMPLATE = (
    "{{ bos_token }}{% set first = '' %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Of conversations as the tuned models of this family have them; the file has none."""

TURNS = [
    {"role": "user", "content": "What is the capital of France? "},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of\nItaly?"},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The GGUF file."""
    folder = tmp_path_factory.mktemp("gemma")
    yield gemma_file(folder)
    for path in folder.iterdir():  # not the folder of those who have it already
        path.unlink()


@pytest.fixture(scope="module")
def reader(file: Path) -> Any:
    """The same file, read by the gguf package, which takes 10 s."""
    return gguf.GGUFReader(file)


@pytest.fixture(scope="module")
def model(file: Path) -> BitNet:
    """Ours."""
    return from_pretrained(file, linear=nn.Linear)


@pytest.fixture(scope="module")
def theirs(reader: Any) -> Gemma3ForCausalLM:
    """Transformers' model with the numbers of the file."""
    return their_gemma_270m(reader)


@pytest.fixture(scope="module")
def metadata(reader: Any) -> dict[str, Any]:
    """What the file says of its tokenizer."""
    prefix = "tokenizer.ggml."
    return {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }


@pytest.fixture(scope="module")
def their_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Transformers' tokenizer of the file."""
    named = {
        "model": "tokenizer_type",
        "pre": "pre_tokenizer_type",
        "unknown_token_id": "unk_token_id",
        "padding_token_id": "pad_token_id",
        "add_space_prefix": "add_prefix_space",
    }
    fields = {named.get(key, key): value for key, value in metadata.items()}
    tokenizer, _ = convert_gguf_tokenizer("gemma3", fields)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@dataclass
class Logits:
    """Of one text, [1, T, V], or of its last tokens.

    Attributes:
        ids: int64 [1, the text's tokens].
        last: how many tokens have logits; 0 for all.
        ours: float32.
        theirs: float32, with our float16 embedding.
        exact: float64, with our float16 embedding.
        unrounded: float64, with the file's embedding; None for the long text.
        loss: the mean of ours over all tokens, in nats.
    """

    ids: Tensor
    last: int
    ours: Tensor
    theirs: Tensor
    exact: Tensor
    unrounded: Tensor | None
    loss: float

    def error(self, logits: Tensor) -> Tensor:
        """The mean difference from the exact ones."""
        return (logits - self.exact).abs().mean()


@pytest.fixture(scope="module")
def logits(model: BitNet, theirs: Gemma3ForCausalLM) -> dict[str, Logits]:
    """Those of `TEXTS`."""
    found = {}
    embedding = theirs.model.embed_tokens.weight
    stored = embedding.data
    assert model.tokenizer is not None
    for name, text in TEXTS.items():
        ids = torch.tensor([model.tokenizer.encode(text).ids[:LONG]])
        last = LAST if name == "long" else 0
        embedding.data = stored
        unrounded = None if last else exact_gemma(theirs, ids)
        embedding.data = model.model.embed_tokens.weight.float()
        ours = model(ids)
        loss = nn.functional.cross_entropy(ours[0, :-1], ids[0, 1:]).item()
        found[name] = Logits(
            ids, last, ours[:, -last:].clone(), theirs(ids, logits_to_keep=last).logits,
            exact_gemma(theirs, ids, last), unrounded, loss,
        )  # fmt: skip
    embedding.data = stored
    assert [20 <= len(one.ids[0]) <= 200 for one in found.values()] == [True, True, True, False]
    assert len(found["long"].ids[0]) == LONG
    return found


def test_the_config(model: BitNet) -> None:
    assert model.config == DecoderConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        activation_bits=16,
        rope_theta=1e6,
        local_rope_theta=1e4,
        window=512,
        local_layers=tuple(layer for layer in range(18) if layer not in (5, 11, 17)),
        embedding_scale=640**0.5,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    assert model.generation_config["eos_token_id"] == [1, 106]  # and <end_of_turn>
    assert model.chat_template is None


def test_weights_are_those_of_the_gguf_package(model: BitNet, theirs: Gemma3ForCausalLM) -> None:
    count = 0
    for name, module in theirs.named_modules():
        if "_proj" in name:
            assert torch.equal(model.get_submodule(name).weight, module.weight), name
        elif "norm" in name:
            assert torch.equal(model.get_submodule(name).weight, 1 + module.weight), name
        else:
            continue
        count += 1
    assert count == 18 * 13 + 1
    assert torch.equal(model.model.embed_tokens.weight, theirs.model.embed_tokens.weight.half())


def test_logits(logits: dict[str, Logits]) -> None:
    """Our mean error is at most twice that of transformers in float32, pooled over the texts."""
    ours = torch.stack([one.error(one.ours) for one in logits.values()])
    theirs = torch.stack([one.error(one.theirs) for one in logits.values()])
    spread = torch.stack([one.exact.std() for one in logits.values()])
    print(f"\nours {ours.tolist()}\ntransformers {theirs.tolist()}\nspread of logits {spread.tolist()}")
    assert (theirs < 1e-5 * spread).all(), "the float64 model is not the same model"
    assert ours.mean() <= 2 * theirs.mean()


def test_logits_with_a_cache(model: BitNet, logits: dict[str, Logits]) -> None:
    """Prefill in pieces, then token by token: likewise, for torch's products depend on the number of rows."""
    errors = []
    for one in (logits["code"], logits["long"]):
        length = one.ids.shape[1]
        cache = KVCache(model.config, 1, length)
        pieces = one.ids.split([10, length - 10 - 24, *[1] * 24], dim=1)
        steps = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)[:, -one.last :]
        errors.append(torch.stack((one.error(steps), one.error(one.theirs))))
    ours, theirs = torch.stack(errors).mean(0)
    print(f"\nours {ours:.3g}, transformers {theirs:.3g}")
    assert ours <= 2 * theirs


def test_equal_bits_with_a_cache(model: BitNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a product does not depend on the number of rows: everything else is ours, and never does."""
    plain = nn.Linear.forward

    def by_rows(self: nn.Linear, x: Tensor) -> Tensor:
        rows = [plain(self, row) for row in x.flatten(0, -2).split(1)]
        return torch.cat(rows).unflatten(0, x.shape[:-1])

    monkeypatch.setattr(nn.Linear, "forward", by_rows)
    ids = model.encode(PROSE)["input_ids"][:, :30]
    whole = model(ids)
    for pieces in (ids.split([11, 12, *[1] * 7], dim=1), ids.split(1, dim=1)):
        cache = KVCache(model.config, 1, ids.shape[1])
        steps = [model(piece, cache=cache) for piece in pieces]
        assert torch.equal(torch.cat(steps, dim=1), whole)


def test_what_the_float16_embedding_costs(logits: dict[str, Logits]) -> None:
    """A number of Q8_0 has 18 bits, of which float16 keeps 11: off by at most u = 2^-11 of itself.

    Logits are sums of products with such numbers, and inputs are such numbers, so that both together are
    taken to move a logit by less than 2 u of its spread. Measured: 0.5 to 1.3 u.
    """
    for name, one in logits.items():
        if one.unrounded is None:
            continue
        moved = (one.exact - one.unrounded).abs().mean()
        before, after = one.unrounded.log_softmax(-1), one.ours.double().log_softmax(-1)
        divergence = (before.exp() * (before - after)).sum(-1).mean()
        print(f"\n{name}: {moved:.3g} of {one.unrounded.std():.3g}, KL {divergence:.3g}")
        assert 10 * one.error(one.ours) < moved < 2 * 2**-11 * one.unrounded.std()
        assert divergence < 1e-5


def test_the_settings_fit_the_weights(logits: dict[str, Logits]) -> None:
    """A mistake on both sides would show here, where the model has to copy what is far away.

    Measured: 0.434. With other settings: RoPE bases 0.60 to 1.23, the order of layers 0.60 to 1.23, a window
    of 64 tokens 0.464, larger scores (scalar 160) 0.468, silu 0.572.
    """
    assert logits["long"].loss < 0.45


def test_the_tokenizer(model: BitNet, their_tokenizer: PreTrainedTokenizerFast) -> None:
    ours = model.tokenizer
    assert ours is not None
    assert ours.encode("Hi").ids == [2, 10979]
    for text in MORE_TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == their_tokenizer.encode(text, add_special_tokens=False), repr(text)
        assert ours.decode(ids) == their_tokenizer.decode(ids) == text.replace("▁", " ")


def test_the_tokenizer_and_sentencepiece(model: BitNet, metadata: dict[str, Any]) -> None:
    library = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs the package protobuf")
    made = proto.ModelProto()
    for token, score, type_ in zip(
        metadata["tokens"], metadata["scores"], metadata["token_type"], strict=True
    ):
        kind = 2 if token == "<unk>" else type_  # the file calls it a control token
        made.pieces.add(piece=token.replace(" ", "▁") if kind == 4 else token, score=score, type=kind)
    made.trainer_spec.model_type = made.trainer_spec.BPE
    made.trainer_spec.byte_fallback = True
    for name in ("pad", "eos", "bos", "unk"):
        setattr(made.trainer_spec, f"{name}_id", metadata["tokens"].index(f"<{name}>"))
    made.normalizer_spec.name = "identity"
    made.normalizer_spec.add_dummy_prefix = made.normalizer_spec.remove_extra_whitespaces = False
    theirs = library.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(made.SerializeToString())
    ours = model.tokenizer
    assert ours is not None
    for text in [*MORE_TEXTS, "a" + " " * 50 + "b"]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text), repr(text)
        assert ours.decode(ids) == theirs.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat_template(
    model: BitNet,
    their_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    system: str | None,
) -> None:
    with pytest.raises(ValueError, match="expected a model with a chat template"):
        ChatSession(model)
    monkeypatch.setattr(model, "chat_template", TEMPLATE)
    session = ChatSession(model, system)
    messages = [*session.messages, *TURNS]
    for prompt in (True, False):
        options: dict[str, Any] = {"chat_template": TEMPLATE, "add_generation_prompt": prompt}
        ours = session.render(messages, add_generation_prompt=prompt)
        assert ours == their_tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert ours.startswith(f"<bos><start_of_turn>user\n{'' if system is None else 'Be brief.'}")
        assert session.tokenizer is not None
        ids = session.tokenizer.encode(ours, add_special_tokens=False).ids
        assert ids == their_tokenizer.apply_chat_template(messages, **options)["input_ids"]
        assert ids[:2] == [2, 105]
        assert ids.count(105) == 3 + prompt
        assert ids.count(106) == 3


@pytest.mark.parametrize(
    "prompt",
    [
        "What is the capital of France?",
        "Question: What is the capital of France?\nAnswer:",
        "The capital of France is the city of",
    ],
)
def test_a_sensible_answer(model: BitNet, prompt: str) -> None:
    """The model is not tuned to answer, but of this it knows what is likely to follow."""
    text = "".join(model.stream(prompt, max_new_tokens=8, do_sample=False))
    assert "Paris" in text


@pytest.mark.parametrize("arguments", [["generate", "Hello"], ["chat"]])
def test_the_command_line_refuses_it(file: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(commands, [*arguments, "--model", str(file)])
    assert result.exit_code == 1
    assert f"{file}: tensor 'blk.0.attn_q.weight': expected ternary weights (TQ1_0, " in result.output
    assert "got Q5_0, such as -0.003784, " in result.output
    hint = "a model that is not ternary loads with linear=torch.nn.Linear, from Python only"
    assert result.output.rstrip().endswith(hint)
