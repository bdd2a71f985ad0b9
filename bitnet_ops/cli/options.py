"""Options that several commands have, and what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .. import DEFAULT_MODEL

if TYPE_CHECKING:
    from ..model import BitNet

MODEL_OPTION = click.option(
    "--model",
    "source",
    metavar="MODEL",
    help="Folder of a checkpoint, .gguf file, or a name on the Hugging Face hub: owner/repo, "
    "owner/repo@revision, owner/repo:file.gguf.  [default: the small model that ships with bitnet-ops]",
)
THREADS_OPTION = click.option(
    "--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads.  [default: as torch chooses]"
)

ACTIVATION_BITS_OPTION = click.option(
    "--activation-bits",
    type=click.Choice(["8", "16"]),
    callback=lambda context, option, value: None if value is None else int(value),
    help="Of models with group scales, such as Ternary-Bonsai: 8 is faster and rounds more.  "
    "[default: as the model says]",
)


def load_model(source: str | None, threads: int | None, activation_bits: int | None = None) -> BitNet:
    """Loads the model of a command, and sets the number of threads."""
    import torch

    from ..model import from_pretrained

    if threads is not None:
        torch.set_num_threads(threads)
    if source is None and not DEFAULT_MODEL.is_dir():
        raise click.ClickException("this installation has no default model; name one with --model")
    return from_pretrained(source or DEFAULT_MODEL, activation_bits=activation_bits)
