"""Ternary embedding and head: packed all the way, in and out of files, in everything that a model does."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from random_models import FAMILIES, SIZES, random_model, with_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitnet_ops
from bitnet_ops import (
    BitLinear,
    BitNet,
    DecoderConfig,
    KVCache,
    TernaryEmbedding,
    from_pretrained,
    save_gguf,
    save_published,
)
from bitnet_ops.checkpoint import CheckpointError
from bitnet_ops.cli.main import commands
from bitnet_ops.evaluation.perplexity import perplexity
from bitnet_ops.integrations.export import export_decode_step, step_inputs

QWEN3 = FAMILIES["qwen3"].replace(rope_scaling=None, group_size=128)
MODELS = {
    "tied": QWEN3.replace(tie_word_embeddings=True, ternary_embedding=True),
    "apart": QWEN3.replace(ternary_embedding=True, ternary_head=True),
    "only the embedding": QWEN3.replace(ternary_embedding=True),
    "only the head": QWEN3.replace(ternary_head=True),
    "rows": QWEN3.replace(group_size=0, ternary_embedding=True, ternary_head=True),
    "8-bit blocks": QWEN3.replace(activation_bits=8, ternary_embedding=True, ternary_head=True),
}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Models are so small that threads would wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> BitNet:
    return random_model(MODELS[request.param])


def ids(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same(one: BitNet, other: BitNet) -> None:
    assert one.config == other.config
    expected, given = one.state_dict(), other.state_dict()
    assert expected.keys() == given.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == given[name].dtype, name
        assert torch.equal(tensor, given[name]), name
    assert torch.equal(one(ids()), other(ids()))


# The embedding


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 64), (16, 65), (17, 130), (40, 300)])
@pytest.mark.parametrize("group_size", [0, 64, 128, 256])
def test_rows(rows: int, columns: int, group_size: int) -> None:
    w = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    scale = torch.rand(-(-columns // group_size), rows) if group_size else torch.rand(rows)
    for stored in (scale, scale.half()) if group_size else (scale,):
        table = TernaryEmbedding.from_ternary(w, stored, group_size=group_size)
        every_input = stored.float().T.repeat_interleave(group_size, 1) if group_size else stored[:, None]
        expected = w * every_input[:, :columns]
        for dtype in (torch.int64, torch.int32):
            assert torch.equal(table(torch.arange(rows, dtype=dtype)), expected)
        assert torch.equal(table.dense(), expected)
        some = torch.randint(rows, (3, 1, 4))
        assert torch.equal(table(some), expected[some])
        assert table(some).dtype == torch.float32
        assert table(some[:0]).shape == (0, 1, 4, columns)


@pytest.mark.parametrize("bad", [-1, 17, 31, 32, 2**40])
def test_ids_out_of_range(bad: int) -> None:
    """Those of padding rows of the last tile, too."""
    table = TernaryEmbedding(64, 17)
    assert table(torch.tensor([16])).shape == (1, 64)
    with pytest.raises(IndexError):
        table(torch.tensor([0, bad]))


def test_it_has_one_layout() -> None:
    with pytest.raises(ValueError, match=r"TernaryEmbedding: layout: expected 'tile16', got 'row'"):
        TernaryEmbedding(64, 16, layout="row")
    table = TernaryEmbedding(64, 16)
    with pytest.raises(ValueError, match=r"TernaryEmbedding.repack: layout: expected 'tile16', the only one"):
        table.repack("row")
    assert table.repack("tile16") is table


def test_scores_are_those_of_a_bitlinear() -> None:
    w = torch.randint(-1, 2, (40, 200), dtype=torch.int8)
    scale, x = torch.rand(2, 40), torch.randn(3, 200)
    options = {"activation_bits": 16, "group_size": 128}
    expected = BitLinear.from_ternary(w, scale, **options)(x)
    assert torch.equal(TernaryEmbedding.from_ternary(w, scale, **options).product(x), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_scores_against_the_dense_head(bits: int) -> None:
    """The head's activations are rounded as those of projections: half a step of the row or the group.

    Sums of 256 terms on one side, and of 2 groups on the other, round at most 2 * (256 + 14) times.
    """
    model = random_model(MODELS["tied"].replace(activation_bits=bits))
    hidden = torch.randn(5, 256) * torch.tensor([1e-3, 1, 30, 1, 1])[:, None]
    table = model.model.embed_tokens.dense()
    assert model.head_weight is None
    groups = hidden.abs().unflatten(1, (-1, 128))
    largest = groups.amax(-1) if bits == 8 else hidden.abs().amax(-1, keepdim=True).expand(-1, 2)
    step = largest.double() / {8: 127, 16: 32639}[bits]
    bound = 0.51 * step @ table.double().abs().unflatten(1, (-1, 128)).sum(-1).T
    bound += 2 * (256 + 14) * 2.0**-24 * (hidden.double().abs() @ table.double().abs().T)
    expected = bitnet_ops.lm_head(hidden, table)
    error = (model.score(hidden).double() - expected).abs()
    assert (error <= bound).all()
    assert error.max() > 0
    if bits == 16:
        assert bound.max() < 1e-2 * expected.abs().max()


# Files


def packed_names(model: BitNet) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(module, (BitLinear, TernaryEmbedding))
    }


def test_own_folders(tmp_path: Path, model: BitNet) -> None:
    model.save_pretrained(tmp_path)
    assert_same(from_pretrained(tmp_path), model)
    assert_same(from_pretrained(tmp_path, mmap=False), model)
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for name in ("ternary_embedding", "ternary_head"):
        assert fields.get(name, False) == getattr(model.config, name)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("model.embed_tokens.packed_weight" in names) == model.config.ternary_embedding
    assert ("model.embed_tokens.weight" in names) != model.config.ternary_embedding


def test_the_published_layout(tmp_path: Path, model: BitNet) -> None:
    """Float weights do not say how wide activations were. Here they are float32, which norms need."""
    for module in (model.model.embed_tokens, model.lm_head) if "lm_head" in model._modules else ():
        if isinstance(module, (torch.nn.Embedding, torch.nn.Linear)):
            module.float()
    save_published(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert packed_names(again) == packed_names(model)
    bits = model.config.activation_bits if model.config.group_size else None
    if model.config.activation_bits == 8:
        assert again.config.activation_bits == 16
    assert_same(from_pretrained(tmp_path, activation_bits=bits), model)


@pytest.mark.parametrize("type_", ["tq1_0", "tq2_0", "q2_0"])
def test_gguf(tmp_path: Path, model: BitNet, type_: str) -> None:
    if model.config.group_size == 128 and type_ != "q2_0":
        with pytest.raises(ValueError, match="scales of 256 inputs"):
            save_gguf(model, tmp_path / "a.gguf", type=type_)
        return
    assert save_gguf(model, tmp_path / "a.gguf", type=type_) == type_
    assert_same(from_pretrained(tmp_path / "a.gguf"), model)
    # float16 holds -s, 0 and s, and they are found to be ternary.
    save_gguf(model, tmp_path / "b.gguf", type=type_, head="f16")
    assert_same(from_pretrained(tmp_path / "b.gguf"), model)
    assert (tmp_path / "b.gguf").stat().st_size > (tmp_path / "a.gguf").stat().st_size + 410 * 256


def test_gguf_with_a_rounded_head(tmp_path: Path) -> None:
    """Q6_K has other numbers: they are floats again."""
    save_gguf(random_model(MODELS["apart"]), tmp_path / "a.gguf", head="q6_k")
    again = from_pretrained(tmp_path / "a.gguf")
    assert not again.config.ternary_embedding
    assert again.head_weight.dtype == torch.float16


def test_gguf_of_8_bit_models(tmp_path: Path) -> None:
    """What is trained with 8 bits a token has a head of floats, which a file cannot say."""
    config = DecoderConfig(**SIZES, ternary_embedding=True, ternary_head=True)
    model = random_model(config, scales="matrix")
    with pytest.raises(ValueError, match="would be read as floats; save_pretrained writes any model"):
        save_gguf(model, tmp_path / "a.gguf")
    model.save_pretrained(tmp_path / "packed")
    assert_same(from_pretrained(tmp_path / "packed"), model)
    with pytest.raises(ValueError, match="has no field for ternary_embedding=True, ternary_head=True"):
        save_published(model, tmp_path / "published")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    model = random_model(MODELS["tied"])
    save_published(model, tmp_path)

    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(tmp_path, twice)
    assert_same(from_pretrained(tmp_path), model)
    change(tmp_path, lambda tensors: tensors["lm_head.weight"][5].neg_())
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*the numbers of the embedding"):
        from_pretrained(tmp_path)


def test_a_dense_table_is_not_ternary_because_its_first_rows_are(tmp_path: Path) -> None:
    model = random_model(MODELS["apart"])
    save_published(model, tmp_path)
    change(tmp_path, lambda tensors: tensors["model.embed_tokens.weight"][-1, :2].copy_(torch.tensor([1, 2])))
    again = from_pretrained(tmp_path)
    assert (again.config.ternary_embedding, again.config.ternary_head) == (False, True)
    assert again.config.group_size == 128


def test_groups_that_only_the_embedding_needs(tmp_path: Path) -> None:
    """One size for all matrices: the coarsest that fits them all."""
    model = random_model(MODELS["apart"])
    save_published(model, tmp_path)

    def finer(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][:, 64:128] *= 2

    change(tmp_path, finer)
    again = from_pretrained(tmp_path)
    assert again.config.group_size == 64
    assert again.config.ternary_embedding
    expected = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(again.model.embed_tokens.dense(), expected.float())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ternary_embedding", 1, "ternary_embedding: expected true or false, got 1"),
        ("ternary_embedding", None, "ternary_embedding: expected true or false, got None"),
        ("ternary_head", False, "ternary_head: expected ternary_embedding = True, for tie_word_embeddings"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, field: str, value: Any, message: str) -> None:
    random_model(MODELS["tied"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"][field] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_a_folder_with_another_layout_is_refused(tmp_path: Path) -> None:
    random_model(MODELS["tied"].replace(group_size=0)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"]["layouts"] = {"model.embed_tokens": "row"}
    file.write_text(json.dumps(fields))
    change(tmp_path, lambda tensors: tensors.update({"model.embed_tokens.packed_weight":
           bitnet_ops.pack_ternary(torch.zeros(410, 256, dtype=torch.int8), "row")}))  # fmt: skip
    with pytest.raises(CheckpointError, match="layout 'tile16', because it is an embedding"):
        from_pretrained(tmp_path)


def test_what_is_saved_is_as_the_configuration_says(tmp_path: Path) -> None:
    model = random_model(MODELS["apart"])
    model.lm_head = torch.nn.Linear(256, 410, bias=False)
    with pytest.raises(
        ValueError, match=r"expected ternary numbers at 'lm_head', as model.config.ternary_head"
    ):
        model.save_pretrained(tmp_path)
    model = random_model(QWEN3)
    model.lm_head = BitLinear(256, 410, activation_bits=16, group_size=128)
    with pytest.raises(ValueError, match=r"expected floats at 'lm_head', .* got ternary numbers"):
        save_gguf(model, tmp_path / "a.gguf")


# All that a model does


def dense_twin(model: BitNet) -> BitNet:
    """The same hidden states, and a head of floats where the model has a ternary one."""
    twin = BitNet(model.config.replace(ternary_embedding=False, ternary_head=False)).eval()
    twin.model.layers, twin.model.norm = model.model.layers, model.model.norm
    tables = [(twin.model.embed_tokens, model.model.embed_tokens)]
    if not model.config.tie_word_embeddings:
        tables.append((twin.lm_head, model.lm_head))
    for mine, theirs in tables:
        weight = theirs.weight if hasattr(theirs, "weight") else theirs.dense()
        mine.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    return twin.requires_grad_(False)


def test_hidden_states_are_those_of_a_dense_table(model: BitNet) -> None:
    assert torch.equal(model.hidden_states(ids()), dense_twin(model).hidden_states(ids()))


def test_text(model: BitNet) -> None:
    """The prompt in pieces, drafts, batches and sampling give what all scores give."""
    prompt = ids(1, 12)
    expected = prompt
    for _ in range(8):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ()}
    assert torch.equal(model.generate(prompt, **greedy), expected)
    batch = torch.cat((prompt, ids(1, 12) + 1))
    assert torch.equal(model.generate(batch, **greedy)[:1], expected)
    sampled = {"max_new_tokens": 8, "do_sample": True, "top_k": 5, "seed": 3, "eos_token_id": ()}
    assert torch.equal(model.generate(prompt, **sampled), model.generate(prompt, **sampled))


def test_the_same_bits(isa: str) -> None:
    for kind in ("tied", "8-bit blocks"):
        model = random_model(MODELS[kind])
        logits = model(ids(3, 9))
        with bitnet_ops.use_isa("scalar"):
            assert torch.equal(model(ids(3, 9)), logits)
        assert torch.equal(torch.cat([model(row[None]) for row in ids(3, 9)]), logits)
        assert torch.equal(model.score(model.hidden_states(ids(3, 9)))[:, 4], logits[:, 4])


def test_state_dicts_and_copies(model: BitNet) -> None:
    fresh = BitNet(model.config).eval().requires_grad_(False)
    fresh.load_state_dict(model.state_dict())  # float16 scales go into float32 ones
    assert torch.equal(fresh(ids()), model(ids()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), bitnet_ops.repack(model)):
        assert torch.equal(other(ids()), fresh(ids()))
    cast = copy.deepcopy(model).to(torch.bfloat16).float()
    if model.config.ternary_embedding:
        assert torch.equal(cast.model.embed_tokens(ids()), model.model.embed_tokens(ids()))


def test_perplexity(model: BitNet) -> None:
    text = ids(1, 40)[0].tolist()
    logits = model(torch.tensor([text[:-1]]))[0].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum")
    assert perplexity(model, text).nats == pytest.approx(float(expected), rel=1e-6)


def test_vectors() -> None:
    model = with_tokenizer(random_model(MODELS["tied"]))
    assert torch.equal(model.embed(["a b"]), dense_twin_with_tokenizer(model).embed(["a b"]))


def dense_twin_with_tokenizer(model: BitNet) -> BitNet:
    return with_tokenizer(dense_twin(model))


@pytest.mark.parametrize("kind", ["tied", "apart"])
def test_compiled_and_exported(kind: str) -> None:
    model = random_model(MODELS[kind])
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids()), model(ids()))
        cache, again = KVCache(model.config, 1, 16), KVCache(model.config, 1, 16)
        program = export_decode_step(model).module()
        expected = model(ids(1, 5), cache=cache)[:, -1]
        assert torch.equal(program(*step_inputs(ids(1, 5), again)), expected)


def test_the_command_line(tmp_path: Path) -> None:
    """info, generate, eval, embed, and convert to each form."""
    model = with_tokenizer(random_model(MODELS["tied"]))
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged", encoding="utf-8")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(commands, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    source = ("--model", tmp_path / "a")
    assert "ternary, shared with the head" in run("info", *source)
    run("generate", *source, "--max-new-tokens", 3, "It")
    assert "perplexity" in run("eval", *source, "--text", tmp_path / "text.txt")
    run("embed", *source, "It")
    assert "q2_0, head q2_0" in run("convert", tmp_path / "a", tmp_path / "b.gguf")
    run("convert", tmp_path / "a", tmp_path / "c", "--to", "safetensors")
    run("convert", tmp_path / "a", tmp_path / "d")
    for name in ("b.gguf", "c", "d"):
        assert_same(from_pretrained(tmp_path / name), model)


def test_a_model_made_here() -> None:
    """Fresh tables hold zeros; float classes of projections take float tables."""
    config = DecoderConfig(**SIZES, ternary_embedding=True, ternary_head=True)
    model = BitNet(config)
    assert isinstance(model.model.embed_tokens, TernaryEmbedding)
    assert isinstance(model.lm_head, BitLinear)
    assert not model(ids()).any()
    trained = BitNet(config, bitnet_ops.BitLinearQAT)
    assert isinstance(trained.model.embed_tokens, torch.nn.Embedding)
    with pytest.raises(ValueError, match=r"ternary_head: expected ternary_embedding = False"):
        DecoderConfig(**SIZES, tie_word_embeddings=True, ternary_head=True)
