"""MLX's 2-bit form, packed here by its public formula: the same model as the floats that it stands for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import assert_same_model
from safetensors.torch import load_file, save_file
from test_ternary_floats import random_floats
from torch import Tensor, nn

from bitnet_ops import BitLinear, from_pretrained
from bitnet_ops.checkpoint import CheckpointError

IDS = torch.arange(40).view(2, 20)

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def matrices() -> dict[str, tuple[int, int]]:
    """The sizes of all that is quantised."""
    shapes = {"q_proj": (384, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 384)}
    names = {f"model.layers.0.self_attn.{name}": shape for name, shape in shapes.items()}
    names |= {f"model.layers.0.mlp.{name}_proj": (640, 256) for name in ("gate", "up")}
    return names | {DOWN: (256, 640), "model.embed_tokens": (97, 256), "lm_head": (97, 256)}


def words(codes: Tensor) -> Tensor:
    """Codes [N, K] as uint32 [N, K / 16]: a word is the sum of code[j] * 4^j."""
    powers = 4 ** torch.arange(16, dtype=torch.int64)
    return (codes.long().unflatten(1, (-1, 16)) * powers).sum(-1).to(torch.uint32)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder


def make_pair(
    folder: Path, group: int = 128, dtype: torch.dtype = torch.float16, true_group: int = 128, **changes: Any
) -> tuple[Path, Path]:
    """A folder in MLX's form and one with the floats that it stands for.

    Args:
        folder: where both go.
        group: inputs with a scale of their own in the file.
        dtype: of scales and of floats.
        true_group: inputs with the same scale; 0 for whole rows.
        **changes: fields of config.json.
    """
    generator = torch.Generator().manual_seed(1)
    floats, quantized = {}, {}
    for seed, (name, (n, k)) in enumerate(matrices().items()):
        x, w, scales = random_floats(n, k, true_group, dtype, seed)
        floats[f"{name}.weight"] = x
        stored = scales.to(dtype).repeat_interleave(true_group or k, dim=0)[:k:group].T.contiguous()
        quantized |= {f"{name}.weight": words(w + 1), f"{name}.scales": stored, f"{name}.biases": -stored}
    hidden = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    heads = ("model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm")
    for name, size in {**dict.fromkeys(hidden, 256), **dict.fromkeys(heads, 64)}.items():
        norm = (1 + 0.2 * torch.randn(size, generator=generator)).to(dtype)
        floats[f"{name}.weight"] = quantized[f"{name}.weight"] = norm
    settings = {"group_size": group, "bits": 2}
    config = CONFIG | {"quantization": settings, "quantization_config": settings} | changes
    return write(folder / "mlx", config, quantized), write(folder / "floats", CONFIG, floats)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid folder, for a test to spoil."""
    return make_pair(tmp_path)[0]


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


def change_config(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    for part in parts:
        assert part in str(caught.value)


def test_the_words_of_the_test() -> None:
    """The first code is in the lowest bits of the first word, the sixteenth in the highest."""
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, 0], codes[0, 15], codes[0, 17] = 1, 2, 2
    assert words(codes).tolist() == [[1 + 2 * 4**15, 2 * 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "true_group"), [(128, 128), (64, 64), (64, 128), (64, 0), (32, 64)])
def test_it_is_the_model_of_the_floats(
    tmp_path: Path, group: int, true_group: int, dtype: torch.dtype
) -> None:
    """Bit for bit, embedding and head too; the coarsest group is found."""
    mlx, floats = make_pair(tmp_path, group, dtype, true_group)
    model = from_pretrained(mlx)
    assert (model.config.activation_bits, model.config.group_size) == (16, true_group)
    assert model.config.ternary_embedding
    assert model.config.ternary_head
    assert_same_model(model, from_pretrained(floats), IDS)
    assert_same_model(from_pretrained(mlx, mmap=True), model, IDS)
    model.save_pretrained(tmp_path / "packed")
    assert_same_model(from_pretrained(tmp_path / "packed"), model, IDS)


def test_float_projections(tmp_path: Path) -> None:
    mlx, floats = make_pair(tmp_path, 32, torch.float16, 32)
    model = from_pretrained(mlx, linear=nn.Linear)
    assert_same_model(model, from_pretrained(floats, linear=nn.Linear), IDS)


def test_only_one_of_the_two_settings(tmp_path: Path) -> None:
    mlx, floats = make_pair(tmp_path)
    expected = from_pretrained(floats)
    for name in ("quantization", "quantization_config"):
        settings = {"group_size": 128, "bits": 2, "mode": "affine", "lm_head": {"group_size": 128, "bits": 2}}
        change_config(mlx, **({"quantization": None, "quantization_config": None} | {name: settings}))
        assert_same_model(from_pretrained(mlx), expected, IDS)


def test_embedding_and_head_in_floats(tmp_path: Path) -> None:
    """A module without scales is not quantised."""
    mlx, floats = make_pair(tmp_path)
    names = ("model.embed_tokens", "lm_head")
    tables = {f"{name}.weight": torch.randn(97, 256).half() for name in names}

    def unquantize(tensors: dict[str, Tensor]) -> None:
        tensors.update(tables)
        for name in names:
            del tensors[f"{name}.scales"], tensors[f"{name}.biases"]

    change_tensors(mlx, unquantize)
    change_tensors(floats, lambda tensors: tensors.update(tables))
    change_config(
        mlx, quantization={"group_size": 128, "bits": 2, "model.embed_tokens": False, "lm_head": False}
    )
    assert_same_model(from_pretrained(mlx), from_pretrained(floats), IDS)


def test_a_group_with_the_scale_0(folder: Path) -> None:
    """Its weights are 0 whatever its codes, also where the whole row gets another scale."""

    def one_scale(tensors: dict[str, Tensor]) -> None:
        for name in matrices():
            tensors[f"{name}.scales"].fill_(0.5)
            tensors[f"{name}.biases"].fill_(-0.5)
        tensors[f"{Q}.scales"][7, 1] = 0
        tensors[f"{Q}.biases"][7, 1] = 0

    change_tensors(folder, one_scale)
    model = from_pretrained(folder)
    assert model.config.group_size == 0
    layer = model.get_submodule(Q)
    assert isinstance(layer, BitLinear)
    w = layer.unpack()
    assert not w[7, 128:].any()
    assert w[7, :128].any()
    assert (layer.weight_scale == 0.5).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group_size": 128, "bits": 4}, ["quantization.bits", "expected 2", "not ternary", "got 4"]),
        ({"group_size": 128, "bits": True}, ["quantization.bits"]),
        ({"group_size": 128, "bits": 2, "mode": "mxfp4"}, ["quantization.mode", "'affine'", "'mxfp4'"]),
        ({"group_size": 16, "bits": 2}, ["quantization.group_size", "got 16"]),
        ({"group_size": "128", "bits": 2}, ["quantization.group_size"]),
        ({"bits": 2}, ["quantization.group_size", "got None"]),
        ({"group_size": 128, "bits": 2, "lm_head": {"bits": 6}}, ["['lm_head'].bits", "got 6"]),
        (
            {"group_size": 128, "bits": 2, "lm_head": {"bits": 2, "group_size": 64}},
            ["['lm_head'].group_size"],
        ),
    ],
    ids=str,
)
def test_other_settings_are_refused(folder: Path, settings: dict[str, Any], words: list[str]) -> None:
    change_config(folder, quantization=settings)
    assert_refused(folder, "config.json", "expected", *words)


def test_group_sizes_that_the_kernels_have_not(tmp_path: Path) -> None:
    """32 inputs with a scale of their own."""
    mlx, _ = make_pair(tmp_path, 32, torch.float16, 32)
    assert_refused(mlx, f"{Q}.scales", "64, 128 or 256", "one for 32")


@pytest.mark.parametrize("name", [Q, DOWN, "model.embed_tokens", "lm_head"])
def test_code_3_is_refused(folder: Path, name: str) -> None:
    """Anywhere in a word."""
    n, k = matrices()[name]
    for row, column in ((0, 0), (n - 1, k - 1)):
        spoilt = folder.parent / f"{row}"
        tensors = load_file(folder / "model.safetensors")
        word = tensors[f"{name}.weight"].view(torch.int32)
        shift = 2 * (column % 16)
        bits = 3 << shift
        word[row, column // 16] |= bits - 2**32 if bits >= 2**31 else bits
        write(spoilt, json.loads((folder / "config.json").read_text()), tensors)
        assert_refused(spoilt, f"{name}.weight", f"a code 3 in byte {(row * k + column) // 4} ")


@pytest.mark.parametrize("name", [Q, "model.embed_tokens"])
@pytest.mark.parametrize(
    ("tensor", "value", "words"),
    [
        ("biases", -0.25, ["minus the scale", "-0.25 beside ", "row 5, group 1"]),
        ("biases", torch.nan, ["minus the scale", "nan beside "]),
        ("scales", -0.25, ["at least 0", "-0.25 in row 5, group 1"]),
        ("scales", torch.inf, ["finite", "inf in row 5, group 1"]),
    ],
)
def test_what_is_not_ternary_is_refused(
    folder: Path, name: str, tensor: str, value: float, words: list[str]
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.{tensor}"][5, 1] = value

    change_tensors(folder, spoil)
    assert_refused(folder, "model.safetensors", f"{name}.{tensor}", *words)


@pytest.mark.parametrize("name", [Q, "lm_head"])
@pytest.mark.parametrize("ending", ["weight", "scales", "biases"])
def test_missing_and_misshapen_tensors(folder: Path, name: str, ending: str) -> None:
    tensor = f"{name}.{ending}"
    whole = load_file(folder / "model.safetensors")
    for change in (
        lambda tensors: tensors.pop(tensor),
        lambda tensors: tensors.update({tensor: whole[tensor][1:].contiguous()}),
        lambda tensors: tensors.update({tensor: whole[tensor].view(torch.int16).contiguous()}),
    ):
        change_tensors(folder, change)
        with pytest.raises(CheckpointError, match=f"{name}.*expected .* got"):
            from_pretrained(folder)
        save_file(whole, folder / "model.safetensors")


def test_inputs_that_the_group_does_not_divide(folder: Path) -> None:
    change_config(folder, hidden_size=200)
    assert_refused(folder, "group_size = 128 divides", "200")
