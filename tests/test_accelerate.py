"""`bitnet_ops.integrations.transformers`: transformers models on our layers give what they gave.

Layer by layer both get the same float32 input, and the difference is compared with a bound on what rounding
can do (`their_models.linear_bound`). End to end a last bit can flip an int8 rounding (docs/numerics.md);
there both are compared with float64.
"""

import copy
import gc
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import Sizes, Weights, published_tensors, tiny_folder, write_folder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitnet_ops
from bitnet_ops import BitLinear, reference
from bitnet_ops.integrations import transformers as accelerating
from bitnet_ops.integrations import transformers_versions as versions
from bitnet_ops.integrations.transformers_weights import NormedBitLinear

transformers = pytest.importorskip("transformers")
from their_models import (  # noqa: E402
    FORMATS,
    U,
    assert_within,
    exact_logits,
    linear_bound,
    make_pair,
    median_error,
    shipped_model,
)
from transformers import BitNetQuantConfig  # noqa: E402
from transformers.integrations import bitnet as theirs  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager")

SIZES = Sizes(vocab=97, hidden=60, intermediate=100, heads=5, kv_heads=1, layers=3)


def is_theirs(module: nn.Module) -> bool:
    return type(module) in (theirs.AutoBitLinear, theirs.BitLinear)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(tmp_path: Path, form: str) -> None:
    """Layers within rounding; logits as near to float64 as before, where no rounding flipped (the median)."""
    pair = make_pair(tmp_path, SIZES, form)
    before = copy.deepcopy(pair.theirs)
    model = bitnet_ops.accelerate(pair.theirs)
    assert model is pair.theirs
    count = 0
    for name, old in before.named_modules():
        if is_theirs(old):
            new = model.get_submodule(name)
            assert type(new) is BitLinear
            assert new.layout == bitnet_ops.best_layout()
            assert torch.equal(new.unpack(), pair.weights.ternary[name])
            x = torch.randn(2, 4, new.in_features) * torch.tensor([0.01, 30.0]).reshape(2, 1, 1)
            assert_within(new(x), old(x), linear_bound(x, new), name)
            count += 1
    assert count == 7 * SIZES.layers
    ids = torch.randint(SIZES.vocab, (36, 12), generator=torch.Generator().manual_seed(3))
    exact = torch.stack([exact_logits(pair, row) for row in ids])
    limit = 2 * median_error(before(ids).logits, exact)
    assert limit < 1e-5 * exact.abs().max(), "most sequences have a flip"
    assert median_error(model(ids).logits, exact) <= limit


def their_layer(kind: str, *, norm: bool, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of transformers with random weights and a scale far from 1, whose direction shows."""
    options = {"bias": bias, "use_rms_norm": norm, "rms_norm_eps": 1e-3, "dtype": dtype}
    layer: nn.Module
    if kind == "bitlinear":
        layer = theirs.BitLinear(40, 28, **options)
        layer.weight = theirs.pack_weights(torch.randint(-1, 2, (28, 40), dtype=torch.int8))
    else:
        layer = theirs.AutoBitLinear(40, 28, online_quant=kind == "online", **options)
        w = torch.randn(28, 40) if kind == "online" else torch.randint(-1, 2, (28, 40))
        layer.weight = nn.Parameter(w.to(dtype))
    if kind != "online":
        layer.weight_scale = torch.tensor([2.0**-5], dtype=dtype)
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(28, dtype=dtype))
    if norm:
        layer.rms_norm.weight = nn.Parameter(torch.rand(40, dtype=dtype) + 0.5)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["offline", "online", "bitlinear"])
def test_biases_and_norms(kind: str, norm: bool) -> None:
    """The same bound, and for the bias two roundings more on each side.

    The offline layer adds the bias before it multiplies with the scale.
    """
    old = their_layer(kind, norm=norm)
    net = bitnet_ops.accelerate(nn.Sequential(old))
    new = net[0]
    assert type(new) is (NormedBitLinear if norm else BitLinear)
    x = torch.randn(6, 40) * 3
    inner = old.rms_norm(x) if norm else x
    bias = new.bias.double().abs()
    bound = linear_bound(inner, new) + 4 * U * (bias + old(x).double().abs())
    assert_within(net(x), old(x), bound, kind)
    assert bound.max() < 0.1 * bias.max(), "the bound would not see a bias in the wrong place"


def test_online_weights_are_rounded_as_theirs() -> None:
    """W * (1 / mean) and W / mean round differently next to a half: of some means, a float away from it."""
    flips = 0
    for seed in range(40):
        weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
        half = weight.abs().mean() / 2
        for _ in range(8):  # moving weights next to half the mean moves the mean
            weight[0, 0], weight[0, 1] = half, torch.nextafter(half, torch.tensor(1.0))
            half = weight.abs().mean() / 2
        layer = theirs.AutoBitLinear(16, 16, bias=False, online_quant=True)
        layer.weight = nn.Parameter(weight)
        expected = theirs.WeightQuant.apply(weight).sign()
        flips += int((reference.quantize_weight(weight)[0] != expected).sum())
        assert torch.equal(bitnet_ops.accelerate(layer).unpack().float(), expected)
    assert flips > 0, "no seed tells the two roundings apart"


def test_old_weights_are_freed_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is converted, those before it are gone."""
    model = make_pair(tmp_path, SIZES, "autobitlinear").theirs
    old = [weakref.ref(module.weight) for module in model.modules() if is_theirs(module)]
    alive = []
    convert = BitLinear.from_ternary.__func__

    def counting(cls: type[BitLinear], *arguments: object, **options: object) -> BitLinear:
        alive.append(sum(ref() is not None for ref in old))
        return convert(cls, *arguments, **options)

    monkeypatch.setattr(BitLinear, "from_ternary", classmethod(counting))
    bitnet_ops.accelerate(model)
    assert alive == list(range(len(old), 0, -1))
    assert all(ref() is None for ref in old)


def test_the_head_is_moved_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays the table of the embedding."""
    model = shipped_model()
    before = model.lm_head.weight.data
    monkeypatch.setattr(accelerating, "LEAST_BYTES", 0)
    bitnet_ops.accelerate(model)
    table = model.lm_head.weight
    assert table is model.model.embed_tokens.weight
    assert table.data_ptr() != before.data_ptr()
    assert torch.equal(table, before)


def test_what_older_versions_leave_in_a_layer() -> None:
    """Unpacked weights in uint8, and a hook by which a layer holds itself."""
    old = their_layer("offline", norm=False)
    expected = copy.deepcopy(old)
    old.weight = nn.Parameter(old.weight.to(torch.int8).view(torch.uint8), requires_grad=False)
    assert old.weight.max() == 255

    def load_hook(*arguments: object, layer: nn.Module = old) -> None:
        pass

    load_hook.__module__ = versions.THEIR_MODULE
    old._load_state_dict_pre_hooks.clear()
    old._load_state_dict_pre_hooks[0] = load_hook
    alive, net = weakref.ref(old), nn.Sequential(old)
    del old, load_hook
    gc.disable()
    try:
        new = bitnet_ops.accelerate(net)[0]
        assert alive() is None
    finally:
        gc.enable()
    assert torch.equal(new.unpack().float(), expected.weight)


def test_a_llama_with_biases_and_norms() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    quantization = BitNetQuantConfig(linear_class="bitlinear", use_rms_norm=True, rms_norm_eps=1e-5)
    model = transformers.LlamaForCausalLM(config)
    model = theirs.replace_with_bitnet_linear(model, ["lm_head"], quantization)
    for name, module in list(model.named_modules()):
        if is_theirs(module):
            w = torch.randint(-1, 2, (module.out_features, module.in_features), dtype=torch.int8)
            layer = theirs.BitLinear(
                module.in_features, module.out_features, True, dtype=torch.float32, use_rms_norm=True
            )
            layer.weight, layer.weight_scale = theirs.pack_weights(w), torch.tensor([5.0])
            model.set_submodule(name, layer)
    model.eval().requires_grad_(False)
    ids = torch.randint(50, (8, 10))
    before = model(ids).logits
    after = bitnet_ops.accelerate(model)(ids).logits
    assert sum(isinstance(module, NormedBitLinear) for module in model.modules()) == 14
    # Without a flip the two differ by some hundred roundings; half of eight sequences have none.
    assert (after - before).abs().flatten(1).amax(1).median() < 1000 * U * before.abs().max()


def test_loaded_by_transformers(tmp_path: Path) -> None:
    """The whole way of a user, against our loader on the same folder."""
    pytest.importorskip("accelerate")
    tensors = published_tensors(Weights.random(SIZES))
    floats = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    folder = write_folder(tmp_path, SIZES.config(), tensors | floats)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(SIZES.vocab, (8, 10))
    logits = bitnet_ops.accelerate(model)(ids).logits
    ours = bitnet_ops.from_pretrained(folder)(ids)
    assert (logits - ours).abs().flatten(1).amax(1).median() < 1000 * U * ours.abs().max()


@pytest.fixture(scope="module", params=["accelerated", "registered"])
def trained(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    """The model in the package as transformers has it, accelerated, and as it loads after registering."""
    if request.param == "accelerated":
        return bitnet_ops.accelerate(shipped_model())
    with bitnet_ops.register_transformers():
        folder = bitnet_ops.DEFAULT_MODEL
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    file = bitnet_ops.DEFAULT_MODEL / "tokenizer.json"
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), padding_side="left", eos_token=end, pad_token=end
    )


PROMPTS = ["the next morning", "There was a great deal of", "on the other"]
TOKENS = 6


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """What our own model writes. A trained model's best token leads by more than roundings make up."""
    model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)
    found = []
    for prompt in PROMPTS:
        ids = model.generate(**model.encode(prompt), max_new_tokens=TOKENS, do_sample=False)
        best = model(ids)[0, -TOKENS - 1 : -1].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 0.2, "choose prompts with a clear answer"
        found.append(model.tokenizer.decode(ids[0].tolist()))
    return found


def test_generate_with_left_padding(trained, tokenizer, texts) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    ids = trained.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


def test_pipeline(trained, tokenizer, texts) -> None:
    pipe = transformers.pipeline("text-generation", model=trained, tokenizer=tokenizer)
    assert pipe(PROMPTS[0], max_new_tokens=TOKENS, do_sample=False)[0]["generated_text"] == texts[0]


def test_streamer(trained, tokenizer, texts, capsys) -> None:
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    trained.generate(ids, max_new_tokens=TOKENS, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.strip() == texts[1]


@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_generation(trained, tokenizer, texts, how) -> None:
    ids = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    helper = trained if how == "assistant_model" else 3
    new = trained.generate(ids, max_new_tokens=TOKENS, do_sample=False, **{how: helper})
    assert tokenizer.decode(new[0], skip_special_tokens=True) == texts[2]


def test_iterator_streamer(trained, tokenizer, texts) -> None:
    """Generation in another thread, as servers do it."""
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    with ThreadPoolExecutor(1) as pool:
        options = {"max_new_tokens": TOKENS, "do_sample": False, "streamer": streamer}
        done = pool.submit(trained.generate, ids, **options)
        pieces = list(streamer)
        done.result()
    assert len(pieces) > 2
    assert "".join(pieces).strip() == texts[1]


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache(trained, tokenizer, texts, padded) -> None:
    prompts = PROMPTS if padded else PROMPTS[:1]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "cache_implementation": "static"}
    ids = trained.generate(**batch, **options, disable_compile=True)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts[: len(prompts)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_compiled(trained, tokenizer, texts, how) -> None:
    """torch.compile of a model, and of the forward pass that `generate` calls with a static cache."""
    model = copy.deepcopy(trained)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.compiler.set_stance("default"), torch.no_grad():
        if how == "forward":
            logits, expected = torch.compile(model)(ids).logits, trained(ids).logits
            assert logits.dtype == torch.float32
            difference = (logits - expected).abs().amax(-1).median()  # flips of int8 roundings excepted
            assert difference < 1e-3 * expected.abs().max()
            return
        model.forward = torch.compile(model.forward)
        options = {"max_new_tokens": TOKENS, "do_sample": False, "cache_implementation": "static"}
        new = model.generate(ids, **options)
    assert tokenizer.decode(new[0], skip_special_tokens=True) == texts[0]


MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear")


class Products(TorchDispatchMode):
    """Collects the dtypes of dense products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.partition("::")[2] in MATMULS:
            self.dtypes.update(tensor.dtype for tensor in args if isinstance(tensor, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["fast", "static", "gradients"])
def test_nothing_dense_runs_in_bfloat16(trained, how) -> None:
    """For which many CPUs have no instructions; attention itself is as fast in it as in float32."""
    model = copy.deepcopy(trained).bfloat16()
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 2, "do_sample": False}
    with Products() as products:
        if how == "gradients":
            model.get_input_embeddings().weight.requires_grad_()
            model.train()(ids).logits.sum()
        else:
            static = {"cache_implementation": "static", "disable_compile": True} if how == "static" else {}
            model.generate(ids, **options, **static)
    assert torch.bfloat16 not in products.dtypes


def test_plain_calls_keep_nothing_for_gradients(trained) -> None:
    logits = trained(torch.tensor([[5, 6, 7]])).logits
    assert torch.is_grad_enabled()
    assert not logits.requires_grad


def test_a_version_that_lacks_private_names(monkeypatch, recwarn) -> None:
    """Layers run as modules then; one warning says so."""
    # One that transformers itself does without, once it is imported.
    monkeypatch.delattr("transformers.generation.logits_process.TopKLogitsWarper")
    for name in ("transformers_cache", "transformers_decoder"):
        monkeypatch.delitem(sys.modules, f"bitnet_ops.integrations.{name}", raising=False)
        monkeypatch.delattr(f"bitnet_ops.integrations.{name}", raising=False)
    monkeypatch.setattr(accelerating, "_has_warned", False)
    model = bitnet_ops.accelerate(shipped_model())
    again = bitnet_ops.accelerate(shipped_model())
    warned = [str(one.message) for one in recwarn if "bitnet_ops:" in str(one.message)]
    assert len(warned) == 1
    assert "TopKLogitsWarper" in warned[0]
    assert type(model.model).__module__.startswith("transformers.")
    ids = torch.tensor([[5, 6, 7, 8]])
    fast = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)(ids)
    assert (model(ids).logits - fast).abs().amax(-1).median() < 1e-3 * fast.abs().max()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_bfloat16(trained, tokenizer) -> None:
    """Keeps its dtype, and scales stay float32; so are the scores, which are not rounded once more."""
    model = copy.deepcopy(trained).bfloat16()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float32
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.float32
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, ids.shape[1] + 2)


def test_a_shared_layer_stays_one() -> None:
    layer = their_layer("offline", norm=False)
    net = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    bitnet_ops.accelerate(net)
    assert isinstance(net["a"], BitLinear)
    assert net["a"] is net["b"][0]


def test_a_layer_alone_and_its_mode() -> None:
    layer = their_layer("offline", norm=True).eval()
    new = bitnet_ops.accelerate(layer)
    assert isinstance(new, NormedBitLinear)
    assert not new.training
    assert bitnet_ops.accelerate(nn.Sequential(their_layer("online", norm=False)).train())[0].training


def test_a_derived_class_is_left_alone() -> None:
    class Other(theirs.AutoBitLinear):
        pass

    other = Other(8, 8, bias=False)
    net = bitnet_ops.accelerate(nn.Sequential(other, their_layer("offline", norm=False)))
    assert net[0] is other


def test_errors() -> None:
    with pytest.raises(TypeError, match="model: expected a loaded transformers model, got str"):
        bitnet_ops.accelerate("bitnet-b1.58-2B-4T")
    with pytest.raises(ValueError, match=r"AutoBitLinear or BitLinear of transformers.*got none in Linear$"):
        bitnet_ops.accelerate(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="are those of bitnet_ops already"):
        bitnet_ops.accelerate(nn.Sequential(BitLinear(4, 4)))
    for broken, match in (
        (nn.Sequential(their_layer("offline", norm=False)).to("meta"), "0: .*'meta'; load its weights first"),
        (with_hook(their_layer("offline", norm=False)), "0: .*hooks would be lost"),
        (with_weight("offline", torch.full((28, 40), 0.5)), "0: .*expected weights in {-1, 0, 1}"),
        (with_weight("bitlinear", torch.full((7, 40), 255, dtype=torch.uint8)), "0: .*got a code 3"),
        (with_weight("bitlinear", torch.zeros(6, 40, dtype=torch.uint8)), r"0: .*\[28, 40\], got \[6, 40\]"),
    ):
        layer = broken[0]
        with pytest.raises(ValueError, match=match):
            bitnet_ops.accelerate(broken)
        assert broken[0] is layer


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: None)
    return nn.Sequential(layer)


def with_weight(kind: str, weight: torch.Tensor) -> nn.Module:
    layer = their_layer(kind, norm=False)
    layer.weight = weight if kind == "bitlinear" else nn.Parameter(weight)
    return nn.Sequential(layer)


def test_zero_scale_of_a_packed_layer() -> None:
    """Its reciprocal is infinite."""
    layer = their_layer("bitlinear", norm=False)
    layer.weight_scale.zero_()
    with pytest.raises(ValueError, match="expected a finite weight scale, got \\[inf\\]"):
        bitnet_ops.accelerate(layer)


def test_cannot_be_saved_as_if_it_were_theirs(trained, tmp_path) -> None:
    with pytest.raises(NotImplementedError, match="got one with the layers of bitnet_ops"):
        trained.save_pretrained(tmp_path)


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    example = Path(__file__).parent.parent / "examples" / "accelerate_transformers.py"
    folder = tiny_folder(tmp_path / "model")
    command = [sys.executable, example, folder, "--eager", "--prompt-tokens", "4", "--new-tokens", "3"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert re.fullmatch(
        r"transformers: .* tokens/s, .* GB\naccelerate: .* s\naccelerated: .* tokens/s, .* GB\n", run.stdout
    )
