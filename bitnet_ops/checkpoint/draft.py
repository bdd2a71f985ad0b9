"""Files of a checkpoint folder that are written as a whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_draft(target: Path, last: str) -> Iterator[Path]:
    """A folder to write files into, which move to ``target`` behind the ``with`` block.

    It may have folders with files. Files of the same names are replaced, others are left alone. Where the
    block raises, ``target`` is as it was. After a power cut in the middle of the renames it has no file
    ``last``.

    Args:
        target: made where it does not exist.
        last: the file without which nobody reads the others.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    # In the folder itself, because a rename is atomic only within one file system.
    draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield draft
        files = [file for file in draft.rglob("*") if file.is_file()]
        files.sort(key=lambda file: file == draft / last)
        for file in files:
            with file.open("r+b") as handle:  # Windows wants the right to write for it
                os.fsync(handle.fileno())
        (target / last).unlink(missing_ok=True)
        for file in files:
            place = target / file.relative_to(draft)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
