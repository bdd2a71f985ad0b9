"""From the hidden states of a text to one vector, and what an embedding model wants done for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

POOLINGS = ("last", "mean", "cls")
"""Which hidden states make the vector: that of the last token, the mean of all, or that of the first."""

LEAST_NORM = 1e-12
"""A shorter vector is divided by this, as in torch.nn.functional.normalize."""


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a model makes a vector of a text.

    Attributes:
        pooling: one of `POOLINGS`.
        normalize: whether vectors are to have length 1.
        eos_token_id: id that ends each text, where the tokenizer has not put it there; None for none.
        prompts: texts that go in front, by their names ("query" and so on).
        default_prompt_name: the one to use where none is asked for, or None.
        max_length: longer texts are cut to so many tokens; None for ``max_position_embeddings``.
    """

    pooling: str = "last"
    normalize: bool = True
    eos_token_id: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_pooling(self.pooling)
        if not isinstance(self.normalize, bool):
            self._refuse("normalize", "true or false")
        for name, least in (("eos_token_id", 0), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < 2**31):
                self._refuse(name, f"an int in [{least}, 2^31) or None")
        if not isinstance(self.prompts, Mapping) or not all(
            isinstance(text, str) for item in self.prompts.items() for text in item
        ):
            self._refuse("prompts", "texts by names")
        default = self.default_prompt_name
        if default is not None and (not isinstance(default, str) or default not in self.prompts):
            self._refuse("default_prompt_name", f"a name of prompts {sorted(self.prompts)!r:.200}")

    def prompt(self, name: str | None) -> str:
        """The text that goes in front for a name, or for none.

        Raises:
            ValueError: no prompt has this name.
        """
        if name is None:
            name = self.default_prompt_name
            if name is None:
                return ""
        if name not in self.prompts:
            known = " or ".join(map(repr, self.prompts)) or "None, because the model has no prompts"
            raise ValueError(f"prompt_name: expected {known}, got {name!r:.200}")
        return self.prompts[name]

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"EmbeddingSettings.{name}: expected {expected}, got {getattr(self, name)!r:.200}")


def check_pooling(pooling: str) -> None:
    """Raises ValueError for what is none of `POOLINGS`."""
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        raise ValueError(f"pooling: expected {' or '.join(map(repr, POOLINGS))}, got {pooling!r:.200}")


def pool(hidden: Tensor, padding: Tensor, pooling: str) -> Tensor:
    """One vector for each text of a batch.

    A mean adds in float64, token after token, so that neither padding nor threads change a bit of it.

    Args:
        hidden: float32 [B, T, d], rows padded on the left.
        padding: int64 [B], how many tokens of each row are padding; fewer than T.
        pooling: one of `POOLINGS`.

    Returns:
        float32 [B, d].

    Raises:
        ValueError: another pooling.
    """
    check_pooling(pooling)
    if pooling == "last":
        return hidden[:, -1]
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, padding]
    time = torch.arange(hidden.shape[1], device=hidden.device)
    is_padding = time < padding.unsqueeze(1)
    # A running sum is made in order; `sum` splits the work, differently for different shapes.
    total = hidden.double().masked_fill(is_padding.unsqueeze(-1), 0.0).cumsum(1)[:, -1]
    return (total / (hidden.shape[1] - padding).unsqueeze(-1)).float()


def normalized(vectors: Tensor) -> Tensor:
    """Vectors [..., d] divided by their lengths, float32; the same bits in any batch."""
    wide = vectors.double()
    length = wide.square().cumsum(-1)[..., -1:].sqrt()
    return (wide / length.clamp(min=LEAST_NORM)).float()
