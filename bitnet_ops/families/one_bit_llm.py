"""The first public BitNet b1.58 models (arXiv:2402.17764, reproduced by 1bitLLM): a Llama with sub-norms.

Checkpoints: 1bitLLM/bitnet_b1_58-large, -xl, -3B. The weights are float32 masters, quantised while they are
loaded; the head is the embedding. The field "model_type" says "llama", so "architectures" or the fields of
its quantisers have to tell. Norms have names of their own::

    ours                      the checkpoint's
    self_attn.attn_sub_norm   self_attn.inner_attn_ln      in front of o_proj
    mlp.ffn_sub_norm          mlp.ffn_layernorm            in front of down_proj
"""

from typing import Any

from ..decoder.config import DecoderConfig
from .family import SAME_NAMES, Family


def _recognises(data: dict[str, Any]) -> bool:
    architectures = data.get("architectures")
    named = isinstance(architectures, list) and "BitnetForCausalLM" in architectures
    return data.get("model_type", "llama") == "llama" and (
        named or "weight_bits" in data or "input_bits" in data
    )


ONE_BIT_LLM = Family(
    model_type="llama",
    architecture="BitnetForCausalLM",
    recognises=_recognises,
    config=DecoderConfig,
    activations={"silu": "silu"},
    defaults={"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
    same=SAME_NAMES,
    only=(
        # weight_bits: 1 stands for ternary in their code, which looks no further at it.
        ("weight_bits", 1, (1,)),
        ("input_bits", 8, (8,)),
        ("attention_bias", False, (False, None)),
        ("mlp_bias", False, (False, None)),
    ),
    optional=("num_key_value_heads",),
    all_ternary=True,
    published=((".attn_sub_norm", ".inner_attn_ln"), (".ffn_sub_norm", ".ffn_layernorm")),
    read=lambda data: {"sub_norms": True},
)
