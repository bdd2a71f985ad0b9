"""The head computes the scores that somebody asks for, and no others."""

from typing import Any

import pytest
import torch
from random_models import FAMILIES, random_model, with_tokenizer
from torch import Tensor

from bitnet_ops import BitNet, ops
from bitnet_ops.decoder import head as screened
from bitnet_ops.evaluation.perplexity import perplexity
from bitnet_ops.generation.chat import ChatSession
from bitnet_ops.generation.loop import PREFILL_TOKENS

CONFIG = FAMILIES["qwen3"].replace(
    rope_scaling=None, max_position_embeddings=2048, num_hidden_layers=1, eos_token_id=None
)
HEADS = {
    "dense": CONFIG,
    "certified": CONFIG,
    "ternary": CONFIG.replace(group_size=128, ternary_embedding=True, ternary_head=True),
    "ternary, tied": CONFIG.replace(group_size=128, ternary_embedding=True, tie_word_embeddings=True),
}


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest) -> BitNet:
    made = with_tokenizer(random_model(HEADS[request.param]))
    made.certified_head = request.param == "certified"
    return made


@pytest.fixture
def rows(model: BitNet, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each call of the head made scores of; layers have other shapes."""
    seen: list[int] = []
    vocabulary = model.config.vocab_size
    dense, ternary, best = ops.lm_head, ops.ternary_linear, ops.lm_head_top_k

    def count(x: Tensor) -> None:
        seen.append(x[..., 0].numel())

    def lm_head(x: Tensor, weight: Tensor) -> Tensor:
        count(x)
        return dense(x, weight)

    def ternary_linear(
        x: Tensor, packed: Tensor, scale: Tensor, bias: None, out_features: int, *rest: Any
    ) -> Tensor:
        if out_features == vocabulary:
            count(x)
        return ternary(x, packed, scale, bias, out_features, *rest)

    def top_k(x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
        count(x)
        return best(x, *rest)

    monkeypatch.setattr(ops, "lm_head", lm_head)
    monkeypatch.setattr(ops, "ternary_linear", ternary_linear)
    monkeypatch.setattr(screened.ops, "lm_head_top_k", top_k)
    return seen


@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_needs_one(model: BitNet, rows: list[int], batch: int) -> None:
    """Also one that is read in several pieces; then one a token."""
    ids = torch.randint(3, 300, (batch, 2 * PREFILL_TOKENS + 5), generator=torch.Generator().manual_seed(1))
    model.generate(ids, max_new_tokens=3, prompt_lookup_num_tokens=0)
    assert rows == [batch] * 3


def test_chat(model: BitNet, rows: list[int]) -> None:
    """The second turn reads what is new, and makes no more scores."""
    session = ChatSession(model)
    for _ in range(2):
        list(session.reply("some words " * 20, max_new_tokens=2, prompt_lookup_num_tokens=0))
    assert rows == [1] * 4


def test_all_but_the_last(model: BitNet, rows: list[int]) -> None:
    model(torch.arange(3, 43).view(2, 20), logits_to_keep=1)
    assert rows == [2]


def test_perplexity_scores_each_token_once(model: BitNet, rows: list[int]) -> None:
    perplexity(model, list(range(3, 103)), context=40, stride=10)
    assert sum(rows) == 99


def test_vectors_need_none(model: BitNet, rows: list[int]) -> None:
    model.embed(["some words", "others"])
    assert rows == []
