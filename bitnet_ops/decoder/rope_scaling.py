"""How rotary embedding is stretched for longer contexts, checked."""

import math
from dataclasses import dataclass

from .checks import check_number, check_sizes

ROPE_KINDS = ("linear", "llama3", "yarn", "factors")
"""Of `RopeScaling`; formulas in `bitnet_ops.reference.rotary_frequencies`."""


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary embedding's frequencies are stretched for longer contexts.

    Attributes:
        kind: "linear" divides every frequency by ``factor``; "llama3" and "yarn" only those whose wavelength
            is long against the context that the model was trained with; "factors" divides each by its own.
        factor: how much longer the context has become; "factors" has no use for it.
        low_freq_factor: "llama3": wavelengths above ``original_max_position_embeddings`` divided by this are
            stretched whole.
        high_freq_factor: "llama3": wavelengths below ``original_max_position_embeddings`` divided by this
            stay as they are.
        original_max_position_embeddings: "llama3", "yarn": the context that the model was trained with.
        beta_fast: "yarn": pairs that make more turns than this in that context stay as they are.
        beta_slow: "yarn": pairs that make fewer turns than this are stretched whole.
        truncate: "yarn": whether these two borders are rounded outwards to whole pairs.
        attention_factor: "yarn", "factors": multiplies cosines and sines; None for what follows from
            the others, see `rotation_scale`.
        mscale: "yarn": see `rotation_scale`.
        mscale_all_dim: "yarn": likewise.
        factors: "factors": divisors of the frequencies, one for each of head_dim / 2.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"RopeScaling.kind: expected {' or '.join(map(repr, ROPE_KINDS))}, got {self.kind!r:.80}"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(self, name, 0.0, 1e6, above=True)
        check_sizes(self, "original_max_position_embeddings")
        check_number(self, "original_max_position_embeddings", 1, 2**31)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"RopeScaling.high_freq_factor: expected a number above low_freq_factor = "
                f"{self.low_freq_factor}, got {self.high_freq_factor}"
            )
        for name in ("beta_fast", "beta_slow"):  # not so small that turns become infinite
            check_number(self, name, 1e-6, 1e6)
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"RopeScaling.beta_fast: expected at least beta_slow = {self.beta_slow}, got {self.beta_fast}"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"RopeScaling.truncate: expected true or false, got {self.truncate!r:.80}")
        if self.attention_factor is not None:
            check_number(self, "attention_factor", 0.0, 1e6, above=True)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(self, name, 0.0, 1e6)
        if isinstance(self.factors, list):  # as JSON has it; a tuple keeps the config hashable
            object.__setattr__(self, "factors", tuple(self.factors))
        if not isinstance(self.factors, tuple) or bool(self.factors) != (self.kind == "factors"):
            raise ValueError(
                f"RopeScaling.factors: expected numbers with kind 'factors', none with others, "
                f"got {self.factors!r:.80} with {self.kind!r}"
            )
        for value in self.factors:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not fits or not 1e-6 <= value < 1e6:
                raise ValueError(f"RopeScaling.factors: expected numbers in [1e-06, 1e6), got {value!r:.80}")

    @property
    def rotation_scale(self) -> float:
        """What multiplies cosines and sines.

        ``attention_factor`` where it is given. Else 1, or for "yarn" (arXiv:2309.00071) m(1), with both
        ``mscale`` and ``mscale_all_dim`` m(mscale) / m(mscale_all_dim)::

            m(c) = 1 + 0.1 * c * log(factor)        1 where factor <= 1
        """
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind != "yarn" or self.factor <= 1:
            return 1.0
        growth = 0.1 * math.log(self.factor)
        if self.mscale and self.mscale_all_dim:
            return (1.0 + self.mscale * growth) / (1.0 + self.mscale_all_dim * growth)
        return 1.0 + growth
