"""GGUF files that we write: read by the gguf package, by formulas written out here, and by us, all exact."""

import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from random_models import FAMILIES, SIZES, random_model, with_tokenizer
from tiny_checkpoints import tiny_folder
from torch import Tensor

from bitnet_ops import BitLinear, BitNet, DecoderConfig, RopeScaling, from_pretrained, save_gguf
from bitnet_ops.checkpoint.gguf import export
from bitnet_ops.checkpoint.gguf.header import GgufFile
from bitnet_ops.checkpoint.gguf.types import types_of
from bitnet_ops.checkpoint.gguf.write import TensorToWrite, write_gguf
from bitnet_ops.cli.main import commands
from bitnet_ops.decoder.pooling import EmbeddingSettings

gguf = pytest.importorskip("gguf")

F32, TQ2_0 = types_of(0)[0], types_of(35)[0]
TYPES = ("i2_s", "tq1_0", "tq2_0", "q2_0")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Models are so small that threads would wait for one another."""
    torch.set_num_threads(1)


def assert_same_model(ours: BitNet, again: BitNet) -> None:
    """The same settings but for what only training needs, and the same numbers."""
    for name, value in vars(ours.config).items():
        if name not in ("dropout", "initializer_range"):
            assert getattr(again.config, name) == value, name
    expected, given = ours.state_dict(), again.state_dict()
    assert expected.keys() == given.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, given[name]), name


def assert_same_results(ours: BitNet, again: BitNet) -> None:
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(ids), again(ids))
    text = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids[:1, :5], **text), again.generate(ids[:1, :5], **text))


# The header


def test_values_of_metadata_are_read_by_the_gguf_package(tmp_path: Path) -> None:
    values = {
        "general.architecture": "llama",
        "a.bool": True,
        "a.u32": 2**32 - 1,
        "a.u64": 2**40,
        "an.i32": -5,
        "an.f32": 0.1,
        "a.text": "naïve 你好",
        "ints": [1, -2, 3],
        "floats": [0.5, -1.25],
        "texts": ["a", "", "🙂"],
        "bools": [True, False],
        "scales": torch.tensor([0.5, 3.0]),
    }
    write_gguf(tmp_path / "a.gguf", values, [])
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value in values.items():
        given = reader.fields[key].contents()
        expected = value.tolist() if isinstance(value, Tensor) else value
        assert given == (struct.unpack("f", struct.pack("f", 0.1))[0] if key == "an.f32" else expected), key
    names = {key: [kind.name for kind in reader.fields[key].types] for key in values}
    assert names["a.u32"] == ["UINT32"]
    assert names["an.i32"] == ["INT32"]
    assert names["an.f32"] == ["FLOAT32"]
    assert names["ints"] == ["ARRAY", "INT32"]
    assert names["scales"] == ["ARRAY", "FLOAT32"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, "a"], "elements of one type"),
        ([2**64], "out of the range of its type"),
        ([-1, 2**31], "out of the range of its type|elements of one type"),
        (1e300, "too large"),
        (None, "got NoneType"),
        ("\ud800", "surrogates"),
        (torch.zeros(2, 2), r"float32 or int32 \[n\]"),
    ],
)
def test_values_that_gguf_does_not_have(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"metadata 'key': .*({message})"):
        write_gguf(tmp_path / "a.gguf", {"key": value}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("",), ("a" * 64,), ("a", "a")])
def test_names_that_ggml_does_not_have(tmp_path: Path, names: tuple[str, ...]) -> None:
    tensors = [TensorToWrite(name, F32, (1,), torch.zeros(4, dtype=torch.uint8)) for name in names]
    with pytest.raises(ValueError, match="expected a name of 1 to 63 bytes, and once only"):
        write_gguf(tmp_path / "a.gguf", {}, tensors)


def test_tensors_are_aligned_and_made_when_their_turn_comes(tmp_path: Path) -> None:
    alive: list[int] = []

    def make(number: int) -> Tensor:
        alive.append(number)
        return torch.full((number,), float(number)).view(torch.uint8)

    tensors = [
        TensorToWrite(f"t{number}", F32, (number,), lambda number=number: make(number))  # type: ignore[misc]
        for number in (3, 1, 17)
    ]
    write_gguf(tmp_path / "new" / "a.gguf", {}, tensors)
    assert alive == [3, 1, 17]
    reader = gguf.GGUFReader(tmp_path / "new" / "a.gguf")
    for tensor, number in zip(reader.tensors, (3, 1, 17), strict=True):
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tolist() == [float(number)] * number
    assert (tmp_path / "new" / "a.gguf").stat().st_size % 32 == 0


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.gguf"
    model = random_model(FAMILIES["qwen3"])
    save_gguf(model, file)
    before = file.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_gguf(model, file)
    model.lm_head.weight[-1, -1] = torch.inf  # found when it is written, behind everything else
    with pytest.raises(ValueError, match="infinity"):
        save_gguf(model, file)
    with monkeypatch.context() as patch:
        patch.setattr(export, "encode", lambda *arguments: torch.zeros(3, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"tensor 'blk.0.attn_q.weight': expected uint8 \[.*\], got"):
            save_gguf(model, file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="expected the name of a file"):
        save_gguf(random_model(FAMILIES["qwen3"]), tmp_path)
    assert not list(tmp_path.iterdir())


# What is in a file


def parse(file: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """The tensors of a file: type, shape, and all bytes up to the next one. Metadata is skipped."""
    data = file.read_bytes()
    at = 8

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values[0]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == 8:
            length = take("Q")
            at += length
        elif kind == 9:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                skip(inner)
        else:
            at += {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)

    assert data[:4] == b"GGUF"
    tensors, keys = take("Q"), take("Q")
    for _ in range(keys):
        skip(8)
        skip(take("I"))
    found = {}
    for _ in range(tensors):
        length = take("Q")
        name = data[at : at + length].decode()
        at += length
        shape = [take("Q") for _ in range(take("I"))]
        found[name] = (take("I"), tuple(reversed(shape)), take("Q"))
    begin = -(-at // 32) * 32
    offsets = sorted(offset for _, _, offset in found.values())
    following = dict(zip(offsets, [*offsets[1:], len(data) - begin], strict=True))
    return {
        name: (kind, shape, data[begin + offset : begin + following[offset]])
        for name, (kind, shape, offset) in found.items()
    }


def by_formula(kind: int, shape: tuple[int, ...], data: bytes) -> Tensor:
    """The weights times scales of I2_S (36) and Q2_0 (42), weight by weight as FORMATS of both say."""
    count = math.prod(shape)
    out = np.empty(count, dtype=np.float32)
    raw = np.frombuffer(data, dtype=np.uint8)
    index = np.arange(count)
    if kind == 36:
        block, place = index // 128, index % 128
        code = raw[32 * block + place % 32] >> (6 - 2 * (place // 32)) & 3
        out = (code.astype(np.float32) - 1) * np.float32(struct.unpack_from("<f", data, count // 4)[0])
    else:
        block, place = index // 64, index % 64
        code = raw[18 * block + 2 + place // 4] >> (2 * (place % 4)) & 3
        scale = np.frombuffer(raw[: len(raw) // 18 * 18].reshape(-1, 18)[:, :2].tobytes(), dtype=np.float16)
        out = (code.astype(np.float32) - 1) * scale[block].astype(np.float32)
    return torch.from_numpy(out).view(shape)


def weights_in(file: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of a file, multiplied out by others than us."""
    if kind in ("tq1_0", "tq2_0"):
        return {
            tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in gguf.GGUFReader(file).tensors
        }
    found = {}
    for name, (number, shape, data) in parse(file).items():
        if number in (36, 42):
            found[name] = by_formula(number, shape, data)
        else:
            dtype = {0: np.float32, 1: np.float16}[number]
            values = np.frombuffer(data, dtype=dtype)[: math.prod(shape)].astype(np.float32)
            found[name] = torch.from_numpy(values).view(shape)
    return found


def permuted(w: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter permutes q and k."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
"""As llama.cpp's converter names modules; those of a gemma3 differ, see `name_of`."""

POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def name_of(module: str, architecture: str) -> str:
    names = NAMES | POST_NORMS if architecture == "gemma3" else NAMES
    if not module.startswith("model.layers."):
        return names[module]
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    if inner.endswith("_proj.norm"):
        return f"blk.{layer}.{names[inner.removesuffix('.norm')]}_norm_in"
    return f"blk.{layer}.{names[inner.removesuffix('.linear')]}"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_others_find_the_weights(tmp_path: Path, architecture: str, kind: str) -> None:
    model = random_model(FAMILIES[architecture], scales="matrix" if kind == "i2_s" else "rows")
    assert save_gguf(model, tmp_path / "a.gguf", type=kind) == kind
    found = weights_in(tmp_path / "a.gguf", kind)
    config = model.config
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            expected = module.unpack() * module.weight_scale[:, None]
        elif list(module.children()) or not list(module.parameters()):
            continue
        else:
            expected = module.weight.float()
        stored = name_of(name, architecture)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        turn = heads.get(stored.partition(".")[2].partition(".")[2], 0) if architecture == "llama" else 0
        assert torch.equal(found.pop(f"{stored}.weight"), permuted(expected, turn) if turn else expected), (
            name
        )
        if isinstance(module, BitLinear) and module.bias is not None:
            bias = permuted(module.bias, turn) if turn else module.bias
            assert torch.equal(found.pop(f"{stored}.bias"), bias), name
    assert set(found) == ({"rope_freqs.weight"} if architecture == "llama" else set())


def test_factors_of_llama_3_are_those_of_the_converter(tmp_path: Path) -> None:
    """The loop of llama.cpp's converter over pairs of a head, in float32."""
    for seed, (dim, base, factor, context) in enumerate(
        ((128, 500000.0, 8.0, 8192), (64, 500000.0, 32.0, 8192), (20, 10000.0, 3.0, 16))
    ):
        config = FAMILIES["llama"].replace(
            num_hidden_layers=1,
            head_dim=dim,
            rope_theta=base,
            rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, context),
        )
        model = random_model(config, scales="matrix", seed=seed)
        save_gguf(model, tmp_path / "a.gguf", type="i2_s")
        expected = []
        for frequency in 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
            wavelength = 2 * math.pi / frequency
            if wavelength < context / 4.0:
                expected.append(torch.tensor(1.0))
            elif wavelength > context / 1.0:
                expected.append(torch.tensor(factor))
            else:
                smooth = (context / wavelength - 1.0) / (4.0 - 1.0)
                expected.append(1 / ((1 - smooth) / factor + smooth))
        assert torch.equal(
            weights_in(tmp_path / "a.gguf", "i2_s")["rope_freqs.weight"], torch.stack(expected)
        )
        assert from_pretrained(tmp_path / "a.gguf").config.rope_scaling == config.rope_scaling


def test_metadata(tmp_path: Path) -> None:
    model = with_tokenizer(random_model(FAMILIES["qwen3"]))
    model.generation_config = {"eos_token_id": [1, 2]}
    save_gguf(model, tmp_path / "a.gguf", name="My model")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    given = {key: field.contents() for key, field in fields.items() if key[:4] not in ("GGUF", "toke")}
    eps = struct.unpack("f", struct.pack("f", 1e-6))[0]
    assert given == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "My model",
        "general.file_type": 37,
        "general.quantization_version": 2,
        "qwen3.vocab_size": 410,
        "qwen3.context_length": 256,
        "qwen3.embedding_length": 256,
        "qwen3.feed_forward_length": 512,
        "qwen3.block_count": 2,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 64,
        "qwen3.attention.value_length": 64,
        "qwen3.attention.layer_norm_rms_epsilon": eps,
        "qwen3.rope.dimension_count": 64,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 64,
        "bitnet_ops.activation_bits": 16,
    }
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 410
    assert fields["tokenizer.chat_template"].contents() == model.chat_template
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "eot", "eom")]
    assert ids == [0, 0, 1, 2]
    again = from_pretrained(tmp_path / "a.gguf")
    assert again.config.eos_token_id == (0, 1, 2)
    assert again.chat_template == model.chat_template
    text = "It is a truth, naïve 你好 🙂"
    assert again.tokenizer is not None
    assert again.tokenizer.encode(text).ids == model.tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q6_k", "bf16", "f32"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads(tmp_path: Path, kind: str, tied: bool) -> None:
    model = random_model(FAMILIES["qwen3"].replace(tie_word_embeddings=tied, num_hidden_layers=1))
    save_gguf(model, tmp_path / "a.gguf", head=kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert ("output.weight" in tensors) is not tied
    for name, weight in (("token_embd", model.model.embed_tokens.weight), ("output", model.head_weight)):
        if f"{name}.weight" not in tensors:
            continue
        tensor = tensors[f"{name}.weight"]
        assert tensor.tensor_type.name == kind.upper()
        stored = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        # Half a step: 2^-11 and 2^-8 of a number; of the largest of 32, 1 / 254 (with a scale in float16).
        # Q6_K has 1 / 64, and searches for scales that are up to twice as coarse.
        bound = {"f32": 0, "f16": 0, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-10, "q6_k": 1 / 31}[kind]
        largest = weight.float().abs().view(-1, 32).amax(1, keepdim=True)
        assert ((stored - weight.float()).view(-1, 32).abs() <= bound * largest + 1e-3 * bound).all()


# Round trips


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_same_model_comes_back(tmp_path: Path, architecture: str, kind: str) -> None:
    model = random_model(FAMILIES[architecture], scales="matrix" if kind == "i2_s" else "rows")
    save_gguf(model, tmp_path / "a.gguf", type=kind)
    again = from_pretrained(tmp_path / "a.gguf")
    assert_same_model(model, again)
    assert_same_results(model, again)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "q2_0"])
@pytest.mark.parametrize(("scales", "size"), [("matrix", 0), ("rows", 0), ("rows", 256)])
def test_scales_that_float16_does_not_hold(tmp_path: Path, kind: str, scales: str, size: int) -> None:
    config = FAMILIES["llama"].replace(group_size=size)
    model = random_model(config, scales=scales, exact=False)
    save_gguf(model, tmp_path / "a.gguf", type=kind)
    assert_same_model(model, from_pretrained(tmp_path / "a.gguf"))
    fields = gguf_fields(tmp_path / "a.gguf")
    groups = 512 // (64 if kind == "q2_0" else 256)
    count = 256 * groups if size else {"matrix": 1, "rows": 256}[scales]
    assert len(fields["bitnet_ops.weight_scale.blk.0.ffn_down.weight"]) == count


def gguf_fields(file: Path) -> dict[str, Any]:
    """The metadata of a file, by our reader: the package opens no file with types that it does not know."""
    with GgufFile(file) as opened:
        return opened.metadata


@pytest.mark.parametrize("size", [64, 128, 256])
def test_groups(tmp_path: Path, size: int) -> None:
    model = random_model(FAMILIES["qwen3"].replace(group_size=size))
    chosen = save_gguf(model, tmp_path / "a.gguf")
    assert chosen == ("tq2_0" if size == 256 else "q2_0")
    assert_same_model(model, from_pretrained(tmp_path / "a.gguf"))
    save_gguf(model, tmp_path / "b.gguf", type="q2_0")
    again = from_pretrained(tmp_path / "b.gguf")
    assert_same_model(model, again)
    assert_same_results(model, again)


def test_odd_sizes(tmp_path: Path) -> None:
    """Blocks of I2_S run over the ends of rows, and Q2_0 has rows of 64 weights."""
    config = FAMILIES["llama"].replace(
        hidden_size=192, intermediate_size=320, num_attention_heads=3, num_key_value_heads=3, head_dim=64
    )
    for kind, sizes in (
        ("q2_0", {}),
        ("i2_s", {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}),
    ):
        model = random_model(config.replace(**sizes), scales="matrix")
        assert save_gguf(model, tmp_path / "a.gguf", type=kind) == kind
        assert_same_model(model, from_pretrained(tmp_path / "a.gguf"))


def test_a_file_replaces_itself(tmp_path: Path) -> None:
    """Its tensors are mapped while it is written."""
    model = random_model(FAMILIES["qwen3"])
    save_gguf(model, tmp_path / "a.gguf")
    save_gguf(from_pretrained(tmp_path / "a.gguf"), tmp_path / "a.gguf")
    assert_same_model(model, from_pretrained(tmp_path / "a.gguf"))


def test_other_factors_of_llama_3(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 4.0, 0.5, 8.0, 32)
    model = random_model(FAMILIES["llama"].replace(rope_scaling=scaling))
    save_gguf(model, tmp_path / "a.gguf")
    assert_same_model(model, from_pretrained(tmp_path / "a.gguf"))


def test_linear_scaling_and_factors(tmp_path: Path) -> None:
    factors = tuple(1.0 + n / 8 for n in range(32))
    for scaling in (RopeScaling("linear", 3.0), RopeScaling("factors", 1.0, factors=factors)):
        model = random_model(FAMILIES["llama"].replace(head_dim=64, rope_scaling=scaling))
        save_gguf(model, tmp_path / "a.gguf")
        assert_same_model(model, from_pretrained(tmp_path / "a.gguf"))


def test_local_layers_of_any_pattern(tmp_path: Path) -> None:
    for layers in ((0, 1, 2, 3, 4), (1, 3)):
        config = FAMILIES["gemma3"].replace(num_hidden_layers=6, local_layers=layers)
        save_gguf(random_model(config, scales="matrix"), tmp_path / "a.gguf", type="tq2_0")
        assert from_pretrained(tmp_path / "a.gguf").config.local_layers == layers
        pattern = gguf_fields(tmp_path / "a.gguf").get("gemma3.attention.sliding_window_pattern")
        assert pattern == (None if len(layers) == 5 else [n in layers for n in range(6)])


def test_how_vectors_are_made(tmp_path: Path) -> None:
    model = with_tokenizer(random_model(FAMILIES["qwen3"]))
    model.embedding_settings = EmbeddingSettings(pooling="mean", eos_token_id=1, prompts={"query": "Find: "})
    save_gguf(model, tmp_path / "a.gguf")
    again = from_pretrained(tmp_path / "a.gguf")
    # The tokenizer appends the token; there is no key for prompts.
    assert again.embedding_settings == EmbeddingSettings(pooling="mean")
    assert again.tokenizer is not None
    assert again.tokenizer.encode("It is").ids[-1] == 1
    texts = ["It is a truth", "a"]
    assert torch.equal(model.embed(texts), again.embed(texts))
    model.embedding_settings = EmbeddingSettings(normalize=False)
    with pytest.raises(ValueError, match=r"no key for embedding_settings\.normalize=False"):
        save_gguf(model, tmp_path / "a.gguf")


# Which type, and what is refused


def test_the_default_type(tmp_path: Path) -> None:
    for architecture, scales, changes, expected in (
        ("bitnet-b1.58", "matrix", {}, "i2_s"),
        ("bitnet-b1.58", "rows", {}, "tq2_0"),
        ("llama", "matrix", {}, "tq2_0"),
        ("qwen3", "rows", {}, "tq2_0"),
        ("qwen3", "rows", {"group_size": 128}, "q2_0"),
        ("qwen3", "rows", {"intermediate_size": 320}, "q2_0"),
        ("llama", "matrix", {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}, "i2_s"),
    ):
        config = FAMILIES[architecture].replace(num_hidden_layers=1, **changes)
        assert save_gguf(random_model(config, scales=scales), tmp_path / "a.gguf") == expected


LLAMA = DecoderConfig(**SIZES)
REFUSED: dict[str, tuple[DecoderConfig, dict[str, Any], str]] = {
    "residual scale": (
        LLAMA.replace(residual_scale=0.5),
        {},
        r"'llama' has no key for residual_scale=0.5; save_pretrained writes any model",
    ),
    "activation": (LLAMA.replace(activation="relu2"), {}, "'llama' has no key for activation='relu2'"),
    "query scale": (LLAMA.replace(query_scale=0.5), {}, "'llama' has no key for query_scale=0.5"),
    "embedding scale": (FAMILIES["gemma3"].replace(embedding_scale=2.0), {}, "for embedding_scale=2.0"),
    "biases": (LLAMA.replace(qk_norm=True, mlp_bias=True), {}, r"'qwen3' has no biases \(only of 'llama'\)"),
    "norms": (
        LLAMA.replace(projection_norms=True),
        {},
        r"'llama' has no projection_norms \(only of 'qwen3' and 'gemma3'\)",
    ),
    "eps of norms": (
        FAMILIES["gemma3"].replace(projection_norm_eps=1e-3),
        {},
        "'gemma3' has no key for projection_norm_eps=0.001",
    ),
    "rope": (
        LLAMA.replace(qk_norm=True, rope_scaling=RopeScaling("llama3", 8.0)),
        {},
        r"'qwen3' has no rope_scaling llama3 \(only of 'llama'\)",
    ),
    "yarn": (
        LLAMA.replace(rope_scaling=RopeScaling("yarn", 8.0, truncate=False)),
        {},
        "'llama' has no key for rope_scaling=",
    ),
    "head": (FAMILIES["bitnet"].replace(tie_word_embeddings=False), {}, "'bitnet' has no head of its own"),
    "rows": (
        LLAMA,
        {"type": "i2_s"},
        r"q_proj: I2_S has one scale for a matrix, and the model has scales of rows; tq1_0 and tq2_0 and "
        r"q2_0 would hold this model",
    ),
    "groups": (
        LLAMA.replace(group_size=64),
        {"type": "tq2_0"},
        r"TQ2_0 has scales of 256 inputs, and the model has scales of groups of 64; q2_0 would hold",
    ),
    "sizes": (
        LLAMA.replace(intermediate_size=320),
        {"type": "tq1_0"},
        r"down_proj: expected a last size that 256 divides.*; q2_0 would hold this model",
    ),
    "all sizes": (LLAMA.replace(intermediate_size=300), {}, "no type holds this model: .*TQ2_0.*Q2_0.*I2_S"),
    "size of head": (
        LLAMA.replace(hidden_size=192, head_dim=64),
        {"head": "q6_k"},
        "head='q6_k': expected a last size that 256 divides",
    ),
    "unknown type": (LLAMA, {"type": "q4_0"}, "type: expected 'i2_s' or .*, got 'q4_0'"),
    "unknown head": (LLAMA, {"head": "q4_0"}, "head: expected 'f16' or .*, got 'q4_0'"),
    "ends": (LLAMA.replace(eos_token_id=(0, 1, 2, 3)), {}, "keys for 3 ids that end a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_say(tmp_path: Path, case: str) -> None:
    config, options, message = REFUSED[case]
    model = random_model(config.replace(num_hidden_layers=1, local_layers=(0,) if config.window else ()))
    with pytest.raises(ValueError, match=f"^save_gguf: .*{message}"):
        save_gguf(model, tmp_path / "a.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_scales_below_those_of_float16(tmp_path: Path) -> None:
    model = random_model(LLAMA.replace(num_hidden_layers=1))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight_scale[3] = 1e-9
    with pytest.raises(ValueError, match=r"up_proj: .* float16, from 6e-8 to 65504, and the model has 1e-09"):
        save_gguf(model, tmp_path / "a.gguf")


# The command


def convert(*arguments: str | Path) -> Any:
    return CliRunner().invoke(commands, ["convert", *map(str, arguments)])


def test_the_command(tmp_path: Path) -> None:
    model = with_tokenizer(random_model(FAMILIES["llama"]))
    model.save_pretrained(tmp_path / "source-1.58")
    result = convert(tmp_path / "source-1.58", tmp_path / "a.gguf")
    assert result.output == f"{tmp_path / 'a.gguf'}: tq2_0, head f16; 1 MB\n"
    assert gguf_fields(tmp_path / "a.gguf")["general.name"] == "source-1.58"
    result = convert(
        tmp_path / "a.gguf", tmp_path / "b.bin", "--to", "gguf", "--type", "tq1_0", "--head", "q8_0"
    )
    assert "b.bin: tq1_0, head q8_0; 1 MB" in result.output
    result = convert(tmp_path / "a.gguf", tmp_path / "c")
    assert "14 matrices" in result.output
    assert_same_model(model, from_pretrained(tmp_path / "c"))


def test_the_command_writes_the_published_layout(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    result = convert(source, tmp_path / "a", "--to", "safetensors")
    assert result.output == f"{tmp_path / 'a'}: packed weights, autobitlinear; 0 MB\n"
    ids = torch.arange(9)[None]
    assert torch.equal(from_pretrained(source)(ids), from_pretrained(tmp_path / "a")(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--type", "i2_s"], "--type has no effect with --to packed"),
        (["a", "--head", "f16"], "--head has no effect with --to packed"),
        (["a.gguf", "--layout", "tile16"], "--layout has no effect with --to gguf"),
        (["a", "--to", "safetensors", "--head", "f16"], "--head has no effect with --to safetensors"),
        (["source", "--to", "gguf"], "--to gguf needs the name of a file"),
        (["file", "--to", "safetensors"], "--to safetensors needs the name of a folder"),
        (["file"], "--to packed needs the name of a folder"),
    ],
)
def test_options_without_effect(tmp_path: Path, arguments: list[str], message: str) -> None:
    tiny_folder(tmp_path / "source")
    (tmp_path / "file").write_text("x")
    result = convert("source", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert (tmp_path / "file").read_text() == "x"


def test_errors_of_the_command_are_one_line(tmp_path: Path) -> None:
    random_model(LLAMA).save_pretrained(tmp_path / "source")
    result = convert("source", "a.gguf", "--type", "i2_s")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "I2_S has one scale" in result.output
