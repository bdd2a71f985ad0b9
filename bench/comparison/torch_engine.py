"""A model of ours, or one in transformers, behind the calls of the comparison."""

from collections.abc import Iterator

import torch
from subjects import SUBJECTS, Subject
from torch import Tensor

import bitnet_ops
from bitnet_ops.layers.memory import give_back_freed_memory

from .engine import SteppedEngine

CONTEXT = 1024


def make(
    *, file: str = "", arguments: dict | None = None, subject: str = "", tiny: bool = False
) -> "Ours | InTransformers":
    """One or the other.

    Args:
        file: what `bitnet_ops.from_pretrained` loads; for a model of ours.
        arguments: for it.
        subject: name in `SUBJECTS`; for one in transformers.
        tiny: the same with small sizes.
    """
    # Made outside of inference mode: of weights that are made inside, F.linear copies the whole head.
    if file:
        return Ours(bitnet_ops.from_pretrained(file, **(arguments or {})))
    made = InTransformers(SUBJECTS[subject](tiny))
    give_back_freed_memory()  # of making it, which may or may not be 0.7 GB
    return made


class _Torch(SteppedEngine):
    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)


class Ours(_Torch):
    """What `generate` does, greedy, without drafts: those of random texts are worth nothing."""

    def __init__(self, model: bitnet_ops.BitNet) -> None:
        self._model = model
        self.vocab_size = model.config.vocab_size

    def weight_bytes(self) -> int:
        """What a decoded token reads."""
        found: dict[int, int] = {}
        for module in self._model.modules():
            for name in ("packed_weight", "weight_scale"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor):
                    found[tensor.data_ptr()] = tensor.nbytes
        head = self._model.screened_head()
        if head is not None:
            return sum(found.values()) + head.codes.nbytes
        embedding = getattr(self._model.model.embed_tokens, "weight", None)
        return sum(found.values()) + (embedding.nbytes if isinstance(embedding, Tensor) else 0)

    def prefill(self, ids: list[int]) -> None:
        self._tokens: Iterator[Tensor] = self._model.stream_tokens(
            torch.tensor([ids]),
            max_new_tokens=CONTEXT - len(ids),
            do_sample=False,
            eos_token_id=(),
            prompt_lookup_num_tokens=0,
        )
        next(self._tokens)

    def step(self) -> None:
        next(self._tokens)


class InTransformers(_Torch):
    """A model of subjects.py."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.vocab_size = subject.vocab_size

    def weight_bytes(self) -> int:
        """What a decoded token reads."""
        return self._subject.weight_bytes

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        self._next, self._cache = self._subject.prefill(torch.tensor([ids]))

    @torch.inference_mode()
    def step(self) -> None:
        self._next = self._subject.step(self._next, self._cache)
