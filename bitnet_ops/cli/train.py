"""The command ``bitnet-ops train``."""

import dataclasses
import json
import sys
from pathlib import Path

import click


@click.command(context_settings={"show_default": True})
@click.option(
    "--text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to learn from.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the checkpoint, the log and, at the end, the packed model.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@click.option("--steps", default=5000, type=click.IntRange(1), help="Optimiser steps.")
@click.option("--batch-size", default=4, type=click.IntRange(1), help="Sequences in a step.")
@click.option("--sequence-length", default=256, type=click.IntRange(2), help="Tokens in a sequence.")
@click.option("--vocab-size", default=4096, type=click.IntRange(257), help="Entries of the tokenizer.")
@click.option("--hidden-size", default=256, type=click.IntRange(1), help="Width of the residual stream.")
@click.option(
    "--intermediate-size", default=704, type=click.IntRange(1), help="Width inside the feed-forward block."
)
@click.option("--layers", default=6, type=click.IntRange(1), help="Decoder layers.")
@click.option("--heads", default=4, type=click.IntRange(1), help="Query heads.")
@click.option("--kv-heads", default=2, type=click.IntRange(1), help="Key and value heads.")
@click.option(
    "--context", default=1024, type=click.IntRange(2), help="Longest sequence the model is meant for."
)
@click.option(
    "--dropout",
    default=0.1,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of activations of the residual branches that a step drops; more where the text is small.",
)
@click.option(
    "--optimizer",
    default="muon",
    type=click.Choice(["adamw", "muon"]),
    help="Muon takes the projections only, AdamW the rest.",
)
@click.option("--learning-rate", default=3e-3, type=click.FloatRange(0, min_open=True), help="Peak.")
@click.option(
    "--matrix-learning-rate",
    default=2e-2,
    type=click.FloatRange(0, min_open=True),
    help="Peak for the projections with Muon.",
)
@click.option("--weight-decay", default=0.1, type=click.FloatRange(0), help="In the first half of training.")
@click.option(
    "--held-out",
    default=0.04,
    type=click.FloatRange(0, 0.4, min_open=True, max_open=True),
    help="Share of the text for validation, in whole chapters; as much again for the test.",
)
@click.option(
    "--chapter-pattern",
    default=None,
    help="Regular expression for a line that opens a chapter.  [default: a line that begins with CHAPTER]",
    show_default=False,
)
@click.option("--keep-lines", is_flag=True, help="Keep line breaks inside paragraphs.")
@click.option("--evaluate-every", default=500, type=click.IntRange(1), help="Steps between held-out losses.")
@click.option(
    "--full-precision", is_flag=True, help="Train float weights instead, to compare; saves no model."
)
@click.option("--seed", default=0, help="Of weights, batches, dropout and the choice of chapters.")
@click.option(
    "--device", default=None, help="cpu or cuda.  [default: cuda where there is one]", show_default=False
)
@click.option(
    "--autocast/--no-autocast",
    default=None,
    help="Products in bfloat16.  [default: where the machine has instructions for it]",
    show_default=False,
)
@click.option("--compile", is_flag=True, help="Run through torch.compile.")
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads.")
def train(
    text: Path,
    out: Path,
    resume: bool,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    dropout: float,
    held_out: float,
    chapter_pattern: str | None,
    keep_lines: bool,
    threads: int | None,
    device: str | None,
    **training: object,
) -> None:
    """Train a ternary model of your own on a plain text.

    A byte-level tokenizer and a model in the architecture of BitNet b1.58 2B4T are trained from scratch, on
    a GPU where there is one. The loss on chapters held out for validation is printed along the way, and the
    weights with the best one are packed into OUT, with a model card, ready for
    `bitnet-ops generate --model OUT "..."`. A stopped run goes on with --resume and ends with the same
    weights.

    \b
    Examples:
      bitnet-ops train --text novel.txt --out novel-model
      bitnet-ops train --text novel.txt --out novel-model --resume
      bitnet-ops train --text novel.txt --out float --full-precision
    """  # noqa: D301, click wants the character
    import torch

    from ..decoder.config import BitNetConfig
    from ..training.corpus import CHAPTER_PATTERN, END_OF_TEXT, read_corpus
    from ..training.export import export
    from ..training.loop import CHECKPOINT, TrainOptions, evaluate
    from ..training.loop import train as run

    if threads is not None:
        torch.set_num_threads(threads)
    if (out / CHECKPOINT).exists() and not resume:
        raise click.ClickException(f"{out / CHECKPOINT} exists: add --resume to go on, or name another --out")
    options = TrainOptions(**training, **({} if device is None else {"device": device}))  # type: ignore[arg-type]
    try:
        corpus = read_corpus(
            text,
            vocab_size=vocab_size,
            held_out=held_out,
            seed=options.seed,
            chapter_pattern=chapter_pattern or CHAPTER_PATTERN,
            keep_lines=keep_lines,
        )
        end_of_text = corpus.tokenizer.token_to_id(END_OF_TEXT)
        config = BitNetConfig(
            vocab_size=corpus.tokenizer.get_vocab_size(),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            rope_theta=10000.0,  # the usual base for contexts of a few thousand tokens
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            dropout=dropout,
        )
        click.echo(
            f"{len(corpus.train.ids):,} training tokens in {len(corpus.train.chapters)} chapters, "
            f"{len(corpus.validation.ids):,} for validation, {len(corpus.test.ids):,} for the test",
            err=True,
        )
        result = run(config, corpus, options, out, resume=resume, progress=sys.stderr.isatty())
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    if options.full_precision:
        losses = {
            name: evaluate(result.model, split, options.sequence_length, progress=True)
            for name, split in (("validation", corpus.validation), ("test", corpus.test))
        }
    else:
        losses = export(text, config, corpus, options, result, out, progress=True)
        click.echo(f'Wrote {out}. Try: bitnet-ops generate --model {out} "Once"', err=True)
    rows = {name: dataclasses.asdict(loss) for name, loss in losses.items()}
    click.echo(json.dumps({"best_step": result.best_step, **rows}))
