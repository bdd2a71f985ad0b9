"""What holds of every model, whatever its family."""

import torch
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitNet, KVCache


def assert_plan_is_the_modules(model: BitNet, ids: Tensor) -> None:
    """What C++ runs in one operator equals the modules, which a hook makes run one by one."""
    fused = model(ids)
    assert [run.lists is not None for run in model.model.plan().runs] == [True]
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: None)
    assert torch.equal(model(ids), fused)
    assert [run.lists is not None for run in model.model.plan().runs] == [False] * len(model.model.layers)


def assert_same_bits_everywhere(model: BitNet, ids: Tensor) -> None:
    """Against scalar, with one thread, without a batch, and for tokens that came in pieces or one by one.

    The test has the fixtures `isa` and `threads`.
    """
    rows, tokens = ids.shape
    logits = model(ids)
    with bitnet_ops.use_isa("scalar"):
        assert torch.equal(model(ids), logits)
    torch.set_num_threads(1)
    assert torch.equal(model(ids), logits)
    assert torch.equal(torch.cat([model(row[None]) for row in ids]), logits)
    for pieces in (ids.split(1, dim=1), ids.split([7, tokens - 8, 1], dim=1)):
        cache = KVCache(model.config, rows, tokens)
        assert torch.equal(torch.cat([model(piece, cache=cache) for piece in pieces], dim=1), logits)


def assert_same_model(one: BitNet, other: BitNet, ids: Tensor) -> None:
    """Configuration, every tensor and the logits."""
    assert one.config == other.config
    assert _state(one).keys() == _state(other).keys()
    for name, tensor in _state(one).items():
        assert tensor.dtype == _state(other)[name].dtype, name
        assert torch.equal(tensor, _state(other)[name]), name
    assert torch.equal(one(ids), other(ids))


def _state(model: BitNet) -> dict[str, Tensor]:
    """Parameters and all buffers, those that a state dict leaves out too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
