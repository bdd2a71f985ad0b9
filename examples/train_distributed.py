"""Ternary training on several processes or machines, with DDP or FSDP2; what comes out is a packed folder.

    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy fsdp --text FILE --out packed

Every process takes its own part of each batch. DDP keeps the whole model in each; FSDP2 keeps a part of every
weight, and gathers a layer for as long as it runs, so the scale of a ternary weight
is that of the whole weight. On GPUs the same command trains with nccl, on CPUs with gloo.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bitnet_ops import BitLinearQAT, BitNet, BitNetConfig, pack

CONFIG = BitNetConfig(
    vocab_size=256,  # bytes
    hidden_size=128,
    intermediate_size=336,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
)


def distribute(model: BitNet, strategy: str, device: torch.device) -> nn.Module:
    """The model as every process of the group trains it; the same weights everywhere to begin with."""
    model = model.to(device)
    if strategy == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The float weights, gathered to the first process; to be called by all of them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of [B, T] byte ids."""
    scores = model(batch[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of all processes together")
    parser.add_argument("--out", type=Path, default=Path("packed"))
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if arguments.batch_size % processes:
        parser.error(
            f"--batch-size: expected a multiple of {processes} processes, got {arguments.batch_size}"
        )

    torch.manual_seed(0)  # the same model and the same batches in every process
    model = distribute(BitNet(CONFIG, BitLinearQAT), arguments.strategy, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    text = torch.frombuffer(bytearray(arguments.text.read_bytes()), dtype=torch.uint8).long()
    for step in range(arguments.steps):
        starts = torch.randint(len(text) - 65, (arguments.batch_size,))
        batch = torch.stack([text[start : start + 65] for start in starts])
        loss = next_token_loss(model, batch[rank::processes].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 20 == 0 or step == arguments.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    state = whole_state(model)
    if rank == 0:
        trained = BitNet(CONFIG, BitLinearQAT)
        trained.load_state_dict(state)
        pack(trained.eval()).save_pretrained(arguments.out)
        print(f"packed into {arguments.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
