"""Training: what is held out, determinism, resuming, the folder that comes out."""

import io
import itertools
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from bitnet_ops import BitLinearQAT, BitNet, BitNetConfig, from_pretrained
from bitnet_ops.cli.main import commands
from bitnet_ops.training import corpus as text
from bitnet_ops.training.loop import (
    CHECKPOINT,
    LOG,
    TrainOptions,
    evaluate,
    make_optimizers,
    schedule,
    train,
)

CONFIG = BitNetConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    dropout=0.1,
)
OPTIONS = TrainOptions(
    steps=6, batch_size=2, sequence_length=16, evaluate_every=2, device="cpu", autocast=False
)


def novel(chapters: int = 20) -> str:
    """A text with regularities that a model can learn, and line breaks inside its paragraphs."""
    names = ["Emma", "Anne", "Elinor", "Fanny", "Jane", "Lucy"]
    parts = []
    for chapter in range(chapters):
        lines = [
            f"{names[(chapter + i) % 6]} walked to the village\nwith {names[(chapter * i) % 6]},  happy."
            for i in range(12)
        ]
        parts.append(f"CHAPTER {chapter + 1}\n\n\n" + "\n\n".join(lines))
    return "\n\n".join(parts)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Models this small lose more to handing out work than they gain, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def novel_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(novel())
    return path


@pytest.fixture(scope="module")
def corpus(novel_file):
    return text.read_corpus(novel_file, vocab_size=300, held_out=0.1)


def test_whole_chapters_are_held_out_and_nothing_is_lost(corpus):
    parts = (corpus.train, corpus.validation, corpus.test)
    chapters = [chapter for part in parts for chapter in part.chapters]
    assert sorted(chapters) == sorted(
        text.split_chapters(text.normalise(novel(), keep_lines=False), text.CHAPTER_PATTERN)
    )
    assert len(set(chapters)) == 20
    assert all(chapter.startswith("CHAPTER") for chapter in chapters)
    size = sum(map(len, chapters))
    longest = max(map(len, chapters))
    for part in parts[1:]:  # the tenth that was asked for, made up by its last chapter
        assert 0.1 * size <= sum(map(len, part.chapters)) < 0.1 * size + longest


def test_another_seed_holds_out_other_chapters(novel_file, corpus):
    other = text.read_corpus(novel_file, vocab_size=300, held_out=0.1, seed=1)
    assert other.test.chapters != corpus.test.chapters


def test_paragraphs_are_joined_unless_lines_are_kept():
    raw = "One  line \r\nand another.\n \n\n\nA  new paragraph.\n"
    assert text.normalise(raw, keep_lines=False) == "One line and another.\n\nA new paragraph."
    assert text.normalise("a \nb\n\n\nc", keep_lines=True) == "a \nb\n\nc"


def test_a_text_without_chapters_is_cut_at_paragraphs():
    plain = "\n\n".join(f"Paragraph {i} of many." for i in range(500))
    pieces = text.split_chapters(plain, text.CHAPTER_PATTERN)
    assert 90 <= len(pieces) <= text.PIECES
    assert "\n\n".join(pieces) == plain
    assert all(piece.startswith("Paragraph") for piece in pieces)


def test_ids_decode_to_the_chapters(corpus):
    decoded = corpus.tokenizer.decode(corpus.test.ids.tolist(), skip_special_tokens=False)
    assert (
        decoded == "".join(text.END_OF_TEXT + chapter for chapter in corpus.test.chapters) + text.END_OF_TEXT
    )
    odd = "naïve café — 日本 \x00\t"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(odd).ids) == odd


@pytest.mark.parametrize(("content", "says"), [(b"short", "hold out"), (b"\xff\xfe caf\xe9" * 99, "UTF-8")])
def test_unfit_text_is_refused(tmp_path, content, says):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        text.read_corpus(tmp_path / "bad.txt", vocab_size=300)


def weights(result):
    return result.model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_same_seed_same_weights_and_resuming_changes_nothing(tmp_path, corpus, optimizer, monkeypatch):
    options = TrainOptions(**{**vars(OPTIONS), "optimizer": optimizer})
    whole = train(CONFIG, corpus, options, tmp_path / "a", progress=False)
    again = train(CONFIG, corpus, options, tmp_path / "b", progress=False)
    assert same(weights(whole), weights(again))

    other_seed = TrainOptions(**{**vars(options), "seed": 1})
    assert not same(
        weights(whole), weights(train(CONFIG, corpus, other_seed, tmp_path / "c", progress=False))
    )

    # Stop the third run in the middle of a step after its second checkpoint.
    calls = 0
    clip = nn.utils.clip_grad_norm_

    def stop_at_fifth(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", stop_at_fifth)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, corpus, options, tmp_path / "d", progress=False)
    torch.rand(100)  # the generator of this process may stand anywhere
    resumed = train(CONFIG, corpus, options, tmp_path / "d", resume=True, progress=False)
    assert same(weights(whole), weights(resumed))
    assert resumed.best_step == whole.best_step
    log = [json.loads(line) for line in (tmp_path / "d" / LOG).read_text().splitlines()]
    assert [row["step"] for row in log] == [2, 4, 6]


def test_resuming_needs_a_checkpoint_of_the_same_run(tmp_path, corpus):
    with pytest.raises(FileNotFoundError, match=CHECKPOINT):
        train(CONFIG, corpus, OPTIONS, tmp_path, resume=True, progress=False)
    train(CONFIG, corpus, OPTIONS, tmp_path, progress=False)
    changed = TrainOptions(**{**vars(OPTIONS), "learning_rate": 1.0})
    with pytest.raises(ValueError, match="same settings"):
        train(CONFIG, corpus, changed, tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("full_precision", [False, True])
def test_training_learns_and_keeps_the_best_weights(tmp_path, corpus, full_precision):
    options = TrainOptions(
        **{**vars(OPTIONS), "steps": 80, "evaluate_every": 20, "full_precision": full_precision}
    )
    result = train(CONFIG, corpus, options, tmp_path, progress=False)
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    held_out = [row["validation"]["nats_per_token"] for row in log]
    assert held_out[-1] < 0.7 * math.log(CONFIG.vocab_size)
    best = min(range(len(log)), key=held_out.__getitem__)
    assert result.best_step == log[best]["step"]
    again = evaluate(result.model, corpus.validation, options.sequence_length)
    # The batches are those of training's evaluation but for their size, so only sums differ in order.
    assert again.nats_per_token == pytest.approx(held_out[best], rel=1e-5)


def test_evaluate_scores_every_token_once(corpus):
    model = BitNet(CONFIG).eval()
    ids = corpus.test.ids
    got = evaluate(model, corpus.test, sequence_length=len(ids))
    with torch.inference_mode():
        wanted = F.cross_entropy(model(ids[None, :-1])[0], ids[1:]).item()
    assert got.nats_per_token == pytest.approx(wanted, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(
        wanted * (len(ids) - 1) / math.log(2) / corpus.test.size_bytes, rel=1e-5
    )
    # With no attention to look back, the context does not matter, and windows must give the same mean.
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.attn_sub_norm.weight)
    short = evaluate(model, corpus.test, sequence_length=10)
    long = evaluate(model, corpus.test, sequence_length=len(ids))
    assert short.nats_per_token == pytest.approx(long.nats_per_token, rel=1e-5)


def test_evaluation_shows_its_progress(corpus, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, *rest, **options):
            super().__init__(*rest, **{**options, "file": io.StringIO(), "disable": False})
            self.quiet = options["disable"]
            bars.append(self)

    # The package's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["bitnet_ops.evaluation.perplexity"], "tqdm", Bar)
    model = BitNet(CONFIG)
    evaluate(model, corpus.test, 16)
    evaluate(model, corpus.test, 16, progress=True)
    assert [bar.quiet for bar in bars] == [True, None]  # None: only on a terminal
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [len(corpus.test.ids) - 1] * 2


def test_schedule_rises_and_falls():
    options = TrainOptions(steps=1000, warmup=0.1, final_learning_rate=0.05)
    rates = [schedule(step / 1000, options) for step in range(1001)]
    assert 0 < rates[0] < 0.02
    assert rates[100] == pytest.approx(1)
    assert rates[1000] == pytest.approx(0.05)
    assert all(a <= b for a, b in itertools.pairwise(rates[:101]))
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


class _Products(TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def muon_step(monkeypatch, capabilities):
    """A step of Muon on a machine with such a CPU: (weight, gradient, its change), the state, the dtypes."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    torch.manual_seed(0)
    model = BitNet(CONFIG, BitLinearQAT)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    before = [p.detach().clone() for p in matrices]
    options = TrainOptions(**{**vars(OPTIONS), "optimizer": "muon", "autocast": None, "weight_decay": 0.0})
    optimizer = make_optimizers(model, options)[0]
    with _Products() as products:
        optimizer.step()
    steps = [(p.grad, start - p.detach()) for start, p in zip(before, matrices, strict=True)]
    return steps, optimizer.state_dict(), products.dtypes


def exact_muon_step(gradient):
    """The first step by singular values, which is what the iteration works on, in float64."""
    u, s, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = gradient.shape
    return OPTIONS.matrix_learning_rate * math.sqrt(max(1, rows / columns)) * (u * s) @ v


def test_muon_multiplies_in_the_dtype_that_the_machine_has_instructions_for(monkeypatch):
    fast, fast_state, fast_dtypes = muon_step(monkeypatch, {"avx512_bf16": True, "amx_bf16": False})
    plain, plain_state, plain_dtypes = muon_step(monkeypatch, {"avx512_bf16": False})
    assert fast_dtypes == {torch.bfloat16}
    assert plain_dtypes == {torch.float32}
    assert str(fast_state) == str(plain_state), "a checkpoint of one machine resumes on another"
    for (gradient, theirs), (_, ours) in zip(fast, plain, strict=True):
        exact = exact_muon_step(gradient)
        assert (ours - exact).norm() < (theirs - exact).norm() < 0.1 * exact.norm()


def test_unknown_optimizer_is_named(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"optimizer.*expected.*sgd"):
        train(CONFIG, corpus, TrainOptions(**{**vars(OPTIONS), "optimizer": "sgd"}), tmp_path)


SIZES = {
    "vocab-size": 300,
    "hidden-size": 32,
    "intermediate-size": 48,
    "layers": 2,
    "heads": 4,
    "kv-heads": 2,
    "context": 64,
    "steps": 4,
    "batch-size": 2,
    "sequence-length": 16,
    "evaluate-every": 2,
    "held-out": 0.1,
    "threads": 1,
    "device": "cpu",
}
ARGUMENTS = [f"--{name}={value}" for name, value in SIZES.items()]


def test_command_writes_a_folder_that_loads(tmp_path, novel_file):
    out = tmp_path / "model"
    command = ["train", "--text", str(novel_file), "--out", str(out), *ARGUMENTS]
    run = CliRunner().invoke(commands, command, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    losses = json.loads(run.stdout)
    model = from_pretrained(out)
    assert model.head_weight.dtype == torch.bfloat16
    ids = model.generate(**model.encode("Emma"), max_new_tokens=5)
    assert model.tokenizer.decode(ids[0].tolist()).startswith("Emma")
    card = (out / "README.md").read_text()
    assert f"{losses['test']['nats_per_token']:.4f}" in card
    assert "novel.txt" in card

    run = CliRunner().invoke(commands, command)
    assert run.exit_code == 1
    assert "--resume" in run.output
    run = CliRunner().invoke(commands, [*command, "--resume"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout) == losses


def test_command_reports_errors_in_one_line(tmp_path, novel_file):
    command = ["train", "--text", str(novel_file), "--out", str(tmp_path / "x"), *ARGUMENTS]
    run = CliRunner().invoke(commands, [*command, "--kv-heads", "3"])
    assert run.exit_code == 1
    assert "num_key_value_heads" in run.output
    assert "Traceback" not in run.output
