"""Draws bitnet_ops beside other programs and models, from the JSON of a benchmark run.

pytest bench/bench_models.py --benchmark-only --benchmark-json=models.json
python bench/chart.py models.json bench/speed.png
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from comparison.rows import MODELS, comparison_rows

PANELS = {
    "prompt of 128, tok/s": "prompt of 128\ntokens per second",
    "decode, tok/s": "writing\ntokens per second",
    "peak memory, GB": "peak memory\nGB",
}
"""Columns, and what stands above their bars."""

OURS, TERNARY, OTHERS = "#e8710a", "#5b8fc7", "#a9adb3"
"""Colours of bars: bitnet_ops, the same model in other programs, other models."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file that --benchmark-json wrote")
    parser.add_argument("image", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    run = json.loads(arguments.results.read_text(encoding="utf-8"))
    draw(models([one["extra_info"] for one in run["benchmarks"]]), arguments.image)


def models(rows: list[dict]) -> dict[str, dict]:
    """The columns of each model of the chart, by its name there.

    Args:
        rows: of all tables; of speed those of the most threads are taken.
    """
    names = {row.name: row.chart for row in comparison_rows(Path()).values() if row.chart}
    found: dict[str, dict] = {}
    for row in rows:
        name = names.get(row.get("row", {}).get("model", ""))
        if name and row["table"].startswith(MODELS):
            columns = found.setdefault(name, {})
            # The table of one thread has no long prompt.
            if "decode, tok/s" not in row or any(key.startswith("prompt of 512") for key in row):
                columns |= row
    return {name: found[name] for name in names.values() if name in found}


def draw(columns: dict[str, dict], image: Path) -> None:
    """A panel for each column, a bar for each model."""
    names = list(columns)
    figure, axes = plt.subplots(
        1, len(PANELS), sharey=True, figsize=(9, 0.9 + 0.42 * len(names)), layout="constrained"
    )
    colors = [OURS if "bitnet_ops" in one else TERNARY if "2B4T" in one else OTHERS for one in names]
    for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
        cells = [columns[name].get(column) for name in names]
        axis.barh(names, [number(cell) for cell in cells], color=colors, height=0.7)
        labels = [f"{cell:.3g}" if isinstance(cell, float) else cell or "?" for cell in cells]
        axis.bar_label(axis.containers[0], labels, fontsize=9, padding=3)
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[])
        axis.margins(x=0.28)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0, labelsize=9)
    axes[0].invert_yaxis()
    figure.savefig(image, dpi=130, facecolor="white")


def number(cell: float | str | None) -> float:
    """What a cell has first: a text may explain its number, or say that there is none."""
    if isinstance(cell, str):
        match = re.match(r"[\d.]+ \(", cell)
        return float(match[0][:-2]) if match else 0.0
    return cell or 0.0


if __name__ == "__main__":
    main()
