"""Perplexity: every token once, from the right context; equal to transformers; in bounded memory."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from text_models import CORPUS, tiny_model
from tiny_checkpoints import Sizes
from torch import Tensor

import bitnet_ops
from bitnet_ops import ops
from bitnet_ops import perplexity as measure
from bitnet_ops.cli.main import commands

TEXT = "".join(CORPUS)


@pytest.mark.parametrize(
    ("context", "stride", "tokens"),
    [(8, 3, 40), (8, 8, 41), (8, 8, 40), (8, 1, 20), (1, 1, 5), (64, 32, 30), (64, 32, 2)],
)
def test_every_token_once_from_its_context(context: int, stride: int, tokens: int) -> None:
    """Against single tokens, one by one: logits are the same bits, so only the order of the sum differs."""
    model = tiny_model()
    ids = model.encode(TEXT)["input_ids"][0, :tokens]
    expected = []
    end = min(context, tokens - 1)  # of the window's inputs
    for target in range(1, tokens):
        if target > end:
            end = min(end + stride, tokens - 1)
        logits = model(ids[None, max(0, end - context) : target])[0, -1]
        expected.append(F.cross_entropy(logits, ids[target]).double())
    loss = measure(model, ids.tolist(), context=context, stride=stride)
    assert loss.tokens == tokens - 1
    assert loss.size_bytes is None
    assert loss.bits_per_byte is None
    assert loss.nats == pytest.approx(sum(expected).item(), rel=tokens * 2**-52)


def test_figures_of_a_text() -> None:
    model = tiny_model(context=64)
    loss = measure(model, TEXT)
    ids = model.encode(TEXT)["input_ids"][0].tolist()
    assert loss == bitnet_ops.TextLoss(loss.nats, len(ids) - 1, len(TEXT.encode()))
    assert loss.nats == measure(model, ids, context=64, stride=32).nats
    assert loss.perplexity == math.exp(loss.nats / (len(ids) - 1))
    assert loss.bits_per_byte == pytest.approx(loss.nats / len(TEXT.encode()) / 0.6931471805599453)
    assert bitnet_ops.TextLoss(1e6, 1).perplexity == math.inf


@pytest.mark.parametrize("form", ["autobitlinear", "bitlinear"])
def test_equals_transformers(tmp_path: Path, form: str) -> None:
    """A loss, ln sum exp(z) - z_t, moves by at most 2 max |dz| when the scores z move by dz."""
    pytest.importorskip("transformers")
    from their_models import make_pair

    pair = make_pair(tmp_path, Sizes(vocab=97, hidden=60, intermediate=100, heads=5, kv_heads=1), form)
    ids = torch.randint(97, (58,), generator=torch.Generator().manual_seed(1))
    with torch.compiler.set_stance("force_eager"):
        windows = [
            (ids[None, begin : begin + 16], ids[begin + 1 : begin + 17], 0 if begin == 0 else 8)
            for begin in range(0, 41, 8)
        ]
        windows.append((ids[None, 41:57], ids[42:58], 15))  # 56 is scored, 57 is left
        theirs, bound = 0.0, 0.0
        for inputs, targets, fresh in windows:
            logits = pair.theirs(inputs).logits[0, fresh:].double()
            theirs += F.cross_entropy(logits, targets[fresh:], reduction="sum").item()
            moved = (pair.ours(inputs)[0, fresh:].double() - logits).abs().amax(-1)
            bound += 2 * moved.sum().item() + 16 * 2**-20  # roundings of ours in float32, of losses below 16
    loss = measure(pair.ours, ids.tolist(), context=16, stride=8)
    assert bound < 0.01 * theirs, "the bound proves nothing"
    assert abs(loss.nats - theirs) <= bound


def test_scores_are_held_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    whole = measure(model, TEXT, context=16)
    rows = []
    lm_head = ops.lm_head

    def counting(x: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(x))
        return lm_head(x, weight)

    monkeypatch.setattr(ops, "lm_head", counting)
    # The package's attribute of this name is the function.
    monkeypatch.setattr(
        sys.modules["bitnet_ops.evaluation.perplexity"], "MOST_LOGITS", 4 * model.config.vocab_size - 1
    )
    assert measure(model, TEXT, context=16) == whole
    assert max(rows) == 3
    assert sum(rows) == whole.tokens


def test_mode_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().train()
    measure(model, TEXT, context=16)
    assert model.training

    def interrupted(x: Tensor, weight: Tensor) -> Tensor:
        assert not model.training
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "lm_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(model, TEXT, context=16)
    assert model.training


def test_errors() -> None:
    model = tiny_model(context=32)
    for options, match in (
        ({"context": 33}, "context: expected 1 to 32 tokens, as many as the model takes, got 33"),
        ({"context": 0}, "context: expected 1 to 32"),
        ({"context": 8, "stride": 9}, "stride: expected 1 to 8 tokens, the context, got 9"),
        ({"stride": 0}, "stride: expected 1 to 32"),
    ):
        with pytest.raises(ValueError, match=match):
            measure(model, TEXT, **options)
    with pytest.raises(ValueError, match=r"text: expected at least two tokens, .* got 1"):
        measure(model, [3])
    with pytest.raises(ValueError, match="got 9999"):
        measure(model, [3, 9999])
    model.tokenizer = None
    with pytest.raises(ValueError, match="expected a model with a tokenizer"):
        measure(model, TEXT)


def test_scores_that_are_no_numbers() -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        measure(model, TEXT)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["eval", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    model = tiny_model(context=64)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    loss = measure(model, TEXT, context=32, stride=8)
    result = run("--model", tmp_path / "model", "--text", file, "--context", 32, "--stride", 8)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        f"perplexity      {math.exp(loss.nats_per_token):.4f} per token",
        f"cross-entropy   {loss.nats_per_token:.4f} nats per token",
        f"bits per byte   {loss.bits_per_byte:.4f}",
        f"scored          {len(model.encode(TEXT)['input_ids'][0]) - 1} tokens, {len(TEXT.encode())} bytes",
    ]


def test_command_without_what_it_needs(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc\xff")
    for arguments, code, message in (
        ((), 2, "Missing option '--text'"),
        (("--text", tmp_path / "none.txt"), 2, "does not exist"),
        (("--text", bad), 1, "expected UTF-8 text, got a byte that is none at 3"),
        (("--text", __file__, "--context", 100_000), 1, "context: expected 1 to 1024"),
    ):
        result = run(*arguments)
        assert result.exit_code == code
        assert message in result.stderr
        assert "Traceback" not in result.stderr
