"""Drafts change nothing but the number of passes; and they are made where they pay."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_models import tiny_model
from torch import Tensor, nn

from bitnet_ops import BitNet
from bitnet_ops.decoder.cache import KVCache
from bitnet_ops.generation import loop as decoding
from bitnet_ops.generation.drafts import (
    CREDIT_PASSES,
    CREDIT_SHARE,
    FIRST_SLOPE,
    LONGEST_MATCH,
    PromptLookup,
    TextMatches,
)
from bitnet_ops.layers.linear import BitLinearQAT

MODEL = tiny_model(eos=None)
PROMPT = [5, 80, 200, 7, 7, 301]
NEW = 40

CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with penalty": {"repetition_penalty": 1.3},
    "noise": {"do_sample": True, "top_k": 0, "seed": 1},
    "noise, hot": {"do_sample": True, "top_k": 0, "temperature": 1.7, "seed": 1},
    "top-k": {"do_sample": True, "top_k": 5, "seed": 2},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.7, "seed": 3},
    "top-k, top-p": {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.8, "seed": 4},
    "min-p": {"do_sample": True, "top_k": 30, "min_p": 0.1, "seed": 5},
    "all": {
        "do_sample": True, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 6,
    },
}  # fmt: skip


def one(ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)])


def plain(prompt: Sequence[int], *, model: BitNet = MODEL, **arguments: Any) -> list[int]:
    arguments = {"max_new_tokens": NEW, **arguments}
    ids = model.generate(one(prompt), prompt_lookup_num_tokens=0, **arguments)
    return ids[0, len(prompt) :].tolist()


def with_drafts(prompt: Sequence[int], *, model: BitNet = MODEL, **arguments: Any) -> list[int]:
    arguments = {"max_new_tokens": NEW, **arguments}
    return model.generate(one(prompt), **arguments)[0, len(prompt) :].tolist()


@pytest.fixture(params=[False, True], ids=["all logits", "certified head"])
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small heads are not certified by themselves."""
    monkeypatch.setattr(MODEL, "certified_head", request.param)


class Oracle:
    """Stands in for `PromptLookup`: drafts the true text, of which every seventh token is made wrong.

    So drafts are right to the end, wrong in any place, and of any length up to 9.
    """

    def __init__(self, text: Sequence[int], wrong: int = 9) -> None:
        self.text = text
        self.wrong = wrong
        self.done = 0
        self.accepted = self.passes = 0
        self.lengths = itertools.cycle([3, 0, 9, 1, 5, 2])

    def draft(self, room: int) -> list[int]:
        assert room >= 0
        length = min(next(self.lengths), room)
        true = self.text[self.done : self.done + length]
        # Behind the text, as where it ends with a stop string, anything may be drafted.
        true = [*true, *[self.wrong] * (length - len(true))]
        return [self.wrong if (self.done + i) % 7 == 6 else token for i, token in enumerate(true)]

    def note(self, drafted: int, tokens: Sequence[int], seconds: float | None) -> None:
        assert 1 <= len(tokens) <= drafted + 1
        self.done += len(tokens)
        self.accepted += len(tokens) - 1
        self.passes += 1


def use_oracle(monkeypatch: pytest.MonkeyPatch, text: Sequence[int], wrong: int = 9) -> Oracle:
    oracle = Oracle(text, wrong)
    monkeypatch.setattr(decoding, "_prompt_lookup", lambda *_: oracle)
    return oracle


class Clock:
    """Every pass takes a second, so drafts cost next to nothing and are made wherever there is a guess."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass, as they happen."""
    lengths: list[int] = []
    hidden_states = BitNet.hidden_states

    def counting(self: BitNet, input_ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return hidden_states(self, input_ids, *rest, **named)

    monkeypatch.setattr(BitNet, "hidden_states", counting)
    return lengths


# ---- the same text ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("choice", CHOICES)
def test_text_is_the_same_whatever_is_drafted(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = CHOICES[choice]
    text = plain(PROMPT, **arguments)
    assert len(set(text)) > 3
    oracle = use_oracle(monkeypatch, text)
    assert with_drafts(PROMPT, **arguments) == text
    assert oracle.accepted > NEW // 3, "the draft is right most of the time"
    assert oracle.passes < NEW


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("prompt", [PROMPT, [9], [3, 1, 4, 1, 5, 9, 2, 6] * 4], ids=len)
def test_text_is_the_same_with_drafts_from_the_text(
    choice: str, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "time", Clock())
    arguments = {**CHOICES[choice], "max_new_tokens": 150}
    assert with_drafts(prompt, **arguments) == plain(prompt, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_text_is_the_same_with_every_cache(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    text = plain(PROMPT, cache_dtype=dtype)
    use_oracle(monkeypatch, text)
    assert with_drafts(PROMPT, cache_dtype=dtype) == text


def test_padding_in_front_of_a_single_row() -> None:
    padded = torch.tensor([[0, 0, 0, *PROMPT]])
    mask = torch.tensor([[0, 0, 0] + [1] * len(PROMPT)])
    new = [
        MODEL.generate(padded, attention_mask=mask, max_new_tokens=100, prompt_lookup_num_tokens=most)
        for most in (0, 10)
    ]
    assert torch.equal(new[0], new[1])
    assert new[0][0, 9:].tolist() == plain(PROMPT, max_new_tokens=100)


def test_trained_weights_before_packing() -> None:
    torch.manual_seed(0)
    model = BitNet(MODEL.config, BitLinearQAT).eval()
    arguments = {"model": model, "max_new_tokens": 30}
    assert with_drafts(PROMPT, **arguments) == plain(PROMPT, **arguments)


# ---- endings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["greedy", "noise", "all"])
@pytest.mark.parametrize("length", [1, 2, 9, 10, 33])
def test_length(choice: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = plain(PROMPT, **CHOICES[choice])
    use_oracle(monkeypatch, text)
    assert with_drafts(PROMPT, **CHOICES[choice], max_new_tokens=length) == text[:length]


@pytest.mark.parametrize("choice", ["greedy", "top-k"])
def test_the_context_may_be_filled(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = (PROMPT * 50)[: MODEL.config.max_position_embeddings - 30]
    text = plain(prompt, **CHOICES[choice], max_new_tokens=30)
    use_oracle(monkeypatch, text)
    assert with_drafts(prompt, **CHOICES[choice], max_new_tokens=30) == text


@pytest.mark.usefixtures("head")
def test_end_token_within_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = CHOICES["noise"]
    text = plain(PROMPT, **arguments)
    for eos in set(text):
        use_oracle(monkeypatch, text)
        assert with_drafts(PROMPT, **arguments, eos_token_id=eos) == text[: text.index(eos) + 1]


def test_stop_string_within_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MODEL.tokenizer is not None
    text = plain(PROMPT, **CHOICES["noise"])
    words = MODEL.tokenizer.decode(text)
    for start in range(0, len(words) - 2, 5):
        stop = words[start : start + 2]
        arguments = {**CHOICES["noise"], "stop_strings": [stop]}
        monkeypatch.undo()
        expected = plain(PROMPT, **arguments)
        stream = MODEL.stream(PROMPT, max_new_tokens=NEW, prompt_lookup_num_tokens=0, **arguments)
        pieces, reason = "".join(stream), stream.finish_reason
        use_oracle(monkeypatch, text)
        assert with_drafts(PROMPT, **arguments) == expected
        drafted = MODEL.stream(PROMPT, max_new_tokens=NEW, **arguments)
        assert ("".join(drafted), drafted.finish_reason) == (pieces, reason)
        assert drafted.token_ids == stream.token_ids


def test_streamer_is_shown_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen.append(value)

        def end(self) -> None:
            pass

    text = plain(PROMPT)
    use_oracle(monkeypatch, text)
    with_drafts(PROMPT, streamer=Streamer())
    assert [value.tolist() for value in seen] == [[PROMPT], *([token] for token in text)]


# ---- the cache --------------------------------------------------------------------------------------


def test_cache_holds_what_it_would_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = plain(PROMPT)
    longer = [*PROMPT, *text, 50, 51]
    expected = plain(longer)
    caches = [KVCache(MODEL.config, 1, 1) for _ in range(2)]
    list(MODEL.stream_tokens(one(PROMPT), cache=caches[0], max_new_tokens=NEW, prompt_lookup_num_tokens=0))
    use_oracle(monkeypatch, text)
    for count, tokens in enumerate(MODEL.stream_tokens(one(PROMPT), cache=caches[1], max_new_tokens=NEW)):
        assert tokens.tolist() == [text[count]]
        assert caches[1].length == len(PROMPT) + count, "all but the token itself, at every step"
    assert caches[0].length == caches[1].length
    for a, b in zip(caches[0].values, caches[1].values, strict=True):
        assert torch.equal(a[:, :, : caches[0].length], b[:, :, : caches[0].length])
    # Keys lie in blocks of 64 positions; these fill less than one.
    for a, b in zip(caches[0].keys, caches[1].keys, strict=True):
        assert torch.equal(a[:, :, 0, :, : caches[0].length], b[:, :, 0, :, : caches[0].length])
    use_oracle(monkeypatch, expected)
    again = MODEL.stream_tokens(one(longer), cache=caches[1], max_new_tokens=NEW)
    assert [int(tokens) for tokens in again] == expected


def test_breaking_off_leaves_no_drafts_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    text = plain(PROMPT)
    for stop in range(1, 12):
        use_oracle(monkeypatch, text)
        cache = KVCache(MODEL.config, 1, 1)
        steps = MODEL.stream_tokens(one(PROMPT), cache=cache, max_new_tokens=NEW)
        for _ in range(stop):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        assert cache.length == len(PROMPT) + stop - 1
        rest = MODEL.stream_tokens(
            one([*PROMPT, *text[:stop]]), cache=cache, max_new_tokens=NEW - stop, prompt_lookup_num_tokens=0
        )
        assert [int(tokens) for tokens in rest] == text[stop:]


# ---- scores that are no numbers ---------------------------------------------------------------------


def model_that_stumbles(token: int, certified: bool) -> BitNet:
    """`MODEL`, but scores behind this token are NaN, and so are its keys and values."""
    model = tiny_model(eos=None)
    model.config = model.config.replace(tie_word_embeddings=False)
    model.lm_head = nn.Linear(1, 1, bias=False)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    model.certified_head = certified
    return model


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_scores_behind_a_wrong_guess_may_be_anything(
    choice: str, certified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = plain(PROMPT, **CHOICES[choice])
    wrong = next(token for token in range(10, 400) if token not in (*PROMPT, *text))
    model = model_that_stumbles(wrong, certified)
    oracle = use_oracle(monkeypatch, text, wrong)
    assert with_drafts(PROMPT, model=model, **CHOICES[choice]) == text
    assert oracle.passes < NEW


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("choice", ["greedy", "noise", "top-k", "all"])
def test_bad_scores_are_refused_where_they_count(
    choice: str, certified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = plain(PROMPT, **CHOICES[choice])
    bad = next(token for token in text[12:] if token not in PROMPT)
    model = model_that_stumbles(bad, certified)
    use_oracle(monkeypatch, text)
    steps = model.stream_tokens(one(PROMPT), max_new_tokens=NEW, **CHOICES[choice])
    end = text.index(bad) + 1
    assert [int(next(steps)) for _ in range(end)] == text[:end]
    with pytest.raises(FloatingPointError, match="logits: expected finite scores"):
        next(steps)


# ---- fewer passes -----------------------------------------------------------------------------------


def test_fewer_passes_where_the_text_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "time", Clock())
    text = plain(PROMPT, max_new_tokens=240)
    assert len(set(text[-60:])) < 30, "this model ends up in a circle"
    lengths = count_passes(monkeypatch)
    assert plain(PROMPT, max_new_tokens=240) == text
    assert lengths == [len(PROMPT)] + [1] * 239
    lengths.clear()
    assert with_drafts(PROMPT, max_new_tokens=240) == text
    assert len(lengths) < 240 * 0.75
    assert max(lengths[1:]) == 11, "10 tokens are drafted at most by default"
    lengths.clear()
    assert with_drafts(PROMPT, max_new_tokens=240, prompt_lookup_num_tokens=3) == text
    assert max(lengths[1:]) == 4


def test_no_drafts_for_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PromptLookup", None)
    ids = MODEL.generate(torch.tensor([PROMPT, PROMPT]), max_new_tokens=5, prompt_lookup_num_tokens=10)
    assert ids.shape == (2, len(PROMPT) + 5)


def test_no_drafts_where_passes_may_differ_in_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PromptLookup", None)
    torch.manual_seed(0)
    BitNet(MODEL.config, nn.Linear).eval().generate(one(PROMPT), max_new_tokens=3)
    BitNet(MODEL.config, BitLinearQAT).train().generate(one(PROMPT), max_new_tokens=3)
    with pytest.raises(TypeError):  # None cannot be called: here drafts would have been made
        MODEL.generate(one(PROMPT), max_new_tokens=3)


def test_setting_of_the_generation_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Lookup(PromptLookup):
        def __init__(self, ids: Sequence[int], most: int) -> None:
            super().__init__(ids, most)
            asked.append(most)

    monkeypatch.setattr(decoding, "PromptLookup", Lookup)
    model = tiny_model(eos=None)
    model.generate(one(PROMPT), max_new_tokens=1)
    model.generation_config = {"prompt_lookup_num_tokens": 4}
    model.generate(one(PROMPT), max_new_tokens=1)
    model.generate(one(PROMPT), max_new_tokens=1, prompt_lookup_num_tokens=6)
    assert asked == [10, 4, 6]
    model.generation_config = {"prompt_lookup_num_tokens": -1}
    with pytest.raises(ValueError, match="generation_config: prompt_lookup_num_tokens: expected an int >= 0"):
        model.generate(one(PROMPT))


# ---- guesses ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 12))
def test_guess_comes_from_a_place_that_ran_alike(text: list[int], count: int) -> None:
    guess = TextMatches(text).guess(count)
    places = [place for place in range(1, len(text)) if text[place - 1] == text[-1]]
    if not places:
        assert guess == []
        return

    def match(place: int) -> int:
        longest = min(place, LONGEST_MATCH)
        return next((n for n in range(longest, 0, -1) if text[place - n : place] == text[len(text) - n :]), 0)

    longest = max(map(match, places))
    assert guess in [
        [text[place + i % (len(text) - place)] for i in range(count)]
        for place in places
        if match(place) == longest
    ]


def test_chances_follow_experience() -> None:
    circle = TextMatches([1, 2, 3, 4] * 10)
    assert all(chance > 0.8 for chance in circle.chances(5))
    # De Bruijn's: every pair of four tokens once, so that a token is followed by each of them equally often.
    pairs = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3]
    assert all(chance < 0.2 for chance in TextMatches(pairs).chances(1))
    changed = TextMatches([1, 2, 3, 4] * 40)
    for token in torch.randint(4, (200,), generator=torch.Generator().manual_seed(0)).tolist():
        changed.push(token)
    assert all(chance < 0.5 for chance in changed.chances(1)), "old experience fades"


def simulate(text: Sequence[int], slope: float) -> float:
    """Time of a text in passes, where a drafted token costs ``slope`` of one."""
    lookup = PromptLookup(text[:1], most=10)
    done, time = 1, 0.0
    while done < len(text):
        draft = lookup.draft(len(text) - done - 1)
        assert len(draft) <= 10
        right = next((i for i, t in enumerate(draft) if text[done + i] != t), len(draft))
        seconds = 1 + slope * len(draft)
        lookup.note(len(draft), text[done : done + right + 1], seconds)
        time += seconds
        done += right + 1
    return time


@given(st.lists(st.integers(0, 5), min_size=2, max_size=300), st.floats(0, FIRST_SLOPE))
def test_drafts_never_lose_more_than_their_credit(text: list[int], slope: float) -> None:
    tokens = len(text) - 1
    # Where a draft costs less than a hundredth, LEAST_SLOPE, the books are on the safe side.
    assert simulate(text, slope) <= tokens + CREDIT_PASSES + CREDIT_SHARE * tokens + 1e-9


def test_repetition_is_used() -> None:
    text = torch.randint(1000, (40,), generator=torch.Generator().manual_seed(0)).tolist() * 6
    # 40 tokens and a few at the beginning of the first repetition one by one, the others by elevens.
    assert simulate(text, 0.2) < 40 + 10 + 200 * (1 + 10 * 0.2) / 11 + 1


def test_a_single_slow_pass_changes_little() -> None:
    text = [1, 2, 3, 4, 5] * 40
    lookup = PromptLookup(text[:20], most=4)
    lookup.note(0, text[20:21], None)
    assert lookup.draft(100) == [], "not before a pass has been measured"
    lookup.note(0, text[21:22], 1.0)
    for step in range(5):
        draft = lookup.draft(100)
        assert draft
        begin = 22 + step
        lookup.note(len(draft), text[begin : begin + 1 + len(draft)], 1000.0 if step == 2 else 1.2)
    assert lookup.draft(100)
