"""The public API is documented, and the page that shows it is the one that the code gives."""

import inspect
import re
from typing import Any

import api_reference
import pytest

import bitnet_ops


def functions() -> list[tuple[str, Any]]:
    """Every public function, constructor and method, by its full name."""
    found = []
    for module, name, value in api_reference.public_objects():
        full_name = f"{module.__name__}.{name}"
        if inspect.isfunction(value):
            found.append((full_name, value))
        elif inspect.isclass(value):
            for method, member in api_reference.public_methods(value):
                found.append((f"{full_name}.{method}", api_reference.as_function(member)))
    return found


NAMED = pytest.mark.parametrize(
    ("name", "function"), [pytest.param(*entry, id=entry[0]) for entry in functions()]
)


def test_the_page_is_up_to_date():
    page = api_reference.PAGE.read_text(encoding="utf-8")
    assert page == api_reference.page(), "run: python tests/api_reference.py"


def test_every_public_name_is_described_on_it():
    headings = re.findall(r"^### (?:class )?`(\w+)`\n\n(?=.)", api_reference.page(), flags=re.MULTILINE)
    assert not set(bitnet_ops.__all__) - set(headings)
    assert all(hasattr(bitnet_ops, name) for name in bitnet_ops.__all__)


def test_every_class_and_constant_says_what_it_is():
    for module, name, value in api_reference.public_objects():
        described = value.__doc__ if inspect.isclass(value) else api_reference.descriptions(module).get(name)
        assert described or inspect.isfunction(value), f"{module.__name__}.{name} has no docstring"


@NAMED
def test_it_says_what_it_does(name, function):
    assert function.__doc__, f"{name} has no docstring"


@NAMED
def test_it_describes_each_argument_by_its_name(name, function):
    """Where there is more than one argument, or a section about them: all of them, in their order."""
    names = [argument for argument in api_reference.arguments(function) if argument != "*"]
    section = re.search(r"^ *Args:\n(.*?)(?:^ *\n|\Z)", function.__doc__, flags=re.MULTILINE | re.DOTALL)
    if section is None:
        assert len(names) <= 1, f"{name} has the arguments {names}, and no section Args"
    else:
        indent = re.match(" *", section[1])[0]
        described = re.findall(rf"^{indent}([*\w][\w*, ]*):", section[1], flags=re.MULTILINE)
        assert [part for entry in described for part in entry.split(", ")] == names


def test_a_signature_keeps_defaults_stars_and_quoted_names():
    def sample(a: "int", b: str = "x, y", *, c: float | None = None, **rest: object) -> "list[int]":
        """Shown."""

    shown = "sample(a: int, b: str = 'x, y', *, c: float | None = None, **rest: object) -> list[int]"
    assert api_reference.signature("sample", sample) == shown
