"""The decoding loop: greedy against a loop without a cache, batches, endings, streams, wrong arguments."""

import itertools
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from text_models import CORPUS, assert_greedy, tiny_model
from torch import Tensor

from bitnet_ops import BitNet
from bitnet_ops.decoder.cache import KVCache
from bitnet_ops.decoder.config import BitNetConfig
from bitnet_ops.generation import loop as decoding
from bitnet_ops.layers.linear import BitLinearQAT

MODEL = tiny_model(eos=None)
"""Never ends by itself, so that lengths are known."""

PROMPTS = [[5, 80, 200, 7, 7, 301], [9], [300, 4, 17]]


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def new_ids(model: BitNet, prompt: list[int], **arguments: Any) -> list[int]:
    ids: list[int] = model.generate(one(prompt), **arguments)[0, len(prompt) :].tolist()
    return ids


# ---- greedy and batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_a_loop_without_cache(prompt: list[int]) -> None:
    new = new_ids(MODEL, prompt, max_new_tokens=24)
    assert len(new) == 24
    assert len(set(new)) > 3, "a model that repeats itself shows little"
    assert_greedy(MODEL, prompt, new)


def test_batch_of_unequal_prompts_equals_one_by_one() -> None:
    batch = MODEL.encode(PROMPTS)
    ids = MODEL.generate(**batch, max_new_tokens=12)
    assert ids.dtype == torch.int64
    assert ids.shape == (3, 6 + 12)
    assert torch.equal(ids[:, :6], batch["input_ids"])
    for row, prompt in enumerate(PROMPTS):
        assert_greedy(MODEL, prompt, ids[row, 6:].tolist())


def test_repetition_penalty_ignores_padding() -> None:
    # The pad id, 0, is also the id the model would like best here: only padding was "seen".
    prompt = [9]
    free = new_ids(MODEL, prompt, max_new_tokens=1)[0]
    batch = MODEL.encode([[7] * 5, prompt])
    batch["input_ids"][1, :4] = free
    ids = MODEL.generate(**batch, max_new_tokens=1, repetition_penalty=50.0)
    assert ids[1, -1] == free


def test_a_mask_without_padding_changes_nothing() -> None:
    ids = torch.tensor(PROMPTS[0]).expand(2, -1).contiguous()
    assert torch.equal(
        MODEL.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6),
        MODEL.generate(ids, max_new_tokens=6),
    )


def test_inputs_are_unchanged_and_outputs_can_be_trained_on() -> None:
    batch = MODEL.encode(PROMPTS)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    ids = MODEL.generate(**batch, max_new_tokens=3)
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    trainee = torch.nn.Embedding(MODEL.config.vocab_size, 4)
    trainee(ids).sum().backward()  # refused for tensors from inference mode
    assert trainee.weight.grad is not None


def test_gradients_stay_on_for_the_caller_of_a_stream() -> None:
    steps = MODEL.stream_tokens(one([9]), max_new_tokens=3)
    next(steps)
    assert torch.is_grad_enabled()


def test_vocabulary_smaller_than_top_k() -> None:
    config = BitNetConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = BitNet(config).eval()
    ids = model.generate(one([1]), do_sample=True, top_k=50, max_new_tokens=20, seed=0)
    assert ids.shape == (1, 21)
    assert ids.max() < 11


# ---- sampling ---------------------------------------------------------------------------------------


def test_same_seed_same_text() -> None:
    batch = MODEL.encode(PROMPTS)
    first, again, other = (
        MODEL.generate(**batch, do_sample=True, max_new_tokens=16, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampled_row_does_not_depend_on_the_batch() -> None:
    prompt = PROMPTS[0]  # the longest, so that no padding moves it
    alone = MODEL.generate(one(prompt), do_sample=True, max_new_tokens=3, seed=3, top_k=5)
    together = MODEL.generate(**MODEL.encode(PROMPTS), do_sample=True, max_new_tokens=3, seed=3, top_k=5)
    assert torch.equal(together[:1], alone)


def test_settings_come_from_the_generation_config() -> None:
    model = tiny_model(eos=None)
    model.generation_config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_new_tokens": 7,
        "top_k": None,
    }
    sampled = new_ids(model, [9], seed=1)
    assert len(sampled) == 7
    explicit = dict(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=7, seed=1)
    assert sampled == new_ids(MODEL, [9], **explicit)
    assert new_ids(model, [9], do_sample=False) == new_ids(MODEL, [9], max_new_tokens=7)
    model.generation_config = {
        "eos_token_id": [sampled[2]],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert new_ids(model, [9], seed=1) == sampled[: sampled.index(sampled[2]) + 1]
    assert len(new_ids(model, [9], seed=1, eos_token_id=())) == 64
    model.generation_config = {"temperature": "hot"}
    with pytest.raises(ValueError, match=r"generation_config: temperature: expected .*, got 'hot'"):
        model.generate(one([9]))


def test_sampling_settings_without_sampling_warn() -> None:
    with pytest.warns(UserWarning, match="temperature: no effect while do_sample is False") as record:
        MODEL.generate(one([9]), temperature=0.5, max_new_tokens=1)
    assert record[0].filename == __file__


# ---- endings ----------------------------------------------------------------------------------------


def test_end_token_ends_a_row_and_padding_fills_it() -> None:
    batch = MODEL.encode(PROMPTS)
    free = MODEL.generate(**batch, max_new_tokens=10)[:, 6:]
    eos = int(free[1, 3])
    ends = [row.tolist().index(eos) + 1 if eos in row else 10 for row in free]
    assert len(set(ends)) > 1, "rows should end at different places here"
    ids = MODEL.generate(**batch, max_new_tokens=10, eos_token_id=eos, pad_token_id=2)[:, 6:]
    assert ids.shape[1] == max(ends)
    for row, end in enumerate(ends):
        assert torch.equal(ids[row, :end], free[row, :end])
        assert (ids[row, end:] == 2).all()
    # Without a pad id the end token fills.
    ids = MODEL.generate(**batch, max_new_tokens=10, eos_token_id=[eos])[:, 6:]
    assert all((ids[row, end:] == eos).all() for row, end in enumerate(ends))


def test_no_pass_is_wasted_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = BitNet.forward
    monkeypatch.setattr(BitNet, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    MODEL.generate(one([9]), max_new_tokens=5, prompt_lookup_num_tokens=0)
    assert len(calls) == 5


SEED = 15
"""Its text has, late enough, three printable characters that span two tokens: `spanning_stop`."""


def sampled_text(seed: int = SEED) -> tuple[list[int], str]:
    ids = new_ids(MODEL, [9], do_sample=True, max_new_tokens=40, seed=seed)
    assert MODEL.tokenizer is not None
    return ids, MODEL.tokenizer.decode(ids)


def spanning_stop() -> tuple[str, int]:
    """A piece of the sampled text that begins in one token and ends in a later one, and the count by then."""
    ids, _ = sampled_text()
    assert MODEL.tokenizer is not None
    for end in range(8, len(ids)):
        before, pair = MODEL.tokenizer.decode(ids[: end - 1]), MODEL.tokenizer.decode(ids[: end + 1])
        stop = pair[len(before) - 1 : len(before) + 2]
        if stop.isascii() and stop.isprintable() and len(stop) == 3 and pair.find(stop) == len(before) - 1:
            done = next(n for n in range(1, end + 2) if stop in MODEL.tokenizer.decode(ids[:n]))
            if done == end + 1:
                return stop, done
    raise AssertionError("choose another seed")


def test_stop_string_over_several_tokens() -> None:
    ids, text = sampled_text()
    stop, count = spanning_stop()
    settings = dict(do_sample=True, max_new_tokens=40, seed=SEED, stop_strings=["never this", stop])
    assert new_ids(MODEL, [9], **settings) == ids[:count]
    stream = MODEL.stream([9], **settings)
    assert "".join(stream) == text[: text.index(stop)]
    assert stream.finish_reason == "stop"
    assert stream.token_ids == ids[:count]


def test_stop_string_ends_one_row_only() -> None:
    stop, count = spanning_stop()
    ids, _ = sampled_text()
    rows = MODEL.generate(
        torch.tensor([[9], [9]]),
        do_sample=True,
        max_new_tokens=40,
        seed=SEED,
        stop_strings=stop,
        pad_token_id=1,
    )[:, 1:]
    assert rows[0, :count].tolist() == ids[:count]
    assert (rows[0, count:] == 1).all()
    assert rows.shape[1] > count


def test_stop_string_in_the_prompt_does_not_count() -> None:
    assert len(new_ids(MODEL, MODEL.encode("a single man")["input_ids"][0].tolist(), stop_strings="man",
                       max_new_tokens=4)) == 4  # fmt: skip


# ---- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_stream_adds_up_to_the_text(seed: int) -> None:
    assert MODEL.tokenizer is not None
    stream = MODEL.stream("naïve 你", do_sample=True, max_new_tokens=30, seed=seed)
    parts = list(stream)
    assert all(parts)
    assert "".join(parts) == MODEL.tokenizer.decode(stream.token_ids)
    assert stream.finish_reason == "length"
    assert len(stream.token_ids) == 30
    assert stream.prompt_ids == MODEL.tokenizer.encode("naïve 你").ids
    assert stream.prompt_seconds > 0
    assert stream.decode_seconds > 0
    same = MODEL.generate(one(stream.prompt_ids), do_sample=True, max_new_tokens=30, seed=seed)
    assert same[0].tolist() == stream.prompt_ids + stream.token_ids
    assert list(stream) == [], "a stream that has ended stays so"


def test_stream_hides_the_end_token() -> None:
    ids, _ = sampled_text()
    assert MODEL.tokenizer is not None
    eos = ids[12]
    stop = ids.index(eos)
    stream = MODEL.stream([9], do_sample=True, max_new_tokens=40, seed=SEED, eos_token_id=eos)
    assert "".join(stream) == MODEL.tokenizer.decode(ids[:stop])
    assert stream.finish_reason == "eos"
    assert stream.token_ids == ids[: stop + 1]


def test_stream_takes_text_ids_and_tensors() -> None:
    assert MODEL.tokenizer is not None
    ids = MODEL.tokenizer.encode("a wife").ids
    texts = {
        "".join(MODEL.stream(prompt, max_new_tokens=8))
        for prompt in ("a wife", ids, torch.tensor(ids), torch.tensor([ids]))
    }
    assert len(texts) == 1


def test_streamer_sees_prompt_and_tokens() -> None:
    seen: list[Tensor] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen.append(value)

        def end(self) -> None:
            seen.append(torch.tensor(-1))

    ids = MODEL.generate(one([9, 8]), max_new_tokens=3, streamer=Streamer())
    assert [value.tolist() for value in seen] == [[[9, 8]], *([token] for token in ids[0, 2:].tolist()), -1]


def test_a_cache_saves_the_tokens_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = BitNet.forward

    def counting(self: BitNet, input_ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *rest, **named)

    monkeypatch.setattr(BitNet, "forward", counting)
    cache = KVCache(MODEL.config, 1, 64)
    settings: dict[str, Any] = dict(cache=cache, max_new_tokens=5, prompt_lookup_num_tokens=0)
    prompt = list(range(10, 30))
    first = [int(tokens) for tokens in MODEL.stream_tokens(one(prompt), **settings)]
    assert cache.length == 24
    longer = [*prompt, *first, 50, 51]
    second = [int(tokens) for tokens in MODEL.stream_tokens(one(longer), **settings)]
    assert lengths == [20, 1, 1, 1, 1, 3, 1, 1, 1, 1]
    monkeypatch.undo()
    assert_greedy(MODEL, longer, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_cache_of_another_dtype(dtype: torch.dtype) -> None:
    made: list[KVCache] = []
    settings: dict[str, Any] = dict(max_new_tokens=40, do_sample=True, seed=0)
    expected = MODEL.stream_tokens(one([9]), cache=KVCache(MODEL.config, 1, 1, dtype=dtype), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "KVCache", lambda *a, **k: made.append(KVCache(*a, **k)) or made[-1])
        ids = MODEL.generate(one([9]), cache_dtype=dtype, **settings)
    assert [cache.dtype for cache in made] == [dtype]
    assert ids[0, 1:].tolist() == [int(tokens) for tokens in expected]


# ---- memory -----------------------------------------------------------------------------------------


def largest_need(model: BitNet, rows: int, tokens: int) -> int:
    """The most bytes of tensors at a time while a prompt is read, what was there before not counted."""
    ids = torch.randint(400, (rows, tokens), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, rows, tokens)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        next(model.stream_tokens(ids, cache=cache, max_new_tokens=1))
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_need_of_memory_does_not_grow_with_the_prompt(rows: int, certified: bool) -> None:
    model = tiny_model(context=2048, eos=None)
    model.certified_head = certified
    model.generate(one([1]), max_new_tokens=1)  # makes what is made once
    short, long = (largest_need(model, rows, tokens) for tokens in (520, 2040))
    assert long == short > 0


# ---- encode -----------------------------------------------------------------------------------------


def test_encode_pads_on_the_left() -> None:
    batch = MODEL.encode([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist()[0] == [5, 6, 7]
    assert batch["input_ids"][1, -1] == 8
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert MODEL.tokenizer is not None
    assert MODEL.encode("a wife")["input_ids"][0].tolist() == MODEL.tokenizer.encode("a wife").ids
    assert MODEL.encode("")["input_ids"].tolist() == [[0]], "the BOS token stands for an empty text"


def test_encode_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        MODEL.encode([])
    with pytest.raises(ValueError, match="prompt: expected at least one token, got none"):
        MODEL.encode([[1], []])
    with pytest.raises(ValueError, match=r"prompt: expected token ids in \[0, 405\), got 405"):
        MODEL.encode([[405]])
    with pytest.raises(ValueError, match=r"prompt: expected text that UTF-8 can encode, got '\\udce9'"):
        MODEL.encode("caf\udce9")
    model = tiny_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="prompt: expected a model with a tokenizer, got one without"):
        model.encode("text")
    with pytest.raises(ValueError, match="stream: expected a model with a tokenizer, got one without"):
        model.stream([1])
    assert model.generate(one([1]), max_new_tokens=1).shape == (1, 2), "ids need no tokenizer"


# ---- wrong arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive int, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens: expected a positive int, got 2.0"),
        ({"max_new_tokens": 300}, "max_new_tokens: expected the prompt and the new tokens to fit into "
                                  "max_position_embeddings = 256, got 2 + 300"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected a number above 0, got 0.0; for the"),
        ({"top_k": -1}, "top_k: expected an int >= 0 (0 keeps all tokens), got -1"),
        ({"top_p": 2}, "top_p: expected a number in [0, 1], got 2"),
        ({"min_p": -1}, "min_p: expected None or a number in [0, 1], got -1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0, got 0"),
        ({"eos_token_id": 405}, "eos_token_id: expected token ids in [0, 405), got 405"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id: expected token ids in [0, 405), got 'x'"),
        ({"pad_token_id": -1}, "pad_token_id: expected token ids in [0, 405), got -1"),
        ({"stop_strings": [""]}, "stop_strings: expected a string or several, none of them empty, got ['']"),
        ({"stop_strings": 7}, "stop_strings: expected a string or several, none of them empty, got 7"),
        ({"prompt_lookup_num_tokens": -1}, "expected an int >= 0 (0 for no drafts), got -1"),
        ({"prompt_lookup_num_tokens": 1.5}, "prompt_lookup_num_tokens: expected an int >= 0"),
        ({"cache_dtype": torch.float16}, "cache_dtype: expected one of torch.float32, torch.bfloat16, "
                                         "torch.int8, got torch.float16"),
        ({"cache_dtype": "int8"}, "torch.int8, got 'int8'"),
        ({"seed": -1}, "seed: expected an int in [0, 2**63), got -1"),
        ({"seed": "x"}, "seed: expected an int in [0, 2**63), got 'x'"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask: expected a tensor of the shape of input_ids "
                                               "[1, 2] on cpu, got [1, 3] on cpu"),
        ({"attention_mask": [[1, 1]]}, "attention_mask: expected a tensor"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "attention_mask: expected padding on the left only"),
        ({"attention_mask": torch.tensor([[0, 0]])}, "attention_mask: expected padding on the left only"),
        ({"attention_mask": torch.tensor([[2, 1]])}, "attention_mask: expected only 0 (padding) and 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MODEL.generate(one([5, 6]), **arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 2]), "input_ids: expected int64 [B, T] with at least one row and one token, got "),
        (torch.zeros(1, 0, dtype=torch.int64), "got torch.int64 [1, 0]"),
        (torch.zeros(0, 1, dtype=torch.int64), "got torch.int64 [0, 1]"),
        (torch.zeros(1, 2), "got torch.float32 [1, 2]"),
        (torch.tensor([[1, 405]]), "input_ids: expected ids in [0, 405), got 405"),
        (torch.tensor([[1, -1]]), "input_ids: expected ids in [0, 405), got -1"),
        (torch.zeros(1, 256, dtype=torch.int64), "max_position_embeddings = 256, got 256 + 1"),
        (torch.zeros(1, 1, dtype=torch.int64, device="meta"), "input_ids: expected device cpu"),
    ],
)  # fmt: skip
def test_wrong_prompts_are_named(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MODEL.generate(ids)


def test_wrong_types_and_names() -> None:
    with pytest.raises(TypeError, match="input_ids: expected a tensor int64"):
        MODEL.generate([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected argument 'max_length': expected one of max_new_tokens,"):
        MODEL.stream([1], max_length=3)  # type: ignore[call-arg]
    with pytest.raises(
        ValueError, match=re.escape("prompt: expected one prompt, [T] or [1, T], got shape [2, 1]")
    ):
        MODEL.stream(torch.tensor([[1], [2]]))


def test_arguments_are_checked_before_the_first_piece() -> None:
    with pytest.raises(ValueError, match="seed"):
        MODEL.stream_tokens(one([1]), seed=-1)


def test_wrong_caches_are_named() -> None:
    with pytest.raises(ValueError, match="cache: expected 1 rows, as input_ids has, got 2"):
        MODEL.stream_tokens(one([1]), cache=KVCache(MODEL.config, 2, 100))
    cache = KVCache(MODEL.config, 1, 100)
    with pytest.raises(ValueError, match=r"cache_dtype: expected .*float32, as cache has, got torch.int8"):
        MODEL.stream_tokens(one([1]), cache=cache, cache_dtype=torch.int8)
    cache.length = 2
    with pytest.raises(ValueError, match="cache: expected fewer tokens than the 2 of input_ids, got 2"):
        MODEL.stream_tokens(one([1, 2]), cache=cache)


def test_default_length_gives_way_to_the_context() -> None:
    assert len(new_ids(MODEL, [5] * 250)) == 6
    assert len(new_ids(MODEL, [5])) == 64


def test_stop_strings_need_something_to_fill_rows_with() -> None:
    with pytest.raises(ValueError, match="pad_token_id: expected a token id, because stop_strings"):
        MODEL.generate(torch.tensor([[1], [2]]), stop_strings="x")
    model = tiny_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="stop_strings: expected a model with a tokenizer"):
        model.generate(one([1]), stop_strings="x")


def test_dropout_would_spoil_the_text() -> None:
    model = BitNet(MODEL.config.replace(dropout=0.1), BitLinearQAT)
    with pytest.raises(ValueError, match="generate: expected the model in eval mode"):
        model.generate(one([1]))
    assert model.eval().generate(one([1]), max_new_tokens=2).shape == (1, 3)


def test_broken_weights_give_an_error_not_text() -> None:
    model = tiny_model(eos=None)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    for do_sample in (False, True):
        with pytest.raises(FloatingPointError, match="logits: expected finite scores"):
            model.generate(one([1]), do_sample=do_sample)


@pytest.mark.parametrize("how", ["stream_tokens", "stream"])
def test_a_program_may_end_in_the_middle_of_a_text(how: str) -> None:
    """The generator is closed when PyTorch's modules are empty."""
    code = (
        "import sys, torch, bitnet_ops; model = bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)\n"
        "kept = getattr(model, sys.argv[1])(torch.tensor([[1, 2, 3]]), max_new_tokens=9); next(iter(kept))"
    )
    run = subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True, text=True)
    assert run.stderr == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_switched_off_while_the_loop_computes_only(enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        for tokens in tiny_model().requires_grad_().stream_tokens(one([1]), max_new_tokens=3):
            assert torch.is_grad_enabled() == enabled
            assert not tokens.is_inference()


def test_text_of_the_corpus_survives_encoding() -> None:
    assert MODEL.tokenizer is not None
    batch = MODEL.encode(CORPUS)
    for row, text in enumerate(CORPUS):
        visible = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert MODEL.tokenizer.decode(visible.tolist()) == text
