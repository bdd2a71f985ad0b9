"""The reader of GGUF headers: what it finds, and that it names what is wrong. Models are not looked at."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Entry,
    Typed,
    gguf_bytes,
    text,
)

from bitnet_ops.checkpoint import CheckpointError
from bitnet_ops.checkpoint.gguf.header import GgufFile


def read(folder: Path, data: bytes, *, mmap: bool = True) -> GgufFile:
    file = folder / "file.gguf"
    file.write_bytes(data)
    return GgufFile(file, mmap=mmap)


def assert_refused(folder: Path, data: bytes, *words: str) -> None:
    """Reading fails with a text that has the file's name and all the words."""
    with pytest.raises(CheckpointError) as caught:
        read(folder, data)
    for word in ("file.gguf", *words):
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def f32(name: str, *shape: int, **more: Any) -> Entry:
    return Entry(name, shape, 0, bytes(4 * int(np.prod(shape))), **more)


VALUES: dict[str, Any] = {
    "u8": Typed(255, U8),
    "i8": Typed(-128, I8),
    "u16": Typed(65535, U16),
    "i16": Typed(-(2**15), I16),
    "u32": Typed(2**32 - 1, U32),
    "i32": Typed(-(2**31), I32),
    "u64": Typed(2**64 - 1, U64),
    "i64": Typed(-(2**63), I64),
    "f32": Typed(0.5, F32),
    "f64": Typed(0.1, F64),
    "true": Typed(True, BOOL),
    "false": Typed(False, BOOL),
    "string": "Grüße",
    "empty": "",
    "numbers": Typed([1, 2, 3], ARRAY, U16),
    "floats": Typed([0.25, -1.0], ARRAY, F32),
    "bools": Typed([True, False], ARRAY, BOOL),
    "strings": Typed(["a", "", "é"], ARRAY, STRING),
    "nothing": Typed([], ARRAY, STRING),
}


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value(version: int, tmp_path: Path) -> None:
    metadata = read(tmp_path, gguf_bytes(VALUES, [], version=version)).metadata
    expected = {key: value.value if isinstance(value, Typed) else value for key, value in VALUES.items()}
    assert metadata == expected
    assert {key: type(value) for key, value in metadata.items()} == {
        key: type(value) for key, value in expected.items()
    }


def test_a_file_of_the_gguf_package(tmp_path: Path) -> None:
    file = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_custom_alignment(64)
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("matrix", matrix)
    writer.add_tensor("half", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for mmap in (True, False):
        with GgufFile(file, mmap=mmap) as files:
            assert files.metadata["general.architecture"] == "llama"
            assert files.metadata["llama.block_count"] == 3
            assert files.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
            assert files.tensors["matrix"].shape == (2, 3)
            assert files.tensors["matrix"].dtype == files.type_of("matrix").name == "F32"
            assert torch.equal(files.tensor("matrix"), torch.arange(6.0).view(2, 3))
            assert torch.equal(files.tensor("half"), torch.arange(5).half())
            assert files.data("half").numpy().tobytes() == np.arange(5, dtype=np.float16).tobytes()
            assert files.tensors["half"].offset % 64 == 0


def test_offsets_need_not_be_in_order(tmp_path: Path) -> None:
    data = gguf_bytes({}, [f32("b", 8, offset=32), f32("a", 8, offset=0)])
    files = read(tmp_path, data)
    assert files.tensors["b"].offset == files.tensors["a"].offset + 32


# Number 42


@pytest.mark.parametrize(("name", "block", "size"), [("Q2_0", 64, 18), ("Q2_0_128", 128, 34)])
@pytest.mark.parametrize("padded", [True, False])
def test_what_42_means_is_told_by_bytes(
    name: str, block: int, size: int, padded: bool, tmp_path: Path
) -> None:
    entries = [Entry(f"{n}", (4, 4096), 42, bytes(4 * 4096 // block * size)) for n in range(3)]
    data = gguf_bytes({}, [*entries, f32("end", 8)] if padded else entries)
    files = read(tmp_path, data)
    assert {files.type_of(entry.name).name for entry in entries} == {name}
    assert files.tensors["1"].nbytes == len(entries[1].data)


@pytest.mark.parametrize(("name", "block", "size"), [("Q2_0", 64, 18), ("Q2_0_128", 128, 34)])
def test_a_small_tensor_of_number_42_means_what_others_do(
    name: str, block: int, size: int, tmp_path: Path
) -> None:
    """Of 128 weights both have 64 bytes with padding."""
    small = Entry("small", (1, 128), 42, bytes(128 // block * size))
    large = Entry("large", (4, 4096), 42, bytes(4 * 4096 // block * size))
    for entries in ([small, large], [large, small]):
        assert read(tmp_path, gguf_bytes({}, entries)).type_of("small").name == name


def test_number_42_has_one_meaning_in_a_file(tmp_path: Path) -> None:
    one = Entry("one", (4, 4096), 42, bytes(4 * 4096 // 64 * 18))
    other = Entry("other", (4, 4096), 42, bytes(4 * 4096 // 128 * 34))
    assert_refused(tmp_path, gguf_bytes({}, [one, other, f32("end", 8)]), "'other'", "Q2_0", "Q2_0_128")


def test_stq1_0_is_refused_by_name(tmp_path: Path) -> None:
    data = gguf_bytes({}, [Entry("one", (4, 4096), 42, bytes(4 * 4096 // 256 * 42))])
    assert_refused(tmp_path, data, "'one'", "STQ1_0")


def test_bytes_that_fit_no_meaning_of_42(tmp_path: Path) -> None:
    data = gguf_bytes({}, [Entry("one", (4, 4096), 42, bytes(1000))])
    assert_refused(tmp_path, data, "'one'", "bytes")


# What is wrong is named


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (41, "Q1_0"),
        (38, "TL1"),
        (39, "MXFP4"),
        (10, "Q2_K"),
        (335, "IQ2_BN_R4"),
        (1234, "1234"),
        (4, "number 4"),
    ],
)
def test_a_type_that_is_not_read(number: int, word: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, gguf_bytes({}, [Entry("one", (2, 256), number, bytes(4096))]), "'one'", word)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", ["end of the file"]),
        (b"GGU", ["end of the file"]),
        (b"GGML" + bytes(20), ["GGUF", "GGML"]),
        (b"GGUF" + struct.pack("<I", 1) + bytes(30), ["version 1"]),
        (b"GGUF" + struct.pack("<I", 4) + bytes(30), ["version 4"]),
        (b"GGUF" + struct.pack("<I", 0) + bytes(30), ["version 0"]),
        (b"GGUF" + struct.pack(">I", 3) + bytes(30), ["big-endian"]),
        (b"GGUF" + struct.pack(">I", 2) + bytes(30), ["big-endian"]),
    ],
)
def test_what_is_no_gguf_file_of_version_2_or_3(head: bytes, words: list[str], tmp_path: Path) -> None:
    assert_refused(tmp_path, head, *words)


HUGE = (2**63, 2**64 - 1, 2**32, 2**31)


@pytest.mark.parametrize("count", HUGE)
def test_absurd_counts(count: int, tmp_path: Path) -> None:
    begin = b"GGUF" + struct.pack("<I", 3)
    assert_refused(
        tmp_path, begin + struct.pack("<QQ", count, 0) + bytes(100), "number of tensors", str(count)
    )
    assert_refused(tmp_path, begin + struct.pack("<QQ", 0, count) + bytes(100), "number of keys", str(count))
    one_key = begin + struct.pack("<QQ", 0, 1)
    assert_refused(tmp_path, one_key + struct.pack("<Q", count) + bytes(100), "key 0", str(count))
    string = one_key + text("k") + struct.pack("<IQ", STRING, count) + bytes(100)
    assert_refused(tmp_path, string, "'k'", str(count))
    for kind in (U8, STRING, F64):
        array = one_key + text("k") + struct.pack("<IIQ", ARRAY, kind, count) + bytes(100)
        assert_refused(tmp_path, array, "'k'", str(count))
    inside = one_key + text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, count) + bytes(100)
    assert_refused(tmp_path, inside, "'k'", "element 0")


@pytest.mark.parametrize("kind", [13, 14, 255, 2**32 - 1])
def test_unknown_types_of_values(kind: int, tmp_path: Path) -> None:
    one_key = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
    assert_refused(tmp_path, one_key + struct.pack("<I", kind) + bytes(100), "'k'", str(kind))
    assert_refused(tmp_path, one_key + struct.pack("<IIQ", ARRAY, kind, 1) + bytes(100), "'k'", str(kind))


def test_arrays_of_arrays(tmp_path: Path) -> None:
    nested = struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQ", ARRAY, 1) * 1000
    one_key = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
    assert_refused(tmp_path, one_key + nested, "'k'", "arrays")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"k": b"\xff\xfe"}, ["'k'", "UTF-8"]),
        ({"k": Typed(["a", b"\x80"], ARRAY, STRING)}, ["'k'", "element 1", "UTF-8"]),
        ({b"\xff": 1}, ["key 0", "UTF-8"]),
        ({"general.alignment": 0}, ["alignment", "power of two"]),
        ({"general.alignment": 33}, ["alignment", "power of two"]),
        ({"general.alignment": "32"}, ["alignment", "power of two"]),
        ({"general.alignment": Typed(-32, I32)}, ["alignment", "power of two"]),
        ({"split.count": 3}, ["split.count", "llama-gguf-split --merge", "3 parts"]),
        ({"": 1}, ["key 0", "name"]),
    ],
)
def test_metadata_that_is_wrong(metadata: dict[Any, Any], words: list[str], tmp_path: Path) -> None:
    assert_refused(tmp_path, gguf_bytes(metadata, []), *words)


def test_a_bool_is_0_or_1(tmp_path: Path) -> None:
    data = gguf_bytes({"k": Typed(True, BOOL)}, [])
    at = data.index(text("k")) + len(text("k")) + 4
    assert_refused(tmp_path, data[:at] + b"\x02" + data[at + 1 :], "'k'", "bool", "2")


def test_a_key_twice(tmp_path: Path) -> None:
    data = gguf_bytes({"key": 1, "kez": 2}, []).replace(b"kez", b"key")
    assert_refused(tmp_path, data, "'key'", "second time")


def test_a_tensor_twice(tmp_path: Path) -> None:
    assert_refused(tmp_path, gguf_bytes({}, [f32("one", 8), f32("one", 8)]), "'one'", "second time")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry("one", (), 0, bytes(32)), ["dimensions", "0"]),
        (Entry("one", (1, 1, 1, 1, 8), 0, bytes(32)), ["dimensions", "5"]),
        (Entry("one", (0, 8), 0, bytes(32)), ["shape"]),
        (Entry("one", (2**63, 8), 0, bytes(32)), ["shape"]),
        (Entry("one", (2**62, 4), 0, bytes(32)), ["shape"]),
        (Entry("one", (2**32, 2**32), 35, bytes(32)), ["shape"]),
        (Entry("one", (9,), 0, bytes(32)), ["36 bytes", "32"]),
        (Entry("one", (2, 100), 35, bytes(512)), ["256", "100"]),
        (Entry("one", (8,), 0, bytes(32), offset=2**63), ["offset"]),
        (Entry("one", (8,), 0, bytes(32), offset=32), ["bytes"]),
        (Entry("one", (1,), 0, bytes(32), offset=4), ["offset", "32"]),
        (Entry("", (8,), 0, bytes(32)), ["name"]),
        (Entry("o" * 70000, (8,), 0, bytes(32)), ["name"]),
    ],
)
def test_tensors_that_are_wrong(entry: Entry, words: list[str], tmp_path: Path) -> None:
    assert_refused(tmp_path, gguf_bytes({}, [entry]), *words)


def test_tensors_that_overlap(tmp_path: Path) -> None:
    for offset in (0, 32):
        data = gguf_bytes({}, [f32("one", 16), f32("two", 8, offset=offset), f32("end", 8, offset=96)])
        assert_refused(tmp_path, data, "bytes", "next tensor")


def test_a_header_that_ends_early_at_every_byte(tmp_path: Path) -> None:
    data = gguf_bytes(VALUES, [f32("one", 2, 4), Entry("two", (2, 256), 35, bytes(132))])
    for end in range(len(data) - 32 - 160 + 1):
        assert_refused(tmp_path, data[:end])


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, word in ((tmp_path, "something else"), (tmp_path / "none.gguf", "no such file")):
        with pytest.raises(CheckpointError, match=word):
            GgufFile(path)


def test_a_file_that_shrank(tmp_path: Path) -> None:
    data = gguf_bytes({}, [f32("one", 1000)])
    for mmap in (True, False):
        files = read(tmp_path, data, mmap=mmap)
        if mmap:
            continue  # the system ends a process that looks at a page that is gone: docs of `from_pretrained`
        (tmp_path / "file.gguf").write_bytes(data[:-100])
        with pytest.raises(CheckpointError, match="'one'"):
            files.data("one")


def test_memory_stays_within_a_multiple_of_the_file(tmp_path: Path) -> None:
    """40 bytes for an element of an array at most, and there is a bound for their number."""
    small = Typed([300] * 100_000, ARRAY, U16)
    data = gguf_bytes({"a": small, "b": Typed([b""] * 100_000, ARRAY, STRING)}, [])
    tracemalloc.start()
    read(tmp_path, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 200_000 + len(data)
    too_many = struct.pack("<IIQ", ARRAY, U8, (1 << 23) + 1) + bytes((1 << 23) + 1)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
    assert_refused(tmp_path, head + too_many, "'k'", str((1 << 23) + 1))
