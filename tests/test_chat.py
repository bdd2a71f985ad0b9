"""Chat templates against transformers' rendering, the sandbox, and conversations with a cache."""

import contextlib
import json
from typing import Any

import pytest
import torch
from text_models import CHAT_TEMPLATE, EOS, assert_greedy, tiny_model
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from bitnet_ops import BitNet
from bitnet_ops.generation import chat
from bitnet_ops.generation.chat import ChatSession, Continuation, render_chat

CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Grüß Gott! "},
    {"role": "assistant", "content": "你好"},
    {"role": "user", "content": "Bye\n"},
]

TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "trimmed blocks": "{{ bos_token }}\n{%- for m in messages %}\n  {{ m.role | upper }}: {{ m.content }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\nAssistant:{% endif %}",
    "lines of blocks": "  {% for m in messages %}\n    {% if loop.first %}\n{{ m['content'] }}|\n"
    "    {% endif %}\n  {% endfor %}\n",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "date": "{{ strftime_now('%Y') | length }}",
    "missing names": "{% if tools is not none %}{{ tools | length }}{% endif %}[{{ no }}]{{ documents }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_rendering_equals_transformers(name: str, add_generation_prompt: bool) -> None:
    settings = {"add_generation_prompt": add_generation_prompt, "bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template([CONVERSATION], chat_template=TEMPLATES[name], **settings)
    ours = render_chat(TEMPLATES[name], CONVERSATION, **settings)
    assert ours == expected[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "chat_template: TemplateSyntaxError in line 1: "),
        ("{{ raise_exception('only two roles') }}", "chat_template: TemplateError: only two roles"),
        ("{{ ''.__class__.__mro__ }}", "chat_template: SecurityError: "),
        ("{{ render.__globals__ }}", "chat_template: UndefinedError: "),
        ("{{ raise_exception.__globals__.os }}", "chat_template: SecurityError: "),
        ("{% set _ = messages.append(1) %}", "chat_template: SecurityError: "),
        ("{% set _ = messages[0].update({}) %}", "chat_template: SecurityError: "),
        ("{% include '/etc/passwd' %}", "chat_template: TypeError: no loader"),
        ("{{ range(1000000000) | list }}", "chat_template: OverflowError: "),
        ("{{ 1 / 0 }}", "chat_template: ZeroDivisionError: "),
        ("{{ 'a' + 1 }}", "chat_template: TypeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat_template: RecursionError: "),
        ("{{ strftime_now(3) }}", "chat_template: TypeError: "),
        ("{{ nothing.at.all }}", "chat_template: UndefinedError: "),
    ],
)
def test_faulty_and_hostile_templates(template: str, message: str) -> None:
    conversation = [dict(turn) for turn in CONVERSATION]
    with pytest.raises(ValueError, match="chat_template") as caught:
        render_chat(template, conversation)
    assert str(caught.value).startswith(message)
    assert conversation == CONVERSATION


NESTED = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
BRANCHING = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = DOUBLE %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        BRANCHING,
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * [0] }}",
        "{{ 10 ** (10 ** 10) }}",
        DOUBLING.replace("DOUBLE", "ns.x ~ ns.x"),
        DOUBLING.replace("DOUBLE", "ns.x + ns.x"),
        DOUBLING.replace("ns.x = DOUBLE", "ns.x %}{{ ns.x }}{{ ns.x }}{% endset"),
        DOUBLING.replace("'a'", "2").replace("DOUBLE", "ns.x * ns.x"),
    ],
)
def test_a_template_has_an_end(template: str) -> None:
    with pytest.raises(ValueError, match=r"chat_template: SecurityError: expected at most"):
        render_chat(template, CONVERSATION)


def test_every_rendering_may_take_as_many_steps() -> None:
    template = "{% for a in range(300) %}{% for b in range(500) %}{% endfor %}{% endfor %}{{ 'a' ~ 3 ~ no }}"
    assert [render_chat(template, CONVERSATION) for _ in range(3)] == ["a3"] * 3


@pytest.mark.parametrize("bad", [{"role": "user"}, {"role": "user", "content": 3}, "hello"])
def test_wrong_messages_are_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="messages: expected mappings with texts 'role' and 'content', got "):
        render_chat(CHAT_TEMPLATE, [bad])


# ---- sessions ---------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in every forward pass."""
    lengths: list[int] = []
    forward = BitNet.forward

    def counting(self: BitNet, input_ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *rest, **named)

    monkeypatch.setattr(BitNet, "forward", counting)
    return lengths


def test_a_turn_computes_only_what_is_new(passes: list[int]) -> None:
    model = tiny_model(eos=None, chat=True)
    session = ChatSession(model, system="Be brief.")
    first = "".join(session.reply("Hello", max_new_tokens=6, seed=0))
    assert session.last is not None
    read = session.last.prompt_ids + session.last.token_ids
    passes.clear()
    second = "".join(session.reply("And now?", max_new_tokens=6, prompt_lookup_num_tokens=0))
    assert session.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": second},
    ]
    # Only the system message and the first question are sure to be encoded as before: random bytes of a
    # random model need not survive decoding and encoding.
    prompt = session.last.prompt_ids
    same = next(n for n, (a, b) in enumerate(zip(read, prompt, strict=False)) if a != b)
    assert same >= len(model.encode("Hello")["input_ids"][0])
    assert passes[0] == len(prompt) - same
    assert passes[1:] == [1] * 5
    assert_greedy(model, prompt, session.last.token_ids)


def test_the_template_gets_the_special_tokens() -> None:
    model = tiny_model(eos=0, chat=True)
    session = ChatSession(model)
    assert session.render([{"role": "user", "content": "Hi"}]) == f"<user>Hi{EOS}\n<assistant>\n"
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(session.render([{"role": "user", "content": "Hi"}])).ids
    assert model.tokenizer.token_to_id("<assistant>") in ids, "special tokens are encoded as such"


def test_a_broken_off_answer_is_kept_and_the_conversation_goes_on() -> None:
    model = tiny_model(eos=None, chat=True)
    session = ChatSession(model)
    reply = session.reply("Hello", max_new_tokens=30)
    part = next(reply)
    reply.close()
    assert session.messages[-1] == {"role": "assistant", "content": part}
    list(session.reply("Go on", max_new_tokens=3))
    assert session.last is not None
    assert_greedy(model, session.last.prompt_ids, session.last.token_ids)


def test_an_answer_ends_where_the_context_does() -> None:
    model = tiny_model(eos=None, chat=True, context=40)
    session = ChatSession(model)
    list(session.reply("Hello", max_new_tokens=1000))
    assert session.last is not None
    assert len(session.last.prompt_ids) + len(session.last.token_ids) == 40
    before = list(session.messages)
    with pytest.raises(ValueError, match=r"conversation: expected fewer than 40 tokens \(the context\), got"):
        session.reply("More? " * 20)
    assert session.messages == before


def test_the_cache_has_the_wanted_dtype() -> None:
    model = tiny_model(eos=None, chat=True)
    for session in (ChatSession(model), Continuation(model)):
        for text in ("Hello", "And now?"):
            "".join(session.reply(text, max_new_tokens=6, cache_dtype=torch.int8))
        assert session._cache is not None
        assert session._cache.dtype == torch.int8
        assert session.last is not None
        ids = torch.tensor([session.last.prompt_ids])
        fresh = model.generate(ids, max_new_tokens=6, cache_dtype=torch.int8)
        assert fresh[0, ids.shape[1] :].tolist() == session.last.token_ids


@pytest.mark.parametrize("session_of", [ChatSession, Continuation])
def test_the_cache_grows_with_the_conversation(
    session_of: type[ChatSession] | type[Continuation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "FIRST_TOKENS", 64)
    model = tiny_model(eos=None, chat=True, context=1 << 30)  # a whole cache would take 481 GB
    session = session_of(model)
    capacities = []
    for text in ("Hello", "It is a truth", " ".join(["and"] * 90)):
        with contextlib.closing(session.reply(text)) as reply:  # may take all of the context
            for _ in zip(range(20), reply, strict=False):
                pass
        assert session._cache is not None
        assert not session._cache.keys.is_inference(), "it can be used like one that did not grow"
        capacities.append(session._cache.capacity)
        assert session.last is not None
        assert_greedy(model, session.last.prompt_ids, session.last.token_ids)
    assert capacities[0] < capacities[-1] <= 1024


def test_models_that_cannot_chat_are_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="model: expected a model with a chat template, got one without"):
        ChatSession(model)
    model.tokenizer = None
    with pytest.raises(ValueError, match="model: expected a model with a tokenizer, got one without"):
        Continuation(model)


def test_continuation_goes_on_with_one_text(passes: list[int]) -> None:
    model = tiny_model(eos=None)
    assert model.tokenizer is not None
    session = Continuation(model)
    list(session.reply("It is a truth", max_new_tokens=5))
    assert session.last is not None
    text = session.last.prompt_ids + session.last.token_ids
    assert session.ids == text
    passes.clear()
    list(session.reply("that a man", max_new_tokens=5, prompt_lookup_num_tokens=0))
    added = model.tokenizer.encode("\n\nthat a man").ids
    assert session.last.prompt_ids == text + added
    assert passes == [1 + len(added), 1, 1, 1, 1], "the last token had not been read yet"
    assert_greedy(model, session.last.prompt_ids, session.last.token_ids)


def test_continuation_leaves_out_the_end_token() -> None:
    model = tiny_model(eos=None)
    session = Continuation(model)
    list(session.reply("It is", max_new_tokens=4))
    assert session.last is not None
    prompt, new = session.last.prompt_ids, session.last.token_ids
    session = Continuation(model)
    list(session.reply("It is", max_new_tokens=4, eos_token_id=new[2]))
    assert session.ids == prompt + new[: new.index(new[2])]


def test_continuation_forgets_its_older_half() -> None:
    model = tiny_model(eos=None, context=64)
    session = Continuation(model)
    for _ in range(12):
        list(session.reply("a single man", max_new_tokens=8))
        assert session.last is not None
        assert len(session.last.token_ids) == 8, "there is always room for an answer"
        assert len(session.ids) <= 64


def test_templates_are_plain_data() -> None:
    # What a template sees are copies: even a method that the sandbox allows cannot reach the caller's list.
    text = render_chat("{{ messages | map(attribute='role') | list | tojson }}", CONVERSATION)
    assert json.loads(text) == [turn["role"] for turn in CONVERSATION]
