"""Fused operators equal the composition of their parts, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import tiny_folder
from torch import Tensor

import bitnet_ops
from bitnet_ops import ops
from bitnet_ops.decoder.model import RMSNorm
from bitnet_ops.layers import packing

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One token, the most that sparse kernels take, more, a chunk of prefill.
SHAPES = [(1,), (2, 2), (5,), (1, 33)]
EPS = 1e-5


class Parts:
    """A layer's weights: K = 150 inputs, 290 features."""

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.norm = torch.rand(150) + 0.5
        self.sizes = [290, 40, 290]
        w = [torch.randint(-1, 2, (size, 150), dtype=torch.int8) for size in self.sizes]
        self.packed = [ops.pack_ternary(each, layout) for each in w]
        self.scale = [torch.rand(size) for size in self.sizes]

    def linear(self, i: int, x: Tensor) -> Tensor:
        return ops.ternary_linear(x, self.packed[i], self.scale[i], None, self.sizes[i], self.layout)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, bad: bool) -> Tensor:
    x = torch.randn(*shape, 150).to(dtype)
    if bad:
        x.view(-1, 150)[-1, 3] = torch.nan
    return x


def assert_same(given: Tensor, expected: Tensor) -> None:
    assert given.dtype == expected.dtype
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_equal_their_parts(
    isa: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, bad: bool
) -> None:
    parts, x = Parts(layout), inputs(shape, dtype, bad)
    n = ops.rms_norm(x, parts.norm, EPS)
    expected = [parts.linear(i, n) for i in range(3)]

    given = ops.norm_linears(x, parts.norm, EPS, parts.packed, parts.scale, parts.sizes, layout)
    for one, other in zip(given, expected, strict=True):
        assert_same(one, other)

    residual = torch.randn(*shape, 290).to(dtype)
    y = ops.norm_linear_add(x, parts.norm, EPS, parts.packed[0], parts.scale[0], layout, residual)
    assert_same(y, residual + expected[0])

    y = ops.norm_squared_relu_glu(
        x, parts.norm, EPS, parts.packed[0], parts.scale[0], layout, parts.packed[2], parts.scale[2], layout
    )
    assert_same(y, F.relu(expected[0]).square() * expected[2])


def test_layouts_may_differ_between_gate_and_up(isa: str) -> None:
    tile16, row = Parts("tile16"), Parts("row")
    x = torch.randn(2, 150)
    n = ops.rms_norm(x, tile16.norm, EPS)
    y = ops.norm_squared_relu_glu(
        x, tile16.norm, EPS, tile16.packed[0], tile16.scale[0], "tile16", row.packed[2], row.scale[2], "row"
    )
    assert_same(y, F.relu(tile16.linear(0, n)).square() * row.linear(2, n))


@pytest.mark.parametrize("tokens", [1, 40])
def test_threads_change_nothing(isa: str, tokens: int, threads: None) -> None:
    sizes = [1500, 300, 301]
    packed = [ops.pack_ternary(torch.randint(-1, 2, (size, 800), dtype=torch.int8)) for size in sizes]
    scale, norm, x = [torch.rand(size) for size in sizes], torch.rand(800), torch.randn(tokens, 800)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.norm_linears(x, norm, EPS, packed, scale, sizes))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def wrong_calls() -> list[tuple[str, dict[str, Any], str]]:
    return [
        (
            "norm_linears",
            {"x": torch.zeros(1, 150, dtype=torch.int8)},
            "argument 'x': expected a CPU tensor of float32",
        ),
        (
            "norm_linears",
            {"norm_weight": torch.ones(149)},
            r"'norm_weight': expected .* \[150\], got float32 \[149\]",
        ),
        ("norm_linears", {"eps": -1.0}, "'eps': expected a number of at least 0"),
        (
            "norm_linears",
            {"packed": [], "weight_scale": [], "out_features": []},
            "'packed': expected at least one",
        ),
        ("norm_linears", {"out_features": [290]}, "'weight_scale and out_features': expected 3 elements"),
        ("norm_linears", {"layout": "rows"}, "'layout': expected 'tile16'"),
        ("norm_linear_add", {"residual": torch.zeros(1, 291)}, r"'residual': expected .* \[1, 290\]"),
        (
            "norm_linear_add",
            {"residual": torch.zeros(1, 290).half()},
            "'residual': expected a CPU tensor float32",
        ),
        ("norm_linear_add", {"weight_scale": torch.ones(1, 290)}, "'weight_scale': expected .*out_features"),
        (
            "norm_squared_relu_glu",
            {"up": torch.zeros(1, 1, 64, dtype=torch.uint8)},
            "argument 'up': expected",
        ),
        ("norm_squared_relu_glu", {"up_scale": torch.ones(3)}, r"'up_scale': expected .* \[290\]"),
    ]


@pytest.mark.parametrize(("name", "wrong", "message"), wrong_calls())
def test_wrong_arguments(name: str, wrong: dict[str, Any], message: str) -> None:
    parts, x = Parts("tile16"), torch.randn(1, 150)
    arguments: dict[str, dict[str, Any]] = {
        "norm_linears": {"packed": parts.packed, "weight_scale": parts.scale, "out_features": parts.sizes},
        "norm_linear_add": {
            "packed": parts.packed[0],
            "weight_scale": parts.scale[0],
            "layout": "tile16",
            "residual": torch.zeros(1, 290),
        },
        "norm_squared_relu_glu": {
            "gate": parts.packed[0],
            "gate_scale": parts.scale[0],
            "gate_layout": "tile16",
            "up": parts.packed[2],
            "up_scale": parts.scale[2],
            "up_layout": "tile16",
        },
    }
    right = {"x": x, "norm_weight": parts.norm, "eps": EPS, **arguments[name]}
    getattr(ops, name)(**right)
    with pytest.raises(RuntimeError, match=rf"^bitnet_ops::{name}: .*{message}"):
        getattr(ops, name)(**{**right, **wrong})


def test_a_model_with_hooks_gives_the_same(tmp_path: Path) -> None:
    """Hooks on a layer see what it gives, so the layer then runs alone, to the same bits."""
    model = bitnet_ops.from_pretrained(tiny_folder(tmp_path))
    ids = torch.arange(20).view(2, 10)
    for layout in (*packing.LAYOUTS, None):
        if layout is not None:
            bitnet_ops.repack(model, layout)
        for tokens in (1, 10):
            expected = model(ids[:, :tokens])
            seen: list[Tensor] = []
            handles = [
                module.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
                for module in model.modules()
                if isinstance(module, (bitnet_ops.BitLinear, RMSNorm))
            ]
            assert torch.equal(model(ids[:, :tokens]), expected)
            assert len(seen) == len(handles)
            for handle in handles:
                handle.remove()
