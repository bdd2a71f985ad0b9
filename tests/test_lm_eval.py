"""lm-eval drives our models: the numbers it gets are those of the model's logits, computed by hand.

The task is a local one (tests/lm_eval_tasks); nothing is downloaded.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from text_models import tiny_model
from torch import Tensor, nn

import bitnet_ops
from bitnet_ops import BitNet

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from bitnet_ops.evaluation.lm_eval import BitNetLM  # noqa: E402

TASKS = Path(__file__).parent / "lm_eval_tasks"
QUESTIONS = [
    json.loads(line) for line in (TASKS / "questions.jsonl").read_text(encoding="utf-8").splitlines()
]
PAIRS = [(question["question"], choice) for question in QUESTIONS for choice in question["choices"]]

ROUNDING = 2.0**-20
"""Of one loss below 16 in float32, generously: a logarithm, a difference and two sums, 2^-21 each."""


@pytest.fixture(scope="module")
def model() -> BitNet:
    return tiny_model(context=64, chat=True)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def by_hand(logits: Tensor, targets: list[int]) -> tuple[float, bool]:
    """Log-likelihood of the tokens that end a text, and whether each of them is the best one."""
    last = logits[-len(targets) :].double().log_softmax(-1)
    chosen = torch.tensor(targets)
    return last.gather(1, chosen[:, None]).sum().item(), torch.equal(last.argmax(-1), chosen)


def expected_pair(model: BitNet, context: str, continuation: str, most: int = 64) -> tuple[float, bool]:
    ids = model.tokenizer.encode(context + continuation).ids
    targets = ids[len(model.tokenizer.encode(context).ids) :]
    return by_hand(model(torch.tensor([ids[-most - 1 : -1]]))[0], targets)


@pytest.mark.parametrize("max_length", [64, 9])
def test_loglikelihood(model: BitNet, max_length: int) -> None:
    """Also where contexts have to be cut; and the same bits in every batch."""
    answers = BitNetLM(model, max_length=max_length).loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (likelihood, greedy) in zip(PAIRS, answers, strict=True):
        wanted, wanted_greedy = expected_pair(model, context, continuation, max_length)
        assert likelihood == pytest.approx(wanted, abs=10 * ROUNDING)
        assert greedy is wanted_greedy
    batched = BitNetLM(model, max_length=max_length, batch_size=5)
    assert batched.loglikelihood(requests("loglikelihood", PAIRS)) == answers


def test_a_greedy_continuation_is_seen(model: BitNet) -> None:
    context = "must be in"
    ids = model.encode(context)["input_ids"]
    new = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=())[0].tolist()
    answer = BitNetLM(model)._loglikelihood_tokens([(None, new[:-3], new[-3:])], disable_tqdm=True)
    assert answer[0][1] is True


def test_an_empty_context_is_the_prefix_token(model: BitNet) -> None:
    ((likelihood, _),) = BitNetLM(model).loglikelihood(requests("loglikelihood", [("", "in want")]))
    ids = model.tokenizer.encode("in want").ids
    wanted, _ = by_hand(model(torch.tensor([[0, *ids[:-1]]]))[0], ids)
    assert likelihood == pytest.approx(wanted, abs=10 * ROUNDING)


def test_rolling_is_perplexity_without_overlap(model: BitNet) -> None:
    texts = [(" ".join(question["question"] for question in QUESTIONS),), ("It is",)]
    answers = BitNetLM(model, max_length=20, batch_size=3).loglikelihood_rolling(
        requests("loglikelihood_rolling", texts)
    )
    for (text,), answer in zip(texts, answers, strict=True):
        ids = [0, *model.tokenizer.encode(text).ids]
        loss = bitnet_ops.perplexity(model, ids, context=20, stride=20)
        assert answer == pytest.approx(-loss.nats, rel=1e-12)


def test_generate_until(model: BitNet) -> None:
    """Each as alone, whatever the batch; greedy unless the task samples; cut at the stop string."""
    contexts = [question["question"] for question in QUESTIONS]
    plain = {"until": [" a"], "max_gen_toks": 12}
    sampled = {"until": " a", "max_gen_toks": 5, "do_sample": True, "temperature": 0.7, "seed": 3}
    arguments = [(context, options) for context in contexts for options in (plain, sampled)]
    for batch_size in (1, 4):
        lm = BitNetLM(model, batch_size=batch_size)
        got = lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)
        for (context, options), text in zip(arguments, got, strict=True):
            if options is plain:
                assert text == "".join(
                    model.stream(context, max_new_tokens=12, do_sample=False, stop_strings=" a")
                )
            assert " a" not in text


def test_long_contexts_leave_room_for_the_answer(model: BitNet) -> None:
    context = " ".join(question["question"] for question in QUESTIONS)
    lm = BitNetLM(model, max_length=30)
    (text,) = lm.generate_until(requests("generate_until", [(context, {"until": [], "max_gen_toks": 10})]))
    ids = torch.tensor([model.tokenizer.encode(context).ids[-20:]])
    new = model.generate(ids, max_new_tokens=10, do_sample=False)[0, 20:].tolist()
    assert text == model.tokenizer.decode(new[: new.index(0)] if 0 in new else new)


def test_chat_template(model: BitNet) -> None:
    lm = BitNetLM(model)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " I say"}]
    assert lm.apply_chat_template(turns[:1]) == "<user>Hello<eos>\n<assistant>\n"
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "<user>Hello<eos>\n<assistant>I say"
    assert lm.chat_template(True) == model.chat_template
    assert lm.chat_template() is None
    assert lm.tokenizer_name.startswith("bitnet_ops-")


def test_arguments(model: BitNet) -> None:
    assert BitNetLM(model, batch_size="auto", max_batch_size=4).batch_size == 4
    for options, match in (
        ({"device": "cuda"}, "device: expected 'cpu', got 'cuda'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_length": 65}, "max_length: expected 2 to 64 tokens, got 65"),
    ):
        with pytest.raises(ValueError, match=match):
            BitNetLM(model, **options)
    lm = BitNetLM(model, max_length=8)
    with pytest.raises(ValueError, match="max_gen_toks: expected 1 to 7"):
        lm.generate_until(requests("generate_until", [("It", {"until": [], "max_gen_toks": 8})]))
    with pytest.raises(ValueError, match=r"generation_kwargs: expected some of do_sample.*, got 'num_beams'"):
        lm.generate_until(requests("generate_until", [("It", {"num_beams": 2, "max_gen_toks": 4})]))
    with pytest.raises(ValueError, match="a continuation of 1 to 8 tokens, got 1 and 9"):
        lm._loglikelihood_tokens([(None, [1], [2] * 9)])
    plain = tiny_model()
    with pytest.raises(ValueError, match="expected a model with a chat template"):
        BitNetLM(plain).apply_chat_template([{"role": "user", "content": "Hello"}])
    plain.tokenizer = None
    with pytest.raises(ValueError, match="BitNetLM: expected a model with a tokenizer"):
        BitNetLM(plain)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks in the current folder, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(TASKS, tmp_path, dirs_exist_ok=True)


@pytest.mark.usefixtures("offline")
def test_a_whole_evaluation(model: BitNet, tmp_path: Path) -> None:
    """From a folder by lm-eval's name, all three kinds of tasks."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    results = lm_eval.simple_evaluate(
        "bitnet_ops",
        model_args={"pretrained": str(folder)},
        batch_size=3,
        tasks=["bitnet_ops_choice", "bitnet_ops_continuation", "bitnet_ops_rolling"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    right = nats = size = matches = 0
    for question in QUESTIONS:
        text = question["question"]
        likelihoods = [expected_pair(model, text, choice)[0] for choice in question["choices"]]
        right += max(range(3), key=likelihoods.__getitem__) == question["answer"]
        nats += bitnet_ops.perplexity(model, [0, *model.tokenizer.encode(text).ids]).nats
        size += len(text.encode())
        written = "".join(model.stream(text, max_new_tokens=12, do_sample=False, stop_strings=" a"))
        matches += written == question["choices"][question["answer"]]
    assert results["bitnet_ops_choice"]["acc,none"] == right / len(QUESTIONS)
    assert results["bitnet_ops_continuation"]["exact_match,none"] == matches / len(QUESTIONS)
    assert results["bitnet_ops_rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / size))


def test_hf_backend_on_an_accelerated_model() -> None:
    """A log-likelihood moves by at most 2 max |dz| a token when the scores z move by dz."""
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM
    from their_models import shipped_model
    from transformers import PreTrainedTokenizerFast

    file = str(bitnet_ops.DEFAULT_MODEL / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
    with torch.compiler.set_stance("force_eager"):
        before = shipped_model()
        after = bitnet_ops.accelerate(shipped_model())
        answers = {
            model: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(
                requests("loglikelihood", PAIRS[:6]), disable_tqdm=True
            )
            for model in (before, after)
        }

        def scores(model: nn.Module, context: str, continuation: str) -> Tensor:
            """Those that the tokens of the continuation are looked up in."""
            ids = tokenizer.encode(context + continuation)
            return model(torch.tensor([ids])).logits[0, len(tokenizer.encode(context)) - 1 : -1]

        for pair, old, new in zip(PAIRS[:6], answers[before], answers[after], strict=True):
            moved = (scores(after, *pair) - scores(before, *pair)).abs().amax(-1).sum().item()
            assert moved < 1, "the bound proves nothing"
            assert abs(new[0] - old[0]) <= 2 * moved + 40 * ROUNDING
