"""Models with a scale for each group of inputs: products at the shapes of Qwen3 1.7B, and the whole model.

    pytest bench/bench_group_scales.py --benchmark-only

Weights are random, with a float16 scale for each 128 inputs, embedding and tied head included. Activations
have 16 bits, or 8 with a scale for each group ("8-bit blocks"). Rows of products also show the share of the
rate that 8-bit activations with one scale a row have in the same rounds.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from matrices import STREAM_BYTES
from measure import Work, limit_columns, limits, measure, median_ratio, put, rate, seconds
from model_2b4t import filled_cache, prompt
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitNet, ops, packing
from bitnet_ops.layers.matrix import TernaryMatrix

GROUP = 128
SHAPES = {"gate_proj, up_proj": (6144, 2048), "down_proj": (2048, 6144), "q_proj, o_proj": (2048, 2048)}
KINDS = {"8 bits, rows": (8, 0), "8 bits, groups": (8, GROUP), "16 bits, groups": (16, GROUP)}
"""Width of activations, inputs that share a scale."""

THREADS = sorted({1, torch.get_num_threads()})
ROUNDS = 7
STEPS = 16
CONTEXT = 128
PROMPT = 128
PRODUCTS = 2_000_000_000
"""Of a round at least: some 10 ms."""


@cache
def weights(shape: tuple[int, int], group: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Copies of a packed matrix with its scales, more than caches hold."""
    rows, inputs = shape
    packed = ops.pack_ternary(torch.randint(-1, 2, shape, dtype=torch.int8))
    scale = packing.pack_scales(torch.rand(inputs // group, rows).half()) if group else torch.rand(rows)
    return tuple((packed.clone(), scale.clone()) for _ in range(-(-STREAM_BYTES // packed.nbytes)))


def product(shape: tuple[int, int], kind: str, tokens: int) -> tuple[Callable[[], None], int]:
    """A round of products, and how many matrices it goes through."""
    bits, group = KINDS[kind]
    copies = weights(shape, group)
    count = len(copies) if tokens == 1 else max(1, PRODUCTS // (tokens * shape[0] * shape[1]))
    x = torch.randn(tokens, shape[1])

    def run() -> None:
        for packed, scale in copies[:count]:
            ops.ternary_linear(x, packed, scale, None, shape[0], "tile16", bits, group)

    return run, count


@pytest.mark.benchmark(group="group scales")
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def bench_products(benchmark, name: str, kind: str, tokens: int, threads: int) -> None:
    """One matrix after another."""
    torch.set_num_threads(threads)
    shape, isa = SHAPES[name], bitnet_ops.isa()
    run, count = product(shape, kind, tokens)
    by_rows, _ = product(shape, "8 bits, rows", tokens)
    with torch.inference_mode():
        others = limits(isa, threads) | {"rows": lambda: seconds(by_rows)}
        rounds = measure(benchmark, run, others, ROUNDS)
    bits, group = KINDS[kind]
    packed, scale = weights(shape, group)[0]
    products = count * tokens * shape[0] * shape[1]
    planes = bits // 8  # 16 bits are two bytes, each multiplied
    work = Work(count * (packed.nbytes + scale.nbytes), products * planes if tokens > 1 else 0)
    columns = {
        "GMAC/s": rate(products, rounds),
        "of the rate by rows": median_ratio(rounds["rows"], rounds["seconds"]),
        **limit_columns(work, isa, rounds),
    }
    row = {"shape": name, "tokens": tokens, "activations": kind, "threads": threads}
    put(benchmark, "Products with group scales:", row, rounds, count, **columns)


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic Qwen3 1.7B in our own layout."""
    path = tmp_path_factory.mktemp("qwen3")
    script = Path(__file__).with_name("make_synthetic_checkpoint.py")
    subprocess.run([sys.executable, script, path / "published", "--model", "qwen3-1.7b"], check=True)
    bitnet_ops.from_pretrained(path / "published").save_pretrained(path / "packed")
    for file in (path / "published").iterdir():
        file.unlink()
    return path / "packed"


@pytest.fixture(scope="module", params=[8, 16], ids=["8 bits", "16 bits"])
def qwen3(qwen3_folder: Path, request: pytest.FixtureRequest) -> BitNet:
    """The same, loaded."""
    return bitnet_ops.from_pretrained(qwen3_folder, activation_bits=request.param)


def step_bytes(model: BitNet) -> int:
    """What a decoded token reads: all weights with their scales, the tied head among them, and the cache."""
    matrices = [module for module in model.modules() if isinstance(module, TernaryMatrix)]
    config = model.config
    cached = 2 * config.num_hidden_layers * config.kv_size * CONTEXT * 4
    return cached + sum(matrix.packed_weight.nbytes + matrix.weight_scale.nbytes for matrix in matrices)


@pytest.mark.benchmark(group="Qwen3 1.7B")
@pytest.mark.parametrize("threads", THREADS)
def bench_decode(benchmark, qwen3: BitNet, threads: int) -> None:
    """Writes tokens behind a context of 128."""
    torch.set_num_threads(threads)
    cache = filled_cache(qwen3, 1, CONTEXT + STEPS)

    def run() -> None:
        cache.length = CONTEXT
        ids = prompt(CONTEXT + 1)
        options = {"do_sample": False, "eos_token_id": (), "prompt_lookup_num_tokens": 0}
        assert sum(1 for _ in qwen3.stream_tokens(ids, cache=cache, max_new_tokens=STEPS, **options)) == STEPS

    isa = bitnet_ops.isa()
    rounds = measure(benchmark, run, limits(isa, threads), ROUNDS)
    read = step_bytes(qwen3)
    columns = {"read for a token, MB": read / 1e6, **limit_columns(Work(STEPS * read), isa, rounds)}
    row = {"activations": f"{qwen3.config.activation_bits} bits", "what": "decode", "threads": threads}
    speed = {"tok/s": rate(STEPS * 1e9, rounds)}
    put(benchmark, "Qwen3 1.7B, group scales:", row, rounds, STEPS, **speed, **columns)


@pytest.mark.benchmark(group="Qwen3 1.7B")
@pytest.mark.parametrize("threads", THREADS)
def bench_prompt(benchmark, qwen3: BitNet, threads: int) -> None:
    """Reads a prompt of 128 tokens; its first token included."""
    torch.set_num_threads(threads)

    def run() -> None:
        next(qwen3.stream_tokens(prompt(PROMPT), max_new_tokens=1, do_sample=False))

    isa = bitnet_ops.isa()
    rounds = measure(benchmark, run, limits(isa, threads), ROUNDS // 2)
    matrices = [module for module in qwen3.model.layers.modules() if isinstance(module, TernaryMatrix)]
    products = PROMPT * sum(matrix.in_features * matrix.out_features for matrix in matrices)
    planes = qwen3.config.activation_bits // 8
    columns = limit_columns(Work(0, products * planes), isa, rounds)
    row = {"activations": f"{qwen3.config.activation_bits} bits", "what": "prompt of 128", "threads": threads}
    speed = {"tok/s": rate(PROMPT * 1e9, rounds)}
    put(benchmark, "Qwen3 1.7B, group scales:", row, rounds, PROMPT, **speed, **columns)
