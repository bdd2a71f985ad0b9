"""A model's decode step as a program of its own: torch.export, and AOTInductor from there.

What `BitNet` does with a `KVCache`, which is a Python object, is here a function of tensors: the program
reads the cache's tensors and writes the new keys and values into them. Whoever runs it counts the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..decoder.cache import CacheTensors, Context, KVCache
from ..model import BitNet

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class DecodeStep(nn.Module):
    """Scores what follows new tokens: a prompt, a part of one, or a decoded token."""

    def __init__(self, model: BitNet) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        start: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> Tensor:
        """Runs the model; `step_inputs` makes the arguments.

        Args:
            input_ids: int64 [B, T].
            start: int64 [B], how many tokens of each row the cache holds; negative where a row begins with
                padding, -padding.
            cos: of the `KVCache`, like all that follows.
            sin: likewise.
            keys: likewise; changed in place.
            values: likewise; changed in place.
            key_scales: likewise; changed in place. None where the cache is not int8.
            value_scales: likewise.

        Returns:
            float32 [B, vocab_size], the scores of what follows the last token.
        """
        context = Context(cos, sin, start, CacheTensors(keys, values, key_scales, value_scales))
        hidden = self.model.model.step(input_ids, context)
        return self.model.score(hidden[:, -1])


def step_inputs(input_ids: Tensor, cache: KVCache) -> tuple[Tensor | None, ...]:
    """The arguments of `DecodeStep.forward`, with room for the new tokens in the cache.

    Afterwards the caller adds the number of new tokens to ``cache.length``.

    Args:
        input_ids: int64 [B, T].
        cache: of B rows.
    """
    cache.reserve(cache.length + input_ids.shape[1])
    cos, sin, start, tensors = cache.context()
    return input_ids, start, cos, sin, *(tensors or ())


def export_decode_step(model: BitNet, *, cache_dtype: torch.dtype = torch.float32) -> ExportedProgram:
    """Exports a `DecodeStep` for any number of rows, of new tokens and of tokens that the cache has room for.

    The process that loads the program needs its operators: it imports bitnet_ops first. Results are the bits
    of the model itself.

    Args:
        model: in eval mode, on the CPU.
        cache_dtype: of the `KVCache` that the program will run on.

    Raises:
        ValueError: the model is in training mode.

    Example:
        >>> torch.export.save(export_decode_step(model), "step.pt2")
        >>> step = torch.export.load("step.pt2").module()        # in another process
        >>> cache = KVCache(config, batch_size=1, capacity=512)
        >>> scores = step(*step_inputs(input_ids, cache))
        >>> cache.length += input_ids.shape[1]
    """
    if model.training:
        raise ValueError("export_decode_step: model: expected it in eval mode, got it in training mode")
    from torch.export import Dim, export  # here, because it takes seconds

    # Sizes beyond 1, which export would take for constants.
    cache = KVCache(model.config, 2, 512, dtype=cache_dtype, device=model.device)
    inputs = step_inputs(torch.zeros(2, 2, dtype=torch.int64, device=model.device), cache)
    rows, tokens, positions, parts, places = map(Dim, ("rows", "tokens", "positions", "parts", "places"))
    int8 = cache_dtype == torch.int8
    scales = {1: rows, 3: places} if int8 else None
    sizes = (
        {0: rows, 1: tokens},
        {0: rows},
        {1: positions},
        {1: positions},
        {1: rows, 3: parts},
        {1: rows, 3: parts if int8 else places},
        scales,
        scales,
    )
    with torch.no_grad():
        return export(DecodeStep(model), inputs, dynamic_shapes=sizes)
