"""Pieces of text against the text as a whole, and stop strings that must not leak."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_models import CORPUS, EOS, byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitnet_ops.generation.text_stream import REPLACEMENT, IncrementalDecoder, StopStrings

BYTE_LEVEL = byte_level_tokenizer()


def metaspace_tokenizer() -> Tokenizer:
    """BPE in the manner of Llama 2: spaces belong to the word behind them, unknown characters are bytes."""
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(CORPUS[:2], trainer)
    state = learner.model
    state.byte_fallback = True
    tokenizer = Tokenizer(state)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


METASPACE = metaspace_tokenizer()


def pieces(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, context or [])
    return [*map(decoder.push, ids), decoder.flush()]


@given(st.lists(st.integers(3, BYTE_LEVEL.get_vocab_size() - 1), max_size=40))
def test_any_bytes_add_up_to_the_whole(ids: list[int]) -> None:
    """Random byte tokens are mostly invalid UTF-8, and the pieces still add up."""
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(st.text(max_size=40))
def test_any_text_comes_in_whole_characters(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, METASPACE):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.decode(ids)
        parts = pieces(tokenizer, ids)
        assert "".join(parts) == whole
        if REPLACEMENT not in whole:
            assert not any(REPLACEMENT in part for part in parts)


def test_a_character_of_several_tokens_appears_once_and_whole() -> None:
    ids = [
        BYTE_LEVEL.token_to_id(piece) for piece in "ðŁĺĢ"
    ]  # the four bytes of the emoji, by their stand-ins
    assert None not in ids
    assert pieces(BYTE_LEVEL, ids) == ["", "", "", "😀", ""]
    assert pieces(BYTE_LEVEL, ids[:3]) == ["", "", "", REPLACEMENT]


def test_text_goes_on_behind_its_context() -> None:
    encoding = METASPACE.encode("in want of a wife")
    word = next(place for place, token in enumerate(encoding.tokens) if place and token.startswith("▁"))
    context, rest = encoding.ids[:word], encoding.ids[word:]
    head = METASPACE.decode(context)
    assert "".join(pieces(METASPACE, rest, context)) == "in want of a wife"[len(head) :]
    # Without the context the word is taken for the beginning of the text, and loses its space.
    assert "".join(pieces(METASPACE, rest)) == "in want of a wife"[len(head) + 1 :]


def test_special_tokens_give_no_text_and_no_false_beginning() -> None:
    eos = BYTE_LEVEL.token_to_id(EOS)
    ids = BYTE_LEVEL.encode(" a man").ids
    assert "".join(pieces(BYTE_LEVEL, [eos, *ids, eos, *ids])) == " a man a man"


def test_a_long_text_takes_linear_time() -> None:
    class Counting:
        decoded = 0

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            self.decoded += len(ids)
            return BYTE_LEVEL.decode(ids, skip_special_tokens=skip_special_tokens)

    tokenizer = Counting()
    ids = BYTE_LEVEL.encode(CORPUS[0] * 20).ids
    decoder = IncrementalDecoder(tokenizer)  # type: ignore[arg-type]
    text = "".join(map(decoder.push, ids))
    assert text == CORPUS[0] * 20
    assert tokenizer.decoded < 8 * len(ids)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads letter by letter, and cuts before the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab", max_size=5), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_the_same_however_text_is_split(parts: list[str], stops: list[str]) -> None:
    expected, found = cut("".join(parts), stops)
    stop = StopStrings(stops)
    shown = ""
    for part in parts:
        shown += stop.push(part)
        assert expected.startswith(shown), "what is shown can not be taken back"
    shown += stop.flush()
    assert shown == expected
    assert stop.found == found


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["\nUser:"])
    assert [stop.push(part) for part in ("Hi", "\n", "there\nUs", "ual\nUser", ": x", "y")] == [
        "Hi", "", "\nthere", "\nUsual", "", "",
    ]  # fmt: skip
    assert stop.found == "\nUser:"
    assert stop.flush() == ""


@pytest.mark.parametrize("stops", [[], ["never"]])
def test_without_a_stop_string_all_text_passes(stops: list[str]) -> None:
    stop = StopStrings(stops)
    assert stop.push("for nev") + stop.flush() == "for nev"
    assert stop.found is None
