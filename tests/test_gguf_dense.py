"""Dense blocks of GGUF files, against the package gguf."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet_ops.checkpoint.gguf import dense
from bitnet_ops.checkpoint.gguf.dense import decode, encode, q6_k
from bitnet_ops.checkpoint.gguf.types import TYPES

BY_NAME = {type.name: type for type in TYPES}
DENSE = [type.name for type in TYPES if not type.ternary]


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    type = BY_NAME[name]
    return np.random.default_rng(0).integers(0, 256, (rows, blocks * type.block_bytes), dtype=np.uint8)


@pytest.mark.parametrize("chunk", [256, 1024, decode.CHUNK])
@pytest.mark.parametrize("name", DENSE)
def test_dequantize_gives_the_numbers_of_gguf(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", chunk)
    type, blocks = BY_NAME[name], 6 if BY_NAME[name].block > 1 else 200
    raw = random_blocks(name, 7, blocks)  # any scale, infinite ones and NaN among them
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    data, shape = torch.from_numpy(raw).view(-1), (7, blocks * type.block)
    ours = dense.dequantize(type, data, shape, torch.float32)
    assert np.isfinite(theirs).mean() > 0.5
    assert np.array_equal(ours.numpy(), theirs, equal_nan=True)
    assert np.array_equal(np.signbit(ours.numpy()[theirs == 0]), np.signbit(theirs[theirs == 0]))
    for dtype in (torch.float16, torch.bfloat16):
        rounded = dense.dequantize(type, data, shape, dtype)
        assert torch.equal(rounded.nan_to_num(9), torch.from_numpy(theirs).to(dtype).nan_to_num(9))
    moved = torch.cat([data[:1], data])[1:]
    assert torch.equal(dense.dequantize(type, moved, shape, torch.float32).nan_to_num(9), ours.nan_to_num(9))


class LargestFloat32(TorchDispatchMode):
    """Remembers the numbers of the largest float32 tensor that an operator gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("name", DENSE)
def test_a_large_matrix_is_never_there_in_float32_as_a_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CHUNK", 512)
    monkeypatch.setattr(encode, "CHUNK", 512)
    type, shape = BY_NAME[name], (8, 512)
    data = torch.zeros(type.nbytes(shape), dtype=torch.uint8)
    dtype = torch.float16 if name == "BF16" else torch.bfloat16
    with LargestFloat32() as seen:
        matrix = dense.dequantize(type, data, shape, dtype)
    assert seen.size <= 512
    if name in ("F16", "BF16", "Q8_0", "Q6_K"):
        with LargestFloat32() as seen:
            dense.quantize(type, matrix)
        assert 0 < seen.size <= 512


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_quantize_gives_the_bytes_of_gguf(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 1024)
    matrix = torch.randn(60, 96) * torch.logspace(-6, 3, 60).unsqueeze(1)
    matrix[0] = 0
    matrix[1, :32] = torch.arange(32) - 15.5  # halves of the step that the next line sets
    matrix[1, 0], matrix[1, 31] = 127, -127
    matrix[2] = 1e-30
    matrix[3, 5] = -0.0
    for numbers in (matrix, matrix.half(), matrix.T.contiguous().T):
        theirs = gguf.quants.quantize(numbers.float().contiguous().numpy(), gguf.GGMLQuantizationType[name])
        ours = dense.quantize(BY_NAME[name], numbers)
        assert torch.equal(ours, torch.from_numpy(theirs.view(np.uint8).reshape(-1)))


def test_q8_0_of_numbers_below_all_scales_is_0() -> None:
    tiny = torch.full((1, 32), 1e-40)
    data = dense.quantize(BY_NAME["Q8_0"], tiny)
    assert torch.equal(data, torch.zeros(34, dtype=torch.uint8))


def q6_k_plainly(numbers: Tensor, *, signed: bool) -> Tensor:
    """What Q6_K gives with scales from the largest absolute value, that of 31 or -32 steps."""
    x = numbers.view(-1, 16, 16)
    most = x.gather(2, x.abs().argmax(2, keepdim=True))
    plain = most / -32 if signed else most.abs() / 31
    d = (plain.abs().amax(1, keepdim=True) / 127).half().float()
    scale = torch.where(d == 0, 0, plain / d).round() * d
    return torch.where(scale == 0, 0, (x / scale).round().clamp(-32, 31) * scale).view(numbers.shape)


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "outliers", "integers", "scaled"])
def test_q6_k_has_a_smaller_error_than_plain_scales(kind: str) -> None:
    numbers = {
        "normal": torch.randn(64, 512),
        "laplace": torch.distributions.Laplace(0.0, 0.01).sample((64, 512)),
        "uniform": torch.rand(64, 512) - 0.3,
        "outliers": torch.randn(64, 512) * (1 + 50 * (torch.rand(64, 512) < 0.01)),
        "integers": torch.randint(-50, 50, (64, 512)).float(),
        "scaled": torch.randn(64, 512) * torch.logspace(-4, 2, 64).unsqueeze(1),
    }[kind]
    data = dense.quantize(BY_NAME["Q6_K"], numbers)
    theirs = gguf.quants.dequantize(data.view(64, -1).numpy(), gguf.GGMLQuantizationType.Q6_K)
    size = numbers.square().mean(1)
    error = ((torch.from_numpy(theirs) - numbers).square().mean(1) / size).mean()
    for signed in (False, True):
        plain = ((q6_k_plainly(numbers, signed=signed) - numbers).square().mean(1) / size).mean()
        assert error < plain


def test_q6_k_of_special_blocks() -> None:
    numbers = torch.zeros(5, 256)
    numbers[1, 17] = 3.0  # one part of a block
    numbers[2] = 1e-12  # below every float16
    numbers[3] = torch.tensor([1.0, 1e-6]).repeat_interleave(128)  # parts too small for a scale
    numbers[4] = torch.tensor([1.0, -1.0]).repeat(128)
    data = dense.quantize(BY_NAME["Q6_K"], numbers)
    result = dense.dequantize(BY_NAME["Q6_K"], data, (5, 256), torch.float32)
    assert not result[0].any()
    assert not result[2].any()
    assert not result[3, 128:].any()
    # d has 11 bits, s is rounded to 1 / 234 at most, and a step is 1 / 31 of the largest.
    assert (result - numbers).abs().max() <= 3 * (2**-11 + 1 / 234 + 1 / 62)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q6_K"])
def test_quantize_refuses_what_the_type_cannot_hold(name: str) -> None:
    type = BY_NAME[name]
    for wrong in (float("nan"), float("inf"), float("-inf")):
        numbers = torch.zeros(2, 256)
        numbers[1, 7] = wrong
        with pytest.raises(ValueError, match="finite"):
            dense.quantize(type, numbers)
    # The largest numbers: of float16; 127 times that; 31 times 127 times that, about.
    largest = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q6_K": q6_k.LARGEST * 32 * 65504.0}
    if name in largest:
        numbers = torch.zeros(1, 256)
        numbers[0, 5] = -largest[name]
        data = dense.quantize(type, numbers)
        assert dense.dequantize(type, data, (1, 256), torch.float32)[0, 5] == pytest.approx(
            -largest[name], 1e-2
        )
        numbers *= 1.01
        with pytest.raises(ValueError, match=f"that {name} can hold, got "):
            dense.quantize(type, numbers)
    if name == "BF16":
        with pytest.raises(ValueError, match=r"that BF16 can hold, got 3\.40"):
            dense.quantize(type, torch.full((1, 1), torch.finfo(torch.float32).max))
    with pytest.raises(ValueError, match="a matrix of floats"):
        dense.quantize(type, torch.zeros(1, 256, dtype=torch.int64))
    if type.block > 1:
        with pytest.raises(ValueError, match="divides"):
            dense.quantize(type, torch.zeros(1, 8))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "TQ1_0", "I2_S"])
def test_other_types_are_not_quantized_to(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name}"):
        dense.quantize(BY_NAME[name], torch.zeros(1, 256))


@pytest.mark.parametrize("name", DENSE)
def test_dense_sizes_that_do_not_fit_are_an_error(name: str) -> None:
    type, shape = BY_NAME[name], (2, 512)
    data = torch.zeros(type.nbytes(shape), dtype=torch.uint8)
    for wrong in (data[:-1], torch.cat([data, data[:1]]), data[:0], data.view(1, -1), data.view(torch.int8)):
        with pytest.raises(ValueError, match=f"expected {data.numel()} bytes for {name}"):
            dense.dequantize(type, wrong, shape, torch.float32)


@pytest.mark.parametrize("name", DENSE)
def test_dense_tensors_of_one_axis_and_of_no_numbers(name: str) -> None:
    type = BY_NAME[name]
    for shape in ((256,), (0, 256), (3, 0), (0,)):
        data = torch.zeros(type.nbytes(shape), dtype=torch.uint8)
        result = dense.dequantize(type, data, shape, torch.bfloat16)
        assert (result.shape, result.dtype) == (shape, torch.bfloat16)
        assert not result.any()
        if name in ("F32", "F16", "BF16", "Q8_0", "Q6_K"):
            assert dense.quantize(type, result).shape == data.shape
