"""The model card: what a trained folder says about itself, from the facts of its run."""

from dataclasses import asdict
from pathlib import Path

from ..decoder.config import DecoderConfig
from .corpus import Corpus
from .loop import HeldOut, TrainOptions, TrainResult


def model_card(
    text: Path,
    config: DecoderConfig,
    corpus: Corpus,
    options: TrainOptions,
    result: TrainResult,
    losses: dict[str, HeldOut],
    sample: str,
) -> str:
    """Renders the card in Markdown.

    Args:
        text: the file that was trained on; only its name is told.
        config: sizes of the model.
        corpus: the tokenised text.
        options: how it was trained.
        result: the run.
        losses: of the packed model, by part of the corpus.
        sample: text the packed model wrote.
    """
    tokens = options.steps * options.batch_size * options.sequence_length
    parts = {"training": corpus.train, "validation": corpus.validation, "test": corpus.test}
    splits = "\n".join(
        f"| {name} | {len(part.chapters)} | {part.size_bytes:,} | {len(part.ids):,} |"
        for name, part in parts.items()
    )
    table = "\n".join(
        f"| {name} | {loss.nats_per_token:.4f} | {loss.bits_per_byte:.4f} |" for name, loss in losses.items()
    )
    tied = ", tied embeddings" if config.tie_word_embeddings else ""
    vocabulary = f"{corpus.tokenizer.get_vocab_size():,}"
    return f"""# A ternary language model

A model in the architecture of BitNet b1.58 2B4T (ternary projections, squared ReLU, sub-norms, grouped-query
attention, rotary positions{tied}), trained from scratch by `bitnet-ops train` on
`{text.name}`. It continues text in the manner of what it was trained on; it knows nothing else and answers
no questions.

## Data

| part | chapters | bytes | tokens |
|---|---|---|---|
{splits}

Whole chapters are held out, and scored in windows of {options.sequence_length} tokens. The tokenizer, a
byte-level BPE of {vocabulary} entries, was trained on the training chapters only. Validation chapters chose
the settings and the step to keep; nothing was chosen by the test chapters.

## Losses of the packed model

| part | nats per token | bits per byte |
|---|---|---|
{table}

The weights are those of step {result.best_step:,} of {options.steps:,} ({tokens:,} tokens seen,
{tokens / len(corpus.train.ids):.1f} epochs, {result.seconds / 60:.0f} minutes).

## Sample

> {sample.strip().replace(chr(10), chr(10) + "> ")}

## Settings

Architecture: {_settings(asdict(config))}.

Training: {_settings(asdict(options))}.
"""


def _settings(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
