"""The model in the package: small enough to ship, same text everywhere, and it knows its author."""

import math

import pytest
import torch
import torch.nn.functional as F

import bitnet_ops

LARGEST_PACKAGE_BYTES = 8_000_000

SENTENCE = (
    "Elizabeth was much too sensible to be mortified, and her sister was too amiable to think of it; but "
    "their mother could talk of nothing else, and every visitor was told how very ill the gentleman had "
    "behaved."
)
"""Not by Jane Austen, but it could be; no part of what the model was trained on."""


@pytest.fixture(scope="module")
def model():
    return bitnet_ops.from_pretrained(bitnet_ops.DEFAULT_MODEL)


def nats_per_token(model, text):
    ids = model.encode(text)["input_ids"]
    return F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()


def test_it_is_small_enough_to_ship():
    assert sum(f.stat().st_size for f in bitnet_ops.DEFAULT_MODEL.iterdir()) <= LARGEST_PACKAGE_BYTES


def test_it_knows_the_manner_of_its_author(model):
    # A model that knows nothing scores log(4096) = 8.3; the words in another order should surprise far more.
    ordered = nats_per_token(model, SENTENCE)
    shuffled = nats_per_token(model, " ".join(sorted(SENTENCE.split())))
    assert ordered < 0.6 * math.log(model.config.vocab_size)
    assert shuffled > ordered + 1.5


def test_every_instruction_set_writes_the_same(model, isa):
    prompt = model.encode("Emma could not forgive her")
    ids = model.generate(**prompt, max_new_tokens=40, seed=1)
    with bitnet_ops.use_isa("scalar"):
        assert torch.equal(model.generate(**prompt, max_new_tokens=40, seed=1), ids)
        scalar = model(ids)
    assert torch.equal(model(ids), scalar)


def test_threads_do_not_change_a_bit(model, threads):
    ids = model.encode(SENTENCE)["input_ids"]
    logits = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        logits.append(model(ids))
    # Attention is still torch's own; over so few tokens it does not split its sums either.
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
