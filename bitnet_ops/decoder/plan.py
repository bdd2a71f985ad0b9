"""The layers of a decoder as one operator, where nothing asks for what is between them.

What a decoded token costs beside reading weights is Python: five calls a layer, with the caches of the
processor full of weights, are several milliseconds. So the arguments of `ops.decoder_layers` are collected
once, handed over to C++ and used as long as the modules they come from are untouched. In a program that
torch.compile makes or torch.export they are collected while it is traced, and remain its inputs.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import _C, ops
from ..layers.linear import BitLinear
from ..layers.norm import RMSNorm
from ..ops._prepared import PreparedLayers
from .fused import is_fusible, is_fusible_norm, is_observed

if TYPE_CHECKING:
    from .cache import CacheTensors

NORMS = ("input_layernorm", "self_attn.attn_sub_norm", "post_attention_layernorm", "mlp.ffn_sub_norm")
PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""The modules of a layer in the order of the operator's arguments."""


class LayerArguments(NamedTuple):
    """The arguments of `ops.decoder_layers` that come from the layers."""

    norm_weight: list[Tensor]
    eps: float
    packed: list[Tensor]
    weight_scale: list[Tensor]
    layouts: list[str]

    def apply_to(self, x: Tensor) -> bool:
        """Whether the operator gives what the layers would."""
        if not x.is_cpu:
            return False
        return not torch.is_grad_enabled() or not (
            x.requires_grad or any(weight.requires_grad for weight in self.norm_weight)
        )

    def run(self, x: Tensor, cache: CacheTensors, start: Tensor) -> Tensor:
        """Runs the layers on x, float32 [B, T, hidden_size]; ``start`` as in `ops.cached_attention`."""
        return ops.decoder_layers(
            x, self.norm_weight, self.eps, self.packed, self.weight_scale, self.layouts,
            *cache.arguments(start),
        )  # fmt: skip


def layer_arguments(layers: nn.ModuleList, known: tuple[type[nn.Module], ...]) -> LayerArguments | None:
    """Collects them; None where the layers do something else than the operator, or are watched by hooks.

    Args:
        layers: of the decoder.
        known: the modules that do what the operator does.
    """
    modules = list(layers.modules())
    if len(layers) == 0 or any(type(m) not in known or m.training or is_observed(m) for m in modules):
        return None
    all_norms = [layer.get_submodule(name) for layer in layers for name in NORMS]
    all_projections = [layer.get_submodule(name) for layer in layers for name in PROJECTIONS]
    norms = [norm for norm in all_norms if is_fusible_norm(norm)]
    projections = [projection for projection in all_projections if is_fusible(projection)]
    if len(norms) < len(all_norms) or len(projections) < len(all_projections):
        return None
    if len({norm.eps for norm in norms}) > 1:
        return None
    return LayerArguments(
        [norm.weight for norm in norms],
        norms[0].eps,
        [projection.packed_weight for projection in projections],
        [projection.weight_scale for projection in projections],
        [projection.layout for projection in projections],
    )


class FusedLayers:
    """`layer_arguments`, and whether they still are what they were.

    Example:
        >>> fused = FusedLayers(decoder.layers, FUSIBLE)
        >>> if fused.is_current() and fused.apply_to(x):
        ...     x = fused.run(x, cache, start)  # what the layers would give, bit for bit
    """

    def __init__(self, layers: nn.ModuleList, known: tuple[type[nn.Module], ...]) -> None:
        """Collects them."""
        self._watch = _Watch(layers)
        self.arguments = layer_arguments(layers, known)
        self._prepared: PreparedLayers | None = None

    def apply_to(self, x: Tensor) -> bool:
        """Whether the layers are one operator, which gives what they would."""
        return self.arguments is not None and self.arguments.apply_to(x)

    def run(self, x: Tensor, cache: CacheTensors, start: Tensor) -> Tensor:
        """`LayerArguments.run`, by layers that are prepared for it the first time."""
        assert self.arguments is not None, "apply_to said no"
        if type(x) is not Tensor:  # such as a FakeTensor, of weights without data
            return self.arguments.run(x, cache, start)
        if self._prepared is None:
            self._prepared = PreparedLayers(*self.arguments)
        return self._prepared(x, *cache.arguments(start))

    def is_current(self) -> bool:
        """Whether the layers still are what they were: modules, tensors, options, hooks."""
        return self._watch.is_current()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copy of a model collects its own."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None in a pickle, likewise."""
        return type(None), ()


class _Watch:
    """Sees whether modules are touched, fast: it looks at their dictionaries, all at once."""

    TABLES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
    OPTIONS = ("training", "forward")
    OPTIONS_OF_TYPE: ClassVar = {BitLinear: ("layout", "activation_bits", "group_size"), RMSNorm: ("eps",)}

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._tables = [vars(module)[name] for module in modules for name in self.TABLES]
        self._counts = array("I", map(len, self._tables)).tobytes()
        self._values = [value for table in self._tables for value in table.values()]
        # A cast gives a parameter another dtype in place; buffers are replaced.
        self._dtypes = [(parameter, parameter.dtype) for parameter in root.parameters()]
        self._options = [self._items(modules, self.OPTIONS)]
        for type_, names in self.OPTIONS_OF_TYPE.items():
            self._options.append(self._items([m for m in modules if type(m) is type_], names))

    @staticmethod
    def _items(
        modules: list[nn.Module], names: tuple[str, ...]
    ) -> tuple[list[dict[str, Any]], tuple[str, ...], list[Any]]:
        return [vars(m) for m in modules], names, [vars(m).get(name) for m in modules for name in names]

    def is_current(self) -> bool:
        """Whether nothing has changed since the beginning."""
        return (
            _C.same_values(self._tables, self._counts, self._values)
            and all(_C.same_items(*items) for items in self._options)
            and all(parameter.dtype is dtype for parameter, dtype in self._dtypes)
        )
