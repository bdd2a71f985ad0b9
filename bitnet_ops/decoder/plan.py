"""How layers run in eval mode: in one operator, wherever nobody asks for what is between them.

What a decoded token costs beside reading weights is Python: twenty calls a layer, with the caches of the
processor full of weights, are several milliseconds. So the layers' weights are collected once, handed over to
C++ (`ops.decoder_layers`) and used as long as the modules they come from are untouched. Layers that somebody
watches (a hook, an adapter, another module in the place of one), and layers that need gradients, run as
modules between those that do not. Either way the bits are the same.

A plan is written as three lists, read in order by csrc/ops/decoder.cpp. For each layer::

    structure   head_dim, rotation, window, activation (its place in ACTIVATIONS)
                1 or 0 for each of NORMS
                for each of PROJECTIONS: has a norm of its own, out_features, in_features, layout (its place
                    in packing.LAYOUTS), activation_bits, group_size, has a bias
    constants   query scale (0: the default), residual scale, and an epsilon for each norm
    weights     for each projection: its own norm, packed_weight, weight_scale, bias; then for each of NORMS

Norms of a projection come with it, in constants too; what a layer has not is left out.

torch.compile and torch.export see one operator as well. There is nothing in the layers to compile, and before
every token a compiled program would check what each of 540 tensors and 420 modules is, which takes far longer
than `Watch` does. So a program without gradients has an operator that knows the decoder by a number; an
exported one, which runs where this decoder is not, `ops.decoder_layers` with all its weights. Times are in
bench/LOG.md.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import _C, ops, packing
from .._ops import add_op_namespace_prefix
from ..layers.linear import BitLinear, NormedLinear
from ..layers.matrix import on_replacement
from ..layers.norm import RMSNorm
from ..locks import Lock
from ..ops._decoder import PreparedLayers
from ..ops._registry import OPS, check_device, fake_kernel
from .cache import CacheTensors, Context
from .config import ACTIVATIONS

if TYPE_CHECKING:
    from .model import Decoder

NORMS = (
    "input_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.attn_sub_norm",
    "post_attention_norm",
    "feed_forward_norm",
    "mlp.ffn_sub_norm",
    "post_feed_forward_norm",
)
PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Attributes of a layer, in the order of csrc/run/decoder.h."""


Known = Mapping[type[nn.Module], tuple[str, ...]]
"""Modules that do what the operator does, and which of their attributes it was told."""


class LayerLists(NamedTuple):
    """The arguments of `ops.decoder_layers` that come from layers."""

    weights: list[Tensor]
    structure: list[int]
    constants: list[float]

    def apply_to(self, x: Tensor) -> bool:
        """Whether the operator gives what the layers would: it gives no gradients."""
        if not x.is_cpu:
            return False
        return not torch.is_grad_enabled() or not (
            x.requires_grad or any(weight.requires_grad for weight in self.weights)
        )

    def add(self, layer: nn.Module, known: Known) -> bool:
        """Writes a layer down; False, and nothing, where it does something else or is watched by hooks."""
        if any(type(m) not in known or m.training or is_observed(m) for m in layer.modules()):
            return False
        norms = [_attribute(layer, name) for name in NORMS]
        projections = [_attribute(layer, name) for name in PROJECTIONS]
        mine = LayerLists([], [], [])
        attention: Any = layer.self_attn
        activation = ACTIVATIONS.index(_attribute(layer, "mlp.activation"))
        mine.structure.extend((attention.head_dim, attention.rotation, attention.window, activation))
        mine.structure.extend(int(norm is not None) for norm in norms)
        mine.constants.extend((attention.query_scale or 0.0, _attribute(layer, "residual_scale")))
        if not all(map(mine._add_projection, projections)):
            return False
        if not all(norm is None or mine._add_norm(norm) for norm in norms):
            return False
        self.weights.extend(mine.weights)
        self.structure.extend(mine.structure)
        self.constants.extend(mine.constants)
        return True

    def _add_norm(self, norm: nn.Module) -> bool:
        if type(norm) is not RMSNorm or norm.weight.dtype != torch.float32 or not norm.weight.is_cpu:
            return False
        self.weights.append(norm.weight)
        self.constants.append(norm.eps)
        return True

    def _add_projection(self, projection: nn.Module) -> bool:
        norm = None
        if type(projection) is NormedLinear:
            norm, projection = projection.norm, projection.linear
        if type(projection) is not BitLinear or not projection.packed_weight.is_cpu:
            return False
        layout, bias = packing.LAYOUTS.index(projection.layout), projection.bias
        self.structure.extend(
            (int(norm is not None), projection.out_features, projection.in_features, layout)
        )
        self.structure.extend((projection.activation_bits, projection.group_size, int(bias is not None)))
        if norm is not None and not self._add_norm(norm):
            return False
        self.weights.extend((projection.packed_weight, projection.weight_scale))
        if bias is not None:
            self.weights.append(bias)
        return True


class Run(NamedTuple):
    """Consecutive layers that one operator runs, or (lists is None) a layer that runs as a module."""

    first: int
    number: int
    lists: LayerLists | None


def collect(layers: nn.ModuleList, known: Known) -> list[Run]:
    """Writes the layers down.

    Args:
        layers: of the decoder.
        known: the modules that do what the operator does; with another among them a layer is a module.
    """
    runs: list[Run] = []
    for place, layer in enumerate(layers):
        current = runs[-1].lists if runs else None
        if current is not None and current.add(layer, known):
            runs[-1] = runs[-1]._replace(number=runs[-1].number + 1)
            continue
        lists = LayerLists([], [], [])
        runs.append(Run(place, 1, lists if lists.add(layer, known) else None))
    return runs


def run(runs: Sequence[Run], layers: nn.ModuleList, x: Tensor, context: Context) -> Tensor:
    """The layers on x, float32 [B, T, hidden_size], with operators that take all weights as arguments."""
    for first, number, lists in runs:
        if lists is not None and lists.apply_to(x):
            arguments: tuple[Any, ...] = (*lists, *context.arguments(), first)
            x = ops.decoder_layers(x, *arguments)
        else:
            x = run_modules(layers, first, number, x, context)
    return x


def run_modules(layers: nn.ModuleList, first: int, number: int, x: Tensor, context: Context) -> Tensor:
    """Some of the layers, as they are."""
    for slot in range(first, first + number):
        x = layers[slot](x, context, slot)
    return x


class _Collected(NamedTuple):
    """What a plan holds, in one piece: a thread that drops it takes nothing from one that runs it."""

    watch: Watch
    runs: list[Run]
    prepared: dict[int, PreparedLayers]  # by Run.first, made at the first call


class Plan:
    """The layers of a decoder, collected and handed over, and whether they still are what they were.

    Example:
        >>> plan = Plan(decoder.layers, known)
        >>> if plan.is_current():
        ...     x = plan.run(x, context)  # what the layers would give, bit for bit
    """

    def __init__(self, layers: nn.ModuleList, known: Known) -> None:
        """Collects them."""
        self._layers = weakref.ref(layers)
        self._collected: _Collected | None = _Collected(Watch(layers, known), collect(layers, known), {})
        # Who stores the weights of a layer anew need not wait for the next token until the old ones go.
        for module in layers.modules():
            if isinstance(module, BitLinear):
                on_replacement(module, self)

    def run(self, x: Tensor, context: Context) -> Tensor:
        """Runs the layers on x, float32 [B, T, hidden_size]."""
        layers, collected = self._layers(), self._collected
        assert layers is not None, "a plan is its decoder's"
        # In torch.func.vmap, operators on rows know what to do with one more axis; the layers as one do not.
        if collected is None or _has_any_global_hook() or is_functorch_wrapped_tensor(x):
            return run_modules(layers, 0, len(layers), x, context)
        if type(x) is not Tensor:  # such as a FakeTensor, of weights without data
            return run(collected.runs, layers, x, context)
        for first, number, lists in collected.runs:
            if lists is not None and lists.apply_to(x):
                prepared = collected.prepared.get(first)
                if prepared is None:
                    prepared = collected.prepared.setdefault(first, PreparedLayers(*lists))
                x = prepared(x, *context.arguments(), first)
            else:
                x = run_modules(layers, first, number, x, context)
        return x

    def is_current(self) -> bool:
        """Whether the layers still are what they were: modules, tensors, options, hooks."""
        collected = self._collected
        return collected is not None and collected.watch.is_current()

    @property
    def runs(self) -> list[Run]:
        """The layers as they run; none after `drop`."""
        return [] if self._collected is None else self._collected.runs

    def drop(self) -> None:
        """Lets go of all weights, once calls under way have ended; the plan is not current any more."""
        self._collected = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copy of a model collects its own."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None in a pickle, likewise."""
        return type(None), ()


def is_observed(module: nn.Module) -> bool:
    """Whether hooks, or a method put in the place of forward, see what the module gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def _attribute(layer: nn.Module, path: str) -> Any:
    value: Any = layer
    for name in path.split("."):
        value = getattr(value, name)
    return value


class Watch:
    """Sees whether modules are touched, fast: it looks at their dictionaries, all at once."""

    TABLES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
    OPTIONS = ("training", "forward")

    def __init__(self, root: nn.Module, known: Known) -> None:
        modules = list(root.modules())
        self._tables = tuple(vars(module)[name] for module in modules for name in self.TABLES)
        self._counts = array("I", map(len, self._tables)).tobytes()
        self._values = tuple(value for table in self._tables for value in table.values())
        # A cast gives a parameter another dtype in place; buffers are replaced.
        self._dtypes = [(parameter, parameter.dtype) for parameter in root.parameters()]
        self._options = [self._items(modules, self.OPTIONS)]
        for type_, names in known.items():
            if names:
                self._options.append(self._items([m for m in modules if type(m) is type_], names))

    @staticmethod
    def _items(
        modules: list[nn.Module], names: tuple[str, ...]
    ) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[Any, ...]]:
        values = tuple(vars(m).get(name) for m in modules for name in names)
        return tuple(vars(m) for m in modules), names, values

    def is_current(self) -> bool:
        """Whether nothing has changed since the beginning."""
        return (
            _C.same_values(self._tables, self._counts, self._values)
            and all(_C.same_items(*items) for items in self._options)
            and all(parameter.dtype is dtype for parameter, dtype in self._dtypes)
        )


# ---- as torch.compile sees it -----------------------------------------------------------------------

_decoders: weakref.WeakValueDictionary[int, Decoder] = weakref.WeakValueDictionary()
_numbers: Iterator[int] = count()
_numbers_lock = Lock()  # two threads may get the same where Python has no global lock

torch.library.define(
    add_op_namespace_prefix("opaque_decoder"),
    "(Tensor input_ids, int decoder, Tensor cos, Tensor sin, Tensor? start=None, Tensor(a!)? keys=None, "
    "Tensor(b!)? values=None, Tensor(c!)? key_scale=None, Tensor(d!)? value_scale=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def number_decoder(decoder: Decoder) -> int:
    """A number that this decoder alone has in this process, by which the operator finds it."""
    with _numbers_lock:
        number = next(_numbers)
    _decoders[number] = decoder
    return number


# A constant, for the compiler's guards would have to watch every layer. They are not missed: a program
# belongs to one number, that is to one decoder, and the operator is right for layers that do not fuse, too.
def runs_in_operators(number: int) -> bool:
    """Whether layers of a decoder run in operators at the time a program is compiled."""
    return any(lists is not None for _, _, lists in _decoder(number).plan().runs)


# What torch.compiler.assume_constant_result does. Calling it would import torch._dynamo: 1.4 s and 70 MB of
# every process, though few compile anything.
runs_in_operators._dynamo_marked_constant = True  # type: ignore[attr-defined]


def opaque_decoder(input_ids: Tensor, number: int, context: Context) -> Tensor:
    """`Decoder.step` of the decoder with this number. Has no gradients."""
    hidden: Tensor = OPS.opaque_decoder.default(input_ids, number, *context.arguments())
    return hidden


@torch.library.impl(add_op_namespace_prefix("opaque_decoder"), "CPU")
def _(
    input_ids: Tensor,
    number: int,
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    cache = None
    if keys is not None and values is not None:
        cache = CacheTensors(keys, values, key_scale, value_scale)
    return _decoder(number).step(input_ids, Context(cos, sin, start, cache))


@fake_kernel("opaque_decoder")
def _(
    input_ids: Tensor,
    number: int,
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
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
