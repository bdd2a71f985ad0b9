"""The synthetic 2B4T as benchmarks use it: made once, converted and loaded as a user's would be."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

import bitnet_ops
from bitnet_ops import BitNet, KVCache


def make_packed(path: Path) -> Path:
    """Writes the synthetic checkpoint in the layouts of this machine; returns its folder."""
    script = Path(__file__).with_name("make_synthetic_checkpoint.py")
    subprocess.run([sys.executable, script, path / "published", "--tokenizer"], check=True)
    bitnet_ops.from_pretrained(path / "published").save_pretrained(path / "packed")
    for file in (path / "published").iterdir():  # a gigabyte
        file.unlink()
    return path / "packed"


@cache
def prompt(tokens: int, rows: int = 1) -> torch.Tensor:
    """Ids [rows, tokens], the same in every run."""
    return torch.randint(100_000, (rows, tokens), generator=torch.Generator().manual_seed(0))


def filled_cache(model: BitNet, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> KVCache:
    """As if it had been used: what the tokens were does not matter to the time."""
    cache = KVCache(model.config, rows, tokens + 1, dtype=dtype)
    for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if tensor is not None:
            tensor.fill_(1)
    return cache
