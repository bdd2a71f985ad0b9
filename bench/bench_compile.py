"""torch.compile against eager in turns: a training step of the default model's shape, a token of both models.

    pytest bench/bench_compile.py --benchmark-only

The first compilation takes a minute, which is not timed.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import measure, median_ratio, rested_seconds, spread
from model_2b4t import filled_cache

import bitnet_ops
from bitnet_ops import BitLinearQAT, BitNet
from bitnet_ops.training.loop import TrainOptions, make_optimizers

CONTEXT = 128
DECODE_ROUNDS = 25
DECODED_TOKENS = 32
"""In a row, as in use: behind a pause, all that Python has to do is out of the processor's caches."""
TRAIN_ROUNDS = 9


def put(
    benchmark, what: str, compiled: Callable[[], object], eager: Callable[[], object], rounds: int, steps: int
) -> None:
    """Times both, warmed up; a row of the table has the time of one of the steps that each of them takes."""
    for _ in range(3):  # compiles; twice where sizes turn out to vary
        compiled()
        eager()
    times = measure(benchmark, compiled, {"eager": lambda: rested_seconds(eager)}, rounds)
    benchmark.extra_info |= {
        "table": "torch.compile:",
        "row": {"what": what},
        "compiled, ms": benchmark.stats.stats.median * 1e3 / steps,
        "spread": spread(times["seconds"]),
        "time over eager": median_ratio(times["seconds"], times["eager"]),
    }


def bench_training_step(benchmark) -> None:
    """Forward and backward compiled; the optimisers are the trainer's, eager on both sides."""
    config = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL).config
    options = TrainOptions(device="cpu")
    autocast = options.uses_autocast()
    ids = torch.randint(config.vocab_size, (options.batch_size, options.sequence_length + 1))

    def step_of(compiled: bool) -> Callable[[], None]:
        model = BitNet(config, BitLinearQAT).train()
        optimizers = make_optimizers(model, options)

        def loss_of(batch: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(batch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

        loss = torch.compile(loss_of, fullgraph=True) if compiled else loss_of

        def step() -> None:
            loss(ids).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    shape = f"{options.batch_size} x {options.sequence_length} tokens"
    put(benchmark, f"training step, {shape}", step_of(True), step_of(False), TRAIN_ROUNDS, 1)


@pytest.mark.parametrize("name", ["2B4T", "default model"])
def bench_decode(benchmark, request: pytest.FixtureRequest, name: str) -> None:
    """One token with all scores, which is what a compiled forward pass gives."""
    if name == "2B4T":
        model = request.getfixturevalue("model")
    else:
        model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    token = torch.tensor([[1]])

    def decode_with(forward: Callable[..., torch.Tensor]) -> Callable[[], None]:
        cache = filled_cache(model, 1, CONTEXT + DECODED_TOKENS)

        def decode() -> None:
            cache.length = CONTEXT
            with torch.inference_mode():
                for _ in range(DECODED_TOKENS):
                    forward(token, cache=cache)

        return decode

    compiled = torch.compile(model.forward, fullgraph=True)
    put(
        benchmark,
        f"{name}, decoded token",
        decode_with(compiled),
        decode_with(model.forward),
        DECODE_ROUNDS,
        DECODED_TOKENS,
    )
