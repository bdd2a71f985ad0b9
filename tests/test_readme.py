"""What README.md shows works as it stands, and what pages and comments name exists."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("bench", "bitnet_ops", "csrc", "docs", "examples", "tests")

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "bench").glob("*.md"),
    *(ROOT / "bitnet_ops").rglob("*.md"),
    *(ROOT / "examples").glob("*.ipynb"),
]
SOURCES = [
    path
    for folder in FOLDERS
    for ending in ("py", "cpp", "h", "sh")
    for path in (ROOT / folder).rglob(f"*.{ending}")
]

A_PATH = re.compile(rf"(?<![\w./])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
A_FILE = re.compile(rf"{A_PATH.pattern}\.(?:py|cpp|h|sh|md|ipynb|png)\b")
A_LINK = re.compile(r"\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    """The text of a page, or of a notebook's cells without what they showed."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(README), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What links into a page may name: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_example_runs(capsys):
    example, *_ = blocks("python")
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.startswith("Emma could not forgive her")


@each_page
def test_every_link_leads_somewhere(page):
    for link in A_LINK.findall(text_of(page)):
        if link.startswith(("https://", "attachment:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@each_page
def test_every_file_that_a_page_names_exists(page):
    if page.name == "CHANGELOG.md":  # names files that were
        return
    # A library exists where it was built; NAME stands for what a reader will write.
    named = [
        name for name in A_PATH.findall(text_of(page)) if not name.endswith(".so") and "NAME" not in name
    ]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_file_that_a_comment_names_exists():
    named = [(file, name) for file in SOURCES for name in A_FILE.findall(file.read_text(encoding="utf-8"))]
    assert len(named) > 100
    assert [f"{file}: {name}" for file, name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("folder", ["bitnet_ops", "csrc"])
def test_the_map_of_files_is_complete(folder):
    """docs/architecture.md names every folder, or files in it."""
    text = text_of(ROOT / "docs" / "architecture.md")
    named = re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE)
    for file in (*(ROOT / folder).glob("*/__init__.py"), *(ROOT / folder).glob("*/*.cpp")):
        path = file.parent.relative_to(ROOT).as_posix()
        assert any(name.startswith(f"{path}/") for name in named), path
