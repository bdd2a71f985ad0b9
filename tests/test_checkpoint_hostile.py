"""Damaged and hostile folders and files: one clear CheckpointError that names the file, never a crash.

Settings: test_settings_hostile.py; tensors: test_tensors_hostile.py; random damage: test_checkpoint_fuzz.py.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_checkpoints import (
    assert_refused,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    Sizes,
    Weights,
    byte_tokenizer,
    published_tensors,
    write_folder,
)
from tokenizers import Tokenizer, models

from bitnet_ops import from_pretrained
from bitnet_ops.checkpoint import CheckpointError
from bitnet_ops.checkpoint.files import TensorFiles
from bitnet_ops.generation.chat import ChatSession

# The folder and its files


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match=r"folder with a checkpoint.*which does not exist"):
        from_pretrained("no-such-folder")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert_refused(folder / "config.json", "folder with a checkpoint", "is another file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, name, "no such file")


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"],
)
def test_a_named_pipe_does_not_block(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert_refused(folder, name)


def test_another_format_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
        b"nonsense",
    ],
    ids=["empty", "cut", "list", "null", "utf-16", "deep list", "deep object", "long number", "word"],
)
def test_json_garbage(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert_refused(folder, name, "expected")


def test_a_huge_json_file_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    assert_refused(folder, "config.json", "at most")


# The index of several files


def sharded(folder: Path, **weight_map: str) -> Path:
    """A valid folder of two files whose index is then changed; "__" in a name stands for "."."""
    sizes = Sizes()
    write_folder(folder, sizes.config(), published_tensors(Weights.random(sizes)), files=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
    index.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "../checkpoint/model-00001-of-00002.safetensors",
        "/etc/passwd",
        "/tmp/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "sub/a.safetensors",
        "a\0.safetensors",
        ".safetensors",
        "passwd",
        "",
        7,
        None,
        ["model-00001-of-00002.safetensors"],
    ],
    ids=repr,
)
def test_the_index_cannot_lead_out_of_the_folder(tmp_path: Path, path: Any) -> None:
    folder = sharded(tmp_path / "checkpoint", model__norm__weight=path)
    assert_refused(folder, "model.safetensors.index.json", "model.norm.weight", "plain name")


def test_the_index_names_a_file_that_is_missing(tmp_path: Path) -> None:
    folder = sharded(tmp_path, model__norm__weight="other.safetensors")
    assert_refused(folder, "other.safetensors", "no such file")


def test_the_index_names_the_wrong_file(tmp_path: Path) -> None:
    content = json.loads((sharded(tmp_path) / "model.safetensors.index.json").read_text())
    files = sorted(set(content["weight_map"].values()))
    other = files[1 - files.index(content["weight_map"]["model.norm.weight"])]
    sharded(tmp_path, model__norm__weight=other)
    assert_refused(tmp_path, other, "model.norm.weight", "no such tensor")


def test_the_index_names_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    folder = sharded(tmp_path, made_up="model-00001-of-00002.safetensors")
    assert_refused(folder, "model-00001-of-00002.safetensors", "made_up", "no such tensor")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    first, second = (folder / f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    save_file(load_file(first) | load_file(second), second)
    assert_refused(folder, second.name, "each tensor in one file")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "[1]"]
)
def test_an_index_without_a_map(tmp_path: Path, content: str) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(content)
    assert_refused(tmp_path, "model.safetensors.index.json", "expected", "got")


# Headers that safetensors itself would never write


def with_header(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + data)
    return folder


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"{}",
        b'{"a":1}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}',
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U9","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}',
        b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}',
        b"[" * 100_000,
    ],
    ids=lambda header: header[:60].decode(),
)
@pytest.mark.parametrize("data", [b"", b"\0"], ids=["no data", "a byte"])
def test_strange_headers(folder: Path, header: bytes, data: bytes) -> None:
    assert_refused(with_header(folder, header, data), "safetensors", "expected")


@pytest.mark.parametrize("length", [1, 1 << 20, 100_000_001, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
def test_header_lengths_beyond_the_file(folder: Path, length: int) -> None:
    assert_refused(with_header(folder, b"{}", length=length), "model.safetensors", "valid safetensors")


def test_a_file_that_shrinks_while_it_is_read(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet_ops.checkpoint.tensor_source.PIECE_BYTES", 100)
    file = ours / "model.safetensors"
    expected = load_file(file)
    with TensorFiles(ours, mmap=False) as files:
        large = [name for name, stored in files.tensors.items() if stored.nbytes > 300]
        assert large
        for name in large:  # several pieces, in several threads
            assert torch.equal(files.read(name), expected[name])
        last = max(large, key=lambda name: files.tensors[name].offset)
        end = files.tensors[last].offset + files.tensors[last].nbytes
        os.truncate(file, end - 1)
        with pytest.raises(CheckpointError, match=r"readable data.*ends before the tensor"):
            files.read(last)


# Text files


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xff", b'{"version":"1.0"}', b"[" * 200_000])
def test_tokenizer_garbage(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert_refused(folder, "tokenizer.json", "a tokenizer")


def test_token_ids_beyond_the_embedding(folder: Path) -> None:
    byte_tokenizer(62).save(str(folder / "tokenizer.json"))
    assert_refused(folder, "tokenizer.json", "vocab_size = 61", "61")


@pytest.mark.parametrize("token", [61, 99, 100, 4_294_967_295])
def test_a_single_token_id_beyond_the_embedding(folder: Path, token: int) -> None:
    tokenizer = json.loads(byte_tokenizer(60).to_str())
    tokenizer["model"]["vocab"]["ab"] = token
    for indent in (None, 2):
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=indent))
        assert_refused(folder, "tokenizer.json", "vocab_size = 61", str(token))


def test_token_ids_that_count_entries(folder: Path) -> None:
    entries = [(chr(256 + number), -1.0) for number in range(62)]
    Tokenizer(models.Unigram(entries, unk_id=0)).save(str(folder / "tokenizer.json"))
    assert_refused(folder, "tokenizer.json", "vocab_size = 61", "61")


def test_an_added_token_beyond_the_embedding(folder: Path) -> None:
    tokenizer = byte_tokenizer(61)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert_refused(folder, "tokenizer.json", "vocab_size = 61", "61")


def test_a_token_may_look_like_an_id(folder: Path) -> None:
    tokenizer = json.loads(byte_tokenizer(60).to_str())
    tokenizer["model"]["vocab"]['":999'] = 60
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = from_pretrained(folder).tokenizer
    assert loaded is not None
    assert loaded.token_to_id('":999') == 60


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": 61},
        {"eos_token_id": [2, "3"]},
        {"eos_token_id": True},
        {"bos_token_id": [1]},
        {"pad_token_id": -1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_p": float("inf")},
        {"top_k": True},
        {"max_new_tokens": [1]},
        {"do_sample": "yes"},
    ],
    ids=str,
)
def test_generation_fields(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    assert_refused(folder, "generation_config.json", next(iter(fields)), "expected", "got")


@pytest.mark.parametrize("template", [3, {"default": "x"}, [{"name": "default", "template": 3}]], ids=str)
def test_chat_templates(folder: Path, template: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert_refused(folder, "tokenizer_config.json", "chat_template", "a string")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'x' | center(10**10) }}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_hostile_chat_templates_in_a_folder(folder: Path, template: str, place: str) -> None:
    """Loading does not run them; a chat refuses them, fast and in little memory."""
    byte_tokenizer(61).save(str(folder / "tokenizer.json"))
    content = template if place.endswith("jinja") else json.dumps({"chat_template": template})
    (folder / place).write_text(content)
    session = ChatSession(from_pretrained(folder))
    with pytest.raises(ValueError, match="chat_template: "):
        list(session.reply("Hello"))
