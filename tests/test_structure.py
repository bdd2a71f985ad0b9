"""The house of docs/architecture.md: an import only ever points down, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bitnet_ops"

FLOORS = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("integrations", "evaluation", "training"),
    ("model",),
    ("generation", "embedding"),
    ("checkpoint",),
    ("families",),
    ("decoder",),
    ("layers",),
    ("ops",),
    ("_ops",),
    ("packing", "reference", "isa", "locks", "_C"),
)
"""From the top down, by the first name below the package."""

ROOM = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Within a floor, too: what training measures is evaluation's, and texts become tokens in one place.
MAY = {("training", "evaluation"), ("embedding", "generation"), ("reference", "isa")}


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports when it is imported itself."""
    parts = ("bitnet_ops", *file.relative_to(PACKAGE).with_suffix("").parts)
    package = parts[:-1]
    found = set()
    # At the top level only: what functions import later, and what only type checkers see, makes no circle.
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *(node.module or "").split("."))).strip(".")
            candidates = {f"{name}.{alias.name}" for alias in node.names}
            known = {candidate for candidate in candidates if is_module(candidate)}
            found |= known | ({name} if known != candidates else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "bitnet_ops"}


def is_module(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return path.is_dir() or any(path.with_suffix(suffix).exists() for suffix in (".py", ".pyi"))


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))
GRAPH = {
    ".".join(("bitnet_ops", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): imports(file)
    for file in FILES
}


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in GRAPH} <= ROOM.keys()


@pytest.mark.parametrize("name", GRAPH)
def test_imports_point_down(name: str) -> None:
    for imported in GRAPH[name]:
        above, below = room(name), room(imported)
        allowed = above == below or ROOM[below] > ROOM[above] or (above, below) in MAY
        # Loading the library is what importing anything does first.
        assert allowed or imported == "bitnet_ops.isa", f"{name} imports {imported}"


def test_no_circles() -> None:
    # A package stands for its __init__, which every module of it imports first; that is no circle.
    edges = {name: {other for other in GRAPH[name] if not name.startswith(f"{other}.")} for name in GRAPH}
    assert set(TopologicalSorter(edges).static_order()) >= GRAPH.keys()  # CycleError names a circle
