"""1bitLLM's models against what is published of them (public_models.py): no library has them any more.

Projection by projection both get the same float32 input and are compared with a bound on what rounding can
do (test_parity_transformers.py). End to end both are compared with float64: our mean error, pooled over
seeds, is at most twice that of the published arithmetic in float32.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import assert_plan_is_the_modules, assert_same_bits_everywhere, assert_same_model
from public_models import PublicModel
from tiny_checkpoints import Sizes, Weights, published_tensors, write_folder
from torch import Tensor

pytest.importorskip("transformers")  # for the bounds' module
from their_models import assert_within, linear_bound, median_error

from bitnet_ops import BitLinear, BitNet, DecoderConfig, KVCache, from_pretrained
from bitnet_ops.checkpoint import CheckpointError

# Fields of 1bitLLM/bitnet_b1_58-xl, and sizes that no tile divides.
XL: dict[str, Any] = {
    "architectures": ["BitnetForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 60,
    "initializer_range": 0.02,
    "input_bits": 8,
    "intermediate_size": 91,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "num_key_value_heads": 5,
    "pad_token_id": 90,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 97,
    "weight_bits": 1,
}

LENGTH = 20


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PublicModel:
    """Float masters, and the frequencies that the published files hold beside them."""

    def masters(n: int, k: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, k, generator=generator) * k**-0.5

    sub_norms = ("self_attn.inner_attn_ln", "mlp.ffn_layernorm")
    model = PublicModel.random(XL | changes, seed, masters, sub_norms)
    size = model.data["hidden_size"] // model.data["num_attention_heads"]
    for layer in range(model.data["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        model.tensors[name] = 10000.0 ** (-torch.arange(0, size, 2) / size)
    model.tensors = {name: tensor.to(dtype) for name, tensor in model.tensors.items()}
    return model


def load(folder: Path, theirs: PublicModel) -> BitNet:
    return from_pretrained(write_folder(folder, theirs.data, theirs.tensors))


@pytest.fixture
def theirs() -> PublicModel:
    return random_model()


@pytest.fixture
def ours(tmp_path: Path, theirs: PublicModel) -> BitNet:
    return load(tmp_path / "published", theirs)


def prompts(count: int, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(97, (count, length), generator=torch.Generator().manual_seed(seed))


def test_the_config(ours: BitNet) -> None:
    assert ours.config == DecoderConfig(
        vocab_size=97,
        hidden_size=60,
        intermediate_size=91,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        activation="silu",
        sub_norms=True,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=90,
    )


@pytest.mark.parametrize(
    "absent",
    [(), ("architectures",), ("weight_bits", "input_bits"), ("model_type",), ("weight_bits",)],
    ids=str,
)
def test_any_sign_of_the_family_is_enough(
    tmp_path: Path, theirs: PublicModel, absent: tuple[str, ...]
) -> None:
    fields = {name: value for name, value in theirs.data.items() if name not in absent}
    assert from_pretrained(write_folder(tmp_path, fields, theirs.tensors)).config.sub_norms


def test_a_plain_llama_is_none(tmp_path: Path) -> None:
    sizes = Sizes(llama=True)
    tensors = published_tensors(Weights.random(sizes), reciprocal=True)
    assert not from_pretrained(write_folder(tmp_path, sizes.config(), tensors)).config.sub_norms


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("weight_bits", 2, "1"),
        ("weight_bits", True, "1"),
        ("input_bits", 16, "8"),
        ("input_bits", None, "8"),
        ("attention_bias", True, "False or None"),
        ("hidden_act", "relu2", "'silu'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "'default'"),
    ],
)
def test_what_its_code_does_not_do_is_refused(
    tmp_path: Path, theirs: PublicModel, field: str, value: Any, expected: str
) -> None:
    folder = write_folder(tmp_path, theirs.data | {field: value}, theirs.tensors)
    with pytest.raises(CheckpointError, match=f"config.json: {field}.*: expected {expected}.*, got"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["self_attn.inner_attn_ln", "mlp.ffn_layernorm"])
def test_a_missing_norm_is_named_as_in_the_file(tmp_path: Path, theirs: PublicModel, name: str) -> None:
    del theirs.tensors[f"model.layers.1.{name}.weight"]
    with pytest.raises(
        CheckpointError, match=rf"tensor 'model\.layers\.1\.{name}\.weight': .* no such tensor"
    ):
        load(tmp_path, theirs)


def test_other_tensors_are_still_unexpected(tmp_path: Path, theirs: PublicModel) -> None:
    theirs.tensors["model.layers.0.self_attn.rotary_emb.other"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"rotary_emb\.other': expected only the"):
        load(tmp_path, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_rounded_as_published(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = random_model(dtype=dtype)
    for name, module in load(tmp_path, theirs).named_modules():
        if isinstance(module, BitLinear):
            codes, s = theirs.quantized(name)
            assert torch.equal(module.unpack(), codes.to(torch.int8)), name
            # 1 / (1 / mean): a reciprocal rounds by half an ulp, twice.
            assert_within(module.weight_scale, 1 / s, 2**-23 / s.double(), name)


def test_projections(ours: BitNet, theirs: PublicModel) -> None:
    for name, module in ours.named_modules():
        if isinstance(module, BitLinear):
            x = torch.randn(7, module.in_features) * torch.logspace(-2, 2, 7)[:, None]
            bound = linear_bound(x, module)
            expected = theirs.linear(x, name)
            assert bound.max() < 1e-3 * expected.abs().max(), "the bound proves nothing"
            assert_within(module(x), expected, bound, name)


def pooled(tmp_path: Path, changes: dict[str, Any], seeds: int, count: int) -> tuple[float, float, float]:
    """Mean errors of ours and of the published arithmetic, and the largest logit."""
    mine, published, largest = [], [], 0.0
    for seed in range(seeds):
        theirs = random_model(seed, **changes)
        ids = prompts(count, seed=seed)
        exact = theirs.logits(ids, torch.float64)
        mine.append((load(tmp_path / str(seed), theirs)(ids) - exact).abs().mean())
        published.append((theirs.logits(ids, torch.float32) - exact).abs().mean())
        largest = max(largest, exact.abs().max().item())
    return float(torch.stack(mine).mean()), float(torch.stack(published).mean()), largest


SHAPES = {
    "xl": {},
    "shared heads": {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6,
                     "num_key_value_heads": 2, "rms_norm_eps": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_end_to_end_without_flips(tmp_path: Path, shape: str) -> None:
    """In short texts the median sequence has no flipped activation: there both differ by rounding."""
    theirs = random_model(**SHAPES[shape])
    ours = load(tmp_path, theirs)
    ids = prompts(15)
    exact = theirs.logits(ids, torch.float64)
    limit = 2 * median_error(theirs.logits(ids, torch.float32), exact)
    assert limit < 1e-5 * exact.abs().max(), "most sequences have a flip"
    assert median_error(ours(ids), exact) <= limit
    cache = KVCache(ours.config, len(ids), LENGTH)
    steps = [ours(piece, cache=cache) for piece in ids.split([5, 1, 14], dim=1)]
    assert median_error(torch.cat(steps, dim=1), exact) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_end_to_end(tmp_path: Path, shape: str) -> None:
    """Flips make the mean errors, so that few models prove nothing."""
    mine, published, largest = pooled(tmp_path, SHAPES[shape] | {"num_hidden_layers": 4}, seeds=8, count=30)
    print(f"{shape}: ours {mine:.4g}, published {published:.4g}, largest logit {largest:.4g}")
    assert published < 0.02 * largest, "the float64 model is not the same model"
    assert mine <= 2 * published


def test_a_packed_folder(ours: BitNet, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path / "packed")
    assert_same_model(from_pretrained(tmp_path / "packed"), ours, prompts(2))
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert fields["decoder_config"] == {"sub_norms": True}


def test_the_same_bits_everywhere(ours: BitNet, isa: str, threads: None) -> None:
    assert_same_bits_everywhere(ours, prompts(3))


def test_the_plan_is_the_modules(ours: BitNet) -> None:
    assert_plan_is_the_modules(ours, prompts(2))


def test_dense_projections_are_the_masters(tmp_path: Path, theirs: PublicModel) -> None:
    dense = from_pretrained(write_folder(tmp_path, theirs.data, theirs.tensors), linear=torch.nn.Linear)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(dense.get_submodule(name).weight, theirs.tensors[f"{name}.weight"])
