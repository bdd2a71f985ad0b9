"""Models that we export write the same texts in llama.cpp.

llama.cpp rounds the inputs of each product to 8 bits with one scale for a block of inputs, whatever the model
was trained with, so its logits are others. `Rounded` does the same in our model: then they agree but for the
float16 in which its head gets its inputs, which shows that rounding is all that differs. Greedy texts are
compared where the best logit leads by more than that rounding moves any logit, in all steps.

The tests run llama-cpp-python, in this Python or in the one that BITNET_OPS_LLAMA_CPP_PYTHON names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import FAMILIES, random_model, with_tokenizer
from torch import Tensor, nn

from bitnet_ops import BitLinear, BitNet, save_gguf

VARIABLE = "BITNET_OPS_LLAMA_CPP_PYTHON"
COUNT = 16
LEAD = 1.5
TEXT = "It is a truth, naïve 你好 🙂 <user>man\n"

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-tq1_0": ("llama", {"activation_bits": 16}, "tq1_0"),
    "llama-tq2_0": ("llama", {"activation_bits": 16, "attention_output_bias": True}, "tq2_0"),
    "llama-q2_0": ("llama", {"activation_bits": 16, "rope_scaling": None, "head_dim": None}, "q2_0"),
    "qwen3-tq2_0": ("qwen3", {}, "tq2_0"),
    "qwen3-q2_0": ("qwen3", {"group_size": 64, "head_dim": 128}, "q2_0"),
}

pytestmark = pytest.mark.slow


class Rounded(nn.Module):
    """A projection whose inputs are rounded as llama.cpp does for a type of weights.

    Q8_K, for TQ1_0 and TQ2_0, has blocks of 256 with a scale in float32; Q8_0, for Q2_0, 32 and float16.
    """

    def __init__(self, layer: BitLinear, kind: str) -> None:
        super().__init__()
        self.block, self.dtype = (32, torch.float16) if kind == "q2_0" else (256, torch.float32)
        scale = layer.scales().view(-1, layer.out_features)
        self.w = (layer.unpack() * scale.repeat_interleave(layer.in_features // len(scale), 0).T).double()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self.block))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        q = (blocks / scale).round()
        y = (q * scale.to(self.dtype).float()).flatten(-2).double() @ self.w.T
        return y.float() if self.bias is None else y.float() + self.bias


@pytest.fixture(scope="module")
def python() -> str:
    """A Python with llama-cpp-python."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return sys.executable
    if not os.environ.get(VARIABLE):
        pytest.skip(f"no llama-cpp-python, here or in a Python that {VARIABLE} names")
    return os.environ[VARIABLE]


def make(case: str) -> BitNet:
    """A random model."""
    architecture, changes, _ = CASES[case]
    return with_tokenizer(random_model(FAMILIES[architecture].replace(**changes)))


def logits_of(model: BitNet, ids: Tensor) -> Tensor:
    """Those of the last `COUNT` tokens of texts: [B, COUNT, V]."""
    return model(ids)[:, -COUNT - 1 : -1]


def rounded(model: BitNet, kind: str) -> BitNet:
    """The same model with llama.cpp's rounding."""
    other = deepcopy(model)
    for name, module in list(other.named_modules()):
        if isinstance(module, BitLinear):
            other.set_submodule(name, Rounded(module, kind))
    return other


def run(python: str, file: Path, prompts: list[Any]) -> list[dict[str, Any]]:
    worker = Path(__file__).parent / "llama_cpp_worker.py"
    done = subprocess.run(
        [python, worker, file, str(COUNT)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts: list[dict[str, Any]] = json.loads(done.stdout)
    return texts


@pytest.mark.parametrize("case", CASES)
def test_the_same_greedy_texts(tmp_path: Path, python: str, case: str) -> None:
    kind = CASES[case][2]
    model = make(case)
    other = rounded(model, kind)
    prompts = torch.randint(3, 260, (400, 5), generator=torch.Generator().manual_seed(0))
    texts = model.generate(prompts, max_new_tokens=COUNT, do_sample=False)
    ours = logits_of(model, texts)
    moved = (ours - logits_of(other, texts)).abs().amax(-1)
    best = ours.topk(2).values
    leads = (best[..., 0] - best[..., 1] > LEAD * moved).all(1)
    whole = ~torch.isin(texts[:, -COUNT:], torch.tensor(model.config.eos_token_ids)).any(1)
    chosen = texts[leads & whole][:8]
    assert len(chosen) >= 4, "too few texts with a lead; take another seed"
    assert len(chosen[:, -COUNT:].unique()) > 20
    save_gguf(model, tmp_path / "a.gguf", type=kind)
    *found, about_text = run(python, tmp_path / "a.gguf", [*chosen[:, :-COUNT].tolist(), TEXT])
    theirs = torch.tensor([text["new"] for text in found])
    assert theirs.tolist() == chosen[:, -COUNT:].tolist()
    logits = torch.tensor([text["logits"] for text in found])
    ours_error, rounded_error = ((logits - logits_of(one, chosen)).abs().mean() for one in (model, other))
    assert 0 < rounded_error < ours_error / 4
    assert model.tokenizer is not None
    assert about_text["prompt"] == model.tokenizer.encode(TEXT).ids
    for text in found:
        assert text["text"].strip() == model.tokenizer.decode(text["new"]).strip()
