"""The command ``bitnet-ops convert``: a checkpoint in the layouts of this machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import expected_errors

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


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text on which the use of the weights is measured.  [default: a short one in the package]",
)
@click.option(
    "--layout",
    type=click.Choice(["tile16", "tile16_base3"]),
    help="One layout for all weights, nothing measured: tile16 suits every machine.",
)
def convert(source: Path, target: Path, text: Path | None, layout: str | None) -> None:
    """Write the model in SOURCE to TARGET in the layouts of this machine.

    SOURCE is a checkpoint folder as published (BitNet, or a ternary Llama), or one that bitnet-ops wrote.
    TARGET loads at once, without conversion: its weights are used where they lie in the file. It loads on
    every other machine too, which converts what it cannot use.

    Feed-forward weights that most tokens do not need are stored so that they can be skipped. How many that
    are is measured on a text; without squared ReLU it is hardly any. The model gives the same logits, bit for
    bit, in every layout.

    \b
    Examples:
      bitnet-ops convert bitnet-b1.58-2B-4T bitnet-here
      bitnet-ops convert bitnet-b1.58-2B-4T bitnet-here --text my-prompts.txt
      bitnet-ops convert bitnet-here bitnet-anywhere --layout tile16
    """  # noqa: D301, click wants the character
    if layout is not None and text is not None:
        raise click.UsageError("--text has no effect with --layout, which measures nothing")
    from tqdm import tqdm

    from ..evaluation.sparsity import layouts_for, measure_sparsity
    from ..layers.linear import BitLinear
    from ..model import from_pretrained

    with expected_errors():
        model = from_pretrained(source)
        projections = {
            name: module for name, module in model.named_modules() if isinstance(module, BitLinear)
        }
        if layout is None:
            sparsity = measure_sparsity(model, sample(model, text))
            layouts = layouts_for(model, sparsity)
            show(sparsity)
        else:
            layouts = dict.fromkeys(projections, layout)
        for name, wanted in tqdm(
            layouts.items(), desc="converting", unit="matrix", disable=None, leave=False
        ):
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
            raise click.UsageError("--text needs a tokenizer.json in SOURCE")
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
