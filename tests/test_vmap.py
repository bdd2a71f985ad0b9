"""torch.func.vmap: equal to a loop, to the last bit, and without PyTorch's slow fallback."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from text_models import tiny_model
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from bitnet_ops import BitLinear, ops, reference


@pytest.fixture(autouse=True)
def fallback_is_an_error() -> Iterator[None]:
    """PyTorch warns of its slow loop past Python's warnings; this switch makes it refuse the loop."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_equals_loop(function: Callable[..., Any], in_dims: tuple[int | None, ...], *inputs: Any) -> None:
    given = flat(vmap(function, in_dims)(*inputs))
    size = next(x.shape[dim] for x, dim in zip(inputs, in_dims, strict=True) if dim is not None)
    one_by_one = [
        flat(
            function(
                *(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True))
            )
        )
        for i in range(size)
    ]
    for batched, singles in zip(given, zip(*one_by_one, strict=True), strict=True):
        expected = torch.stack(singles)
        assert batched.dtype == expected.dtype
        assert torch.equal(batched, expected)


def packed(*shape: int, layout: str = "tile16") -> Tensor:
    return ops.pack_ternary(torch.randint(-1, 2, shape, dtype=torch.int8), layout)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_operators_on_rows(dim: int) -> None:
    x = torch.randn(3, 5, 20).movedim(0, dim) if dim < 2 else torch.randn(5, 20, 3)
    norm, scale = torch.rand(20), torch.rand(7)
    matrix, row_matrix = packed(7, 20), packed(7, 20, layout="row")
    for function in (
        ops.quantize_activations,
        lambda x: ops.quantize_activations(x, 16),
        lambda x: ops.ternary_linear(x, matrix, scale, None, 7),
        lambda x: ops.ternary_linear(x, matrix, scale, scale, 7, activation_bits=16),
        lambda x: ops.rms_norm(x, norm, 1e-5),
        lambda x: ops.lm_head(x, norm.repeat(9, 1)),
        lambda x: ops.ternary_linear(x, row_matrix, scale, None, 7, layout="row"),
        lambda x: ops.glu(x, x.flip(0), "silu"),
    ):
        assert_equals_loop(function, (dim,), x)


def test_the_batch_may_be_in_any_of_the_tensors_with_rows() -> None:
    x, scale, matrix = torch.randn(5, 20), torch.rand(7), packed(7, 20, layout="row")
    active = torch.rand(5, 7, 3) < 0.5

    def glu(gate: Tensor, up: Tensor) -> Tensor:
        return ops.glu(gate, up, "relu2")

    assert_equals_loop(glu, (None, 1), x, torch.randn(5, 3, 20))
    assert_equals_loop(glu, (2, 1), torch.randn(5, 20, 3), torch.randn(5, 3, 20))
    assert_equals_loop(
        lambda x, active: ops.ternary_linear(x, matrix, scale, None, 7, layout="row", active=active),
        (None, 2),
        x,
        active,
    )


def test_nested() -> None:
    layer = BitLinear.from_linear(nn.Linear(20, 7))
    x = torch.randn(3, 4, 5, 20)
    assert torch.equal(vmap(vmap(layer, 1), 0)(x), layer(x).transpose(1, 2))


@pytest.mark.parametrize("start", [None, torch.tensor([0, -2]), torch.tensor([[0, -2], [-1, 0], [0, 0]])])
def test_attention(start: Tensor | None) -> None:
    cos, sin = reference.rotary_embedding(torch.arange(6), 8, 10000.0)
    q, k, v = torch.randn(3, 2, 6, 32), torch.randn(2, 6, 3, 16), torch.randn(2, 6, 16)
    in_dims = (0, 2, None, None, None, None if start is None or start.dim() == 1 else 0)
    assert_equals_loop(ops.attention, in_dims, q, k, v, cos, sin, start)
    assert_equals_loop(ops.attention, (0, 2, None, 0, None), q, k, v, torch.stack([cos, sin, cos]), sin)
    assert vmap(ops.attention, (0, 2, None, None, None))(q[:, :0], k[:0], v[:0], cos, sin).shape == (
        3,
        0,
        6,
        32,
    )


def test_a_model() -> None:
    model = tiny_model()
    ids = torch.randint(model.config.vocab_size, (3, 2, 9))
    with torch.no_grad():
        assert_equals_loop(model, (0,), ids)


def test_an_ensemble_runs_model_by_model() -> None:
    models = [BitLinear.from_linear(nn.Linear(20, 7)) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(5, 20)
    both = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))(
        parameters, buffers, x
    )
    assert torch.equal(both, torch.stack([model(x) for model in models]))


def test_gradients_of_many_rows_at_once() -> None:
    layer = BitLinear.from_linear(nn.Linear(20, 7))
    x = torch.randn(4, 20, requires_grad=True)
    y = vmap(layer)(x)
    y.sum().backward()
    given, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(given, x.grad)
