"""Turns the JSON of a benchmark run into tables.

    pytest bench/ --benchmark-only --benchmark-json=results.json
    python bench/report.py results.json                            # prints the tables
    python bench/report.py results.json --into bench/RESULTS.md    # writes them between the marks
    python bench/report.py results.json --only "2 threads" --into README.md

publish.sh does all of it.

Benchmarks put what belongs into a table in `extra_info`: the key "table" names it, "row" holds the columns
that tell its rows apart, and the other keys are columns of results. Equal rows are merged, so several
benchmarks can fill one row.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table -->", "<!-- /table -->"


def main() -> None:
    """Prints or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file that --benchmark-json wrote")
    parser.add_argument("--into", type=Path, help=f"file to replace the text between {BEGIN} and {END} in")
    parser.add_argument("--only", default="", metavar="TEXT", help="tables whose title contains it")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    rows = [one["extra_info"] for one in results["benchmarks"]]
    text = report([row for row in rows if arguments.only in row.get("table", "")], results["machine_info"])
    if arguments.into is None:
        print(text)
        return
    document = arguments.into.read_text(encoding="utf-8")
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{arguments.into}: expected the marks {BEGIN} and {END}, got a file without them")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=arguments.into.parent, delete=False) as draft:
        draft.write(f"{before}{BEGIN}\n{text}\n{END}{after}")
    shutil.copymode(arguments.into, draft.name)
    os.replace(draft.name, arguments.into)


def report(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """All tables in Markdown, and below them the machine they come from."""
    tables: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        if "table" in row:
            cells = {**row["row"], **row}
            title, key = cells.pop("table"), tuple(cells.pop("row").items())
            tables.setdefault(title, {}).setdefault(key, {}).update(cells)
    parts = [f"{title}\n\n{table(list(lines.values()))}" for title, lines in tables.items()]
    cpu = machine.get("cpu", {}).get("brand_raw", "unknown CPU")
    facts = [cpu, f"{machine.get('cpu', {}).get('count', '?')} cores", *machine.get("bitnet_ops", [])]
    return "\n\n".join([*parts, f"Machine: {', '.join(facts)}. Medians."])


def table(lines: list[dict[str, Any]]) -> str:
    """One Markdown table; columns in the order in which rows bring them, texts to the left."""
    columns = list(dict.fromkeys(column for cells in lines for column in cells))
    texts = {column for cells in lines for column, value in cells.items() if isinstance(value, str)}
    rule = ["---" if column in texts else "---:" for column in columns]
    body = [[cell(cells.get(column)) for column in columns] for cells in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *body])


def cell(value: Any) -> str:
    """A number with three digits that say something, a text as it is, nothing where there is nothing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    main()
