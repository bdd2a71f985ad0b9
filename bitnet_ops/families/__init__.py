"""Families of models: what each calls its settings and its tensors, a page each and no forward pass.

family.py   what a page says, and how config.json's fields become a `DecoderConfig` and back
bitnet.py   model_type "bitnet"
llama.py    model_type "llama"
gemma3.py   model_type "gemma3_text"
"""

from typing import Any

from ..decoder.config import BitNetConfig, DecoderConfig
from .bitnet import BITNET
from .family import Family, SettingError
from .gemma3 import GEMMA3
from .llama import LLAMA

__all__ = ["FAMILIES", "Family", "SettingError", "family_of", "family_to_write"]

FAMILIES = {family.model_type: family for family in (BITNET, LLAMA, GEMMA3)}
"""By the field "model_type" of config.json."""


def family_of(data: dict[str, Any]) -> Family:
    """The family that the content of config.json names.

    Raises:
        SettingError: it is none of `FAMILIES`.
    """
    name = data.get("model_type", BITNET.model_type)
    if not isinstance(name, str) or name not in FAMILIES:
        raise SettingError("model_type", " or ".join(map(repr, FAMILIES)), f"{name!r:.200}")
    return FAMILIES[name]


def family_to_write(config: DecoderConfig) -> Family:
    """The family whose fields describe a model best; what they leave out is written beside them."""
    if isinstance(config, BitNetConfig):
        return BITNET
    return GEMMA3 if config.post_norms and config.activation == "gelu_tanh" else LLAMA
