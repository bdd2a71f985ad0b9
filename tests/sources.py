"""The files and flags of the extension, as setup.py has them."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def setup_py() -> ModuleType:
    """The module setup.py; to import it builds nothing."""
    spec = importlib.util.spec_from_file_location("bitnet_ops_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
