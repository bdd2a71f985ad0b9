"""What `bitnet-ops info` says of memory: computed from headers, and what a process takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitnet_ops
from bitnet_ops.checkpoint.memory_report import memory_report
from bitnet_ops.layers.linear import BitLinear

GENERATE = """
import re, sys, torch, bitnet_ops
from pathlib import Path
model = bitnet_ops.from_pretrained(sys.argv[1])
model.generate(torch.arange(128).view(1, -1), max_new_tokens=256 - 128, eos_token_id=())
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its weights show beside torch: 46 MB of table, 18 MB of its copy."""
    config = bitnet_ops.BitNetConfig(
        vocab_size=30_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = bitnet_ops.BitNet(config).eval().requires_grad_(False)
    model.model.embed_tokens.to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, BitLinear):
            w = torch.randint(-1, 2, (layer.out_features, layer.in_features), dtype=torch.int8)
            layer.packed_weight = bitnet_ops.pack_ternary(w, layer.layout)
            layer.weight_scale = torch.full_like(layer.weight_scale, 0.05)
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    return out


def test_parts(folder: Path) -> None:
    report = memory_report(folder, 200)
    model = bitnet_ops.from_pretrained(folder)
    head = model.screened_head()
    assert head is not None
    assert report.head_copy == head.codes.nbytes + head.bounds.nbytes
    assert (report.table, report.table_in_file) == (0, model.head_weight.nbytes)
    tensors = {*model.parameters(), *model.buffers()} - {model.head_weight}
    assert report.weights == sum(tensor.nbytes for tensor in tensors)
    cache = bitnet_ops.KVCache(model.config, 1, 200)
    assert report.cache == cache.keys.nbytes + cache.values.nbytes
    assert report.total > report.weights + report.head_copy + report.cache


@pytest.mark.parametrize("context", [0, 1025])
def test_a_context_that_does_not_fit(folder: Path, context: int) -> None:
    with pytest.raises(ValueError, match=f"context: expected 1 to 1024, .* got {context}"):
        memory_report(folder, context)


def test_json(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bitnet_ops",
        "info",
        "--model",
        str(folder),
        "--context",
        "64",
        "--json",
    ]
    memory = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["memory"]
    assert memory["context"] == 64
    assert memory["total"] == sum(
        memory[part] for part in memory if part not in ("context", "total", "table_in_file")
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_the_prediction(folder: Path) -> None:
    """To half the table, 46 MB, that must not become resident."""
    command = [
        sys.executable,
        "-c",
        "import bitnet_ops, sys; from bitnet_ops.checkpoint.memory_report import *; "
        "print(memory_report(sys.argv[1], 256).total)",
        str(folder),
    ]
    predicted = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    command = [sys.executable, "-c", GENERATE, str(folder)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = int(re.findall(r"\d+", found)[0]) * 1024
    # Ends of the table in folios of 2 MB; scratch of two threads; the heap's own.
    assert abs(peak - predicted) < 24 << 20
