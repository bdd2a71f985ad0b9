"""What each process of tests/test_distributed.py runs, started by torchrun; rank 0 writes what came out.

Also holds what that test needs to do the same in one process.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_ops import BitLinearQAT, BitNet, BitNetConfig

STEPS = 3
STRATEGIES = ("ddp", "fsdp")
EXAMPLE = str(Path(__file__).parent.parent / "examples/train_distributed.py")

# Sizes that two processes cannot share evenly: FSDP2 pads.
CONFIG = BitNetConfig(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=51,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=32,
    bos_token_id=0,
    eos_token_id=0,
)


def model() -> BitNet:
    torch.manual_seed(0)
    return BitNet(CONFIG, BitLinearQAT)


def batches() -> list[Tensor]:
    return list(torch.randint(61, (STEPS, 4, 12), generator=torch.Generator().manual_seed(1)))


def exact_layer() -> BitLinearQAT:
    """One whose halves, the parts of two processes, differ by a factor of 64."""
    torch.manual_seed(2)
    layer = BitLinearQAT(48, 10, bias=False)
    layer.weight.data[:5] *= 64
    return layer


def exact_batch() -> tuple[Tensor, Tensor]:
    """Inputs [8, 48] and factors [8, 10] of a linear loss whose gradients are exact in float32.

    The largest input of a row is 127 / 32, so its scale is 1 / 32 and the others are integers of that; a
    gradient is the sum of eight products of 1 / 8, an integer of at most 3 and one of at most 127, over 32.
    """
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-127, 128, (8, 48), generator=generator)
    q[:, 7] = 127
    return q / 32, torch.randint(-3, 4, (8, 10), generator=generator).float()


def exact_loss(layer: nn.Module, x: Tensor, factors: Tensor) -> Tensor:
    return (layer(x) * factors).sum() / len(x)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, foreach=False)


def exact_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.5, foreach=False)


def main(folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    example = runpy.run_path(EXAMPLE)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for strategy in STRATEGIES:
        spread = example["distribute"](model(), strategy, torch.device("cpu"))
        steps = optimizer(spread.parameters())
        for batch in batches():
            loss = example["next_token_loss"](spread, batch.chunk(processes)[rank])
            steps.zero_grad()
            loss.backward()
            steps.step()
        results[strategy] = example["whole_state"](spread)

        layer = exact_layer()
        if strategy == "ddp":
            layer = DistributedDataParallel(layer)
        else:
            fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (processes,)))
            try:
                from bitnet_ops import pack

                pack(nn.Sequential(layer))
            except ValueError as error:
                results["pack"] = str(error)
        x, factors = exact_batch()
        steps = exact_optimizer(layer.parameters())  # before a forward pass, while FSDP2's are parts
        results[f"{strategy} output"] = layer(x).detach()
        for _ in range(STEPS):
            loss = exact_loss(layer, x.chunk(processes)[rank], factors.chunk(processes)[rank])
            steps.zero_grad()
            loss.backward()
            steps.step()
        results[f"{strategy} exact"] = example["whole_state"](layer)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
