"""Reading from a place in a file, also as systems without preadv do it."""

import os
from pathlib import Path

import pytest

from bitnet_ops.checkpoint.read_at import read_at


@pytest.mark.parametrize("has_preadv", [True, False])
def test_read_at(has_preadv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_preadv != hasattr(os, "preadv"):
        if has_preadv:
            pytest.skip("this system has no preadv")
        monkeypatch.delattr(os, "preadv")
    file = tmp_path / "file"
    file.write_bytes(bytes(range(10)))
    with file.open("rb") as handle:
        room = bytearray(4)
        assert read_at(handle.fileno(), 3, memoryview(room)) == 4
        assert room == bytes([3, 4, 5, 6])
        assert read_at(handle.fileno(), 8, memoryview(room)) == 2
        assert room == bytes([8, 9, 5, 6])
        assert read_at(handle.fileno(), 10, memoryview(room)) == 0
