"""BitNet b1.58 2B4T (arXiv:2504.12285) and what has its shape: squared ReLU, and a norm ("subln") in front of
``o_proj`` and of ``down_proj``.

Modules have our names. Checkpoints: microsoft/bitnet-b1.58-2B-4T (packed, "autobitlinear"), and its bf16
masters, whose config.json does not always say that they are to be quantised.
"""

from ..decoder.config import BitNetConfig
from .family import SAME_NAMES, Family

BITNET = Family(
    model_type="bitnet",
    architecture="BitNetForCausalLM",
    config=BitNetConfig,
    activations={"relu2": "relu2"},
    defaults={"tie_word_embeddings": False},
    same=(*SAME_NAMES, "dropout"),  # of models that are trained here
    only=(("attention_bias", False, (False, None)), ("mlp_bias", False, (False, None))),
    all_ternary=True,
)
