"""Embedding models: BitNet-embedding's tensors and names, and the files of sentence-transformers.

The models are transformers' own, with the bitnet quantiser's norms inside projections: saved under the names
that microsoft/BitNet's converters read (utils/convert-bitnet-embedding-to-gguf.py), without a head.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from text_models import EOS, byte_level_tokenizer
from tiny_checkpoints import Sizes, Weights, published_tensors, tiny_folder, untied, write_folder
from tokenizers import processors
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers import BitNetQuantConfig, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

import bitnet_ops
from bitnet_ops import BitLinear, BitNet, CheckpointError, EmbeddingSettings, KVCache, from_pretrained
from bitnet_ops.checkpoint.pooling import BITNET_EMBEDDING, load_embedding_settings, save_embedding_settings

pytestmark = pytest.mark.usefixtures("eager")

SIZES = {
    "vocab_size": 400,
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": True,
}
KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "gemma3_text": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"eos_token_id": 2}),
}
ARCHITECTURES = {"gemma3_text": "Gemma3TextModel", "qwen3": "Qwen3Model"}


@dataclass
class Body:
    """The same body in both implementations, and its folder."""

    folder: Path
    kind: str
    ours: BitNet
    theirs: nn.Module


def make_body(
    folder: Path, kind: str, *, prefix: str = "", dtype: torch.dtype = torch.float32, **changes: Any
) -> Body:
    """Fills transformers' model with random numbers, and saves it as BitNet-embedding is.

    Args:
        folder: of the checkpoint.
        kind: one of `KINDS`.
        prefix: in front of the names of tensors.
        dtype: of the tensors.
        **changes: of config.json.
    """
    make, make_config, more = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    config = make_config(attn_implementation="eager", **SIZES, **more)
    quantization = BitNetQuantConfig(
        linear_class="autobitlinear",
        quantization_mode="online",
        use_rms_norm=True,
        rms_norm_eps=config.rms_norm_eps,
    )
    theirs = replace_with_bitnet_linear(make(config), ["lm_head"], quantization)
    state = {}
    for name, module in theirs.model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            shape = module.weight.shape
            weight = torch.randn(shape, generator=generator)
            if isinstance(module, AutoBitLinear):
                weight *= shape[1] ** -0.5
            elif not isinstance(module, nn.Embedding):
                # Gemma's own norms add 1 to the weight, the others do not.
                offset = kind == "qwen3" or name.endswith("rms_norm")
                weight = offset + 0.2 * weight
            state[f"{name}.weight"] = weight.to(dtype)
    tensors = {f"{prefix}{name.replace('rms_norm', 'norm')}": weight for name, weight in state.items()}
    fields = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [ARCHITECTURES[kind]]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields | changes))
    save_file(tensors, folder / "model.safetensors")
    tokenizer = byte_level_tokenizer()
    ending = [(EOS, tokenizer.token_to_id(EOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=ending)
    tokenizer.save(str(folder / "tokenizer.json"))
    theirs.model.load_state_dict({name: weight.float() for name, weight in state.items()}, assign=True)
    theirs.eval().requires_grad_(False)
    return Body(folder, kind, from_pretrained(folder), theirs.model)


@pytest.fixture(params=KINDS)
def body(request: pytest.FixtureRequest, tmp_path: Path) -> Body:
    return make_body(tmp_path / "published", request.param)


def prompts(count: int, length: int) -> Tensor:
    return torch.randint(400, (count, length), generator=torch.Generator().manual_seed(3))


def assert_close_but_for_flips(ours: Tensor, theirs: Tensor) -> None:
    """The median sequence has no flipped rounding; there both are as near as in test_gemma3.py."""
    difference = (ours - theirs).abs().flatten(1).mean(1).median()
    assert difference < 1e-5 * theirs.abs().max()


def test_what_the_tensors_say(body: Body) -> None:
    config = body.ours.config
    assert config.projection_norms
    assert config.projection_norm_eps == config.rms_norm_eps == 1e-4
    assert config.tie_word_embeddings
    assert config.activation_bits == 8
    assert config.qk_norm
    assert (config.query_scale, config.head_dim) == (None, 20)
    assert not hasattr(body.ours, "lm_head")
    assert body.ours.embedding_settings == BITNET_EMBEDDING
    projections = [module for module in body.ours.modules() if isinstance(module, BitLinear)]
    assert len(projections) == 3 * 7


def test_hidden_states(body: Body) -> None:
    ids = prompts(15, 12)
    assert_close_but_for_flips(body.ours.hidden_states(ids), body.theirs(ids).last_hidden_state)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_either_kind_of_names(tmp_path: Path, body: Body, prefix: str) -> None:
    """With and without "model.", and in bfloat16: rounding moves masters, but few of them by a step."""
    again = make_body(tmp_path / "b", body.kind, prefix=prefix)
    ids = prompts(2, 12)
    assert torch.equal(again.ours.hidden_states(ids), body.ours.hidden_states(ids))
    half = make_body(tmp_path / "c", body.kind, prefix=prefix, dtype=torch.bfloat16)
    ids = prompts(15, 12)
    assert_close_but_for_flips(half.ours.hidden_states(ids), half.theirs(ids).last_hidden_state)


def test_vectors_are_of_the_last_token(body: Body) -> None:
    """Which is the one that ends the text, by transformers' hidden states."""
    texts = ["It is a truth", "a wife", "good fortune", "of a single man", "x"]
    assert body.ours.tokenizer is not None
    expected = []
    for text in texts:
        ids = body.ours.tokenizer.encode(text).ids
        assert ids[-1] == body.ours.tokenizer.token_to_id(EOS)
        hidden = body.theirs(torch.tensor([ids])).last_hidden_state[0, -1]
        expected.append(hidden / hidden.norm())
    vectors = body.ours.embed(texts)
    assert_close_but_for_flips(vectors, torch.stack(expected))
    assert not torch.equal(body.ours.embed(texts, pooling="mean"), vectors)
    query = body.ours.embed("x", prompt_name="query")
    assert torch.equal(query, body.ours.embed(BITNET_EMBEDDING.prompts["query"] + "x"))
    assert torch.equal(
        bitnet_ops.SentenceEncoder(body.ours).encode_query(["x"], convert_to_tensor=True), query
    )


def test_the_same_bits_everywhere(tmp_path: Path, isa: str, threads: None) -> None:
    """Instruction sets, threads, batches, and tokens that came by prefill, in pieces or one by one."""
    for kind in KINDS:
        model = make_body(tmp_path / kind, kind).ours
        ids, texts = prompts(3, 20), ["It is a truth", "x", "a single man in possession"]
        hidden, vectors = model.hidden_states(ids), model.embed(texts)
        with bitnet_ops.use_isa("scalar"):
            assert torch.equal(model.hidden_states(ids), hidden)
        torch.set_num_threads(1)
        assert torch.equal(model.hidden_states(ids), hidden)
        assert torch.equal(torch.cat([model.embed(text) for text in texts]), vectors)
        for pieces in (ids.split(1, dim=1), ids.split([7, 12, 1], dim=1)):
            cache = KVCache(model.config, 3, 20)
            steps = [model.hidden_states(piece, cache=cache) for piece in pieces]
            assert torch.equal(torch.cat(steps, dim=1), hidden)


def test_a_packed_folder(body: Body, tmp_path: Path) -> None:
    """Keeps the weights and how vectors are made."""
    settings = EmbeddingSettings(
        "mean", False, eos_token_id=5, prompts={"query": "Instruct: é\nQuery: ", "": ""}, max_length=20
    )
    texts = ["It is a truth", "a wife"]
    for number, one in enumerate((BITNET_EMBEDDING, settings)):
        body.ours.embedding_settings = one
        body.ours.save_pretrained(tmp_path / f"{number}")
        again = from_pretrained(tmp_path / f"{number}")
        assert again.config == body.ours.config
        assert again.embedding_settings == one
        assert torch.equal(again.embed(texts), body.ours.embed(texts))
    fields = json.loads((tmp_path / "0" / "config.json").read_text())
    assert fields["model_type"] == body.kind
    assert "decoder_config" not in fields


def test_a_body_without_norms_is_a_model_like_any_other(tmp_path: Path) -> None:
    """Whose config.json may say that the head is not tied, though there is none."""
    sizes = Sizes(llama=True)
    tensors = published_tensors(Weights.random(sizes), reciprocal=True)
    config = sizes.config(tie_word_embeddings=False)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    model = from_pretrained(write_folder(tmp_path / "a", config, bare))
    whole = from_pretrained(write_folder(tmp_path / "b", sizes.config(), tensors))
    assert model.config == whole.config
    assert model.embedding_settings is None
    ids = torch.randint(61, (2, 9))
    assert torch.equal(model(ids), whole(ids))
    headed = published_tensors(untied(Weights.random(sizes)), reciprocal=True)
    bare = {name.removeprefix("model."): tensor for name, tensor in headed.items()}
    assert not from_pretrained(write_folder(tmp_path / "c", config, bare)).config.tie_word_embeddings
    with pytest.raises(CheckpointError, match=r"'lm_head.weight': expected .* got no such tensor"):
        from_pretrained(write_folder(tmp_path / "d", config, tensors))


def test_dense_projections_with_norms(body: Body) -> None:
    """The masters as they are, not quantised."""
    model = from_pretrained(body.folder, linear=nn.Linear)
    for module in body.theirs.modules():
        if isinstance(module, AutoBitLinear):
            norm = module.rms_norm
            module.forward = lambda x, m=module, norm=norm: nn.functional.linear(norm(x), m.weight)
    ids = prompts(5, 12)
    assert_close_but_for_flips(model.hidden_states(ids), body.theirs(ids).last_hidden_state)


# The files of sentence-transformers

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
LAST = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True, "include_prompt": True}  # fmt: skip


def write_st(
    folder: Path,
    modules: Any = MODULES,
    pooling: Any = LAST,
    prompts: Any = None,
    length: Any = None,
    tokenizer: Any = None,
) -> Path:
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("config_sentence_transformers.json", prompts),
        ("sentence_bert_config.json", length),
        ("tokenizer_config.json", tokenizer),
    ):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def read_st(folder: Path) -> EmbeddingSettings | None:
    return load_embedding_settings(folder, 61, byte_level_tokenizer())


def test_what_folders_say(tmp_path: Path) -> None:
    assert read_st(write_st(tmp_path / "a")) == EmbeddingSettings("last")
    assert read_st(write_st(tmp_path / "b", MODULES[:2], {"pooling_mode": "cls"})) == EmbeddingSettings(
        "cls", False
    )
    newer = [
        {"path": module["path"], "type": f"sentence_transformers.base.modules.{kind.lower()}.{kind}"}
        for module, kind in zip(MODULES, ("Transformer", "Pooling", "Normalize"), strict=True)
    ]
    whole = write_st(
        tmp_path / "c",
        newer,
        {"embedding_dimension": 24, "pooling_mode": "lasttoken", "include_prompt": True},
        {"prompts": {"query": "Instruct: x\nQuery: ", "document": None}, "default_prompt_name": "query"},
        {"max_seq_length": 512, "do_lower_case": False},
        {"add_eos_token": True, "eos_token": {"content": EOS}},
    )
    assert read_st(whole) == EmbeddingSettings(
        "last",
        eos_token_id=0,
        prompts={"query": "Instruct: x\nQuery: ", "document": ""},
        default_prompt_name="query",
        max_length=512,
    )
    for length, known in ((64, 64), (10**30, None), (1e30, None), (None, None), (-1, None)):
        named = write_st(tmp_path / "f", tokenizer={"model_max_length": length})
        assert read_st(named) == EmbeddingSettings("last", max_length=known)
    silent = write_st(tmp_path / "d", None, None, {"prompts": {}}, {}, {})
    assert read_st(silent) is None
    mean = write_st(
        tmp_path / "e", MODULES, {}, {"prompts": None}, {"max_seq_length": None}, {"eos_token": EOS}
    )
    assert read_st(mean) == EmbeddingSettings("mean")


def test_a_model_has_them(tmp_path: Path) -> None:
    folder = tiny_folder(write_st(tmp_path, prompts={"prompts": {"query": "x"}}))
    assert from_pretrained(folder).embedding_settings == EmbeddingSettings("last", prompts={"query": "x"})
    (folder / "modules.json").unlink()
    assert from_pretrained(folder).embedding_settings is None


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"modules": {}}, "modules.json: file: expected a list"),
        ({"modules": [3]}, "modules.json: file: expected a list"),
        ({"modules": [*MODULES, {"type": "x.Dense"}]}, r"modules.json: types of the modules: .*'Dense'\]"),
        ({"modules": MODULES[1:]}, "modules.json: types of the modules"),
        ({"modules": []}, "modules.json: types of the modules"),
        ({"modules": [MODULES[0], {"type": "Pooling", "path": "../x"}]}, "modules.json: path of Pooling"),
        ({"modules": [MODULES[0], {"type": "Pooling"}]}, "modules.json: path of Pooling"),
        ({"modules": [MODULES[0], {"type": "Pooling", "path": "2"}]}, "2.config.json: file: .* no such file"),
        ({"pooling": {"pooling_mode": "max"}}, "1_Pooling.config.json: pooling_mode: .*'max'"),
        ({"pooling": {"pooling_mode": ["cls", "mean"]}}, "1_Pooling.config.json: pooling_mode"),
        ({"pooling": LAST | {"pooling_mode_mean_tokens": True}}, "1_Pooling.config.json: pooling_mode"),
        ({"pooling": LAST | {"include_prompt": False}}, "1_Pooling.config.json: include_prompt"),
        ({"prompts": {"prompts": ["x"]}}, "config_sentence_transformers.json: EmbeddingSettings.prompts"),
        ({"prompts": {"prompts": {"a": 3}}}, "config_sentence_transformers.json: EmbeddingSettings.prompts"),
        (
            {"prompts": {"default_prompt_name": "query"}},
            "config_sentence_transformers.json: EmbeddingSettings.default_prompt_name",
        ),
        (
            {"prompts": {"append_eos_token_id": "0"}},
            "config_sentence_transformers.json: EmbeddingSettings.eos_token_id",
        ),
        ({"prompts": {"append_eos_token_id": 61}}, "config_sentence_transformers.json: append_eos_token_id"),
        ({"length": {"max_seq_length": -1}}, "sentence_bert_config.json: EmbeddingSettings.max_length"),
        ({"tokenizer": {"add_eos_token": True}}, "tokenizer_config.json: eos_token"),
        ({"tokenizer": {"add_eos_token": True, "eos_token": "none"}}, "tokenizer_config.json: eos_token"),
    ],
)
def test_damaged_files(tmp_path: Path, files: dict[str, Any], error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        read_st(write_st(tmp_path, **files))


def test_files_that_are_no_json(tmp_path: Path) -> None:
    for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json",
                 "sentence_bert_config.json", "tokenizer_config.json"):  # fmt: skip
        folder = write_st(tmp_path / name.replace("/", "-"))
        for content in ("[", "[" * 100_000, '{"x": NaN', "\0", "3"):
            (folder / name).write_text(content)
            with pytest.raises(CheckpointError, match=name.replace("/", ".")):
                read_st(folder)


def test_saved_files_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    """Field by field as in folders that sentence-transformers 2.7 wrote."""
    settings = EmbeddingSettings("last", prompts={"query": "x"}, max_length=7)
    save_embedding_settings(tmp_path, settings, 24)
    assert json.loads((tmp_path / "modules.json").read_text()) == MODULES
    pooling = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert pooling == LAST | {
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
    }
    prompts = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert prompts == {
        "prompts": {"query": "x"},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text()) == {"max_seq_length": 7}
    assert read_st(tmp_path) == settings
