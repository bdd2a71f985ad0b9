"""What tests of damaged checkpoints share: names of tensors, and the tools that do damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoints import Sizes
from torch import Tensor

from bitnet_ops import from_pretrained
from bitnet_ops.checkpoint import CheckpointError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.self_attn.attn_sub_norm.weight"
EMBEDDING = "model.embed_tokens.weight"
LLAMA = Sizes(llama=True, norms=True, head=12)


def assert_refused(folder: Path, *words: str) -> None:
    """Loading fails with a text that has all the words."""
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is missing in: {message}"


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
