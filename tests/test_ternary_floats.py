"""Float weights that are ternary already: scales are found exactly, and anything else is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import Sizes, Weights, untied, write_folder
from torch import Tensor

from bitnet_ops import BitLinear, from_pretrained, reference
from bitnet_ops.checkpoint import CheckpointError
from bitnet_ops.checkpoint.files import TensorFiles
from bitnet_ops.checkpoint.group_sizes import FittingSizes
from bitnet_ops.checkpoint.ternary_floats import CHUNK_BYTES, NotTernary, group_scales, to_ternary

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (1, 24, 63, 64, 65, 128, 200, 256, 300, 512)  # of rows, most of which no group divides


def random_floats(
    n: int, k: int, group: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Ternary floats [n, k], and the int8 weights and scales [G, n] that they are made of."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    size = group or k
    scales = (torch.randn(-(-k // size), n, generator=generator).exp() * k**-0.5).to(dtype)
    every_input = scales.repeat_interleave(size, dim=0)[:k].T
    return w * every_input, w, scales.float()


def assert_takes_apart(x: Tensor, group: int, w: Tensor, scales: Tensor) -> None:
    got = to_ternary(x, group)
    assert torch.equal(got.w, w)
    assert got.scales.dtype == torch.float32
    assert torch.equal(got.scales, torch.where(used(w, group), scales, 0.0 if group else 1.0))


def used(w: Tensor, group: int) -> Tensor:
    """Which groups have weights but 0, [G, n]."""
    return torch.stack([part.any(1) for part in w.split(group or w.shape[1], dim=1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 64, 128, 256])
def test_scales_are_found_exactly(group: int, dtype: torch.dtype) -> None:
    for k in LENGTHS:
        x, w, scales = random_floats(5, k, group, dtype)
        x[1, : k // 2] = w[1, : k // 2] = 0
        x[2] = w[2] = 0
        assert_takes_apart(x, group, w, scales)


@pytest.mark.parametrize("group", [0, 64, 128, 256])
def test_the_coarsest_group_is_found(group: int) -> None:
    x, *_ = random_floats(7, 1000, group)
    sizes = FittingSizes()
    for rows in x.split(3):
        assert sizes.see(group_scales(rows))
    assert sizes.coarsest == group
    sizes.see(group_scales(random_floats(3, 512, 0)[0]))
    assert sizes.coarsest == group, "a coarser matrix changes nothing"
    for finer in (256, 128, 64):
        sizes.see(group_scales(random_floats(3, 1000, finer)[0]))
        assert sizes.coarsest == min(group or 256, finer)


def test_nothing_is_the_coarsest() -> None:
    sizes = FittingSizes()
    sizes.see(group_scales(torch.zeros(3, 200)))
    assert sizes.coarsest == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_numbers(dtype: torch.dtype) -> None:
    """The extremes of a dtype are scales like others; a negative zero is a zero."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # subnormal
    for scale in (smallest, info.max, 1.0):
        x = torch.tensor([[scale, -scale, 0.0, -0.0]], dtype=dtype)
        w, scales = to_ternary(x, 0)
        assert w.tolist() == [[1, -1, 0, 0]]
        assert scales.tolist() == [[scale]]
    w, scales = to_ternary(torch.full((2, 70), -0.0, dtype=dtype), 64)
    assert not w.any()
    assert not scales.any()
    w, scales = to_ternary(torch.full((2, 70), -2.0, dtype=dtype), 0)
    assert (w == -1).all()
    assert scales.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [0, 63, 64, 199])
def test_other_values_are_refused(column: int, dtype: torch.dtype) -> None:
    """The nearest other number, in every place of a group; the message has both."""
    for value in (torch.nan, torch.inf, -torch.inf, "next", "half"):
        x = torch.full((4, 200), 0.25, dtype=dtype)
        if value == "next":
            number = 0.25 * (1 + torch.finfo(dtype).eps)
        else:
            number = 0.125 if value == "half" else value
        x[2, column] = number
        for look in (group_scales, lambda x: to_ternary(x, 64)):
            with pytest.raises(NotTernary) as caught:
                look(x)
            assert caught.value.row == 2
            assert f"{number:.9g}" in caught.value.given


def test_a_finer_scale_than_that_of_the_group_is_refused() -> None:
    x = torch.ones(3, 200)
    x[1, 128:] = 2.0
    assert to_ternary(x, 128).scales.tolist() == [[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]]
    for group in (256, 0):
        with pytest.raises(NotTernary, match=r"row 1: .* 1 and 2"):
            to_ternary(x, group)


def test_every_small_group_of_magnitudes() -> None:
    """Against the definition: all rows of three values out of six."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.5, torch.inf])
    rows = torch.cartesian_prod(values, values, values)
    for row in rows:
        magnitudes = set(row.abs().tolist()) - {0.0}
        if len(magnitudes) > 1 or torch.inf in magnitudes:
            with pytest.raises(NotTernary):
                group_scales(row[None])
        else:
            assert group_scales(row[None]).item() == max(magnitudes, default=0.0)


# Folders

TRILM = Sizes(hidden=130, intermediate=200, heads=5, kv_heads=5, llama=True)


def folder_of(
    folder: Path, group: int = 0, dtype: torch.dtype = torch.float16, **changes: Any
) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """A Llama-class folder of ternary floats without "quantization_config", and what it was made of."""
    weights = untied(Weights.random(TRILM))
    tensors = {name: tensor.to(dtype) for name, tensor in weights.floats.items()}
    parts = {}
    for seed, (name, w) in enumerate(weights.ternary.items()):
        x, *parts[name] = random_floats(*w.shape, group, dtype, seed)
        tensors[f"{name}.weight"] = x
    config = TRILM.config(quantization_config=None, tie_word_embeddings=False, rope_scaling=None)
    for name, value in changes.items():
        tensors[name] = value(tensors[name].clone())
    return write_folder(folder, config, tensors), parts


@pytest.mark.parametrize("group", [0, 64, 128])
@pytest.mark.parametrize("mmap", [None, True])
def test_a_folder(tmp_path: Path, group: int, mmap: bool | None) -> None:
    folder, parts = folder_of(tmp_path, group)
    model = from_pretrained(folder, mmap=mmap)
    assert (model.config.activation_bits, model.config.group_size) == (16, group)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
    assert layers.keys() == parts.keys()
    for name, (w, scales) in parts.items():
        assert torch.equal(layers[name].unpack(), w)
        expected = torch.where(used(w, group), scales, 0.0 if group else 1.0)
        assert torch.equal(layers[name].scales(), expected if group else expected[0])
        assert layers[name].activation_bits == 16
    dense = from_pretrained(folder, linear=torch.nn.Linear)
    x = torch.randn(3, 130)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        assert torch.allclose(layers[name](x), dense.get_submodule(name)(x), atol=2e-3)


def test_one_scale_a_tensor_and_rows_of_zeros(tmp_path: Path) -> None:
    """Both have no group; a row of zeros has a scale that our own folders take."""

    def one(x: Tensor) -> Tensor:
        x = x.sign() * 0.5
        x[3] = 0
        return x

    folder, _ = folder_of(tmp_path / "a", **{"model.layers.0.mlp.up_proj.weight": one})
    model = from_pretrained(folder)
    scale = model.model.layers[0].mlp.up_proj.scales()
    assert scale[3] == 1
    assert set(scale.tolist()) == {0.5, 1.0}
    model.save_pretrained(tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids), model(ids))


def test_trilm(tmp_path: Path) -> None:
    """A Llama of transformers with one scale a row, in float16.

    Activations of 16 bits cost no more than twice what they cost in float64; see test_qwen3.py.
    """
    pytest.importorskip("transformers")
    from their_models import exact_llama, make_ternary_floats
    from transformers import LlamaConfig

    sizes = {"hidden_size": 60, "intermediate_size": 100, "num_attention_heads": 5, "num_hidden_layers": 2}
    pair = make_ternary_floats(tmp_path / "a", 0, 0, torch.float16, config_class=LlamaConfig, **sizes)
    config = pair.ours.config
    assert (config.activation_bits, config.group_size, config.qk_norm) == (16, 0, False)
    ids = torch.randint(97, (4, 30))
    exact, rounded = exact_llama(pair.theirs, ids), exact_llama(pair.theirs, ids, reference.LARGEST_Q[16])
    limit = 2 * (rounded - exact).abs().mean()
    assert limit < 1e-3 * exact.abs().max()
    assert (pair.ours(ids) - exact).abs().mean() <= limit
    pair.ours.save_pretrained(tmp_path / "b")
    assert torch.equal(from_pretrained(tmp_path / "b")(ids), pair.ours(ids))


def test_scales_of_a_model_that_was_trained_in_parts(tmp_path: Path) -> None:
    """Each has a scale of its own: parts of rows in most projections, of inputs in o_proj and down_proj."""

    def rows(x: Tensor) -> Tensor:
        return x.sign() * torch.tensor([0.5, 0.25]).half().repeat_interleave(len(x) // 2).unsqueeze(1)

    def inputs(x: Tensor) -> Tensor:
        x = x.sign()
        x[:, :128] *= 0.5
        return x

    names = {
        f"model.layers.{layer}.mlp.{name}_proj.weight": parts
        for layer in range(2)
        for name, parts in (("up", rows), ("gate", rows), ("down", inputs))
    }
    folder, _ = folder_of(tmp_path, **names)
    model = from_pretrained(folder)
    assert model.config.group_size == 128
    scale = model.model.layers[1].mlp.down_proj.scales()
    assert scale.tolist() == [[0.5] * 130, [1.0] * 130]
    scale = model.model.layers[1].mlp.up_proj.scales()
    assert scale[0].tolist() == [0.5] * 100 + [0.25] * 100


def test_groups_of_zeros(tmp_path: Path) -> None:
    def clear(x: Tensor) -> Tensor:
        x[:, :64] = 0
        return x

    folder, _ = folder_of(tmp_path / "a", 64, **{"model.layers.0.mlp.down_proj.weight": clear})
    model = from_pretrained(folder)
    scale = model.model.layers[0].mlp.down_proj.scales()
    assert not scale[0].any()
    assert scale[1:].all()
    model.save_pretrained(tmp_path / "b")
    ids = torch.arange(6)[None]
    assert torch.equal(from_pretrained(tmp_path / "b")(ids), model(ids))


def test_one_finer_projection_decides(tmp_path: Path) -> None:
    def finer(x: Tensor) -> Tensor:
        x[-1, 64:] *= 2
        return x

    folder, parts = folder_of(tmp_path, 0, **{"model.layers.1.mlp.down_proj.weight": finer})
    model = from_pretrained(folder)
    assert model.config.group_size == 64
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, BitLinear)
    assert layer.scales().shape == (3, 130)
    w, scales = parts[name]
    assert torch.equal(layer.scales(), torch.where(used(w, 64), scales.expand(3, -1), 0.0))


def test_what_is_not_ternary_is_refused(tmp_path: Path) -> None:
    """By name, with an example and what to do."""
    name = "model.layers.1.self_attn.k_proj.weight"

    def spoil(x: Tensor) -> Tensor:
        x[7, 66] = 0.0456
        x[7, 65] = 0.0123
        return x

    folder, _ = folder_of(tmp_path, **{name: spoil})
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    assert "model.safetensors" in message
    assert f"'{name}'" in message
    assert "expected weights -s, 0 or s with one s for each 64, 128 or 256 inputs of a row, got " in message
    assert re.search(r"got \S+ and \S+ in row 7; .* loads with linear=torch.nn.Linear", message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_strange_numbers_are_refused(tmp_path: Path, value: float) -> None:
    def spoil(x: Tensor) -> Tensor:
        x[0, 3] = value
        return x

    folder, _ = folder_of(tmp_path, **{"model.layers.0.mlp.gate_proj.weight": spoil})
    with pytest.raises(CheckpointError, match=f"gate_proj.weight.* got {value} in row 0"):
        from_pretrained(folder)


def test_a_missing_or_a_wrong_tensor(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    folder, _ = folder_of(tmp_path / "a", **{name: lambda x: x[:, 1:].contiguous()})
    with pytest.raises(CheckpointError, match=r"gate_proj.weight.* \[200, 130\], got F16 \[200, 129\]"):
        from_pretrained(folder)
    folder, _ = folder_of(tmp_path / "b", **{name: lambda x: x.sign().char()})
    with pytest.raises(CheckpointError, match=r"gate_proj.weight.* got I8"):
        from_pretrained(folder)


@pytest.mark.parametrize("mmap", [True, False])
def test_rows_of_a_tensor(tmp_path: Path, mmap: bool) -> None:
    """Read alone they are those of the whole."""
    folder, _ = folder_of(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    with TensorFiles(folder, mmap=mmap) as files:
        whole = files.tensor(name)
        assert torch.equal(files.rows(name, 3, 9), whole[3:9])
        assert torch.equal(files.rows(name, 0, 200), whole)
        assert files.rows(name, 5, 5).shape == (0, 130)


def test_a_long_matrix_is_looked_at_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than `CHUNK_BYTES` of float weights are in memory, and the message counts rows of them all."""
    name = "model.layers.1.mlp.gate_proj.weight"

    def spoil(x: Tensor) -> Tensor:
        x[150, 1] = 0.3
        x[150, 2] = 0.2
        return x

    folder, _ = folder_of(tmp_path, **{name: spoil})
    most = 130 * 2 * 40
    monkeypatch.setattr("bitnet_ops.checkpoint.ternary_floats.CHUNK_BYTES", most)
    sizes = []
    rows = TensorFiles.rows

    def spy(self: TensorFiles, *args: Any) -> Tensor:
        x = rows(self, *args)
        sizes.append(x.nbytes)
        return x

    monkeypatch.setattr(TensorFiles, "rows", spy)
    with pytest.raises(CheckpointError, match="in row 150;"):
        from_pretrained(folder)
    assert max(sizes) == most < CHUNK_BYTES
