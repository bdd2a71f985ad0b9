"""Accelerated models of transformers: layers in one operator, our cache inside theirs, the certified head.

What the fast path gives is compared with our own model, which it has to equal bit for bit, and the way back
to transformers' own forward pass with that pass. tests/test_accelerate.py has texts that transformers writes.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import bitnet_ops

transformers = pytest.importorskip("transformers")
from their_models import LLAMA_FORMATS, make_llama, shipped_model  # noqa: E402
from transformers import DynamicCache, Qwen3Config, StaticCache  # noqa: E402

from bitnet_ops.integrations import transformers_decoder as decoder  # noqa: E402
from bitnet_ops.integrations.transformers_cache import SharedLayer  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager")

CACHE = decoder.CACHE
IDS = torch.randint(4000, (3, 14), generator=torch.Generator().manual_seed(2))
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def ours() -> bitnet_ops.BitNet:
    return bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)


@pytest.fixture(scope="module")
def accelerated() -> nn.Module:
    return bitnet_ops.accelerate(shipped_model())


@pytest.fixture
def model(accelerated: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Counts, in ``slow``, passes through transformers' own decoder."""
    accelerated.slow = 0
    original = decoder.bitnet.BitNetModel.forward

    def counting(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        accelerated.slow += 1
        return original(self, *arguments, **options)

    monkeypatch.setattr(decoder.bitnet.BitNetModel, "forward", counting)
    return accelerated


def test_equals_our_model(model: Any, ours: bitnet_ops.BitNet) -> None:
    """With and without a cache, in steps of several tokens, from embeddings, with bfloat16 tables too."""
    assert torch.equal(model(IDS).logits, ours(IDS))
    assert torch.equal(model(IDS, use_cache=False).logits, ours(IDS))
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(IDS)).logits, ours(IDS))
    cache = DynamicCache(config=model.config)
    parts = [model(ids, **{CACHE: cache}).logits for ids in IDS.split((9, 1, 4), dim=1)]
    assert torch.equal(torch.cat(parts, 1), ours(IDS))
    assert cache.get_seq_length() == 14
    low = copy.deepcopy(model)
    low.model.embed_tokens.bfloat16()  # the head has the same table
    assert torch.equal(low(IDS).logits, ours(IDS))
    assert model.slow == 0


def test_left_padding(model: Any, ours: bitnet_ops.BitNet) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :5] = mask[2, :1] = 0
    real = mask.bool()
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert torch.equal(model(IDS, **inputs).logits[real], ours(IDS, attention_mask=mask)[real])
    new = model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(new, ours.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False))
    assert model.slow == 0


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("form", LLAMA_FORMATS)
def test_llamas(tmp_path: Any, form: str, norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_llama(tmp_path, form, norms=norms, attention_bias=True, mlp_bias=True, **LLAMA)
    fast = bitnet_ops.accelerate(pair.theirs)
    monkeypatch.setattr(decoder.llama.LlamaModel, "forward", None)
    ids = IDS % 97
    if form == "online":  # their scale of masters is rounded otherwise
        assert close(fast(ids).logits, pair.ours(ids))
    else:
        assert torch.equal(fast(ids).logits, pair.ours(ids))


def test_qwen3(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_llama(tmp_path, "bitlinear", config_class=Qwen3Config, **LLAMA)
    fast = bitnet_ops.accelerate(pair.theirs)
    monkeypatch.setattr(decoder.qwen3.Qwen3Model, "forward", None)
    ids = IDS % 97
    assert torch.equal(fast(ids).logits, pair.ours(ids))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for rows where a rounding to int8 flipped: the median row agrees to some hundred roundings."""
    difference = (a - b).abs().flatten(1).amax(1).median()
    return bool(difference < 1000 * 2.0**-24 * b.abs().max())


def test_what_the_cache_holds(model: Any) -> None:
    """Read as theirs it has their keys and values, and their attention can go on with it."""
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    fast = model.model(IDS, **inputs)
    with watched(model.model.layers[0].mlp):
        slow = model.model(IDS, **inputs)
    assert model.slow == 1
    mine, other = getattr(fast, CACHE).layers[0], getattr(slow, CACHE).layers[0]
    assert type(mine) is SharedLayer
    real = mask.bool()
    for name in ("keys", "values"):
        a, b = (getattr(layer, name).transpose(1, 2)[real] for layer in (mine, other))
        assert (a - b).abs().max() < 1e-4 * b.abs().max(), name
    with watched(model.model.layers[0].mlp):
        next_slow = model(IDS[:, :1], **{CACHE: getattr(fast, CACHE)}).logits
    assert not isinstance(getattr(getattr(fast, CACHE).layers[0], "shared", None), decoder.FastLayers)
    assert next_slow.shape == (3, 1, 4096)


class watched:
    """A forward hook on a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.seen = module, 0

    def __enter__(self) -> "watched":
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.seen += 1

        self.handle = self.module.register_forward_hook(hook)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_who_looks_sees(model: Any) -> None:
    """Hooks anywhere in the decoder, and outputs of layers."""
    expected = model(IDS).logits
    for name in ("layers.1", "layers.1.self_attn.q_proj", "layers.0.input_layernorm", "norm"):
        with watched(model.model.get_submodule(name)) as hook:
            assert close(model(IDS).logits, expected)
        assert hook.seen == 1, name
    assert len(model(IDS, output_hidden_states=True).hidden_states) == model.config.num_hidden_layers + 1
    before = model.slow
    assert torch.equal(model(IDS).logits, expected)
    assert model.slow == before, "fast again when nobody looks"


def test_changed_weights_are_seen(model: Any) -> None:
    changed = copy.deepcopy(model)
    expected = changed(IDS).logits
    with torch.no_grad():
        changed.model.layers[2].input_layernorm.weight.mul_(1.5)
        changed.model.norm.weight.mul_(0.5)
    assert not close(changed(IDS).logits, expected)
    with torch.no_grad():
        changed.model.layers[2].input_layernorm.weight.div_(1.5)
        changed.model.norm.weight.div_(0.5)
    assert torch.equal(changed(IDS).logits, expected)
    bitnet_ops.repack(changed, "row")
    assert torch.equal(changed(IDS).logits, expected)
    changed.model.layers[1] = nn.Sequential(changed.model.layers[1])
    before = model.slow
    with pytest.raises(
        TypeError
    ):  # a sequence does not take their arguments: what matters is that it was called
        changed(IDS)
    assert model.slow == before + 1


@pytest.mark.parametrize("mask", ["right", "holes", "four dimensions"])
def test_other_masks(model: Any, mask: str) -> None:
    given = torch.ones_like(IDS)
    if mask == "right":
        given[0, -3:] = 0
    elif mask == "holes":
        given[0, 4:6] = 0
    else:
        given = torch.ones(14, 14).tril().log().expand(3, 1, 14, 14)
    model(IDS, attention_mask=given)
    assert model.slow == 1


def test_positions_of_the_caller(model: Any) -> None:
    model(IDS, position_ids=torch.arange(14).unsqueeze(0))
    assert model.slow == 0
    model(IDS, position_ids=torch.arange(1, 15).unsqueeze(0))
    assert model.slow == 1


def test_static_cache(model: Any, ours: bitnet_ops.BitNet) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert close(model(IDS, **{CACHE: cache}).logits, ours(IDS))
    assert model.slow == 1


def test_gradients(model: Any) -> None:
    """A model with adapters trains as before."""
    trained = copy.deepcopy(model)
    trained.model.norm.weight.requires_grad_()
    trained(IDS).logits.sum().backward()
    assert trained.model.norm.weight.grad is not None


def test_beams(model: Any) -> None:
    """Rows of the cache change places, and are repeated."""
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    fast = model.generate(IDS, **options)
    assert model.slow == 0
    with watched(model.model.layers[0].mlp):
        assert torch.equal(model.generate(IDS, **options), fast)
    assert model.slow > 0


def test_copies_and_pickles(model: Any) -> None:
    expected = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    file = io.BytesIO()
    decoder_alone = bitnet_ops.accelerate(shipped_model()).model
    pickle.dump(decoder_alone, file)
    file.seek(0)
    again = pickle.load(file)
    assert type(again) is decoder.FastBitNetModel
    assert torch.equal(again(IDS).last_hidden_state, decoder_alone(IDS).last_hidden_state)


def test_architecture_keeps_its_name(model: Any) -> None:
    assert type(model).__name__ == "BitNetForCausalLM"
    assert isinstance(model, transformers.BitNetForCausalLM)


@pytest.fixture
def certified(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the certified head was asked for, call by call."""
    asked: list[int] = []
    top_k = decoder.ScreenedHead.top_k

    def counting(self: Any, hidden: Any, k: int, *rest: Any) -> Any:
        asked.append(k)
        return top_k(self, hidden, k, *rest)

    monkeypatch.setattr(decoder, "LEAST_BYTES", 0)
    monkeypatch.setattr(decoder.ScreenedHead, "top_k", counting)
    return asked


def test_greedy_generation_uses_the_certified_head(model: Any, certified: list[int]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False}
    new = model.generate(IDS, **options)
    assert certified == [1] * 6
    whole = model.generate(IDS, **options, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(whole.sequences, new)
    assert whole.logits[0].isfinite().all()
    model.generate(IDS, **options, repetition_penalty=1.3)
    assert certified == [1] * 6, "with a processor all scores count"
    assert model(IDS).logits.isfinite().all()


def test_sampling_of_the_best_tokens(model: Any, certified: list[int]) -> None:
    """The same tokens as from all scores."""
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    torch.manual_seed(3)
    new = model.generate(IDS, **options)
    assert certified == [5] * 6
    torch.manual_seed(3)
    whole = model.generate(IDS, **options, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(whole.sequences, new)
    model.generate(IDS, max_new_tokens=2, do_sample=True, top_k=0)
    assert len(certified) == 6


def test_sampled_rows_stay_normal_distributions(model: Any, certified: list[int]) -> None:
    """One token wanted: it is the best one."""
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, max_new_tokens=4, do_sample=False))


def test_threads_do_not_see_each_others_settings(model: Any, certified: list[int]) -> None:
    """One thread wants the best token only while another one wants all scores of the same head."""
    hidden = torch.randn(1, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(4))
    with decoder._best_only(model.lm_head, 1), ThreadPoolExecutor(1) as pool:
        other = pool.submit(model.lm_head, hidden).result()
        own = model.lm_head(hidden)
    assert other.isfinite().all()
    assert int(own.isfinite().sum()) == 1
    assert own.max() == other.max()
