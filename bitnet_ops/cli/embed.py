"""The command ``bitnet-ops embed``: vectors of texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import expected_errors
from .options import ACTIVATION_BITS_OPTION, MODEL_OPTION, THREADS_OPTION, load_model

if TYPE_CHECKING:
    from torch import Tensor

NUMPY_MAGIC = b"\x93NUMPY\x01\x00"

FORMATS = (".safetensors", ".npy", ".jsonl")


@click.command()
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@MODEL_OPTION
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help='UTF-8 file of one text a line; "-" is stdin.',
)
@click.option("--prompt-name", metavar="NAME", help="The model's prompt to put in front, such as query.")
@click.option("--prompt", metavar="TEXT", help="The prompt itself.")
@click.option(
    "--pooling",
    type=click.Choice(["last", "mean", "cls"]),
    help="The last token's hidden state, the mean of all, or the first's.  [default: as the model wants]",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Whether vectors get length 1.  [default: as the model wants]",
)
@click.option(
    "--truncate-dim", metavar="D", type=click.IntRange(min=1), help="Keep D numbers of each vector."
)
@click.option(
    "--max-length",
    metavar="N",
    type=click.IntRange(min=1),
    help="Cut texts to N tokens.  [default: as many as the model takes]",
)
@click.option(
    "--batch-size",
    metavar="B",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Texts at a time.",
)
@click.option(
    "--out",
    metavar="FILE",
    default="-",
    help='Where vectors go: .safetensors, .npy, or .jsonl; "-" is stdout.  [default: -]',
)
@ACTIVATION_BITS_OPTION
@THREADS_OPTION
def embed(
    texts: tuple[str, ...],
    source: str | None,
    file: Path | None,
    prompt_name: str | None,
    prompt: str | None,
    pooling: str | None,
    normalize: bool | None,
    truncate_dim: int | None,
    max_length: int | None,
    batch_size: int,
    out: str,
    activation_bits: int | None,
    threads: int | None,
) -> None:
    """Make a vector of each TEXT, or of each line of a file.

    The dot product of two vectors says how close two texts are: 1 for the same meaning, about 0 for nothing
    in common. Any model can do it; those trained for it, such as BitNet-embedding, do it well. They want
    their prompt in front of what is searched for (--prompt-name query), and none in front of what is found.

    On stdout and in .jsonl each vector is a line, a JSON array, in the order of the texts. A .safetensors
    file has one tensor, "embeddings", float32 [texts, size]; a .npy file is that array for NumPy.

    \b
    Examples:
      bitnet-ops embed "The cat sleeps on the sofa."
      bitnet-ops embed --model bitnet-embedding-0.6b --file lines.txt --out lines.safetensors
      bitnet-ops embed --model bitnet-embedding-0.6b --prompt-name query "where does the cat sleep?"
      cut -f2 table.tsv | bitnet-ops embed --file - --out table.npy
    """  # noqa: D301, click wants the character
    if bool(texts) == (file is not None):
        raise click.UsageError("expected TEXT or --file, one of them")
    if prompt is not None and prompt_name is not None:
        raise click.UsageError("expected --prompt or --prompt-name, not both")
    suffix = ".jsonl" if out == "-" else Path(out).suffix
    if suffix not in FORMATS:
        raise click.UsageError(f"--out: expected a name in {', '.join(FORMATS)}, got {out!r}")
    with expected_errors():
        given = list(texts) if file is None else lines(file)
        model = load_model(source, threads, activation_bits)
        try:
            vectors = model.embed(
                given,
                prompt_name=prompt_name,
                prompt=prompt,
                pooling=pooling,
                normalize=normalize,
                truncate_dim=truncate_dim,
                max_length=max_length,
                batch_size=batch_size,
            )
        except KeyboardInterrupt:
            raise click.Abort from None
        if out == "-":
            for row in vectors:
                click.echo(json_line(row))
        else:
            write(Path(out), vectors)


def lines(file: Path) -> list[str]:
    """The lines of a file without their ends."""
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    # Not splitlines(): that would break lines at a form feed, too.
    return [line.removesuffix("\r") for line in data.decode().removesuffix("\n").split("\n")] if data else []


def json_line(row: Tensor) -> str:
    """A vector as JSON, with as many digits as tell one float32 from the next."""
    return "[" + ", ".join(f"{value:.9g}" for value in row.tolist()) + "]"


def write(file: Path, vectors: Tensor) -> None:
    """Writes float32 [n, d] to a file, in the format that its name says."""
    from ..checkpoint.tensor_source import tensor_bytes
    from ..checkpoint.write import write_tensors

    if file.suffix == ".safetensors":
        write_tensors(file, {"embeddings": vectors}, {})
    elif file.suffix == ".npy":
        # NumPy's format 1.0: a Python literal, padded so that data begin at a multiple of 64 bytes.
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(vectors.shape)}, }}".encode()
        header += b" " * (-(len(NUMPY_MAGIC) + 2 + len(header) + 1) % 64) + b"\n"
        with file.open("wb") as handle:
            handle.write(NUMPY_MAGIC + len(header).to_bytes(2, "little") + header)
            handle.write(tensor_bytes(vectors.contiguous()))
    else:
        file.write_text("".join(f"{json_line(row)}\n" for row in vectors), encoding="utf-8")
