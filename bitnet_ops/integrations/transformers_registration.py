"""`register_transformers`: plain `from_pretrained` of transformers keeps ternary weights packed."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from ..checkpoint.config_json import QUANT_METHOD
from . import transformers_versions as versions

_originals: dict[str, Any] | None = None  # entries of their tables before ours; None while not registered
_ABSENT = object()


class Registration:
    """The result of `register_transformers`: a context manager that takes back what the call has changed."""

    def __init__(self, changed: bool) -> None:
        self._changed = changed

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._changed:
            unregister_transformers()


def register_transformers() -> Registration:
    """Makes transformers' ``from_pretrained`` load ternary checkpoints into packed layers.

    From then on, in this process, a checkpoint whose ``quant_method`` is "bitnet" (``linear_class``
    "autobitlinear", offline or online, and "bitlinear") never is in memory unpacked: its weights go from
    the file into `BitLinear`, one layer after another. Folders that bitnet_ops has saved, whose
    ``quant_method`` is "bitnet_ops", load too. Models that are loaded are as `bitnet_ops.accelerate` makes
    them. They are for the CPU; "bitnet" checkpoints for another device load as before.

    Importing bitnet_ops alone changes nothing: this call replaces entries of transformers' tables. Calling it
    twice does no harm.

    Returns:
        An object that may be used in a ``with`` statement and then takes the change back at its end;
        `unregister_transformers` does so too. Models that are loaded stay as they are.

    Raises:
        ImportError: transformers is not installed, or is a version without the hooks that this takes.

    Example:
        >>> bitnet_ops.register_transformers()
        >>> model = AutoModelForCausalLM.from_pretrained("microsoft/bitnet-b1.58-2B-4T")
        >>> model.generate(**tokenizer("The sea", return_tensors="pt"))
    """
    global _originals
    if _originals is not None:
        return Registration(changed=False)
    auto = _their_tables()
    from . import transformers_quantizers as ours

    quantizers, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    _originals = {name: quantizers.get(name, _ABSENT) for name in ("bitnet", QUANT_METHOD)}
    quantizers["bitnet"] = ours.BitNetQuantizer
    quantizers[QUANT_METHOD] = ours.OwnQuantizer
    configs[QUANT_METHOD] = ours.OwnConfig
    return Registration(changed=True)


def unregister_transformers() -> None:
    """Takes back what `register_transformers` has changed; does nothing if that was not called."""
    global _originals
    if _originals is None:
        return
    auto = _their_tables()
    for name, original in _originals.items():
        if original is _ABSENT:
            auto.AUTO_QUANTIZER_MAPPING.pop(name, None)
        else:
            auto.AUTO_QUANTIZER_MAPPING[name] = original
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    _originals = None


def _their_tables() -> Any:
    """The module with transformers' tables of quantizers, if it has all that is needed."""
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "register_transformers: expected the package transformers, which is not installed: "
            "pip install 'bitnet_ops[transformers]'"
        ) from None
    try:
        from transformers import core_model_loading
        from transformers.quantizers import auto
        from transformers.quantizers.base import HfQuantizer

        hooks = (
            auto.AUTO_QUANTIZER_MAPPING["bitnet"],
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
            HfQuantizer.get_weight_conversions,
            core_model_loading.WeightConverter,
            core_model_loading.WeightRenaming,
            core_model_loading.ConversionOps.convert,
        )
    except (ImportError, AttributeError, KeyError) as error:
        raise _too_old(transformers.__version__, f" ({error})") from None
    assert all(hook is not None for hook in hooks)
    if versions.numbers(transformers.__version__) < versions.OLDEST:
        raise _too_old(transformers.__version__)
    return auto


def _too_old(version: str, why: str = "") -> ImportError:
    oldest = ".".join(map(str, versions.OLDEST))
    return ImportError(
        f"register_transformers: expected transformers {oldest} or later, whose quantizers convert weights "
        f"as they are loaded, got {version}{why}"
    )
