"""The head of a model of which only the best tokens are wanted."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..layers.memory import HugePages
from ..locks import Lock
from ..packing import TILE_ROWS

LEAST_BYTES = 4 << 20
"""Smaller tables are computed whole by default: a copy saves under 0.05 ms a token there (bench/LOG.md)."""

FORMAT = "6 bits, a factor for 64 inputs, bounds to be evaluated in float32"
"""Of the copy, as csrc/kernels/screen.h draws it: stored copies of another are not used."""

copy_lock = Lock()
"""Threads that share a model wait for one copy of its head instead of making one each."""

PIECE_ROWS = 4096  # a multiple of 16, the tile of the copy; 8 MB of codes at 2B4T's width


class ScreenedHead:
    """Finds the best-scored tokens and reads about three eighths of the table for it, with the same result.

    A copy of the table in six bits (made here in a fraction of a second) approximates every logit and bounds
    it. The k best by approximation are computed from the table itself, as `ops.lm_head` does; tokens whose
    bounds are below those are ruled out, the others computed as well. csrc/kernels/screen.h has the proof.

    Attributes:
        rescored: int64 [B], rows of the table that the last call needed, or None before the first.

    Example:
        >>> head = ScreenedHead(model.head_weight)
        >>> logits, ids = head.top_k(hidden, 50)     # the best of ops.lm_head(hidden, model.head_weight)
    """

    def __init__(
        self,
        weight: Tensor,
        copy: tuple[Tensor, Tensor] | None = None,
        done: Callable[[Tensor], None] = lambda rows: None,
    ) -> None:
        """Makes the copy.

        Args:
            weight: float32, bfloat16 or float16 [V, K], on the CPU.
            copy: what `ops.screen_lm_head` gave for this very table, if that is at hand.
            done: is called with rows of the table that have been copied, piece by piece, so that a table that
                is a mapped file need not be in memory as a whole.
        """
        self.weight = weight
        self.codes, self.bounds = copy or _screen(weight.detach(), done)
        self.rescored: Tensor | None = None
        self._state = _state(weight)

    def is_current(self, weight: Tensor) -> bool:
        """Whether ``weight`` still is the table of the copy, unchanged.

        Tells a change by PyTorch's version counter, which sees every in-place operation but those on
        ``weight.data`` and on memory shared with other libraries.
        """
        return weight is self.weight and _state(weight) == self._state

    def top_k(
        self, hidden: Tensor, k: int, temperature: float = 1.0, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best-scored tokens of each row of ``hidden`` [B, K]; see `ops.lm_head_top_k`.

        Returns:
            ``(logits, ids)``: float32 and int64 [B, min(k, V)], best first.
        """
        logits, ids, self.rescored = ops.lm_head_top_k(
            hidden, self.weight.detach(), k, self.codes, self.bounds, temperature, noise
        )
        return logits, ids


def copy_tensors(weight: Tensor) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what `ops.screen_lm_head` gives for a table: codes and bounds."""
    # Of another tensor, because looking at rows of a mapped table brings them into memory.
    codes, bounds = ops.screen_lm_head(torch.zeros(TILE_ROWS, weight.shape[1]))
    tiles = -(-weight.shape[0] // TILE_ROWS)
    return ((tiles, *codes.shape[1:]), codes.dtype), ((bounds.shape[0], tiles * TILE_ROWS), bounds.dtype)


def _screen(weight: Tensor, done: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """`ops.screen_lm_head` piece by piece, into 2 MB pages: a decoded token reads all of it."""
    memory = HugePages()
    codes, bounds = (memory.empty(shape, dtype) for shape, dtype in copy_tensors(weight))
    begin = 0
    for rows in weight.split(PIECE_ROWS):
        piece, piece_bounds = ops.screen_lm_head(rows)
        end = begin + len(piece)
        codes[begin:end] = piece
        bounds[:, TILE_ROWS * begin : TILE_ROWS * end] = piece_bounds
        begin = end
        done(rows)
    return codes, bounds


def _state(weight: Tensor) -> tuple[int, int]:
    # Tensors of inference mode have no counter, and PyTorch lets nobody change them outside of it.
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
