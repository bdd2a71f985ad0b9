"""What `pip install` leaves behind."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bitnet_ops import _C


def test_the_extension_has_no_debugging_symbols() -> None:
    """It had 17 MB with them, because Python's own flags say -g; without, 1.4 MB on x86-64."""
    assert Path(_C.__file__).stat().st_size < 3_000_000


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a global lock")
def test_importing_leaves_the_global_lock_off() -> None:
    """Python switches it on where an extension module does not say that it needs none."""
    asks = "import sys, bitnet_ops; from bitnet_ops import _C; print(sys._is_gil_enabled())"
    result = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr[-2000:]
