"""The whole model gives the same bits on every instruction set, for every number of threads, in any batch.

And whether a token came by prefill or by decode (docs/numerics.md).
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import bitnet_ops
from bitnet_ops import BitLinearQAT, BitNet, KVCache, pack
from bitnet_ops.decoder.config import BitNetConfig

# Heads of 20 fill no register; 5 query heads to 1 fill no register block; 300 tokens are more than a span of
# 256 keys, and not a multiple of a block of 64.
CONFIG = BitNetConfig(
    vocab_size=97,
    hidden_size=200,
    intermediate_size=144,
    num_hidden_layers=2,
    num_attention_heads=10,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.2,
)
LENGTH = 300
CACHES = [torch.float32, torch.bfloat16, torch.int8]


def random_model() -> BitNet:
    torch.manual_seed(3)
    model = pack(BitNet(CONFIG, BitLinearQAT)).eval()
    assert isinstance(model, BitNet)
    return model


MODEL = random_model()
IDS = torch.randint(CONFIG.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def through_cache(
    ids: Tensor, pieces: Sequence[int], dtype: torch.dtype, mask: Tensor | None = None
) -> Tensor:
    """Logits of all tokens, computed piece by piece."""
    cache = KVCache(CONFIG, len(ids), 1, dtype=dtype)  # far too small: it has to grow on the way
    masks = [None] * len(pieces) if mask is None else mask.split(pieces, dim=1)
    return torch.cat(
        [
            MODEL(piece, attention_mask=seen, cache=cache)
            for piece, seen in zip(ids.split(pieces, dim=1), masks, strict=True)
        ],
        dim=1,
    )


EXPECTED = {}


def expected(dtype: torch.dtype | None = None) -> Tensor:
    """By the scalar kernels in one pass; without a cache, or with one of this dtype."""
    if dtype not in EXPECTED:
        with bitnet_ops.use_isa("scalar"):
            EXPECTED[dtype] = MODEL(IDS) if dtype is None else through_cache(IDS, [LENGTH], dtype)
    return EXPECTED[dtype]


def test_instruction_sets(isa: str) -> None:
    assert torch.equal(MODEL(IDS), expected())
    for dtype in CACHES:
        assert torch.equal(through_cache(IDS, [LENGTH], dtype), expected(dtype))


def test_a_float32_cache_changes_nothing() -> None:
    assert torch.equal(expected(torch.float32), expected())
    assert not torch.equal(expected(torch.bfloat16), expected())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads(count: int, threads: None) -> None:
    torch.set_num_threads(count)
    assert torch.equal(MODEL(IDS), expected())
    for dtype in CACHES:
        pieces = [LENGTH - 3, 1, 1, 1]
        assert torch.equal(through_cache(IDS[:1], pieces, dtype), expected(dtype)[:1])


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize(
    "pieces",
    [[1] * LENGTH, [255, 1, 44], [64] * 4 + [44], [7, 200, 93], [0, 100, 0, 200]],
    ids=["one by one", "to the end of a span", "blocks", "uneven", "empty"],
)
def test_prefill_and_decode(pieces: list[int], dtype: torch.dtype) -> None:
    assert torch.equal(through_cache(IDS[:1], pieces, dtype), expected(dtype)[:1])


def test_batches() -> None:
    for row in range(len(IDS)):
        assert torch.equal(MODEL(IDS[row : row + 1]), expected()[row : row + 1])
    assert torch.equal(MODEL(IDS[[2, 2, 1]]), expected()[[2, 2, 1]])


@pytest.mark.parametrize("dtype", [None, *CACHES])
@pytest.mark.parametrize("pieces", [[LENGTH], [100, 150, 47, 1, 1, 1]], ids=["whole", "pieces"])
def test_padding(pieces: list[int], dtype: torch.dtype | None) -> None:
    """Sequences of different lengths in one batch, one of them padded over more than a piece and a span."""
    padding = torch.tensor([0, 1, 130, 296])
    mask = (torch.arange(LENGTH) >= padding.unsqueeze(1)).long()
    ids = torch.where(mask.bool(), IDS, 5)
    batch = MODEL(ids, attention_mask=mask) if dtype is None else through_cache(ids, pieces, dtype, mask)
    for row, skip in enumerate(padding.tolist()):
        alone = IDS[row : row + 1, skip:]
        one = MODEL(alone) if dtype is None else through_cache(alone, [alone.shape[1]], dtype)
        assert torch.equal(batch[row, skip:], one[0])


@pytest.mark.parametrize("size", [1, 64, 100])
def test_generation_reads_a_prompt_in_pieces_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = IDS[:2, :150]
    whole = MODEL.generate(prompt, max_new_tokens=8)
    monkeypatch.setattr("bitnet_ops.generation.loop.PREFILL_TOKENS", size)
    assert torch.equal(MODEL.generate(prompt, max_new_tokens=8), whole)


def test_going_back_in_a_cache() -> None:
    """What was written behind the new length is never read."""
    cache = KVCache(CONFIG, 1, LENGTH)
    MODEL(IDS[:1, :200], cache=cache)
    cache.length = 90
    assert torch.equal(MODEL(IDS[:1, 90:], cache=cache), expected()[:1, 90:])


def test_padding_behind_a_token_is_refused() -> None:
    ids = IDS[:2, :4]
    cache = KVCache(CONFIG, 2, 64)
    MODEL(ids, cache=cache)
    for mask, given in (([1, 1, 0, 1], None), ([1, 1, 1, 0], None), ([0, 1, 1, 1], cache)):
        with pytest.raises(ValueError, match="attention_mask: expected padding on the left only"):
            MODEL(ids, attention_mask=torch.tensor([[1, 1, 1, 1], mask]), cache=given)
    assert cache.length == 4
    assert cache.padding.tolist() == [0, 0]


def test_a_cache_of_another_dtype_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"KVCache: dtype: expected .*float32, bfloat16 or int8, got torch.float16"
    ):
        KVCache(CONFIG, 1, 64, dtype=torch.float16)
