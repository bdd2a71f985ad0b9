"""Programs, and packages for releases, and what a test does without them."""

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest


def need(*names: str, package: str) -> str:
    """The path of the first program that is there. Without any the test is skipped, but in CI it fails.

    A skip in CI would read as passed for ever. `.ci/run` sets TOOLS_MAY_BE_MISSING, and says so, where it
    could not install them.

    Args:
        names: of the program.
        package: Debian's, that has it.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    _without(f"no {' or '.join(names)} (Debian's package {package})")


def _without(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true" and not os.environ.get("TOOLS_MAY_BE_MISSING"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_package(name: str) -> ModuleType:
    """Imports a package of the extra `release`. Without it the same as `need`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        _without(f"no {name} (pip install -e '.[release]')")
