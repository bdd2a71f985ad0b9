"""The command ``bitnet-ops convert``: a model for this machine, or in the formats of other programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import expected_errors
from .options import ACTIVATION_BITS_OPTION

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.sparsity import LayerSparsity
    from ..model import BitNet

SAMPLE_TEXT = """\
The harbour was quiet when the ferry came in. A few men in oilskins stood by the wall and watched the ropes
go over; nobody spoke. Above the town the road climbs in six long bends to the lighthouse, which was built in
1871 and has been empty for thirty years. "You will need better shoes than those," said the woman at the
ticket office, not unkindly, and handed me a map on which somebody had marked the path in red pencil.

To estimate a mean, take the sum of the samples and divide by their number: (2 + 4 + 9) / 3 = 5. The variance
is the mean of the squared distances from it. In Python, `statistics.pvariance([2, 4, 9])` gives 8.67.
"""
"""What sparsity is measured on where the user gives no text: prose, speech, numbers and code."""

MOST_TOKENS = 512  # shares of open gates are then known to about a hundredth


GGUF_SUFFIX = ".gguf"


@click.command()
@click.argument("source", metavar="MODEL")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["packed", "safetensors", "gguf"]),
    help="What TARGET becomes; see above.  [default: gguf where TARGET ends in .gguf, else packed]",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="packed: UTF-8 text on which the use of the weights is measured.  "
    "[default: a short one in the package]",
)
@ACTIVATION_BITS_OPTION
@click.option(
    "--layout",
    type=click.Choice(["tile16", "tile16_base3"]),
    help="packed: one layout for all weights, nothing measured: tile16 suits every machine.",
)
@click.option(
    "--type",
    "type_",
    type=click.Choice(["i2_s", "tq1_0", "tq2_0", "q2_0"]),
    help="gguf: type of the ternary weights.  [default: the first that holds the model of i2_s, tq2_0, q2_0 "
    "for BitNet's own architectures, of tq2_0, q2_0, i2_s for others]",
)
@click.option(
    "--head",
    type=click.Choice(["f16", "q8_0", "q6_k", "bf16", "f32"]),
    help="gguf: type of embedding and head.  [default: f16; of ternary ones as --type]",
)
def convert(
    source: str,
    target: Path,
    to: str | None,
    text: Path | None,
    activation_bits: int | None,
    layout: str | None,
    type_: str | None,
    head: str | None,
) -> None:
    """Write the model MODEL to TARGET, for this machine or for other programs.

    MODEL is what from_pretrained takes, such as a folder as published, one that bitnet-ops wrote, or a .gguf
    file. Ternary weights and their scales stay what they are, bit for bit.

    --to packed makes a folder in the layouts of this machine. It loads at once, without conversion: its
    weights are used where they lie in the file. It loads on every other machine too, which converts what it
    cannot use. Feed-forward weights that most tokens do not need are stored so that they can be skipped. How
    many that are is measured on a text; without squared ReLU it is hardly any. The model gives the same
    logits, bit for bit, in every layout.

    --to gguf makes a file for llama.cpp and its relatives, with tokenizer and chat template. Its types:

    \b
      type   bits  one scale for    inputs          read by
      i2_s   2     a matrix         any             bitnet.cpp, bitnet-ops
      tq1_0  1.69  256 inputs, row  256 divides     llama.cpp, bitnet-ops
      tq2_0  2.06  256 inputs, row  256 divides     llama.cpp, bitnet-ops
      q2_0   2.25  64 inputs, row   64 divides      llama.cpp since July 2026, bitnet-ops

    Only bitnet.cpp knows the architecture of BitNet b1.58 2B4T. --head is for embedding and head, which it
    rounds: f16 hardly (bf16 and f32 keep what is stored so), q8_0 to 8.5 bits a weight, q6_k to 6.6. Without
    it, those of a model where they are ternary are written as the other ternary weights.

    --to safetensors makes a folder in the layout that is published on the Hugging Face hub, which
    transformers loads: packed weights and "bitnet" quantisation for models of 8-bit activations, otherwise
    float weights.

    \b
    Examples:
      bitnet-ops convert bitnet-b1.58-2B-4T bitnet-here
      bitnet-ops convert bitnet-b1.58-2B-4T bitnet-here --text my-prompts.txt
      bitnet-ops convert bitnet-here bitnet-anywhere --layout tile16
      bitnet-ops convert my-model my-model.gguf --type tq2_0 --head q6_k
      bitnet-ops convert my-model.gguf for-transformers --to safetensors
    """  # noqa: D301, click wants the character
    if to is None:
        named_so = target.suffix.lower() == GGUF_SUFFIX and not target.is_dir()
        to = "gguf" if named_so else "packed"
    for wanted, option, value in (
        ("packed", "--text", text),
        ("packed", "--layout", layout),
        ("gguf", "--type", type_),
        ("gguf", "--head", head),
    ):
        if value is not None and to != wanted:
            raise click.UsageError(f"{option} has no effect with --to {to}")
    if activation_bits is not None and to == "safetensors":
        raise click.UsageError(
            "--activation-bits has no effect with --to safetensors, which has no field for it"
        )
    if layout is not None and text is not None:
        raise click.UsageError("--text has no effect with --layout, which measures nothing")
    _check_place(target, to)
    from ..model import from_pretrained

    with expected_errors():
        model = from_pretrained(source, activation_bits=activation_bits)
        if to == "gguf":
            _to_gguf(model, target, type_, head, Path(source).name.removesuffix(GGUF_SUFFIX))
        elif to == "safetensors":
            _to_published(model, target)
        else:
            _to_packed(model, target, text, layout)


def _check_place(target: Path, to: str) -> None:
    """Says before the model is loaded that the result would have no place."""
    if to == "gguf" and target.is_dir():
        raise click.UsageError(f"--to gguf needs the name of a file, and {target} is a folder")
    if to != "gguf" and target.exists() and not target.is_dir():
        raise click.UsageError(f"--to {to} needs the name of a folder, and {target} is a file")


def _to_gguf(model: BitNet, target: Path, type_: str | None, head: str | None, name: str) -> None:
    from ..checkpoint import save_gguf
    from ..checkpoint.gguf.export import DEFAULT_HEAD

    chosen = save_gguf(model, target, type=type_, head=head, name=name)
    ternary = head is None and model.config.ternary_head
    form = chosen if ternary else head or DEFAULT_HEAD
    click.echo(f"{target}: {chosen}, head {form}; {target.stat().st_size / 1e6:,.0f} MB")


def _to_published(model: BitNet, target: Path) -> None:
    from ..checkpoint import save_published

    form = save_published(model, target)
    size = (target / "model.safetensors").stat().st_size
    click.echo(f"{target}: {form}; {size / 1e6:,.0f} MB")


def _to_packed(model: BitNet, target: Path, text: Path | None, layout: str | None) -> None:
    from tqdm import tqdm

    from ..evaluation.sparsity import layouts_for, measure_sparsity
    from ..layers.linear import BitLinear

    projections = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
    if layout is None:
        sparsity = measure_sparsity(model, sample(model, text))
        layouts = layouts_for(model, sparsity)
        show(sparsity)
    else:
        layouts = dict.fromkeys(projections, layout)
    for name, wanted in tqdm(layouts.items(), desc="converting", unit="matrix", disable=None, leave=False):
        projections[name].repack(wanted)
    model.save_pretrained(target)
    counts = ", ".join(f"{count} in {name}" for name, count in Counter(layouts.values()).most_common())
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    click.echo(f"{target}: {len(layouts)} matrices, {counts}; {size / 1e6:,.0f} MB")


def sample(model: BitNet, file: Path | None) -> Tensor:
    """Tokens of the text, at most `MOST_TOKENS`; of a model without tokenizer random ones."""
    import torch

    most = min(MOST_TOKENS, model.config.max_position_embeddings)
    if model.tokenizer is None:
        if file is not None:
            raise click.UsageError("--text needs a tokenizer (tokenizer.json) in MODEL")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (1, most), generator=generator)
    text = SAMPLE_TEXT if file is None else file.read_text(encoding="utf-8")
    ids = model.encode(text[: 16 * MOST_TOKENS])[
        "input_ids"
    ]  # tokens are shorter than 16 characters on average
    return ids[:, :most]


def show(sparsity: list[LayerSparsity]) -> None:
    """What was measured, layer by layer."""
    click.echo("layer  gates open  inputs of down_proj not 0")
    for index, layer in enumerate(sparsity):
        click.echo(f"{index:5}  {layer.open_gates:10.1%}  {layer.used_inputs:25.1%}")
