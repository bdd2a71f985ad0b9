"""Families of models: what each calls its settings and its tensors, a page each and no forward pass.

family.py        what a page says, and how config.json's fields become a `DecoderConfig` and back
bitnet.py        model_type "bitnet"
gemma3.py        model_type "gemma3_text"
llama.py         model_type "llama"
minicpm.py       model_type "minicpm"
one_bit_llm.py   1bitLLM's models, which say "llama", too
qwen3.py         model_type "qwen3"
refused.py       models known to be of another kind, and the reason
"""

from typing import Any

from ..decoder.config import BitNetConfig, DecoderConfig
from . import refused
from .bitnet import BITNET
from .family import Family, SettingError
from .gemma3 import GEMMA3
from .llama import LLAMA
from .minicpm import MINICPM
from .one_bit_llm import ONE_BIT_LLM
from .qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "SettingError", "family_of", "family_to_write"]

FAMILIES = (BITNET, ONE_BIT_LLM, LLAMA, QWEN3, GEMMA3, MINICPM)
"""The first that recognises config.json is the model's."""


def family_of(data: dict[str, Any]) -> Family:
    """The family that the content of config.json names.

    Raises:
        SettingError: it is none of `FAMILIES`, or has a part that none of them has.
    """
    name = data.get("model_type")
    known = " or ".join(map(repr, dict.fromkeys(family.model_type for family in FAMILIES)))
    reason = refused.reason(name)
    if reason is not None:
        raise SettingError("model_type", known, f"{name!r} ({reason})")
    refused.check_parts(data)
    for family in FAMILIES:
        if family.is_named_in(data):
            return family
    if "model_type" not in data and "architectures" not in data:
        return BITNET
    raise SettingError("model_type", known, f"{name!r:.200}" if "model_type" in data else "nothing")


def family_to_write(config: DecoderConfig) -> Family:
    """The family whose fields describe a model best; what they leave out is written beside them."""
    if isinstance(config, BitNetConfig):
        return BITNET
    if config.post_norms:
        return GEMMA3 if config.activation == "gelu_tanh" else LLAMA
    return QWEN3 if config.qk_norm else LLAMA
