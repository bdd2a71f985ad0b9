"""Decoders of transformers whose layers run in one operator, and heads that need not read their whole table.

Where nobody looks in between, a decoder of transformers gives its embeddings to the layers' plan of ours
(bitnet_ops/decoder/plan.py), which computes what its layers would, in float32. Otherwise its own forward pass
runs: with hooks or other modules in the layers, gradients, attention or hidden states as outputs, a mask that
is not padding on the left, inside torch.compile, or a cache that is not a ``DynamicCache``.

Nothing of the user's objects changes but their classes, which derive from what they were.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.bitnet import modeling_bitnet as bitnet
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .. import ops
from ..checkpoint.config_json import parse_config
from ..decoder.cache import Context, rotation_tables
from ..decoder.head import LEAST_BYTES, ScreenedHead, copy_lock
from ..decoder.model import KNOWN, DecoderLayer
from ..decoder.plan import Plan, Watch
from ..layers.embedding import Embedding
from ..layers.linear import BitLinear, NormedLinear
from ..layers.norm import RMSNorm
from . import transformers_versions as versions
from .transformers_cache import shared_cache
from .transformers_tables import TERNARY_HEADS
from .transformers_weights import NormedBitLinear

CACHE = versions.cache_name()

HARMLESS = {"cache_position", "use_cache", "return_dict", "logits_to_keep", "num_items_in_batch"}
"""Other arguments of a forward pass that change nothing here."""


class _Derived:
    """Something made from a module that its copies make for themselves."""

    value: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Derived:
        return _Derived()

    def __reduce__(self) -> tuple[type[_Derived], tuple[()]]:
        return _Derived, ()


class FastLayers:
    """The layers of a decoder of transformers, collected.

    Attributes:
        config: what they are made of.
        plan: how they run.
    """

    def __init__(self, model: Any) -> None:
        """Collects them.

        Raises:
            ValueError: they are not what the plan knows.
        """
        data = json.loads(model.config.to_json_string(use_diff=False))
        self.config = parse_config(data, Path("config.json"))
        if _is_watched(model.norm) or _is_watched(model.rotary_emb):
            raise ValueError("norm and rotary_emb: expected none with hooks")
        self._norms: list[tuple[nn.Parameter, int]] = []
        layers = [self._ours(layer, slot) for slot, layer in enumerate(model.layers)]
        if len(layers) != self.config.num_hidden_layers:
            raise ValueError(f"layers: expected {self.config.num_hidden_layers}, got {len(layers)}")
        self.norm = self._norm(model.norm).eval()
        self._layers = nn.ModuleList(layers).eval()  # the plan knows them weakly
        self.plan = Plan(self._layers, KNOWN)
        if any(lists is None for _, _, lists in self.plan.runs):
            raise ValueError("layers: expected ones that one operator runs")
        options = ("layout", "activation_bits", "group_size")
        watched: dict[type[nn.Module], tuple[str, ...]] = {BitLinear: options, NormedBitLinear: options}
        self._watch = Watch(model.layers, watched)
        self._final = (model.norm, model.rotary_emb)
        self._versions = [parameter._version for parameter, _ in self._norms]

    def is_current(self, model: Any) -> bool:
        """Whether the layers still are what they were."""
        return (
            self._final == (model.norm, model.rotary_emb)
            and not _is_watched(model.norm)
            and not _is_watched(model.rotary_emb)
            and self._watch.is_current()
            and bool(self.plan.runs)
            and [parameter._version for parameter, _ in self._norms] == self._versions
            and all(id(parameter) == identity for parameter, identity in self._norms)
        )

    def _ours(self, theirs: nn.Module, slot: int) -> DecoderLayer:
        if any(_is_watched(module) for module in theirs.modules()):
            raise ValueError("layers: expected none with hooks")
        with torch.device("meta"):
            ours = DecoderLayer(self.config, slot, BitLinear)
        for name, module in list(ours.named_modules()):
            if isinstance(module, RMSNorm) and "_proj" not in name:
                ours.set_submodule(name, self._norm(theirs.get_submodule(name)))
            elif name.endswith("_proj"):
                ours.set_submodule(name, self._projection(theirs.get_submodule(name)))
        return ours

    def _projection(self, theirs: nn.Module) -> nn.Module:
        if type(theirs) is NormedBitLinear:
            # The plan knows exact types; the weights are the same tensors.
            inner = BitLinear(1, 1)
            inner.__dict__ = {**theirs.__dict__, "_modules": {}}
            return NormedLinear(self._norm(theirs.rms_norm), inner)
        if type(theirs) is not BitLinear:
            raise ValueError(f"projections: expected BitLinear, got {type(theirs).__name__}")
        return theirs

    def _norm(self, theirs: Any) -> RMSNorm:
        with torch.device("meta"):
            norm = RMSNorm(len(theirs.weight), float(theirs.variance_epsilon))
        norm.weight = nn.Parameter(theirs.weight.detach().float().clone(), requires_grad=False)
        self._norms.append((theirs.weight, id(theirs.weight)))
        return norm


RECORDER = "transformers.utils.output_capturing"
"""Hooks of this module record outputs that somebody asked for by an argument, and stay afterwards."""


def _is_watched(module: nn.Module) -> bool:
    if module.training or "forward" in vars(module):
        return True
    tables = [hooks for key, hooks in vars(module).items() if key.endswith("_hooks") and hooks]
    return any(getattr(hook, "__module__", None) != RECORDER for hooks in tables for hook in hooks.values())


class FastModel:
    """A decoder of transformers that runs its layers in one operator where it can."""

    fast: _Derived
    float32_output: bool

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """As before."""
        out = None
        if not arguments:
            out = self._run_fast(input_ids, attention_mask, position_ids, options)
        if out is not None:
            return out
        return super().forward(  # type: ignore[misc]
            input_ids, attention_mask, position_ids, *arguments, **options
        )

    def _run_fast(
        self, input_ids: Tensor | None, mask: Any, position_ids: Tensor | None, options: dict[str, Any]
    ) -> Any:
        me: Any = self
        cache, embeds, rest = options.get(CACHE), options.get("inputs_embeds"), dict(options)
        for name in (CACHE, "inputs_embeds"):
            rest.pop(name, None)
        config = me.config
        if (
            torch.compiler.is_compiling()
            or me.training
            or (input_ids is None) == (embeds is None)
            or any(value not in (None, False) for name, value in rest.items() if name not in HARMLESS)
            or rest.get("return_dict", config.return_dict) is False
            or config.output_attentions
            or config.output_hidden_states
        ):
            return None
        x = me.embed_tokens(input_ids) if embeds is None else embeds
        if x.dim() != 3 or not x.is_cpu or (torch.is_grad_enabled() and self._has_gradients(x)):
            return None
        layers = self._fast_layers()
        if layers is None:
            return None
        if cache is None and (config.use_cache if rest.get("use_cache") is None else rest["use_cache"]):
            from transformers.cache_utils import DynamicCache

            cache = DynamicCache(config=config)
        hidden = _run(layers, x.float(), mask, position_ids, cache)
        if hidden is None:
            return None
        hidden = hidden if self.float32_output else hidden.to(x.dtype)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})

    def _has_gradients(self, x: Tensor) -> bool:
        me: Any = self
        return x.requires_grad or any(parameter.requires_grad for parameter in me.parameters())

    def _fast_layers(self) -> FastLayers | None:
        layers: FastLayers | None = self.fast.value
        if layers is None or not layers.is_current(self):
            try:
                layers = FastLayers(self)
            except (ValueError, AttributeError):
                # Layers of another make: transformers' own forward pass knows what to do with them.
                layers = None
            self.fast.value = layers
        return layers


def _run(layers: FastLayers, x: Tensor, mask: Any, position_ids: Tensor | None, cache: Any) -> Tensor | None:
    """The final hidden states, float32; None where mask, positions or cache are of another kind."""
    batch, tokens, _ = x.shape
    shared = None
    if cache is not None:
        shared = shared_cache(cache, layers.config, batch, tokens)
        if shared is None:
            return None
    length = 0 if shared is None else shared.kv.length
    padding = _left_padding(mask, batch, length + tokens)
    if padding is None or (length and not torch.equal(padding, shared.kv.padding)):  # type: ignore[union-attr]
        return None
    if position_ids is None:
        if bool(padding.any()):
            return None  # transformers counts padding then
    else:
        expected = torch.arange(length, length + tokens) - padding.unsqueeze(1)
        if position_ids.dim() != 2 or not bool(((position_ids == expected) | (expected < 0)).all()):
            return None
    if shared is None:
        positions = torch.arange(tokens)
        context = Context(*rotation_tables(layers.config, positions), -padding)
    else:
        shared.kv.padding = padding
        shared.kv.reserve(length + tokens)
        context = shared.kv.context()
    hidden: Tensor = layers.norm(layers.plan.run(x, context))
    if shared is not None:
        shared.kv.length += tokens
    return hidden


def _left_padding(mask: Any, batch: int, tokens: int) -> Tensor | None:
    """How many tokens of each row are padding, int64 [B]; None for masks of another kind."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, tokens):
        return None
    real = mask != 0
    padding = tokens - real.sum(1)
    if bool(padding.any()) and not torch.equal(real, torch.arange(tokens) >= padding.unsqueeze(1)):
        return None
    return padding


_best: ContextVar[tuple[nn.Module, int | None]] = ContextVar("best")
"""A head, and how many of the best tokens are wanted of it; of each thread, for threads share models."""


class FastHead(nn.Linear):
    """A head of transformers: float32 scores, from the table in its own dtype.

    Within `_best_only`, scores of all tokens but the best are -inf.
    """

    screened: _Derived

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., hidden_size] to float32 [..., vocab_size]."""
        weight = self.weight
        if not x.is_cpu:
            return F.linear(x.to(weight.dtype), weight).float()
        trained = self.training or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        if (
            trained
            or torch.compiler.is_compiling()
            or x.dim() != 3
            or x.shape[1] != 1
            or weight.nbytes < LEAST_BYTES
        ):
            return ops.lm_head(x, weight)
        head, best = _best.get((self, None))
        if best is None or head is not self:
            return ops.lm_head(x, weight)
        logits, ids = self.prepare().top_k(x[:, 0].float(), best)
        scores = logits.new_full((len(x), weight.shape[0]), -torch.inf)
        return scores.scatter_(1, ids, logits).unsqueeze(1)

    def prepare(self, done: Callable[[Tensor], None] = lambda rows: None) -> ScreenedHead:
        """The head's copy, made at the first call and anew when the table has changed."""
        with copy_lock:
            head: ScreenedHead | None = self.screened.value
            if head is None or not head.is_current(self.weight):
                head = self.screened.value = ScreenedHead(self.weight, done=done)
            return head


class FastCausalLM:
    """A language model of transformers whose generation asks the head for the tokens that can win only."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,
    ) -> Any:
        head: Any = getattr(self, "lm_head", None)
        best = _wanted(logits_processor, generation_config)
        with _best_only(head, best) if isinstance(head, FastHead) else contextlib.nullcontext():
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, **rest
            )


@contextlib.contextmanager
def _best_only(head: FastHead, best: int | None) -> Iterator[None]:
    token = _best.set((head, best))
    try:
        yield
    finally:
        _best.reset(token)


def _wanted(processors: Any, config: Any) -> int | None:
    """How many of the best tokens decide what is generated; None where more than their scores do."""
    if config.output_scores or config.output_logits:
        return None
    if not config.do_sample:
        return None if len(processors) else 1
    for processor in processors:
        if type(processor) is TopKLogitsWarper:
            return int(processor.top_k)
        if type(processor) is not TemperatureLogitsWarper:
            return None
    return None


class FastBitNetModel(FastModel, bitnet.BitNetModel):  # type: ignore[misc]
    """`FastModel`."""


class FastLlamaModel(FastModel, llama.LlamaModel):  # type: ignore[misc]
    """`FastModel`."""


class FastQwen3Model(FastModel, qwen3.Qwen3Model):  # type: ignore[misc]
    """`FastModel`."""


class FastBitNetForCausalLM(FastCausalLM, bitnet.BitNetForCausalLM):  # type: ignore[misc]
    """`FastCausalLM`."""


class FastLlamaForCausalLM(FastCausalLM, llama.LlamaForCausalLM):  # type: ignore[misc]
    """`FastCausalLM`."""


class FastQwen3ForCausalLM(FastCausalLM, qwen3.Qwen3ForCausalLM):  # type: ignore[misc]
    """`FastCausalLM`."""


DERIVED: dict[type, type] = {
    bitnet.BitNetModel: FastBitNetModel,
    llama.LlamaModel: FastLlamaModel,
    qwen3.Qwen3Model: FastQwen3Model,
    bitnet.BitNetForCausalLM: FastBitNetForCausalLM,
    llama.LlamaForCausalLM: FastLlamaForCausalLM,
    qwen3.Qwen3ForCausalLM: FastQwen3ForCausalLM,
}

for _theirs, _ours in DERIVED.items():
    # transformers looks classes up by this name: which architecture a model has, what a pipeline can run.
    _ours.__name__ = _theirs.__name__


def install(model: nn.Module) -> None:
    """Has the decoders and heads of a model run faster where they are of a kind that is known."""
    for module in list(model.modules()):
        derived = DERIVED.get(type(module))
        if derived is None:
            continue
        module.__class__ = derived
        if isinstance(module, FastModel):
            module.fast, module.float32_output = _Derived(), False
            versions.keep_recording(module)
            embedding: Any = module.embed_tokens
            if type(embedding) is nn.Embedding and embedding.max_norm is None:
                embedding.__class__ = Embedding
    for module in list(model.modules()):
        if isinstance(module, FastCausalLM):
            me: Any = module
            head = me.lm_head
            if type(head) is nn.Linear and head.bias is None and not _is_watched_in_eval(head):
                head.__class__ = FastHead
                head.screened = _Derived()
            me.model.float32_output = isinstance(head, (FastHead, *TERNARY_HEADS))


def prepare_heads(model: nn.Module, done: Callable[[Tensor], None]) -> None:
    """Makes the copies of heads that are large enough for one.

    Args:
        model: that `install` has seen.
        done: called with rows of the table that have been read.
    """
    for module in model.modules():
        if isinstance(module, FastHead) and module.weight.nbytes >= LEAST_BYTES:
            module.prepare(done)


def _is_watched_in_eval(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(
        hooks for key, hooks in vars(module).items() if key.endswith("_hooks")
    )
