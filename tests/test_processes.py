"""Models in more processes: forked after use, spawned, in DataLoader workers; pickled, copied, shared."""

import copy
import io
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bitnet_ops
from bitnet_ops import BitLinear, BitLinearQAT, BitNet, packing

SECONDS = 90  # in which a process has to end that takes one or two

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


# More tokens than torch embeds, rotates and adds in one thread.
IDS = torch.randint(5, 4000, (1, 200), generator=torch.Generator().manual_seed(0))


def answers(model: BitNet) -> tuple[Tensor, Tensor]:
    """Scores of a prompt, and a text by the paths of generation: layers in one operator, screened head."""
    model.certified_head = True
    with torch.no_grad():
        scores = model(IDS)
    return scores, model.generate(IDS[:, :20], max_new_tokens=4, do_sample=False, eos_token_id=())


def agree(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.fixture(params=["stored", pytest.param("mapped", marks=pytest.mark.slow)])
def used_model(request: pytest.FixtureRequest, tmp_path: Path) -> BitNet:
    """The default model as it is stored, or packed for this machine and mapped; all its paths have run."""
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    if request.param == "mapped":
        bitnet_ops.repack(model).save_pretrained(tmp_path / "packed")
        model = bitnet_ops.from_pretrained(tmp_path / "packed", mmap=True)
    answers(model)
    return model


def tell(sender: Connection, model: BitNet) -> None:
    """What a child does. Bytes, because tensors would travel through shared memory."""
    sender.send_bytes(pickle.dumps(answers(model)))


def in_a_process(context: Any, model: BitNet) -> tuple[Tensor, ...]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(sender, model))
    process.start()
    sender.close()
    try:
        assert receiver.poll(SECONDS), "the child hangs"
        told = pickle.loads(receiver.recv_bytes())
    finally:
        process.join(10)
        process.kill()
        process.join()
    assert process.exitcode == 0
    return told


@needs_fork
@forks
def test_a_forked_process(used_model: BitNet, threads: None) -> None:
    torch.set_num_threads(3)
    expected = answers(used_model)
    torch.randn(1_000_000).exp()  # torch's own threads exist now, too
    for _ in range(2):
        assert agree(in_a_process(multiprocessing.get_context("fork"), used_model), expected)
    assert torch.get_num_threads() == 3
    assert agree(answers(used_model), expected)


@needs_fork
@forks
def test_a_fork_while_another_thread_computes(threads: None) -> None:
    torch.set_num_threads(2)
    layer = BitLinear.from_linear(nn.Linear(1000, 3000))
    x = torch.randn(4, 1000)
    expected = layer(x)
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            layer(x)

    other = threading.Thread(target=compute)
    other.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(2)
                os._exit(0 if torch.equal(layer(x), expected) else 1)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
    finally:
        stop.set()
        other.join(SECONDS)
    assert not other.is_alive()


@needs_fork
@forks
def test_a_fork_of_a_fork(threads: None) -> None:
    torch.set_num_threads(2)
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    expected = answers(model)
    child = os.fork()
    if child == 0:
        answers(model)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if agree(answers(model), expected) else 1)
        _, status = os.waitpid(grandchild, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_spawned_process_gets_the_model(used_model: BitNet) -> None:
    """By torch's pickler, which puts the weights into memory that both share."""
    expected = answers(used_model)
    assert agree(in_a_process(torch.multiprocessing.get_context("spawn"), used_model), expected)
    assert agree(answers(used_model), expected)


class Rows(Dataset[Tensor]):
    """Inputs that a layer has gone over, in whichever process asks for them."""

    def __init__(self, layer: nn.Module) -> None:
        self.x = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
        self.layer = layer

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.layer(self.x[index])


@forks
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_dataloader(start: str, threads: None) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    torch.set_num_threads(3)
    rows = Rows(nn.Sequential(BitLinear.from_linear(nn.Linear(1000, 3000)), nn.ReLU(), BitLinear(3000, 10)))
    with torch.no_grad():
        expected = rows.layer(rows.x)
    loader = DataLoader(rows, batch_size=2, num_workers=2, multiprocessing_context=start, timeout=SECONDS)
    assert torch.equal(torch.cat(list(loader)), expected)


def by_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("make_copy", [by_pickle, by_torch_save, copy.deepcopy])


@COPIES
def test_copies_of_a_used_model(used_model: BitNet, make_copy: Callable[[Any], Any]) -> None:
    expected = answers(used_model)
    other = make_copy(used_model)
    assert other.config == used_model.config
    assert other.tokenizer.to_str() == used_model.tokenizer.to_str()
    assert agree(answers(other), expected)
    # A copy is its own: to change one changes nothing in the other.
    other.model.layers[0].mlp.down_proj.weight_scale.mul_(2)
    assert not agree(answers(other), expected)
    assert agree(answers(used_model), expected)


@COPIES
@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_copies_of_layers(layout: str, make_copy: Callable[[Any], Any]) -> None:
    packed = BitLinear.from_linear(nn.Linear(70, 40), layout=layout, activation_bits=16)
    trained = BitLinearQAT(70, 40)
    x = torch.randn(3, 70)
    trained(x).sum().backward()
    for layer in (packed, trained):
        other = make_copy(layer)
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)


def test_a_pickle_is_no_larger_than_the_weights(used_model: BitNet) -> None:
    """Matrices are cut from common memory, or from one mapped file, which must not come along with each."""
    size = sum(tensor.nbytes for tensor in (*used_model.parameters(), *used_model.buffers()))
    # The tokenizer and the head's copy come with it, less than the weights. Each of 42 matrices with its
    # neighbours would be many times as much.
    assert len(pickle.dumps(used_model)) < 2 * size


def test_a_model_in_shared_memory(used_model: BitNet) -> None:
    expected = answers(used_model)
    assert agree(answers(used_model.share_memory()), expected)


def test_the_number_of_threads_may_change_between_tokens(threads: None) -> None:
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    torch.set_num_threads(1)
    expected = [int(token) for token in model.stream_tokens(IDS, max_new_tokens=12, eos_token_id=(), seed=1)]
    found = []
    for i, token in enumerate(model.stream_tokens(IDS, max_new_tokens=12, eos_token_id=(), seed=1)):
        found.append(int(token))
        torch.set_num_threads(1 + i % 4)
    assert found == expected
