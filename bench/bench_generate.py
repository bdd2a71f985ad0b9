"""What `generate` adds to single steps of 2B4T: drafts by prompt lookup, batches, and long prompts.

    pytest bench/bench_generate.py --benchmark-only

Random weights write no text, so drafts are measured on texts that are known beforehand: the model computes
everything it would, screened head included, and then "chooses" the text's next token.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from measure import measure, median_ratio, seconds, spread, thread_counts
from model_2b4t import filled_cache, prompt
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitNet
from bitnet_ops.decoder.head import ScreenedHead
from bitnet_ops.generation.sampling import Sampler
from bitnet_ops.generation.settings import DEFAULT_DRAFT_TOKENS

THREADS = thread_counts()
ROUNDS = 5
TEXT_TOKENS = 96
BATCHES = (1, 2, 4, 8, 16)
BATCH_STEPS = 8
BATCH_CONTEXT = 128
LONG_PROMPT = 4095  # and one new token: as many as the model has positions


class Replay:
    """Makes a model write a text that is known beforehand, at the cost of writing it itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of the head in the sampler."""
        self.text: list[int] = []
        from_head, follow = Sampler._from_head, Sampler.follow_from_head

        def choose(
            sampler: Sampler, head: ScreenedHead, hidden: Tensor, numbers: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            best, tokens = from_head(sampler, head, hidden, numbers)
            known = self.text[self.place : self.place + len(tokens)]
            if len(tokens) == 1:
                self.place += 1
            return best, torch.tensor(known + [0] * (len(tokens) - len(known)))

        def follow_known(sampler: Sampler, head: ScreenedHead, hidden: Tensor, draft: list[int]) -> Tensor:
            tokens = follow(sampler, head, hidden, draft)
            self.place += len(tokens)
            return tokens

        monkeypatch.setattr(Sampler, "_from_head", choose)
        monkeypatch.setattr(Sampler, "follow_from_head", follow_known)

    def run(self, model: BitNet, begin: list[int], text: list[int], draft_tokens: int) -> float:
        """Seconds from the first to the last token of ``text`` behind a prompt."""
        self.text, self.place = text, 0
        stream = model.stream_tokens(
            torch.tensor([begin]),
            max_new_tokens=len(text),
            do_sample=False,
            eos_token_id=(),
            prompt_lookup_num_tokens=draft_tokens,
        )
        written = [int(next(stream))]
        took = seconds(lambda: written.extend(int(token) for token in stream))
        assert written == text
        return took


@cache
def written_text() -> list[int]:
    """Text of the small model in the package, which does not repeat itself more than English does."""
    small = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    ids = small.generate(
        **small.encode("It is a truth universally acknowledged, that"),
        max_new_tokens=2 * TEXT_TOKENS,
        do_sample=True,
        temperature=0.8,
        eos_token_id=(),
        seed=1,
    )
    return ids[0].tolist()


def fresh() -> tuple[list[int], list[int]]:
    """A prompt, and text that goes on from it."""
    text = written_text()
    return text[:-TEXT_TOKENS], text[-TEXT_TOKENS:]


def edited() -> tuple[list[int], list[int]]:
    """A prompt, and the same once more with every sixteenth token another one, as in code that is revised."""
    text = written_text()[-TEXT_TOKENS:]
    return text, [token if i % 16 else token + 5000 for i, token in enumerate(text, 1)]


def quoted() -> tuple[list[int], list[int]]:
    """A prompt, and the same once more."""
    text = written_text()[-TEXT_TOKENS:]
    return text, text


def noise() -> tuple[list[int], list[int]]:
    """Tokens by chance out of thirty: hardly a guess is right, though there is always one to make."""
    ids = torch.randint(30, (2 * TEXT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids[:TEXT_TOKENS], ids[TEXT_TOKENS:]


@pytest.mark.benchmark(group="prompt lookup")
@pytest.mark.parametrize("text", [quoted, edited, fresh, noise], ids=lambda text: text.__name__)
@pytest.mark.parametrize("threads", THREADS)
def bench_prompt_lookup(
    benchmark,
    model: BitNet,
    monkeypatch: pytest.MonkeyPatch,
    text: Callable[[], tuple[list[int], list[int]]],
    threads: int,
) -> None:
    """Writes one text with drafts and, in turns, without."""
    torch.set_num_threads(threads)
    begin, known = text()
    replay = Replay(monkeypatch)
    drafted: list[float] = []

    def with_drafts() -> None:
        drafted.append(replay.run(model, begin, known, DEFAULT_DRAFT_TOKENS))

    rounds = measure(benchmark, with_drafts, {"plain": lambda: replay.run(model, begin, known, 0)}, ROUNDS)
    drafted = drafted[1:]  # the first one warms up
    benchmark.extra_info |= {
        "table": f"2B4T, {TEXT_TOKENS} tokens with drafts by prompt lookup (the default):",
        "row": {"text": text.__name__, "threads": threads},
        "tok/s": (TEXT_TOKENS - 1) / statistics.median(drafted),
        "without drafts, tok/s": (TEXT_TOKENS - 1) / statistics.median(rounds["plain"]),
        "speed-up": median_ratio(rounds["plain"], drafted),
        "spread": spread(drafted),
    }


@pytest.mark.benchmark(group="batch")
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("threads", THREADS)
def bench_batch(benchmark, model: BitNet, rows: int, threads: int) -> None:
    """Decodes several sequences together, and in turns one alone."""
    torch.set_num_threads(threads)

    def steps(count: int) -> Callable[[], None]:
        cache = filled_cache(model, count, BATCH_CONTEXT + BATCH_STEPS)
        ids = prompt(BATCH_CONTEXT + 1, count)

        def run() -> None:
            cache.length = BATCH_CONTEXT
            stream = model.stream_tokens(
                ids,
                cache=cache,
                max_new_tokens=BATCH_STEPS,
                do_sample=False,
                eos_token_id=(),
                prompt_lookup_num_tokens=0,
            )
            assert sum(1 for _ in stream) == BATCH_STEPS

        return run

    alone = steps(1)
    rounds = measure(benchmark, steps(rows), {"alone": lambda: seconds(alone)}, ROUNDS)
    rate = rows * BATCH_STEPS / statistics.median(rounds["seconds"])
    benchmark.extra_info |= {
        "table": f"2B4T, decode of several sequences (context {BATCH_CONTEXT}, greedy):",
        "row": {"sequences": rows, "threads": threads},
        "tok/s, all together": rate,
        "over one sequence": rows * median_ratio(rounds["alone"], rounds["seconds"]),
        "spread": spread(rounds["seconds"]),
    }


PREFILL = """
import sys, torch, bitnet_ops
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
model = bitnet_ops.from_pretrained(sys.argv[1], mmap=False)
tokens, dtype = int(sys.argv[2]), getattr(torch, sys.argv[3])
ids = torch.randint(100_000, (1, tokens))
model.generate(ids[:, :2], max_new_tokens=1, do_sample=False)  # what is made once
cache = bitnet_ops.KVCache(model.config, 1, tokens, dtype=dtype)
for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
    if tensor is not None:
        tensor.fill_(0)  # so that its pages are there
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
next(model.stream_tokens(ids, cache=cache, max_new_tokens=1, do_sample=False))
print(memory("VmHWM") - before)
"""


@pytest.mark.benchmark(group="long prompt")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def bench_long_prompt_memory(benchmark, folder: Path, dtype: str) -> None:
    """Reads a long prompt in a new process; its time counts for nothing."""
    run = benchmark.pedantic(
        subprocess.run,
        ([sys.executable, "-c", PREFILL, str(folder), str(LONG_PROMPT), dtype],),
        {"stdout": subprocess.PIPE, "check": True, "text": True},
        rounds=1,
    )
    benchmark.extra_info |= {
        "table": f"2B4T, a prompt of {LONG_PROMPT} tokens:",
        "row": {"cache": dtype},
        "peak memory beyond weights and cache, MB": int(run.stdout) / 1e6,
        "s, all included": benchmark.stats.stats.median,
    }
