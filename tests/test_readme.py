"""What README.md shows works as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_notebook_example_runs(capsys):
    example, *_ = blocks("python")
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.startswith("Emma could not forgive her")


def test_every_file_it_names_exists():
    names = re.findall(r"^\| (`.*?) \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) > 10
    for cell in names:
        folder = ""
        for name in re.findall(r"`([^`]+)`", cell):
            if "/" in name:  # later names of a cell stand in the folder of the first
                folder = name.rpartition("/")[0]
            path = name if "/" in name or not folder else f"{folder}/{name}"
            if not (README.parent / path).exists():
                pytest.fail(f"README.md names {path}, which does not exist")
