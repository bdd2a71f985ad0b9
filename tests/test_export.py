"""torch.export and AOTInductor: saved, loaded in a new process, and still the model's bits."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import FAMILIES, SIZES, random_model
from text_models import tiny_model
from torch import Tensor, nn

import bitnet_ops
from bitnet_ops import _C, BitLinear, BitNet, DecoderConfig, KVCache, packing
from bitnet_ops.decoder.cache import CACHE_DTYPES
from bitnet_ops.integrations.export import export_decode_step, step_inputs
from bitnet_ops.layers.norm import RMSNorm

MODEL = tiny_model(eos=None)
EXPORTED = {
    **FAMILIES,
    "qwen3, groups": FAMILIES["qwen3"].replace(group_size=128, ternary_embedding=True, ternary_head=True),
    "qwen3, 8-bit blocks": FAMILIES["qwen3"].replace(group_size=128, activation_bits=8),
    "minicpm": DecoderConfig(**SIZES, embedding_scale=12.0, residual_scale=0.25, logit_scale=0.1),
}
EXAMPLE = Path(__file__).parent.parent / "examples" / "export_decode_step.py"

Step = Callable[..., Tensor]
Arguments = tuple[Tensor | None, ...]

IN_A_NEW_PROCESS = """
import sys, torch
kind, program, library, inputs, results = sys.argv[1:]
torch.ops.load_library(library)  # what `import bitnet_ops` does
load = torch._inductor.aoti_load_package if kind == "aoti" else lambda path: torch.export.load(path).module()
run = load(program)
calls = torch.load(inputs)
with torch.no_grad():
    torch.save(([run(*call) for call in calls], calls), results)
assert "bitnet_ops" not in sys.modules
"""


def run_in_a_new_process(
    kind: str, program: Path, calls: list[Arguments]
) -> tuple[list[Tensor], list[Arguments]]:
    """Results of a saved program for some calls, and these calls' arguments as it left them."""
    inputs, results = program.with_suffix(".inputs"), program.with_suffix(".results")
    torch.save(calls, inputs)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, kind, program, _C.__file__, inputs, results]
    subprocess.run(command, check=True)
    outputs, changed = torch.load(results)
    return outputs, changed


def steps(forward: Step, dtype: torch.dtype, rows: int = 1, model: BitNet = MODEL) -> list[Tensor]:
    """Scores of a prompt, all its rows but the first padded, and of tokens until the cache has grown."""
    cache = KVCache(model.config, rows, 1, dtype=dtype)
    ids = torch.arange(6 * rows).reshape(rows, 6) % model.config.vocab_size
    cache.padding[1:] = 2
    scores = []
    with torch.no_grad():
        while cache.length < 80:
            scores.append(forward(*step_inputs(ids, cache)))
            cache.length += ids.shape[1]
            ids = scores[-1].argmax(-1, keepdim=True)
    return scores


def model_steps(dtype: torch.dtype, rows: int = 1, model: BitNet = MODEL) -> list[Tensor]:
    """The same by the model itself, which is told of padding by a mask."""
    cache = KVCache(model.config, rows, 1, dtype=dtype)
    ids = torch.arange(6 * rows).reshape(rows, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    scores = []
    with torch.no_grad():
        while cache.length < 80:
            scores.append(model(ids, attention_mask=mask, cache=cache)[:, -1])
            ids, mask = scores[-1].argmax(-1, keepdim=True), None
    return scores


@pytest.mark.parametrize(
    "layout", [pytest.param(packing.LAYOUTS[0], marks=pytest.mark.slow), *packing.LAYOUTS[1:]]
)
def test_a_block_with_bit_linear(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    first = BitLinear.from_linear(nn.Linear(70, 33), layout=layout)
    block = nn.Sequential(
        RMSNorm(70, 1e-5), first, nn.SiLU(), BitLinear.from_linear(nn.Linear(33, 20))
    ).eval()
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(block, (torch.randn(5, 70),), dynamic_shapes=({0: tokens},))
    torch.export.save(program, tmp_path / "block.pt2")
    calls: list[Arguments] = [(torch.randn(tokens, 70),) for tokens in (1, 5, 17)]
    if layout == packing.LAYOUTS[0]:  # a new process takes seconds
        given, _ = run_in_a_new_process("export", tmp_path / "block.pt2", calls)
    else:
        given = [program.module()(*call) for call in calls]
    with torch.no_grad():
        assert all(torch.equal(y, block(*call)) for y, call in zip(given, calls, strict=True))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_decode_step_gives_the_bits_of_the_model(dtype: torch.dtype, rows: int) -> None:
    step = export_decode_step(MODEL, cache_dtype=dtype).module()
    assert all(map(torch.equal, steps(step, dtype, rows), model_steps(dtype, rows)))


@pytest.mark.parametrize("family", EXPORTED)
def test_decode_step_of_each_family(family: str) -> None:
    model = random_model(EXPORTED[family])
    step = export_decode_step(model).module()
    given, expected = steps(step, torch.float32, 2, model), model_steps(torch.float32, 2, model)
    assert all(map(torch.equal, given, expected))


def test_decode_step_is_one_operator_for_all_layers() -> None:
    graph = export_decode_step(MODEL).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.bitnet_ops.decoder_layers.default) == 1
    assert not any("copy" in str(target) for target in called), "a cache is not copied"


@pytest.mark.parametrize("kind", ["export", pytest.param("aoti", marks=pytest.mark.slow)])
def test_decode_step_in_a_new_process(tmp_path: Path, kind: str) -> None:
    program, path = export_decode_step(MODEL), tmp_path / "step.pt2"
    if kind == "aoti":
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        torch.export.save(program, path)
    cache, other = (KVCache(MODEL.config, 1, 64) for _ in range(2))
    prompt, token = torch.arange(5)[None], torch.tensor([[7]])
    calls = [step_inputs(prompt, cache)]
    cache.length = 5
    calls.append(step_inputs(token, cache))
    given, changed = run_in_a_new_process(kind, path, calls)
    with torch.no_grad():
        expected = [MODEL(ids, cache=other)[:, -1] for ids in (prompt, token)]
    assert all(map(torch.equal, given, expected))
    values = changed[-1][5]
    assert values is not None
    assert torch.equal(values[:, :, :, :6], other.values[:, :, :, :6]), "it writes into the cache"


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="export_decode_step: model: expected it in eval mode"):
        export_decode_step(tiny_model().train())


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    prompt = "It is a truth universally acknowledged"
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    ids = model.generate(**model.encode(prompt), max_new_tokens=12, do_sample=False)
    subprocess.run([sys.executable, EXAMPLE, "export", tmp_path], check=True)
    run = [sys.executable, EXAMPLE, "run", tmp_path, prompt, "--max-new-tokens", "12"]
    text = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert text.strip() == model.tokenizer.decode(ids[0].tolist()).strip()
