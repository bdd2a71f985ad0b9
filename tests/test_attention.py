"""The attention operators: against the reference, bit for bit against themselves, on difficult inputs."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import bitnet_ops
from bitnet_ops import ops, reference

CACHES = [torch.float32, torch.bfloat16, torch.int8]
U = 2.0**-24

# batch, tokens, heads, kv_heads, head_dim. Around a block of 64 and a span of 256 keys; heads smaller than
# a register and no multiple of one; 1 to 5 heads to a group, so that blocks of 6 rows are cut anywhere.
SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 63, 4, 2, 12),
    (1, 64, 2, 2, 16),
    (2, 65, 10, 2, 20),
    (1, 130, 3, 1, 80),
    (1, 257, 4, 4, 64),
    (1, 300, 8, 2, 128),
]


class Inputs:
    """q, k and v, tables, and the positions of the first tokens."""

    def __init__(
        self, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, size: float = 1.5
    ) -> None:
        self.q = torch.randn(batch, tokens, heads * head_dim) * size
        self.k = torch.randn(batch, tokens, kv_heads * head_dim) * size
        self.v = torch.randn(batch, tokens, kv_heads * head_dim)
        self.cos, self.sin = reference.rotary_embedding(torch.arange(tokens), head_dim, 10000.0)
        self.start = torch.zeros(batch, dtype=torch.int64)
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.scale: float | None = None
        self.window = 0

    def run(self) -> Tensor:
        options: dict[str, Any] = {"scale": self.scale, "window": self.window}
        return ops.attention(self.q, self.k, self.v, self.cos, self.sin, self.start, **options)

    def row(self, row: int) -> "Inputs":
        """One sequence alone, without its padding."""
        one = Inputs.__new__(Inputs)
        one.__dict__.update(self.__dict__)
        skip = max(-int(self.start[row]), 0)
        one.q, one.k, one.v = (x[row : row + 1, skip:] for x in (self.q, self.k, self.v))
        one.start = torch.zeros(1, dtype=torch.int64)
        return one

    def cache(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Storage full of what must never be read: NaN, and for int8 scales of NaN."""
        blocks = -(-self.cos.shape[0] // 64)
        heads = (self.q.shape[0], self.kv_heads)
        width = -(-self.head_dim // 16) * 16
        if dtype != torch.int8:
            keys = torch.full((*heads, blocks, self.head_dim, 64), math.nan, dtype=dtype)
            return keys, torch.full((*heads, 64 * blocks, width), math.nan, dtype=dtype), None, None
        spans = -(-self.cos.shape[0] // 256)
        keys, values = (torch.full((*heads, spans, 256 * width), 99, dtype=dtype) for _ in range(2))
        return keys, values, *(torch.full((*heads, 256 * spans), math.nan) for _ in range(2))

    def through_cache(
        self, dtype: torch.dtype, pieces: list[int], operator: Any = ops.cached_attention
    ) -> Tensor:
        cache = self.cache(dtype)
        done, out = 0, []
        for q, k, v in zip(*(x.split(pieces, dim=1) for x in (self.q, self.k, self.v)), strict=True):
            options = {"scale": self.scale, "window": self.window}
            out.append(operator(q, k, v, self.cos, self.sin, self.start + done, *cache, **options))
            done += q.shape[1]
        return torch.cat(out, dim=1)


def softmax_bound(x: Inputs, k: Tensor, v: Tensor, int8: bool = False) -> Tensor:
    """How far rounding may take a result from the exact one, [B, T, heads * head_dim].

    A score is off by e <= ((d + 6) |q|.|k| / sqrt(d) + |score|) u: a chain of d products, roundings of
    rotation (3 on either side) and scale. That changes each weight by a factor within exp(+-2 e) of itself.
    exp is within 1.1 ulp, its argument's rounding adds |score - max| u; sums and rescalings over S keys add
    (S + S / 64 + 8) u. All of it times the largest |v|, and twice for the other side, reference or kernel.

    With an int8 cache queries and weights are rounded to 16 bits. An element of q is off by 1 / 65278 of the
    largest, so a score by |q|.|k| / 65278. 256 weights are off by 1 / 65278 of the largest of them each, and
    the largest of every span together are no more than all weights: a result by 256 / 65278 of max |v|.
    """
    heads = x.q.unflatten(-1, (-1, x.head_dim))
    group = heads.shape[2] // x.kv_heads
    key_norm = k.unflatten(-1, (-1, x.head_dim)).norm(dim=-1).amax(1).repeat_interleave(group, 1)
    scale = x.head_dim**-0.5 if x.scale is None else x.scale
    score = heads.norm(dim=-1) * key_norm.unsqueeze(1) * scale  # largest possible, [B, T, heads]
    keys = torch.arange(1, x.q.shape[1] + 1)[:, None]
    relative = torch.expm1(2 * (x.head_dim + 9) * score * U) + (4 * score + 1.1 * keys + 12) * U
    if int8:
        relative += (torch.expm1(2 * score * x.head_dim**0.5 / 65278) + 256 / 65278) / 2
    largest = v.abs().amax((1, 2))[:, None, None]
    return (2 * relative * largest).repeat_interleave(x.head_dim, dim=2)


def assert_within(given: Tensor, expected: Tensor, bound: Tensor) -> None:
    worst = ((given.double() - expected).abs() / bound).max()
    assert worst <= 1, f"{float(worst)} of the bound"


# ---- against the reference --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(isa: str, shape: tuple[int, ...]) -> None:
    x = Inputs(*shape)
    x.start -= torch.arange(shape[0]) * (shape[1] // 3)
    exact = reference.attention(x.q.double(), x.k.double(), x.v.double(), x.cos, x.sin, x.start)
    bound = softmax_bound(x, x.k, x.v)
    assert bound.max() < 2e-3 * x.v.abs().max(), "the bound proves nothing"
    assert_within(x.run(), exact, bound)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cached_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against the reference with the same rounding of keys and values; what is stored is the same bits."""
    x = Inputs(*shape)
    x.start -= torch.arange(shape[0]) * (shape[1] // 3)
    ours, theirs = x.cache(dtype), x.cache(dtype)
    arguments = (x.q, x.k, x.v, x.cos, x.sin, x.start)
    given = ops.cached_attention(*arguments, *ours)
    expected = reference.cached_attention(*arguments, *theirs)
    for one, other in zip(ours, theirs, strict=True):
        if one is not None and other is not None:
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    # Rounding to bfloat16 or int8 moves a vector by less than a tenth.
    assert_within(given, expected.double(), 1.2 * softmax_bound(x, x.k, x.v, dtype == torch.int8))


@pytest.mark.parametrize(("dtype", "loss"), [(torch.bfloat16, 2.0**-8), (torch.int8, 1 / 127)])
def test_what_a_small_cache_costs(dtype: torch.dtype, loss: float) -> None:
    """Near a float32 cache: both k and v are off by a relative error of half a step at most."""
    x = Inputs(1, 200, 4, 2, 64, size=0.7)
    small, full = x.through_cache(dtype, [200]), x.run()
    assert not torch.equal(small, full)
    assert (small - full).norm() < loss * full.norm() * 1.5


# ---- bit for bit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_gives_the_bits_of_scalar(isa: str, shape: tuple[int, ...]) -> None:
    x = Inputs(*shape)
    x.start -= torch.arange(shape[0]) * (shape[1] // 3)
    for run in (x.run, *(lambda d=d: x.through_cache(d, [shape[1] // 2, -(-shape[1] // 2)]) for d in CACHES)):
        given = run()
        with bitnet_ops.use_isa("scalar"):
            assert torch.equal(given, run())


@pytest.mark.parametrize("dtype", CACHES)
def test_prefill_and_decode(isa: str, dtype: torch.dtype) -> None:
    x = Inputs(1, 270, 8, 2, 36)
    whole = x.through_cache(dtype, [270])
    for pieces in ([1] * 270, [255, 1, 1, 13], [64, 64, 142], [3, 200, 67], [0, 270]):
        assert torch.equal(x.through_cache(dtype, pieces), whole)
    if dtype == torch.float32:
        assert torch.equal(x.run(), whole)


@pytest.mark.parametrize("dtype", CACHES)
def test_padding_and_batch(isa: str, dtype: torch.dtype) -> None:
    x = Inputs(5, 140, 4, 2, 20)
    x.start = -torch.tensor([0, 1, 70, 139, 140])
    for x_padding in (x.q, x.k, x.v):
        x_padding[2, :70] = math.nan  # padding is never looked at
    batch, pieces = x.run(), x.through_cache(dtype, [100, 38, 1, 1])
    for row in range(4):
        one = x.row(row)
        skip = 140 - one.q.shape[1]
        assert torch.equal(batch[row, skip:], one.run()[0])
        assert torch.equal(pieces[row, skip:], one.through_cache(dtype, [140 - skip])[0])
        assert (batch[row, :skip] == 0).all()
        assert (pieces[row, :skip] == 0).all()
    assert (batch[4] == 0).all(), "a row that is all padding"


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_threads(tokens: int, dtype: torch.dtype, threads: None) -> None:
    """Long enough to be shared out: by spans for few tokens, by blocks of queries for many."""
    context = 1500
    x = Inputs(1, context, 20, 5, 128)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(x.through_cache(dtype, [context - tokens, tokens]))
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_slices_of_a_fused_projection() -> None:
    x = Inputs(2, 30, 4, 2, 24)
    fused = torch.cat((x.q, x.k, x.v), dim=2)
    q, k, v = fused.split([96, 48, 48], dim=2)
    before = fused.clone()
    assert torch.equal(ops.attention(q, k, v, x.cos, x.sin), x.run())
    assert torch.equal(fused, before)
    spread = x.v.repeat_interleave(2, dim=2)[:, :, ::2]  # elements lie apart
    assert torch.equal(ops.attention(x.q, x.k, spread, x.cos, x.sin), x.run())


# ---- windows and scales -----------------------------------------------------------------------------

# One token, inside a block, one block, across blocks, one span and a few positions.
WINDOWS = [1, 5, 64, 100, 259]


def windowed(shape: tuple[int, ...], window: int, scale: float | None = None) -> Inputs:
    x = Inputs(*shape)
    x.start -= torch.arange(shape[0]) * (shape[1] // 3)
    x.window, x.scale = window, scale
    return x


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_window_equals_reference(isa: str, shape: tuple[int, ...], window: int) -> None:
    x = windowed(shape, window)
    inputs = (x.q.double(), x.k.double(), x.v.double(), x.cos, x.sin, x.start)
    assert_within(x.run(), reference.attention(*inputs, window=window), softmax_bound(x, x.k, x.v))


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("window", WINDOWS)
def test_cached_window_equals_reference(dtype: torch.dtype, window: int) -> None:
    x = windowed((2, 300, 4, 2, 20), window, 0.2)
    given = x.through_cache(dtype, [290, 9, 1])
    expected = x.through_cache(dtype, [300], reference.cached_attention)
    assert_within(given, expected.double(), 1.2 * softmax_bound(x, x.k, x.v, dtype == torch.int8))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", CACHES)
def test_window_has_the_same_bits_everywhere(isa: str, dtype: torch.dtype, window: int) -> None:
    """For every instruction set, however tokens are cut into calls, and beside other sequences."""
    x = windowed((2, 340, 6, 2, 36), window)
    with bitnet_ops.use_isa("scalar"):
        whole = x.through_cache(dtype, [340])
    for pieces in ([340], [1] * 340, [255, 1, 1, 83], [64, 64, 142, 70], [3, 197, 140]):
        assert torch.equal(x.through_cache(dtype, pieces), whole)
    if dtype == torch.float32:
        assert torch.equal(x.run(), whole)
    one = x.row(1)
    assert torch.equal(one.through_cache(dtype, [one.q.shape[1]])[0], whole[1, -one.q.shape[1] :])


@pytest.mark.parametrize("dtype", CACHES)
def test_a_window_beyond_the_context_is_none(isa: str, dtype: torch.dtype) -> None:
    x = windowed((2, 300, 4, 2, 20), 0)
    plain, decoded = x.run(), x.through_cache(dtype, [298, 1, 1])
    for window in (300, 301, 2**62):
        x.window = window
        assert torch.equal(x.run(), plain)
        assert torch.equal(x.through_cache(dtype, [298, 1, 1]), decoded)
    x.window = 299
    assert not torch.equal(x.run(), plain)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(("tokens", "window"), [(1, 700), (3, 1), (40, 300), (700, 90)])
def test_threads_and_windows(tokens: int, window: int, dtype: torch.dtype, threads: None) -> None:
    x = windowed((1, 1500, 20, 5, 64), window)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(x.through_cache(dtype, [1500 - tokens, tokens]))
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("dtype", CACHES)
def test_positions_below_the_window_may_hold_anything(isa: str, dtype: torch.dtype) -> None:
    x = windowed((2, 600, 4, 2, 20), 70)
    x.start[:] = 0
    expected = x.through_cache(dtype, [600])[:, 590:]
    for tensor in (x.k, x.v):
        tensor[:, : 590 - 69] = math.nan  # of int8 caches the scales
    for pieces in ([590, 10], [590, *([1] * 10)], [520, 80]):
        assert torch.equal(x.through_cache(dtype, pieces)[:, 590:], expected)


def test_a_window_of_one_gives_the_value_itself(isa: str) -> None:
    x = windowed((1, 130, 4, 2, 16), 1)
    values = x.v.unflatten(2, (2, 16)).repeat_interleave(2, dim=2).flatten(2)
    assert torch.equal(x.run(), values)


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.3, -0.2, 1.0])
def test_scale_equals_reference(isa: str, scale: float) -> None:
    x = windowed((2, 100, 4, 2, 20), 0, scale)
    inputs = (x.q.double(), x.k.double(), x.v.double(), x.cos, x.sin, x.start)
    expected = reference.attention(*inputs, scale=scale)
    x.scale = abs(scale)
    bound = softmax_bound(x, x.k, x.v)
    x.scale = scale
    assert_within(x.run(), expected, bound)


def test_no_scale_is_that_of_the_head() -> None:
    for head_dim in (2, 12, 20, 64, 80, 128, 256):
        x = Inputs(1, 30, 2, 1, head_dim)
        plain = x.run(), x.through_cache(torch.int8, [30])
        x.scale = head_dim**-0.5
        assert torch.equal(x.run(), plain[0])
        assert torch.equal(x.through_cache(torch.int8, [30]), plain[1])


@pytest.mark.parametrize("operator", [ops.attention, ops.cached_attention])
def test_wrong_scale_and_window(operator: Any) -> None:
    x = Inputs(1, 3, 4, 2, 12)
    cache = x.cache(torch.float32) if operator is ops.cached_attention else ()
    arguments = (x.q, x.k, x.v, x.cos, x.sin, x.start, *cache)
    for scale in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match=f"argument 'scale': expected a finite number.*, got {scale}"):
            operator(*arguments, scale=scale)
    with pytest.raises(RuntimeError, match=r"argument 'window': expected a number of positions.*, got -1"):
        operator(*arguments, window=-1)


# ---- inputs that break softmax ----------------------------------------------------------------------


def one_head(scores: list[float], values: list[list[float]]) -> tuple[Tensor, ...]:
    """Inputs whose last token has these scores, up to rounding: no rotation, and q along the first axis."""
    tokens = len(scores)
    q = torch.zeros(1, tokens, 2)
    q[..., 0] = 2**0.5
    k = torch.zeros(1, tokens, 2)
    k[0, :, 0] = torch.tensor(scores)
    return q, k, torch.tensor([values]), torch.ones(tokens, 1), torch.zeros(tokens, 1)


def test_equal_scores_give_the_mean(isa: str) -> None:
    for score in (0.0, -0.0, 50.0, -2e38):
        y = ops.attention(*one_head([score] * 4, [[1.0, 8.0], [2.0, 4.0], [3.0, 2.0], [4.0, 2.0]]))
        assert y[0, -1].tolist() == [2.5, 4.0]
        assert y[0, 0].tolist() == [1.0, 8.0]


def test_a_score_far_above_the_others_takes_all(isa: str) -> None:
    values = [[1.0, -1.0], [2.0, -2.0], [5.0, -5.0]]
    for high in (100.0, 1e30, 2e38):  # scores above 2.3e38 overflow: they are kept times log2(e)
        for scores in ([high, 0.0, -high], [-high, high, 0.0], [0.0, -high, high]):
            y = ops.attention(*one_head(scores, values))
            assert y[0, -1].tolist() == values[scores.index(high)]


@pytest.mark.parametrize("gap", [0.5, 20.0, 80.0, 87.0, 87.4, 88.0, 104.0, 1000.0])
def test_weights_follow_exp_down_to_underflow(isa: str, gap: float) -> None:
    """Two keys: the weight of the lower is exp(-gap) / (1 + exp(-gap)); below 2^-126 it may become 0."""
    for scores in ([0.0, -gap], [-gap, 0.0]):
        low = scores.index(-gap)
        values = [[0.0, 1.0], [0.0, 1.0]]
        values[low] = [1.0, 0.0]
        share, rest = ops.attention(*one_head(scores, values))[0, -1].tolist()
        exact = math.exp(-gap) / (1 + math.exp(-gap))
        # The score's own roundings (4 of them), the polynomial, sum, reciprocal and product.
        assert abs(share - exact) <= (5 * gap + 8) * U * exact + 2.0**-126
        assert abs(rest - (1 - exact)) <= (5 * gap + 8) * U


def test_infinite_scores(isa: str) -> None:
    values = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    y = ops.attention(*one_head([0.0, -math.inf, 0.0], values))
    # The key of -inf also meets a 0 in q: 0 * inf is NaN, so its tokens see NaN, as in the reference.
    assert y[0, 0].tolist() == [1.0, 2.0]
    assert y[0, 1:].isnan().all()
    q, k, v, cos, sin = one_head([-3e38, -3e38, 0.0], values)
    q[..., 0] = 1e30  # the products overflow: -inf, -inf, 0
    y = ops.attention(q, k, v, cos, sin)
    assert y[0, :2].isnan().all(), "all scores are -inf: the formula says 0 / 0"
    assert y[0, 2].tolist() == [5.0, 6.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_bad_numbers_stay_where_they_are_seen(isa: str, which: str, bad: float) -> None:
    """In one token of one sequence: the tokens before it and the other sequences keep their bits."""
    x = Inputs(3, 200, 6, 2, 24)
    clean, decoded = x.run(), x.through_cache(torch.float32, [200])
    tensor = getattr(x, which)
    tensor[1, 100, 5] = bad
    for given, before in ((x.run(), clean), (x.through_cache(torch.float32, [99, 1, 1, 99]), decoded)):
        assert torch.equal(given[[0, 2]], before[[0, 2]])
        assert torch.equal(given[1, :100], before[1, :100])
        assert not given[1, 100].isfinite().all()
        if which == "q":
            assert torch.equal(given[1, 101:], before[1, 101:])
    for dtype in CACHES:
        given = x.through_cache(dtype, [200])
        for pieces in ([150, 50], [99, 1, 1, 99]):
            again = x.through_cache(dtype, pieces)
            assert torch.equal(again.isnan(), given.isnan())
            assert torch.equal(again.nan_to_num(), given.nan_to_num())


def test_zero_sizes() -> None:
    for batch, tokens in ((0, 3), (2, 0)):
        x = Inputs(batch, tokens, 4, 2, 12)
        assert x.run().shape == (batch, tokens, 48)
        cache = x.cache(torch.float32)
        assert ops.cached_attention(x.q, x.k, x.v, x.cos, x.sin, x.start, *cache).shape == (batch, tokens, 48)


# ---- gradients, GPU path, errors --------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "window"), [(None, 0), (0.5, 7)])
def test_gradients(scale: float | None, window: int) -> None:
    x = Inputs(2, 20, 4, 2, 12)
    x.start[1] = -5
    x.scale, x.window = scale, window
    inputs = [tensor.requires_grad_() for tensor in (x.q, x.k, x.v)]
    grad = torch.randn_like(x.q)
    given = torch.autograd.grad(x.run(), inputs, grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(
        reference.attention(*wide, x.cos.double(), x.sin.double(), x.start, scale, window),
        wide,
        grad.double(),
    )
    for one, other in zip(given, exact, strict=True):
        # Sums of at most 20 * 2 * 12 products of order one.
        torch.testing.assert_close(one.double(), other, rtol=480 * U, atol=480 * U)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_inputs_are_widened(dtype: torch.dtype) -> None:
    x = Inputs(1, 9, 2, 1, 8)
    x.q, x.k, x.v = (tensor.to(dtype) for tensor in (x.q, x.k, x.v))
    y = x.run()
    assert y.dtype == torch.float32
    x.q, x.k, x.v = (tensor.float() for tensor in (x.q, x.k, x.v))
    assert torch.equal(y, x.run())


def call(**others: Any) -> Tensor:
    """A call of cached_attention that is right but for the arguments given."""
    x = Inputs(2, 3, 4, 2, 12)
    names = ("keys", "values", "key_scale", "value_scale")
    arguments = {name: getattr(x, name) for name in ("q", "k", "v", "cos", "sin", "start")}
    arguments.update(zip(names, x.cache(torch.float32), strict=True))
    return torch.ops.bitnet_ops.cached_attention(**{**arguments, **others})


HALF = torch.zeros(2, 2, 1, 12, 64, dtype=torch.float16)
INT8 = torch.zeros(2, 2, 1, 4096, dtype=torch.int8)
STARTS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("argument", "wrong", "expected", "given"),
    [
        ("q", torch.zeros(2, 3, 50), "[batch, tokens, heads * 12]", "float32 [2, 3, 50]"),
        ("q", torch.zeros(2, 3, 48).double(), "float32", "float64 [2, 3, 48]"),
        ("q", torch.zeros(3, 48), "[batch, tokens, heads * 12]", "float32 [3, 48]"),
        ("k", torch.zeros(2, 4, 24), "float32 [2, 3, kv_heads * head_dim]", "float32 [2, 4, 24]"),
        ("k", torch.zeros(2, 3, 36), "a divisor of q's 4", "float32 [2, 3, 36]"),
        ("v", torch.zeros(2, 3, 12), "float32 [2, 3, 24]", "float32 [2, 3, 12]"),
        ("cos", torch.zeros(6), "float32 [positions, head_dim / 2]", "float32 [6]"),
        ("sin", torch.zeros(3, 5), "float32 [3, 6]", "float32 [3, 5]"),
        ("start", torch.zeros(2), "int64 [2]", "float32 [2]"),
        ("start", torch.zeros(3, dtype=torch.int64), "int64 [2]", "int64 [3]"),
        ("start", STARTS, "within the 3 of cos", "1"),
        ("start", -STARTS * 2**40, "within the 3 of cos", str(-(2**40))),
        ("keys", HALF, "float32 or bfloat16 [2, 2, ", "float16 [2, 2, 1, 12, 64]"),
        ("keys", torch.zeros(2, 2, 1, 12, 64, dtype=torch.int8), "int8 [2, 2, ", "int8 [2, 2, 1, 12, 64]"),
        ("keys", torch.zeros(2), "[2, 2, ", "float32 [2]"),
        ("keys", torch.zeros(2, 1, 1, 12, 64), "[2, 2, ", "float32 [2, 1, 1, 12, 64]"),
        ("keys", torch.zeros(2, 2, 1, 12, 128)[..., ::2], "contiguous", "float32 [2, 2, 1, 12, 64]"),
        ("values", torch.zeros(2, 2, 64, 12), "float32 [2, 2, 64, 16]", "float32 [2, 2, 64, 12]"),
        ("values", torch.zeros(2, 2, 16, 64).mT, "contiguous", "float32 [2, 2, 64, 16] with other strides"),
        ("key_scale", torch.zeros(2, 2, 64), "None otherwise", "a tensor"),
        ("value_scale", torch.zeros(2, 2, 64), "None otherwise", "a tensor"),
    ],
)
def test_wrong_argument(argument: str, wrong: Tensor, expected: str, given: str) -> None:
    start = re.escape(f"bitnet_ops::cached_attention: argument '{argument}': expected ")
    with pytest.raises(RuntimeError, match=f"^{start}.*{re.escape(expected)}.*, got .*{re.escape(given)}"):
        call(**{argument: wrong})


def test_wrong_scales_and_places() -> None:
    with pytest.raises(RuntimeError, match="argument 'values': expected a CPU tensor int8"):
        call(keys=INT8)
    values = INT8.clone()
    with pytest.raises(
        RuntimeError, match=r"argument 'key_scale': expected a tensor where keys are int8.*, got None"
    ):
        call(keys=INT8, values=values)
    x = Inputs(2, 70, 4, 2, 12)
    with pytest.raises(RuntimeError, match=r"argument 'start': expected .*the 64 of the cache, got 0"):
        call(q=x.q, k=x.k, v=x.v, cos=x.cos, sin=x.sin)
    with pytest.raises(RuntimeError, match=r"bitnet_ops::attention: argument 'start': expected .*, got 1"):
        ops.attention(x.q, x.k, x.v, torch.zeros(99, 6), torch.zeros(99, 6), STARTS)
    with pytest.raises(
        RuntimeError, match="attention: argument 'keys': expected a tensor on cpu, got one on meta"
    ):
        call(keys=INT8.to("meta"))
