"""A decoder over a cache as one operator that torch.compile does not look into.

There is nothing in it to compile: one call of `ops.decoder_layers` runs all layers. But that call takes the
weights of all layers, 540 tensors for 2B4T, and before every token a compiled program would check what each
of them and each module around them is, which takes far longer than `FusedLayers` does. And it would read the
embedding in an OpenMP loop, whose threads then wait for more on the cores that the layers need. So it has an
operator that knows the decoder by a number and runs it as it then is. Times are in bench/LOG.md.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..ops._registry import OPS, check_device, fake_kernel
from .cache import CacheTensors

if TYPE_CHECKING:
    from .model import Decoder

_decoders: WeakValueDictionary[int, Decoder] = WeakValueDictionary()
_numbers = count()

torch.library.define(
    "bitnet_ops::opaque_decoder",
    "(Tensor input_ids, int decoder, Tensor cos, Tensor sin, Tensor start, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def number_decoder(decoder: Decoder) -> int:
    """A number that this decoder alone has in this process, by which the operator finds it."""
    number = next(_numbers)
    _decoders[number] = decoder
    return number


# A constant, for the compiler's guards would have to watch every layer. They are not missed: a program
# belongs to one number, that is to one decoder, and the operator is right for layers that do not fuse, too.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_fused_layers(number: int) -> bool:
    """Whether the layers of a decoder are one operator at the time a program is compiled."""
    return _decoder(number).fused_layers() is not None


def opaque_decoder(input_ids: Tensor, number: int, start: Tensor, cache: CacheTensors) -> Tensor:
    """`Decoder.step` of the decoder with this number. Has no gradients."""
    hidden: Tensor = OPS.opaque_decoder.default(input_ids, number, *cache.arguments(start))
    return hidden


@torch.library.impl("bitnet_ops::opaque_decoder", "CPU")
def _(
    input_ids: Tensor,
    number: int,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    cache = CacheTensors(keys, values, key_scale, value_scale, cos, sin)
    return _decoder(number).step(input_ids, start, cache)


@fake_kernel("opaque_decoder")
def _(
    input_ids: Tensor,
    number: int,
    cos: Tensor,
    sin: Tensor,
    start: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    check_device("opaque_decoder", input_ids, cos=cos, sin=sin, start=start, keys=keys, values=values)
    shape = (*input_ids.shape, _decoder(number).config.hidden_size)
    return input_ids.new_empty(shape, dtype=torch.float32)


def _decoder(number: int) -> Decoder:
    decoder = _decoders.get(number)
    if decoder is None:
        raise RuntimeError(
            "bitnet_ops::opaque_decoder: argument 'decoder': expected the number of a model in this process, "
            f"got {number}: the model that this program was compiled for is no longer there"
        )
    return decoder
