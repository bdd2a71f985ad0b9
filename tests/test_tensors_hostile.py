"""Tensors that are missing, of other shapes or dtypes, or hold what a format forbids: an error names them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_checkpoints import (
    EMBEDDING,
    NORM,
    UP,
    assert_refused,
    change_config,
    change_tensors,
)
from tiny_checkpoints import (
    Sizes,
    Weights,
    write_folder,
)
from torch import Tensor

from bitnet_ops import from_pretrained, packing, repack


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(f"{UP}.weight"))
    assert_refused(folder, "model.safetensors", f"{UP}.weight", "U8 [9, 24]", "no such tensor")


def test_a_missing_scale_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    assert_refused(folder, "model.safetensors", f"{UP}.weight_scale", "no such tensor")


def test_a_missing_head_is_named(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    assert_refused(folder, "model.safetensors", "lm_head.weight", "no such tensor")


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(36)}))
    assert_refused(folder, "model.safetensors", f"{UP}.bias", "only the")


def test_a_layer_too_many(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    assert_refused(folder, "model.safetensors", "model.layers.1.", "only the")


def test_a_layer_too_few(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    assert_refused(folder, "config.json", "num_hidden_layers", "model.layers.2")


def test_a_second_head_that_differs(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": -tensors[EMBEDDING]}))
    assert_refused(folder, "model.safetensors", "lm_head.weight")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{UP}.weight", torch.zeros(36, 24, dtype=torch.uint8)),
        (f"{UP}.weight", torch.zeros(24, 9, dtype=torch.uint8)),
        (f"{UP}.weight", torch.zeros(216, dtype=torch.uint8)),
        (f"{UP}.weight", torch.zeros(9, 24, dtype=torch.int8)),
        (f"{UP}.weight", torch.zeros(9, 24)),
        (f"{UP}.weight", torch.zeros(0, 24, dtype=torch.uint8)),
        (f"{UP}.weight_scale", torch.ones(2)),
        (f"{UP}.weight_scale", torch.ones(1, dtype=torch.int32)),
        (f"{UP}.weight_scale", torch.ones(1, dtype=torch.float64)),
        (f"{UP}.weight_scale", torch.ones(0)),
        (NORM, torch.ones(23)),
        (NORM, torch.ones(24, dtype=torch.int64)),
        (NORM, torch.ones(24, 1)),
        (EMBEDDING, torch.ones(60, 24)),
        (EMBEDDING, torch.ones(61, 24, dtype=torch.float64)),
        (EMBEDDING, torch.ones(61, 24, dtype=torch.uint8)),
    ],
    ids=lambda value: (
        value.rsplit(".", 2)[-1] if isinstance(value, str) else f"{value.dtype} {list(value.shape)}"
    ),
)
def test_wrong_shapes_and_dtypes(folder: Path, name: str, tensor: Tensor) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    assert_refused(folder, "model.safetensors", name, "expected", str(list(tensor.shape)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0])
def test_impossible_scales(folder: Path, value: float) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight_scale": torch.tensor([value])}))
    assert_refused(folder, "model.safetensors", f"{UP}.weight_scale", "above 0", str(value))


def test_a_reciprocal_scale_that_overflows(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitnet", "linear_class": "bitlinear"})
    change_tensors(folder, lambda tensors: tensors.update({f"{UP}.weight_scale": torch.tensor([1e-40])}))
    assert_refused(folder, "model.safetensors", f"{UP}.weight_scale", "reciprocal")


def test_a_row_scale_of_ours_that_is_impossible(ours: Path) -> None:
    change_tensors(ours, lambda tensors: tensors[f"{UP}.weight_scale"][35:].fill_(float("nan")))
    assert_refused(ours, "model.safetensors", f"{UP}.weight_scale")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [NORM, EMBEDDING])
def test_floats_that_are_none(folder: Path, name: str, value: float) -> None:
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert_refused(folder, "model.safetensors", name, "finite")


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{Q}.bias", torch.ones(35)),
        (f"{Q}.bias", torch.ones(36, dtype=torch.int64)),
        (f"{Q}.bias", torch.full((36,), torch.nan)),
        (f"{Q}.rms_norm.weight", torch.ones(36)),
        (f"{Q}.rms_norm.weight", torch.full((24,), torch.inf)),
        (f"{Q}.norm.weight", torch.ones(24)),
        (f"{Q}.linear.weight", torch.zeros(9, 24, dtype=torch.uint8)),
        (f"{Q}.weight", torch.zeros(6, 24, dtype=torch.uint8)),  # hidden / heads instead of head_dim
        (f"{Q}.weight", torch.zeros(36, 24)),  # "bitlinear" is packed always
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype} {list(value.shape)}",
)
def test_tensors_of_a_llama(llama: Path, name: str, tensor: Tensor) -> None:
    change_tensors(llama, lambda tensors: tensors.update({name: tensor}))
    assert_refused(llama, "model.safetensors", name, "expected", "got")


@pytest.mark.parametrize("name", [f"{Q}.bias", f"{Q}.rms_norm.weight", f"{Q}.weight_scale"])
def test_a_missing_tensor_of_a_llama(llama: Path, name: str) -> None:
    change_tensors(llama, lambda tensors: tensors.pop(name))
    assert_refused(llama, "model.safetensors", name, "no such tensor")


def test_a_bias_that_overflows_with_its_scale(llama: Path) -> None:
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "use_rms_norm": True}
    change_config(llama, quantization_config=quantization)
    from_pretrained(llama)
    change_tensors(
        llama,
        lambda tensors: tensors.update(
            {f"{Q}.bias": torch.full((36,), 1e38), f"{Q}.weight_scale": torch.tensor([100.0])}
        ),
    )
    assert_refused(llama, "model.safetensors", f"{Q}.bias", "finite numbers")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{Q}.linear.bias", torch.ones(35)),
        (f"{Q}.linear.bias", torch.full((36,), torch.nan)),
        (f"{Q}.linear.weight_scale", torch.ones(1, 36)),
        (f"{Q}.norm.weight", torch.full((24,), torch.nan)),
        (f"{Q}.rms_norm.weight", torch.ones(24)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype} {list(value.shape)}",
)
def test_tensors_of_our_llama(our_llama: Path, name: str, tensor: Tensor) -> None:
    change_tensors(our_llama, lambda tensors: tensors.update({name: tensor}))
    assert_refused(our_llama, "model.safetensors", name, "expected", "got")


def test_group_scales_in_our_own_format(our_llama: Path) -> None:
    """Groups of 64 inputs: one for 24 inputs, and for 36. A scale of 0 is that of a group of zeros."""
    fields = json.loads((our_llama / "config.json").read_text())["quantization_config"]
    change_config(our_llama, quantization_config=fields | {"group_size": 64})
    assert_refused(our_llama, "model.safetensors", "weight_scale", "[1, 36]")

    def group(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name][None].clone()

    change_tensors(our_llama, group)
    assert from_pretrained(our_llama).config.group_size == 64
    change_tensors(our_llama, lambda tensors: tensors[f"{Q}.linear.weight_scale"][0, 3:4].fill_(0.0))
    from_pretrained(our_llama)
    change_tensors(our_llama, lambda tensors: tensors[f"{Q}.linear.weight_scale"][0, 3:4].fill_(-1.0))
    assert_refused(our_llama, "model.safetensors", f"{Q}.linear.weight_scale")


def test_group_scales_have_one_layout(our_llama: Path) -> None:
    """Row has the same shape for 36 x 24 as for no other layout, so the shape alone is right."""
    fields = json.loads((our_llama / "config.json").read_text())["quantization_config"]
    change_config(
        our_llama, quantization_config=fields | {"group_size": 64, "layouts": {f"{Q}.linear": "row"}}
    )

    def group(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name][None].clone()
        tensors[f"{Q}.linear.packed_weight"] = torch.full((36, 1, 64), 0b01010101, dtype=torch.uint8)

    change_tensors(our_llama, group)
    assert_refused(our_llama, "model.safetensors", f"{Q}.linear.packed_weight", "'tile16'", "'row'")


@pytest.mark.parametrize("place", range(4))
def test_code_3_in_published_weights(folder: Path, place: int) -> None:
    change_tensors(folder, lambda tensors: tensors[f"{UP}.weight"][8, 23:].bitwise_or_(3 << 2 * place))
    assert_refused(folder, "model.safetensors", f"{UP}.weight", "code 3", "byte 215")


@pytest.mark.parametrize("place", range(4))
def test_code_3_in_our_weights(ours: Path, place: int) -> None:
    change_tensors(
        ours, lambda tensors: tensors[f"{UP}.packed_weight"][1, 1, 5:6].bitwise_or_(3 << 2 * place)
    )
    assert_refused(ours, "model.safetensors", f"{UP}.packed_weight", "code 3", f"byte {3 * 64 + 5}")


@pytest.mark.parametrize(
    "index", [(2, 0, 16), (2, 1, 63), (0, 1, 0)], ids=["row 36 of 36", "last row", "column 24 of 24"]
)
def test_padding_of_our_weights_that_is_not_zero(ours: Path, index: tuple[int, int, int]) -> None:
    """up_proj is 36 x 24: rows 4 to 15 of the third tile, inputs 8 to 15 of the second block are padding."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        packed = tensors[f"{UP}.packed_weight"]
        packed[index] = int(packed[index]) & 0b00111111 | 0b10000000  # p = 3: inputs 12 to 15 of the block

    change_tensors(ours, spoil)
    assert_refused(ours, "model.safetensors", f"{UP}.packed_weight", "padding")


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_padding_of_every_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    """Weights of 1 in all of the padding, as large as the layout makes it."""
    repack(from_pretrained(folder), layout).save_pretrained(tmp_path / "ours")
    name = f"{UP}.packed_weight"

    def spoil(tensors: dict[str, Tensor], rows: int, columns: int) -> None:
        padded = packing.padded_size(36, 24, layout)
        w = torch.ones(padded, dtype=torch.int8)
        w[:rows, :columns] = packing.unpack(tensors[name], *padded, layout)[:rows, :columns]
        tensors[name] = packing.pack(w, layout)

    change_tensors(tmp_path / "ours", lambda tensors: spoil(tensors, *packing.padded_size(36, 24, layout)))
    from_pretrained(tmp_path / "ours")  # nothing but the weights again
    rows, columns = packing.padded_size(36, 24, layout)
    if rows > 36:
        change_tensors(tmp_path / "ours", lambda tensors: spoil(tensors, 36, columns))
        assert_refused(tmp_path / "ours", "model.safetensors", name, "padding")
    if columns > 24:
        change_tensors(tmp_path / "ours", lambda tensors: spoil(tensors, rows, 24))
        assert_refused(tmp_path / "ours", "model.safetensors", name, "padding")


def test_bytes_that_are_no_codes_in_base_3(folder: Path, tmp_path: Path) -> None:
    repack(from_pretrained(folder), "tile16_base3").save_pretrained(tmp_path / "ours")
    name = f"{UP}.packed_weight"
    change_tensors(tmp_path / "ours", lambda tensors: tensors[name][1, 1, 5:6].fill_(243))
    assert_refused(tmp_path / "ours", "model.safetensors", name, "at most 242", "got 243")


@pytest.mark.parametrize("layouts", [{UP: "tile17"}, {UP: None}, [UP], "row"], ids=str)
def test_layouts_have_to_be_known(ours: Path, layouts: Any) -> None:
    quantization = {"quant_method": "bitnet_ops", "layout": "tile16", "layouts": layouts}
    change_config(ours, quantization_config=quantization)
    assert_refused(ours, "config.json", "quantization_config.layouts")


def test_a_layout_that_is_not_that_of_the_file(ours: Path) -> None:
    quantization = {"quant_method": "bitnet_ops", "layout": "tile16", "layouts": {UP: "row"}}
    change_config(ours, quantization_config=quantization)
    assert_refused(ours, "model.safetensors", f"{UP}.packed_weight", "expected U8")


def test_our_layout_has_to_be_known(ours: Path) -> None:
    change_config(ours, quantization_config={"quant_method": "bitnet_ops", "layout": "tile17"})
    assert_refused(ours, "config.json", "quantization_config.layout", "tile17")


def test_floats_with_a_scale_have_to_be_ternary(folder: Path) -> None:
    for value in (0.5, 2.0, 300.0, float("nan")):
        weight = torch.ones(36, 24)
        weight[35, 23] = value
        change_tensors(folder, lambda tensors, weight=weight: tensors.update({f"{UP}.weight": weight}))
        assert_refused(folder, "model.safetensors", f"{UP}.weight", "{-1, 0, 1}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_master_weights_have_to_be_finite(tmp_path: Path, value: float) -> None:
    sizes = Sizes()
    weights = Weights.random(sizes)
    tensors = weights.floats | {f"{name}.weight": w.float() for name, w in weights.ternary.items()}
    tensors[f"{UP}.weight"][0, :8] = value  # eight times 3e38 is above the largest float32
    folder = write_folder(tmp_path, sizes.config(quantization_config=None), tensors)
    assert_refused(folder, "model.safetensors", f"{UP}.weight", "finite")


def test_packed_weights_where_the_config_speaks_of_master_weights(folder: Path) -> None:
    change_config(folder, quantization_config=None)
    assert_refused(folder, "model.safetensors", ".weight", "F32", "U8 [6, 24]")


def test_rows_that_the_published_packing_cannot_hold(folder: Path) -> None:
    change_config(folder, intermediate_size=34)
    assert_refused(folder, "gate_proj.weight", "34")
