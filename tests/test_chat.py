"""Chat templates against transformers' rendering, the sandbox, and conversations with a cache."""

import contextlib
import json
import random
import re
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
    "methods": "{{ messages[1].content.strip().split(' ')[-1].replace('!', '?').ljust(9, '.') }}|"
    "{{ ', '.join(['a', 'b']) }}|{{ 'Ab'.startswith(('x', 'A')) }}|{{ 'a b'.title().center(9) }}|"
    "{{ 'one two  three'.split() }}{{ 'a,b,c'.rsplit(',', maxsplit=1) }}{{ 'x\ny'.splitlines() }}"
    "{{ messages[0].get('no', 3) }}{% for key, value in messages[0].items() %}{{ key }}={{ value }}"
    ";{% endfor %}",
    "formats": "{{ '%s-%05d-%.2f' % ('a', 42, 1.5) }}|{{ '%(a)s' % {'a': [1, 'x']} }}|{{ '%3s' |"
    " format('b') }}|"
    "{{ '{0:>5}|{a!r}|{0:<{1}}|{{}}'.format('x', 4, a='y') }}|{{ '{b[0]}'.format_map({'b': ['z']}) }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}|{{ 'a\nb' | indent(2, first=true) }}|"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ {'b': 1, 'a': 2} |"
    " dictsort }}|"
    "{{ [3, 1, 2] | sort | first }}{{ [1, 2] | sum }}{{ [1, 1] | unique | list }}{{ 2.345 | round(1) }}|"
    "{{ [1, 2, 3] | batch(2, 'x') | list }}{{ 'x' | center(5) }}{{ 'aXa' | replace('X', '-', count=1) }}|"
    "{{ messages | groupby('role') | map('first') | join(d='/') }}{{ 'a b c d' | truncate(5) }}{{ '7' |"
    " int }}",
    "comparisons": "{{ 1 < 2 < 3 }}{{ 3 > 2 > 2 }}{{ 'er' in 'user' }}{{ 'x' not in ['x'] }}"
    "{{ (1, 2) == (1, 2) }}"
    "{{ [1, [2]] != [1, [2]] }}{{ 'a' is in ['a'] }}{{ 3 is odd }}{{ 4 is divisibleby(2) }}{{ 2 is ge(3) }}",
    "slices": "{{ messages[1:] | length }}{{ 'abcdef'[::-1][1:-1] }}{{ messages[-1:][0].role }}"
    "{{ [1, 2, 3][:2] }}",
    "containers": "{% set d = {'a': (1, 2), ('b', 1): {}} %}{{ d }}{{ d[('b', 1)] }}"
    "{% set x, y = 1, [2] %}{{ y + [x] }}"
    "{{ dict(a=1) }}{{ namespace(a=1).a }}{% for i, (j, k) in [(1, (2, 3))] %}"
    "{{ i + j * k ** 2 // 1 % 7 }}{% endfor %}",
    "macros": "{% macro f(context, called=2) %}{{ context }}{{ called }}{{ caller() if caller }}"
    "{% endmacro %}"
    "{{ f(1, called='c') }}{% call f(context=2) %}inside{% endcall %}{% block b %}block{% endblock %}"
    "{{ self.b() }}"
    "{% set t %}{{ f('x') ~ 3 ~ no ~ [1] }}{% endset %}{{ t }}{% filter upper %}up{% endfilter %}",
    "loops": "{% for m in messages recursive %}{{ loop.index }}{{ loop.cycle('a', 'b') }}"
    "{{ loop.changed(m.role) }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{% else %}none{% endfor %}{% for c in 'ab' %}"
    "{{ c }}{% endfor %}",
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
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "chat_template: SyntaxError: too many"),
        ("{% if 1 %}" * 120 + "{% endif %}" * 120, "chat_template: IndentationError: too many"),
        ("{% macro f(a, a) %}{% endmacro %}", "chat_template: SyntaxError: "),
        ("{% break %}", "chat_template: SyntaxError: "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat_template: RecursionError: "),
        ("{{ " + "9" * 6000 + " }}", "chat_template: ValueError: "),
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
LARGE = "{% set b = 'a' * 16000000 %}"
TREE = DOUBLING.replace("'a'", "['a']").replace("DOUBLE", "[ns.x, ns.x]")
TWO_TREES = TREE + TREE.replace("ns", "nt")
KEYS = DOUBLING.replace("'a'", "('a',)").replace("DOUBLE", "(ns.x, ns.x)")
AGAIN = LARGE + "{% for i in range(99999) %}{% set c = DO %}{% endfor %}"

ENDLESS = (
    NESTED,
    BRANCHING,
    "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}"
    "{% endif %}{% endmacro %}{% call f(40) %}{% endcall %}",
    # operators
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * [0] }}",
    "{{ 10 ** (10 ** 10) }}",
    DOUBLING.replace("DOUBLE", "ns.x ~ ns.x"),
    DOUBLING.replace("DOUBLE", "ns.x + ns.x"),
    DOUBLING.replace("ns.x = DOUBLE", "ns.x %}{{ ns.x }}{{ ns.x }}{% endset"),
    DOUBLING.replace("'a'", "2").replace("DOUBLE", "ns.x * ns.x"),
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%.10000000000f' % 1.5 }}",
    "{{ ('%10000000000d' | safe) % 1 }}",
    LARGE + "{{ ('%(a)s' * 1000) % {'a': b} }}",
    # methods
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.rjust(10**10) }}",
    "{{ 'x'.center(10**10) }}",
    "{{ 'x'.zfill(10**10) }}",
    "{{ ('x' | safe).ljust(10**10) }}",
    "{{ 'x'['ljust'](10**10) }}",
    "{{ ('x' | attr('ljust'))(10**10) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 10**10) }}",
    "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "{{ ('{:9999999999}' | safe).format(1) }}",
    LARGE + "{{ ('{0}' * 1000).format(b) }}",
    LARGE + "{{ b.replace('a', 'bbb') }}",
    LARGE + "{{ b.replace('', b) }}",
    LARGE + "{{ b.join(['x'] * 1000) }}",
    LARGE + "{{ ''.join([b] * 1000) }}",
    "{{ ('a,' * 8000000).split(',') }}",
    "{{ ('a,' * 8000000).split(sep=',') }}",
    "{{ ('a b ' * 4000000).split() }}",
    "{{ ('a\n' * 8000000).splitlines() }}",
    # filters and tests
    "{{ 'x' | center(10**10) }}",
    "{{ 'x' | center(width=10**10) }}",
    "{{ ['x'] | map('center', 10**10) | list }}",
    "{% filter center(10**10) %}x{% endfilter %}",
    "{{ 'x' | indent(width=10**10, first=true) }}",
    "{{ '\n\n\n' | indent('y' * 10**7) }}",
    "{{ '%10000000000d' | format(1) }}",
    LARGE + "{{ b | replace('a', 'bb') }}",
    LARGE + "{{ [b, b] | join }}",
    LARGE + "{{ ['x', 'y', 'z'] | join(b) }}",
    LARGE + "{{ ([b] * 1000) | upper }}",
    LARGE + "{{ ([b] * 1000) | tojson }}",
    LARGE + "{{ b | list }}",
    "{{ [1] | batch(10**10, 'x') | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ 1.5 | round(10**10, 'ceil') }}",
    "{{ ([[1]] * 99999) | sum(start=[]) }}",
    "{{ [1] | tojson(indent=10**10) }}",
    "{{ ('f' * 100000) | int(base=16) }}",
    "{{ '%10000000000d' is odd }}",
    "{{ '%10000000000d' is divisibleby(3) }}",
    "{{ strftime_now('%Y' * 10000) }}",
    # what is written, compared or hashed as often as it is held
    LARGE + "{{ [b] * 1000 }}",
    LARGE + "{{ '%s' % ([b] * 1000) }}",
    LARGE + "{{ '{!r}'.format([b] * 1000) }}",
    TREE + "{{ ns.x }}",
    TREE + "{{ ns }}",
    TREE + "{{ ns.x ~ 1 }}",
    TREE + "{{ ns.x | string }}",
    TREE + "{{ ns.x | tojson }}",
    TREE + "{{ {'a': ns.x}.items() }}",
    TREE + "{{ {'a': ns.x} | dictsort }}",
    TREE + "{{ raise_exception(ns.x) }}",
    TREE + "{{ {}[ns.x].y }}",
    TREE + "{{ ns.x is lower }}",
    TWO_TREES + "{{ ns.x == nt.x }}",
    TWO_TREES + "{{ ns.x in [nt.x] }}",
    TWO_TREES + "{{ [ns.x, nt.x] | sort }}",
    TWO_TREES + "{{ [[ns.x], [nt.x]] | map('first') | sort }}",
    TWO_TREES + "{{ [ns.x].index(nt.x) }}",
    TWO_TREES + "{{ [ns.x] | select('eq', nt.x) | list }}",
    TWO_TREES + "{% for x in [ns.x, nt.x] %}{{ loop.changed(x) }}{% endfor %}",
    KEYS,
    DOUBLING.replace("'a'", "('a',)").replace("DOUBLE", "{ns.x: ns.x}.items() | first"),
    DOUBLING.replace("'a'", "('a',)").replace("DOUBLE", "dict([[ns.x, ns.x]]).items() | first"),
    # much of what is little each time
    AGAIN.replace("DO", "b[1:]"),
    AGAIN.replace("DO", "b == b"),
    AGAIN.replace("{% set c = DO %}", "{{ b }}"),
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ['a' * 10000000] %}"
    "{% endfor %}",
)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_has_an_end(template: str) -> None:
    with pytest.raises(ValueError, match=r"chat_template: SecurityError: expected "):
        render_chat(template, CONVERSATION)


@pytest.mark.parametrize("expression", ["b | upper", "b.count('aab')", "'aab' in b", "range(99999) | sum"])
@pytest.mark.slow
def test_a_template_has_an_end_after_seconds(expression: str) -> None:
    with pytest.raises(ValueError, match=r"chat_template: SecurityError: expected at most .* in all"):
        render_chat(AGAIN.replace("DO", expression), CONVERSATION)


@pytest.mark.parametrize(
    "expression",
    [
        "(1).to_bytes(10**10, 'big')",
        "dict.fromkeys(range(9))",
        "'a'.translate({97: 'b'})",
        "''.maketrans('a', 'b')",
        "'a'.expandtabs(10**10)",
        "'a'.encode()",
        "('x' | safe).striptags()",
        "{}.items().isdisjoint([])",
    ],
)
def test_methods_that_are_not_known_to_be_bounded(expression: str) -> None:
    with pytest.raises(
        ValueError, match="chat_template: SecurityError: expected a method that templates may use"
    ):
        render_chat(f"{{{{ {expression} }}}}", CONVERSATION)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' | pprint }}",
        "{{ 'x' | urlize }}",
        "{{ 'x' | wordwrap(1) }}",
        "{{ lipsum(n=10**8) }}",
        DOUBLING.replace("60", "99999").replace("'a'", "('a',)").replace("DOUBLE", "(ns.x,)"),
        DOUBLING.replace("60", "9999").replace("DOUBLE", "[ns.x]") + "{{ ns.x == [1] }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
    ],
)
def test_what_is_left_out_or_too_deep(template: str) -> None:
    with pytest.raises(ValueError, match=r"chat_template: (TemplateAssertion|Undefined|Recursion)Error"):
        render_chat(template, CONVERSATION)


def test_a_long_conversation_is_far_from_the_bounds() -> None:
    """Twenty texts of a million characters, and as much work on each as published templates do."""
    template = (
        "{% set ns = namespace(tools=[]) %}{% for m in messages %}{% set text = m.content | trim %}"
        "{% if '<x>' in text %}{% set text = text.split('</x>')[-1].lstrip('\n') %}{% endif %}"
        "{% set ns.tools = ns.tools + [loop.index] %}{% if loop.index0 == messages | length - 1 %}"
        "last{% endif %}"
        "{{ '<|' + m['role'] ~ '|>' }}{{ text[:10] }}{% endfor %}{{ ns.tools | length }}"
    )
    messages = [{"role": "user", "content": "<x>" + "a b\n" * 250_000}] * 20
    assert render_chat(template, messages).endswith("last<|user|><x>a b\na b20")
    messages = [{"role": "user", "content": "Hello"}] * 3000
    assert render_chat(template, messages).endswith("last<|user|>Hello3000")


@pytest.mark.slow
def test_whatever_a_template_is_it_renders_or_is_refused() -> None:
    """Thousands of mutations of the templates above."""
    token = re.compile(r"\{%-?|-?%\}|\{\{|\}\}|'[^']*'|\w+|\s+|.", re.DOTALL)
    small = [template for template in ENDLESS if LARGE not in template]
    subjects = [token.findall(template) for template in (*TEMPLATES.values(), *small)]
    tokens = [one for subject in subjects for one in subject]
    generator, rendered = random.Random(0), 0
    for _ in range(5000):
        mutant = list(generator.choice(subjects))
        for _ in range(generator.randint(1, 5)):
            at = generator.randrange(len(mutant) + 1)
            mutant[at : at + generator.randint(0, 1)] = generator.choices(tokens, k=generator.randint(0, 2))
        try:
            render_chat("".join(mutant), CONVERSATION)
            rendered += 1
        except ValueError as error:
            if not str(error).startswith("chat_template: "):
                raise AssertionError("another error") from error
    assert rendered > 100, "hardly any is a template"


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
