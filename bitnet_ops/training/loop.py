"""The training loop: batches, schedule, optimiser, held-out loss, checkpoints that resume."""

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..decoder.config import DecoderConfig
from ..decoder.model import LinearFactory
from ..evaluation.perplexity import TextLoss, sum_of_losses
from ..layers.linear import BitLinearQAT
from ..model import BitNet
from .corpus import Corpus, Split
from .muon import Float32Muon

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass
class TrainOptions:
    """How to train. Two runs with equal options, data, thread count and machine give equal models.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence.
        learning_rate: peak of the schedule, for embeddings and norms (and for all with AdamW).
        matrix_learning_rate: peak for the projections with Muon.
        optimizer: "adamw", or "muon" (arXiv:2502.16982) for the projections and AdamW for the rest.
        weight_decay: on the projections, in the first half of training only (arXiv:2504.12285, section 3.2).
        warmup: share of the steps in which the learning rate rises linearly; it then falls as a cosine.
        final_learning_rate: share of the peak that is left at the end.
        gradient_clip: largest norm of the gradient.
        seed: of the weights, the batches and dropout.
        evaluate_every: steps between two held-out losses and checkpoints.
        full_precision: train nn.Linear in place of BitLinearQAT, to see what ternary weights cost.
        autocast: run the products in bfloat16; None: where the machine has instructions for it.
        device: "cuda" where there is one, else "cpu".
        compile: run through torch.compile.
    """

    steps: int = 5000
    batch_size: int = 4
    sequence_length: int = 256
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 2e-2
    optimizer: str = "muon"
    weight_decay: float = 0.1
    warmup: float = 0.03
    final_learning_rate: float = 0.02
    gradient_clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 500
    full_precision: bool = False
    autocast: bool | None = None
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    compile: bool = False

    def uses_autocast(self) -> bool:
        """Whether products run in bfloat16 on this machine."""
        if self.autocast is not None:
            return self.autocast
        return has_bfloat16(self.device)


@dataclass
class HeldOut:
    """Loss on held-out chapters.

    Attributes:
        nats_per_token: mean cross-entropy.
        bits_per_byte: the same per byte of text, comparable between tokenizers.
    """

    nats_per_token: float
    bits_per_byte: float


@dataclass
class TrainResult:
    """What a run leaves behind.

    Attributes:
        model: the weights of the best validation loss, still float master weights, in eval mode.
        best_step: the step they come from.
        seconds: time spent in steps and evaluations, resumed parts included.
    """

    model: BitNet
    best_step: int
    seconds: float


def train(
    config: DecoderConfig,
    corpus: Corpus,
    options: TrainOptions,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    linear: LinearFactory | None = None,
) -> TrainResult:
    """Trains a model and keeps the weights with the best validation loss.

    Args:
        config: sizes and dropout; ``vocab_size`` must hold the corpus' tokenizer.
        corpus: see `corpus.read_corpus`.
        options: see `TrainOptions`.
        folder: gets ``checkpoint.pt`` and ``log.jsonl`` (one JSON object per evaluation).
        resume: go on from ``checkpoint.pt``; the result equals that of an uninterrupted run.
        progress: show a progress bar on stderr.
        linear: makes the projections; None for `BitLinearQAT`, or nn.Linear with ``options.full_precision``.

    Raises:
        ValueError: sizes that do not fit, or a checkpoint of a run with other settings.
        FileNotFoundError: ``resume`` without a checkpoint.
    """
    if config.vocab_size < corpus.tokenizer.get_vocab_size():
        raise ValueError(
            f"config.vocab_size: expected at least the tokenizer's {corpus.tokenizer.get_vocab_size()}, "
            f"got {config.vocab_size}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed)
    if linear is None:
        linear = nn.Linear if options.full_precision else BitLinearQAT
    model = BitNet(config, linear).to(options.device)
    state = _State(model, make_optimizers(model, options), _fingerprint(config, corpus, options))
    if resume:
        state.load(folder / CHECKPOINT)
    else:
        (folder / LOG).unlink(missing_ok=True)

    autocast = _autocast(options)

    def step_loss(batch: Tensor) -> Tensor:
        with autocast:
            logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    if options.compile:
        step_loss = torch.compile(step_loss)
    batches = _batches(corpus.train.ids, options, state.step)
    bar = tqdm(total=options.steps, initial=state.step, unit="step", disable=not progress, smoothing=0.05)
    begin = time.perf_counter() - state.seconds
    while state.step < options.steps:
        factor = schedule(state.step / options.steps, options)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
                group["weight_decay"] = group["peak_decay"] if 2 * state.step < options.steps else 0.0
        model.train()
        loss = step_loss(next(batches).to(options.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.train_loss += (loss.item() - state.train_loss) * max(1 / state.step, 0.02)
        if not math.isfinite(state.train_loss):
            raise RuntimeError(f"step {state.step}: the loss is {loss.item()}; try a lower learning rate")
        bar.update()
        if state.step % options.evaluate_every == 0 or state.step == options.steps:
            with autocast:
                held_out = evaluate(model, corpus.validation, options.sequence_length, progress=progress)
            state.seconds = time.perf_counter() - begin
            state.record(held_out)
            state.save(folder / CHECKPOINT)
            _append_log(folder / LOG, state, held_out, options)
            bar.write(
                f"step {state.step}: training loss {state.train_loss:.4f}, held-out "
                f"{held_out.nats_per_token:.4f} nats per token, {held_out.bits_per_byte:.4f} bits per byte",
                file=sys.stderr,
            )
        bar.set_postfix(loss=f"{state.train_loss:.3f}", held_out=f"{state.best_loss:.3f}", refresh=False)
    bar.close()

    model.load_state_dict(state.best_weights)
    return TrainResult(model.eval(), state.best_step, state.seconds)


def evaluate(model: BitNet, split: Split, sequence_length: int, *, progress: bool = False) -> HeldOut:
    """Mean cross-entropy over a split, every token once, with dropout off (`perplexity.sum_of_losses`).

    Windows of ``sequence_length`` start every half window, so a token is predicted from at least half a
    window of context.

    Args:
        model: float or packed; its mode is restored afterwards.
        split: the text.
        sequence_length: tokens in a window.
        progress: show a progress bar where stderr is a terminal.
    """
    stride = max(1, sequence_length // 2)
    nats = sum_of_losses(model, split.ids, sequence_length, stride, progress=progress)
    loss = TextLoss(nats, len(split.ids) - 1, split.size_bytes)
    assert loss.bits_per_byte is not None  # it has a size
    return HeldOut(loss.nats_per_token, loss.bits_per_byte)


def schedule(progress: float, options: TrainOptions) -> float:
    """Share of the peak learning rate at a point of training: a linear rise, then half a cosine."""
    if progress < options.warmup:
        return max(progress / options.warmup, 1 / options.steps)
    fall = (progress - options.warmup) / (1 - options.warmup)
    low = options.final_learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fall))


def has_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are at least as fast as in float32 there."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if kind != "cpu":
        return True
    # Public since torch 2.11. Before, nothing is known, and float32 is right everywhere.
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def make_optimizers(model: BitNet, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """One or two optimisers over all parameters; weight decay on the projections only."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]

    def group(params: list[nn.Parameter], lr: float, decay: float) -> dict[str, Any]:
        return {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay, "peak_decay": decay}

    # 0.95 for the second moment, as is usual for language models: 0.999 would remember a thousand steps.
    betas = (0.9, 0.95)
    rest_group = group(rest, options.learning_rate, 0.0)
    if options.optimizer == "adamw":
        groups = [group(matrices, options.learning_rate, options.weight_decay), rest_group]
        return [torch.optim.AdamW(groups, betas=betas, fused=True)]
    if options.optimizer == "muon":
        muon = torch.optim.Muon if has_bfloat16(options.device) else Float32Muon
        return [
            muon([group(matrices, options.matrix_learning_rate, options.weight_decay)]),
            torch.optim.AdamW([rest_group], betas=betas, fused=True),
        ]
    raise ValueError(f'options.optimizer: expected "adamw" or "muon", got {options.optimizer!r}')


def seed_everything(seed: int) -> None:
    """Seeds Python's and torch's generators."""
    random.seed(seed)
    torch.manual_seed(seed)


class _State:
    """Everything a run needs to go on where it stopped."""

    def __init__(self, model: BitNet, optimizers: list[torch.optim.Optimizer], fingerprint: str) -> None:
        self.model, self.optimizers, self.fingerprint = model, optimizers, fingerprint
        self.step = 0
        self.seconds = 0.0
        self.train_loss = 0.0
        self.best_loss = math.inf
        self.best_step = 0
        self.best_weights: dict[str, Tensor] = {}

    def record(self, held_out: HeldOut) -> None:
        """Keeps the weights if they are the best so far."""
        if held_out.nats_per_token < self.best_loss:
            self.best_loss, self.best_step = held_out.nats_per_token, self.step
            self.best_weights = {
                name: w.detach().cpu().clone() for name, w in self.model.state_dict().items()
            }

    def save(self, path: Path) -> None:
        """Writes to a temporary name first, so that a stop in between loses nothing."""
        state = {name: getattr(self, name) for name in self._FIELDS}
        state |= {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Takes over a saved state."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a checkpoint to resume from, got no such file")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{path}: expected a checkpoint of the same settings and text\n  {self.fingerprint}\n"
                f"got one of\n  {state['fingerprint']}"
            )
        for name in self._FIELDS:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    _FIELDS = ("fingerprint", "step", "seconds", "train_loss", "best_loss", "best_step", "best_weights")


def _fingerprint(config: DecoderConfig, corpus: Corpus, options: TrainOptions) -> str:
    """What must be equal for a checkpoint to fit; where and how fast it runs may differ."""
    free = {"device", "compile", "autocast"}
    told = {name: value for name, value in asdict(options).items() if name not in free}
    text = int(corpus.train.ids.sum()), len(corpus.train.ids)
    return json.dumps({"config": asdict(config), "options": told, "text": text}, sort_keys=True)


def _autocast(options: TrainOptions) -> AbstractContextManager[Any]:
    if not options.uses_autocast():
        return nullcontext()
    return torch.autocast(options.device.split(":")[0], torch.bfloat16)


def _batches(ids: Tensor, options: TrainOptions, first_step: int) -> Iterator[Tensor]:
    """Yields [batch, sequence_length + 1] for every step from ``first_step`` on.

    An epoch cuts the text into windows behind a random offset and shuffles them; what it looks like follows
    from the seed and the epoch alone, so a resumed run sees what an uninterrupted one would.
    """
    length = options.sequence_length
    windows_an_epoch = (len(ids) - 1 - length) // length
    steps_an_epoch = windows_an_epoch // options.batch_size
    if steps_an_epoch < 1:
        raise ValueError(
            f"text: expected at least {(options.batch_size + 2) * length} tokens for a batch of "
            f"{options.batch_size} x {length}, got {len(ids)}"
        )
    step = first_step
    while True:
        epoch, skipped = divmod(step, steps_an_epoch)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        offset = int(torch.randint(length, (1,), generator=generator))
        order = torch.randperm(windows_an_epoch, generator=generator)
        for group in order[: steps_an_epoch * options.batch_size].view(steps_an_epoch, -1)[skipped:]:
            yield torch.stack(
                [ids[start : start + length + 1] for start in (group * length + offset).tolist()]
            )
            step += 1


def _append_log(path: Path, state: _State, held_out: HeldOut, options: TrainOptions) -> None:
    row = {
        "step": state.step,
        "tokens": state.step * options.batch_size * options.sequence_length,
        "seconds": round(state.seconds, 1),
        "training_loss": round(state.train_loss, 5),
        "validation": asdict(held_out),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
