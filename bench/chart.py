"""Draws bitnet_ops beside other models, and by threads and context, from the JSON of a benchmark run.

pytest bench/bench_model.py bench/bench_models.py --benchmark-only --benchmark-json=model.json
python bench/chart.py model.json bench/speed.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

MODELS = "BitNet b1.58 2B4T and Llama 3.2 1B"
BARS = ("decode, tok/s", "prefill 128, tok/s", "peak memory, GB")
DECODE, PROMPT = "2B4T, decode:", "2B4T, reading a prompt:"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file that --benchmark-json wrote")
    parser.add_argument("image", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    rows = [one["extra_info"] for one in json.loads(arguments.results.read_text())["benchmarks"]]
    figure = plt.figure(figsize=(9, 6.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    models = [row for row in rows if row.get("table", "").startswith(MODELS)]
    for axis, column in zip(upper.subplots(1, 3, sharey=True), BARS, strict=True):
        bars(axis, column, {row["row"]["model"]: row[column] for row in models if column in row})
    left, right = lower.subplots(1, 2)
    context_axis(left, [row for row in rows if row.get("table") == DECODE])
    threads_axis(right, rows)
    lower.suptitle("BitNet b1.58 2B4T with bitnet_ops, tokens per second", fontsize="medium")
    figure.savefig(arguments.image, dpi=110)


def bars(axis: plt.Axes, column: str, values: dict[str, float]) -> None:
    """One column of the comparison, the first model on top and in another colour."""
    names = [name.replace(", transformers", "").replace(", torchao", ",\n") for name in values]
    colors = ["tab:orange" if "bitnet_ops" in name else "tab:gray" for name in names]
    axis.barh(names, list(values.values()), color=colors)
    axis.bar_label(axis.containers[0], fmt="%.3g", fontsize="x-small", padding=2)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize="x-small")
    axis.set(xticks=[])
    axis.set_title(column, fontsize="small")
    axis.margins(x=0.2)


def context_axis(axis: plt.Axes, rows: list[dict]) -> None:
    """Decoding behind longer and longer contexts, a line for each cache and number of threads."""
    base = {row["row"]["threads"]: row for row in rows if row["row"]["context"] == 128}
    lines: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        key = row["row"]["cache"], row["row"]["threads"]
        lines.setdefault(key, [] if row["row"]["context"] == 128 else [base[key[1]]]).append(row)
    for (cache, threads), line in lines.items():
        line.sort(key=lambda row: row["row"]["context"])
        axis.plot(
            [row["row"]["context"] for row in line],
            [row["tok/s"] for row in line],
            marker="o",
            linestyle="-" if threads > 1 else "--",
            label=f"{cache}, {threads} thread{'s' if threads > 1 else ''}",
        )
    axis.set(title="decode", xlabel="tokens of context", ylim=(0, None))
    axis.legend(fontsize="x-small")


def threads_axis(axis: plt.Axes, rows: list[dict]) -> None:
    """Reading prompts and decoding by the number of threads."""
    series = {
        f"prompt of {tokens}": {
            row["row"]["threads"]: row["tok/s"]
            for row in rows
            if row.get("table") == PROMPT and row["row"]["tokens"] == tokens
        }
        for tokens in (128, 512)
    }
    series["decode at 128"] = {
        row["row"]["threads"]: row["tok/s"]
        for row in rows
        if row.get("table") == DECODE and row["row"]["context"] == 128
    }
    for label, points in series.items():
        axis.plot(list(points), list(points.values()), marker="o", label=label)
    threads = sorted({thread for points in series.values() for thread in points})
    axis.set(title="by threads", xlabel="threads", xticks=threads, ylim=(0, None))
    axis.legend(fontsize="x-small")


if __name__ == "__main__":
    main()
