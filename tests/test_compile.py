"""Under torch.compile every operator stays one node: no graph break, dynamic shapes, eager's bits."""

import pytest
import torch
from torch import Tensor

from bitnet_ops import ops

PACKED = ops.pack_ternary(torch.randint(-1, 2, (24, 40), dtype=torch.int8))
SCALE = torch.rand(24)
NORM = torch.rand(40)
TABLE = torch.randn(50, 24).bfloat16()


def layer(x: Tensor) -> tuple[Tensor, ...]:
    hidden = ops.ternary_linear(ops.rms_norm(x, NORM, 1e-5), PACKED, SCALE, None, 24)
    q, x_scale = ops.quantize_activations(hidden)
    w = ops.unpack_ternary(PACKED, 24, 40)
    acc = ops.ternary_matmul(ops.quantize_activations(x)[0].flatten(0, -2), ops.pack_ternary(w), 24)
    return hidden, q, x_scale, acc, ops.lm_head(hidden, TABLE)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_full_graph_and_dynamic_shapes(backend: str) -> None:
    torch.compiler.reset()
    recompilations = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for tokens in (2, 3, 17):
            x = torch.randn(2, tokens, 40)
            with torch.compiler.set_stance("fail_on_recompile" if tokens == 17 else "default"):
                results = recompilations(x)
            for given, expected in zip(results, layer(x), strict=True):
                assert given.dtype == expected.dtype
                assert torch.equal(given, expected)


def test_gradients_through_a_compiled_graph() -> None:
    torch.compiler.reset()
    x = torch.randn(3, 40, requires_grad=True)
    compiled = torch.compile(lambda x: layer(x)[-1], fullgraph=True, backend="aot_eager")
    (given,) = torch.autograd.grad(compiled(x).square().sum(), [x])
    (expected,) = torch.autograd.grad(layer(x)[-1].square().sum(), [x])
    assert torch.equal(given, expected)


def test_fake_kernels_on_meta_tensors() -> None:
    x = torch.empty(2, 3, 40, device="meta", dtype=torch.bfloat16)
    y = ops.ternary_linear(x, PACKED.to("meta"), SCALE.to("meta"), None, 24)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 24), torch.bfloat16, "meta")
    logits = ops.lm_head(y, TABLE.to("meta"))
    assert (logits.shape, logits.dtype) == ((2, 3, 50), torch.float32)
    q, x_scale = ops.quantize_activations(x)
    assert (q.shape, q.dtype, x_scale.shape, x_scale.dtype) == ((2, 3, 40), torch.int8, (2, 3), torch.float32)
