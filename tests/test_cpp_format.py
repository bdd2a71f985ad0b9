"""C++ is formatted as `.clang-format` says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_file_is_formatted():
    # That of the extra `test` before the system's, which is another version.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    clang_format = shutil.which("clang-format", path=places)
    assert clang_format is not None, "expected clang-format, which the extra `test` brings"
    files = [
        file
        for folder in ("csrc", "bench", "tests")
        for ending in ("*.cpp", "*.h")
        for file in sorted((ROOT / folder).rglob(ending))
    ]
    assert len(files) > 80
    result = subprocess.run(
        [clang_format, "--dry-run", "--Werror", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = {line.partition(":")[0] for line in result.stderr.splitlines() if "error:" in line}
    assert result.returncode == 0, f"run: clang-format -i {' '.join(sorted(names))}\n{result.stderr[:1000]}"
