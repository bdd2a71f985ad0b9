"""Writes docs/API.md, the reference of everything public, from signatures and docstrings.

    python tests/api_reference.py

It stands beside the code it is made from; a test says when it is out of date. Signatures are read from the
source, so the page is the same whichever versions of Python and torch make it.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "API.md"

MODULES: dict[str, tuple[str, ...] | None] = {
    "bitnet_ops": None,
    "bitnet_ops.ops": None,
    "bitnet_ops.packing": None,
    "bitnet_ops.evaluation.sparsity": None,
    "bitnet_ops.integrations.peft": ("adapt_packed_layers",),
    "bitnet_ops.generation.mixin": ("TextStream", "Streamer"),  # the mixin's are with BitNet
    "bitnet_ops.integrations.export": None,
    "bitnet_ops.generation.chat": ("ChatSession", "Continuation", "render_chat"),
    "bitnet_ops.reference": None,
}
"""What users import from, in the order of the page. A name is shown where it comes first. None stands for
``__all__``, or without it for the functions, classes and described constants that the module defines."""

WIDTH = 100
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", re.MULTILINE)
LISTS = ("Args", "Attributes", "Raises")

HEADER = """\
# bitnet_ops, name by name

Made by `python tests/api_reference.py` from signatures and docstrings: edit those.
Sizes stand in brackets behind a tensor's dtype: M tokens, N outputs, K inputs, B sequences, T tokens of a
sequence, V tokens of the vocabulary.
"""


def public_objects() -> Iterator[tuple[ModuleType, str, Any]]:
    """Every public function, class and constant with its module and name; each once."""
    seen: set[int] = set()
    for module_name, names in MODULES.items():
        module = import_module(module_name)
        for name in names or getattr(module, "__all__", None) or own_names(module):
            value = getattr(module, name)
            if id(value) not in seen:
                seen.add(id(value))
                yield module, name, value


def own_names(module: ModuleType) -> Iterator[str]:
    """What a module without ``__all__`` defines in public."""
    described = descriptions(module)
    for name, value in vars(module).items():
        defined_here = name in described or getattr(value, "__module__", None) == module.__name__
        if defined_here and not name.startswith("_"):
            yield name


def descriptions(module: ModuleType) -> dict[str, str]:
    """The constants of a module that a string under them describes."""
    found = {}
    for statement, below in pairwise(ast.parse(inspect.getsource(module)).body):
        match statement, below:
            case (
                ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = inspect.cleandoc(text)
    return found


def public_methods(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties of a class without underscore, also those of bases in this package."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("bitnet_ops"):
            continue
        for name, value in vars(base).items():
            function = as_function(value)
            if function is not None and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, value


def as_function(member: Any) -> Any:
    """The function in a method, class method or property; None of another member."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return function if inspect.isfunction(function) else None


def arguments(function: Any) -> dict[str, str]:
    """The arguments that a caller gives, by name, as the source has them; ``*`` stands for itself."""
    given = definition_of(function).args
    ordered = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(ordered) - len(given.defaults)) + given.defaults
    found = {
        argument.arg: declared(argument, default) for argument, default in zip(ordered, defaults, strict=True)
    }
    if given.vararg:
        found[f"*{given.vararg.arg}"] = f"*{declared(given.vararg)}"
    elif given.kwonlyargs:
        found["*"] = "*"
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found[argument.arg] = declared(argument, default)
    if given.kwarg:
        found[f"**{given.kwarg.arg}"] = f"**{declared(given.kwarg)}"
    return {name: text for name, text in found.items() if name not in ("self", "cls")}


def declared(argument: ast.arg, default: ast.expr | None = None) -> str:
    annotation = f": {unquoted(argument.annotation)}" if argument.annotation else ""
    return argument.arg + annotation + (f" = {ast.unparse(default)}" if default is not None else "")


def unquoted(annotation: ast.expr) -> str:
    """An annotation, also one that is a string because its name comes later."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return ast.unparse(annotation)


def definition_of(function: Any) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


def signature(name: str, function: Any) -> str:
    """As in the source, on one line or with one for each argument."""
    given = arguments(function).values()
    returns = definition_of(function).returns
    result = f" -> {unquoted(returns)}" if returns is not None and name != "__init__" else ""
    line = f"{name}({', '.join(given)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in given), f"){result}"])


def markdown(docstring: str) -> str:
    """A docstring in Google's form as Markdown: lists, and examples as code."""
    text, *sections = SECTION.split(docstring)
    parts = [re.sub(r"::$", ":", text.strip(), flags=re.MULTILINE)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = textwrap.dedent(body).strip("\n")
        if title == "Example":
            parts.append(code(body.rstrip()))
            continue
        if title in LISTS:
            body = re.sub(r"^(\S.*?): ", r"- `\1`: ", body, flags=re.MULTILINE)
        else:
            body = body.strip()
        parts.append(f"**{title}**{': ' if title == 'Returns' else chr(10) * 2}{body.rstrip()}")
    return "\n\n".join(parts)


def entry(name: str, value: Any, described: str | None) -> Iterator[str]:
    """The Markdown of a function, of a class with its methods, or of a constant."""
    if inspect.isclass(value):
        yield f"### class `{name}`"
        ours = (base for base in value.__mro__ if base.__module__.startswith("bitnet_ops"))
        constructor = next((vars(base)["__init__"] for base in ours if "__init__" in vars(base)), None)
        has_constructor = inspect.isfunction(constructor) and not is_dataclass(value)  # fields are attributes
        if has_constructor:
            yield code(signature("__init__", constructor).replace("__init__", name, 1))
        yield markdown(inspect.getdoc(value) or "")
        if has_constructor and constructor.__doc__:
            yield markdown(inspect.getdoc(constructor) or "")
        for method, member in public_methods(value):
            yield f"#### `{name}.{method}`"
            if not isinstance(member, property):
                yield code(signature(method, as_function(member)))
            yield markdown(inspect.getdoc(as_function(member)) or "")
    elif inspect.isfunction(value):
        yield f"### `{name}`"
        yield code(signature(name, value))
        yield markdown(inspect.getdoc(value) or "")
    else:
        yield f"### `{name}`"
        yield markdown(described or "")


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def page() -> str:
    """The whole page."""
    parts = [HEADER.strip()]
    current = None
    for module, name, value in public_objects():
        if module is not current:
            current = module
            parts += [f"## {module.__name__}", markdown(inspect.getdoc(module) or "")]
        parts += entry(name, value, descriptions(module).get(name))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {sum(1 for _ in public_objects())} names")
