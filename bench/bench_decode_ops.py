"""The operators of a decoded token that read no ternary weights, at the shapes of BitNet b1.58 2B4T.

    pytest bench/bench_decode_ops.py --benchmark-only

The head finds the best tokens of a table of bfloat16 with the help of its copy in six bits. How fast depends
on the table. Beside every round of a few tokens, the same tokens get all their logits and the best of these.
Attention reads the caches of all layers in turn, so that they come from memory.
"""

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
from matrices import CONFIG
from measure import Work, limit_columns, limits, measure, median_ratio, put, rate, seconds
from torch import Tensor

import bitnet_ops
from bitnet_ops import KVCache, ops
from bitnet_ops.decoder.head import ScreenedHead

ROUNDS = 7
TOKENS = 4
"""Of a round, one after another: how many rows are computed differs between them."""

THREADS = sorted({1, torch.get_num_threads()})


@pytest.fixture(params=THREADS, ids=lambda threads: f"{threads}t")
def threads(request: pytest.FixtureRequest) -> int:
    """Runs with one thread and with all."""
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


# ---- the head --------------------------------------------------------------------------------------------


def gaussian_rows() -> Tensor:
    """Of random tables the hardest: no logit stands out."""
    return torch.randn(CONFIG.vocab_size, CONFIG.hidden_size, dtype=torch.bfloat16)


def equal_rows() -> Tensor:
    """Rows that differ by less than their copies lose: none can be ruled out."""
    return torch.randn(CONFIG.hidden_size, dtype=torch.bfloat16) + 1e-2 * gaussian_rows()


def some_equal_rows() -> Tensor:
    """As many of them as are possible without an end to screening (kMostSurvivors), here and there."""
    weight = gaussian_rows()
    equal = torch.rand(len(weight)) < 0.29
    weight[equal] = equal_rows()[equal]
    return weight


TABLES = {"Gaussian": gaussian_rows, "nearly equal": equal_rows, "29 % nearly equal": some_equal_rows}
KINDS = ["greedy", "top-50", "sampling"]


@pytest.fixture(scope="module", params=TABLES)
def head(request: pytest.FixtureRequest) -> tuple[str, ScreenedHead]:
    """A table and its copy."""
    torch.manual_seed(0)
    return request.param, ScreenedHead(TABLES[request.param]())


def tokens_of(name: str, head: ScreenedHead) -> Tensor:
    """Tokens for which the rows that are nearly equal are the best."""
    tokens = torch.randn(TOKENS, 1, CONFIG.hidden_size)
    if name == "Gaussian":
        return tokens
    some = head.weight[:16].float()
    equal = some[(some @ some.T > 0.5 * CONFIG.hidden_size).sum(dim=1).argmax()]
    return 0.5 * tokens + equal


@pytest.mark.benchmark(group="head")
@pytest.mark.parametrize("kind", KINDS)
def bench_head(benchmark, head: tuple[str, ScreenedHead], kind: str, threads: int) -> None:
    """The best tokens through the copy, against all logits and their best; noise is made before."""
    name, screened = head
    tokens = tokens_of(name, screened)
    k = 50 if kind == "top-50" else 1
    noise = ops.gumbel_noise(torch.arange(TOKENS), CONFIG.vocab_size).unsqueeze(1)

    def best(token: int) -> Tensor:
        return screened.top_k(tokens[token], k, 1.0, noise[token] if kind == "sampling" else None)[1]

    def best_of_all(token: int) -> Tensor:
        logits = ops.lm_head(tokens[token], screened.weight)
        if kind == "sampling":
            logits += noise[token]
        return logits.argmax(dim=-1) if k == 1 else logits.topk(k).indices

    def every(work: Callable[[int], Tensor]) -> None:
        for token in range(TOKENS):
            work(token)

    rescored = []
    for token in range(TOKENS):
        logits = ops.lm_head(tokens[token], screened.weight)[0]
        assert torch.equal(logits[best(token)[0]], logits[best_of_all(token).flatten()])
        rescored.append(int(screened.rescored))

    isa = bitnet_ops.isa()
    others = {**limits(isa, threads), "all logits": lambda: seconds(lambda: every(best_of_all))}
    rounds = measure(benchmark, lambda: every(best), others, ROUNDS)
    row = {"rows": name, "wanted": kind, "threads": threads}
    columns = {
        "rows computed": f"{statistics.median(rescored):.0f} (at most {max(rescored)})",
        **limit_columns(Work(TOKENS * screened.codes.nbytes), isa, rounds),
        "time over all logits": median_ratio(rounds["seconds"], rounds["all logits"]),
    }
    put(benchmark, "The head (one token):", row, rounds, TOKENS, **columns)


# ---- attention -------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("context", [128, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def bench_attention(benchmark, dtype: torch.dtype, context: int, threads: int) -> None:
    """One token attends to a context, in every layer."""

    def decode(dtype: torch.dtype) -> tuple[Callable[[], None], int]:
        """The call, and how many bytes it reads."""
        cache = KVCache(CONFIG, 1, context, dtype=dtype)
        read = 0
        for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
            if tensor is not None:
                tensor.random_(-127, 128) if tensor.dtype == torch.int8 else tensor.uniform_(0, 0.01)
                read += tensor.nbytes
        q = torch.randn(1, 1, CONFIG.num_attention_heads * CONFIG.head_dim)
        k, v = torch.randn(2, 1, 1, CONFIG.num_key_value_heads * CONFIG.head_dim)
        seen = cache.context()._replace(start=torch.tensor([context - 1]))

        def run() -> None:
            for layer in range(CONFIG.num_hidden_layers):
                seen.attend(q, k, v, layer, rotation=0, training=False)

        return run, read

    isa = bitnet_ops.isa()
    run, read = decode(dtype)
    bfloat16, _ = decode(torch.bfloat16)
    others = {**limits(isa, threads), "bfloat16": lambda: seconds(bfloat16)}
    rounds = measure(benchmark, run, others, ROUNDS)
    row = {"cache": str(dtype).removeprefix("torch."), "context": context, "threads": threads}
    columns = {
        "GB/s": rate(read, rounds),
        **limit_columns(Work(read), isa, rounds),
        "time over bfloat16": median_ratio(rounds["seconds"], rounds["bfloat16"]),
    }
    put(benchmark, "Attention (one token, one layer):", row, rounds, CONFIG.num_hidden_layers, **columns)
