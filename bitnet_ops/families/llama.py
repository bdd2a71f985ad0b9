"""Llama-class models with ternary projections: SiLU, no norms but Llama's, and optional biases.

Checkpoints: HF1BitLLM/Llama3-8B-1.58-100B-tokens, tiiuae/Falcon3-*-1.58bit (both "bitlinear", packed), and
tiiuae/Falcon-E-*. A plain Llama has the same model_type; "quantization_config" tells them apart.

Modules have our names but those that transformers puts inside a projection with "use_rms_norm"::

    ours                    the checkpoint's
    q_proj.norm.weight      q_proj.rms_norm.weight
    q_proj.linear.*         q_proj.weight, q_proj.weight_scale, q_proj.bias
"""

from ..decoder.config import DecoderConfig
from .family import SAME_NAMES, Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config=DecoderConfig,
    activations={"silu": "silu"},
    defaults={"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
    same=(*SAME_NAMES, "head_dim", "attention_bias", "mlp_bias"),  # attention_bias: in o_proj as well
    only=(("partial_rotary_factor", None, (None, 1.0, 1)),),
    optional=("num_key_value_heads",),
    rope_kinds=("linear", "llama3", "yarn"),
    projection_norms=True,
    published=(("_proj.linear", "_proj"), ("_proj.norm", "_proj.rms_norm")),
)
