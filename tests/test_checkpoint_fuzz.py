"""Random damage to checkpoints: there is a model that runs, or a CheckpointError."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import (
    byte_tokenizer,
)

from bitnet_ops import from_pretrained
from bitnet_ops.checkpoint import CheckpointError


def load_or_refuse(folder: Path) -> bool:
    """Whether the folder loads; a model that loads has to run, too."""
    try:
        model = from_pretrained(folder)
    except CheckpointError as error:
        if str(folder) not in str(error):
            raise AssertionError("the message names no file") from error
        return False
    ids = torch.tensor([[0, 3, 1]])
    assert model(ids).shape == (1, 3, model.config.vocab_size)
    return True


# One kind of file in each fast run: ours, with every tensor that there is.
@pytest.fixture(
    params=[
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("folder", "ours", "llama")),
        "our_llama",
    ]
)
def subject(request: pytest.FixtureRequest) -> Path:
    """A valid folder in either format, small enough to load some thousand times."""
    return request.getfixturevalue(request.param)


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_fuzz_truncation(subject: Path) -> None:
    file = subject / "model.safetensors"
    data = file.read_bytes()
    chance = random.Random(1)
    ends = {0, 1, 7, 8, 9, header_end(data) - 1, header_end(data), header_end(data) + 1, len(data) - 1}
    for end in sorted(ends | {chance.randrange(len(data)) for _ in range(100)}):
        file.write_bytes(data[:end])
        assert not load_or_refuse(subject), end
    file.write_bytes(data + b"\0")
    assert not load_or_refuse(subject)
    file.write_bytes(data)
    assert load_or_refuse(subject)


def flips(data: bytes, start: int, end: int, count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(count):
        spoiled = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            spoiled[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
        yield bytes(spoiled)


def test_fuzz_header_bytes(subject: Path) -> None:
    file = subject / "model.safetensors"
    data = file.read_bytes()
    refused = 0
    for spoiled in flips(data, 0, header_end(data), 400, seed=2):
        file.write_bytes(spoiled)
        refused += not load_or_refuse(subject)
    # A flip goes unnoticed only in a space of the padding or in the file's own metadata.
    assert refused > 360


def test_fuzz_data_bytes(subject: Path) -> None:
    file = subject / "model.safetensors"
    data = file.read_bytes()
    results = set()
    for spoiled in flips(data, header_end(data), len(data), 200, seed=3):
        file.write_bytes(spoiled)
        results.add(load_or_refuse(subject))
    assert results == {True, False}  # some flips make a code 3 or a NaN, some only another weight


STRANGE_VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 61, 1.5, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 63,
    10**30, "", "24", "bitnet", "x" * 10_000, [], [1], [[[]]], {}, {"a": None}, {"rope_type": "default"},
)  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_fuzz_json_fields(subject: Path, name: str) -> None:
    file = subject / name
    if name == "generation_config.json":
        fields: dict[str, Any] = dict.fromkeys(
            ("eos_token_id", "bos_token_id", "temperature", "top_k", "do_sample"), 1
        )
        fields["do_sample"] = True
    else:
        fields = {
            "head_dim": 8,
            "rope_scaling": None,
            "attention_bias": False,
            **json.loads(file.read_text()),
        }
        rope = fields["rope_scaling"] or {"rope_type": "default"}
        fields["rope_parameters"] = {"rope_theta": fields["rope_theta"], **rope}
        if subject.name.startswith("our"):
            fields["decoder_config"] = {
                "qk_norm": False, "residual_scale": 1.0, "logit_scale": 1.0, "rope_scaling": None,
                "local_layers": [1], "window": 3, "query_scale": 0.3, "dropout": 0.0,
            }  # fmt: skip
            if rope["rope_type"] != "default":
                fields["decoder_config"]["rope_scaling"] = {"kind": "linear", "factor": 2.0}
    file.write_text(json.dumps(fields))
    assert load_or_refuse(subject)
    for field in fields:
        for value in STRANGE_VALUES:
            file.write_text(json.dumps(fields | {field: value}))
            load_or_refuse(subject)
            if isinstance(fields[field], dict):
                for inner in fields[field]:
                    file.write_text(json.dumps(fields | {field: fields[field] | {inner: value}}))
                    load_or_refuse(subject)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_fuzz_json_bytes(subject: Path, name: str) -> None:
    file = subject / name
    if name == "tokenizer.json":
        byte_tokenizer(60).save(str(file))
    data = file.read_bytes()
    loaded = []
    for spoiled in flips(data, 0, len(data), 200, seed=4):
        file.write_bytes(spoiled)
        loaded.append(load_or_refuse(subject))
    assert not all(loaded), "no flip was noticed"
