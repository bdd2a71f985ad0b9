"""The command ``bitnet-ops eval``: the perplexity of a text."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import expected_errors
from .options import ACTIVATION_BITS_OPTION, MODEL_OPTION, THREADS_OPTION, load_model


@click.command("eval")
@MODEL_OPTION
@click.option(
    "--text",
    "file",
    metavar="FILE",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to predict.",
)
@click.option(
    "--context",
    metavar="N",
    type=click.IntRange(min=1),
    help="Tokens that the model sees at most.  [default: as many as it takes]",
)
@click.option(
    "--stride",
    metavar="S",
    type=click.IntRange(min=1),
    help="Tokens by which the window moves; smaller is slower and better.  [default: half the context]",
)
@ACTIVATION_BITS_OPTION
@THREADS_OPTION
def evaluate(
    source: str | None,
    file: Path,
    context: int | None,
    stride: int | None,
    activation_bits: int | None,
    threads: int | None,
) -> None:
    """Measure how well a model predicts a text.

    Perplexity is per token, so it compares models with the same tokenizer; bits per byte compare any models.
    Every token but the first is predicted once, from the tokens before it in a window that slides over the
    text: from N - S at least, where there are as many.

    \b
    Examples:
      bitnet-ops eval --text novel.txt
      bitnet-ops eval --model bitnet-b1.58-2B-4T --text wiki.txt --context 2048 --stride 512
    """  # noqa: D301, click wants the character
    from ..evaluation.perplexity import perplexity
    from ..training.corpus import read_text

    with expected_errors():
        text = read_text(file)
        model = load_model(source, threads, activation_bits)
        try:
            loss = perplexity(model, text, context=context, stride=stride, progress=True)
        except KeyboardInterrupt:
            raise click.Abort from None
    click.echo(f"perplexity      {loss.perplexity:.4f} per token")
    click.echo(f"cross-entropy   {loss.nats_per_token:.4f} nats per token")
    click.echo(f"bits per byte   {loss.bits_per_byte:.4f}")
    click.echo(f"scored          {loss.tokens:,} tokens, {loss.size_bytes:,} bytes")
