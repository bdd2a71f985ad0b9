"""BitLinearQAT under DDP and FSDP2, two processes by torchrun: the steps of one process, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitLinearQAT, BitNet, pack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]


def torchrun(*arguments: str, folder: Path) -> str:
    """Runs a program in two processes and returns what it printed."""
    # Processes that share two cores: with threads of their own they would only wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("distributed")
    torchrun(worker.__file__, str(folder), folder=folder)
    return torch.load(folder / "results.pt", weights_only=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
def test_a_language_model_takes_the_steps_of_one_process(
    results: dict[str, Any], strategy: str, threads: None
) -> None:
    """Which takes the mean of the gradients of both halves of a batch: the same sums in the same order."""
    torch.set_num_threads(1)
    model = worker.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = worker.optimizer(model.parameters())
    for batch in worker.batches():
        gradients = []
        for half in batch.chunk(2):
            loss = F.cross_entropy(model(half[:, :-1]).flatten(0, 1), half[:, 1:].flatten())
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for parameter, first, second in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = (first + second) / 2
        optimizer.step()
    assert same(results[strategy], model.state_dict())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in results[strategy].items())


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
def test_steps_on_a_whole_batch_where_sums_are_exact(results: dict[str, Any], strategy: str) -> None:
    layer, (x, factors) = worker.exact_layer(), worker.exact_batch()
    optimizer = worker.exact_optimizer(layer.parameters())
    for _ in range(worker.STEPS):
        optimizer.zero_grad()
        worker.exact_loss(layer, x, factors).backward()
        optimizer.step()
    assert same(results[f"{strategy} exact"], layer.state_dict())
    assert not torch.equal(layer.weight, worker.exact_layer().weight)


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
def test_the_scale_is_that_of_the_whole_weight(results: dict[str, Any], strategy: str) -> None:
    layer, (x, _) = worker.exact_layer(), worker.exact_batch()
    assert torch.equal(results[f"{strategy} output"], layer(x))
    part = BitLinearQAT(48, 5, bias=False)
    part.weight.data = layer.weight.data[5:]
    assert not torch.equal(part(x), layer(x)[:, 5:]), "halves with one scale would not show the difference"


def test_a_part_of_a_weight_is_not_packed(results: dict[str, Any]) -> None:
    assert "expected all of it in this process, got a DTensor" in results["pack"]


def test_packing_after_training(results: dict[str, Any]) -> None:
    model = BitNet(worker.CONFIG, BitLinearQAT)
    model.load_state_dict(results["fsdp"])
    ids = worker.batches()[0]
    with torch.no_grad():
        expected = model.eval()(ids)
        pack(model).save_pretrained("packed")
        assert torch.equal(bitnet_ops.from_pretrained("packed")(ids), expected)


def test_the_example(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 20)
    printed = torchrun(worker.EXAMPLE, "--steps", "30", "--text", str(text), folder=tmp_path)
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.6 * losses[0]
    model = bitnet_ops.from_pretrained(tmp_path / "packed")
    ids = torch.tensor([list(text.read_bytes()[:64])])
    with torch.no_grad():
        loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert loss < 0.6 * losses[0]
