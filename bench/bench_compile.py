"""torch.compile against eager in turns: a training step of the default model's shape, a token of 2B4T.

    pytest bench/bench_compile.py --benchmark-only

The first compilation takes a minute, which is not timed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import measure, median_ratio, seconds, spread
from model_2b4t import filled_cache

import bitnet_ops
from bitnet_ops import BitLinearQAT, BitNet
from bitnet_ops.training.loop import TrainOptions, make_optimizers

CONTEXT = 128
DECODE_ROUNDS = 25
TRAIN_ROUNDS = 9


def put(
    benchmark, what: str, compiled: Callable[[], object], eager: Callable[[], object], rounds: int
) -> None:
    """Times both, warmed up, and fills a row of the table."""
    for _ in range(3):  # compiles; twice where sizes turn out to vary
        compiled()
        eager()
    times = measure(benchmark, compiled, {"eager": lambda: seconds(eager)}, rounds)
    benchmark.extra_info |= {
        "table": "torch.compile:",
        "row": {"what": what},
        "compiled, ms": benchmark.stats.stats.median * 1e3,
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
    put(benchmark, f"training step, {shape}", step_of(True), step_of(False), TRAIN_ROUNDS)


def bench_decode(benchmark, model: BitNet) -> None:
    """One token with all scores, which is what a compiled forward pass gives."""
    token = torch.tensor([[1]])

    def step_of(forward: Callable[..., torch.Tensor]) -> Callable[[], None]:
        cache = filled_cache(model, 1, CONTEXT)

        def step() -> None:
            cache.length = CONTEXT
            with torch.inference_mode():
                forward(token, cache=cache)

        return step

    compiled = torch.compile(model.forward, fullgraph=True)
    put(benchmark, "2B4T, decoded token", step_of(compiled), step_of(model.forward), DECODE_ROUNDS)
