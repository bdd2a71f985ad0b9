"""Models that are known to be of another kind, and why: an error says more than that a tensor is missing.

Three places of config.json tell: fields that only such models have (`check_parts`), "quantization_config"
(`check_parts`, too) and "model_type" (`reason`).
"""

from collections.abc import Iterator
from typing import Any

from .family import SettingError

EXPERTS = "a mixture of experts; only dense models run here"
HYBRID = (
    "a model with recurrent layers, which keep a state in place of keys and values; only attention runs here"
)
ENCODER = "an encoder, whose tokens see those behind them; only decoders run here"
BOTH = "an encoder with a decoder; only decoders run here"
MULTIMODAL = "a model of text and other media; save its language model alone and load that"
LATENT = "a model with multi-head latent attention, which stores keys and values in another form"
DENSE = "a dense decoder of a family that has no ternary models in use; nothing here describes it"
FOUR_VALUES = (
    "a dense decoder whose 2-bit form has four values, -1.5, -0.5, 0.5 and 1.5 times a scale: not ternary"
)


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


MODEL_TYPES = {
    **_each(
        "dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5_moe glm4_moe gpt_oss granitemoe "
        "hunyuan_v1_moe llama4_text minimax minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe",
        EXPERTS,
    ),
    **_each(
        "bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 "
        "nemotron_h olmo_hybrid plamo2 qwen3_5 qwen3_5_moe qwen3_5_text qwen3_next recurrent_gemma rwkv "
        "rwkv5 rwkv6 rwkv6qwen2 rwkv7 xlstm zamba zamba2",
        HYBRID,
    ),
    **_each(
        "albert bert deberta deberta-v2 distilbert electra eurobert modernbert mpnet neobert nomic_bert "
        "roberta xlm-roberta",
        ENCODER,
    ),
    **_each("bart marian mbart mt5 pegasus t5 t5gemma umt5 whisper", BOTH),
    **_each(
        "gemma3 gemma3n gemma4 idefics3 internvl llama4 llava llava_next minicpmo minicpmv mistral3 mllama "
        "paligemma phi4_multimodal qwen2_5_vl qwen2_vl qwen3_vl smolvlm",
        MULTIMODAL,
    ),
    **_each("minicpm3", LATENT),
    **_each(
        "apertus bloom cohere cohere2 exaone exaone4 falcon gemma gemma2 glm glm4 gpt2 gpt_neo gpt_neox gptj "
        "granite internlm2 ministral mistral mpt olmo olmo2 olmo3 opt phi phi3 qwen qwen2 smollm3 stablelm "
        "starcoder2",
        DENSE,
    ),
    **_each("hunyuan_v1_dense", FOUR_VALUES),
}
"""By "model_type" of config.json. The types of `FAMILIES` are in none of these groups."""

QUANT_METHODS = {
    **_each(
        "aqlm auto-round auto_round autoround awq bitsandbytes compressed-tensors eetq exl2 exl3 gptq higgs "
        "hqq modelopt quanto quip quip# sinq spqr torchao vptq",
        "2 to 8 bits a weight on a grid of its own, not ternary",
    ),
    **_each("fbgemm_fp8 fp_quant fp8 mxfp8 nvfp4", "floats of 4 or 8 bits, not ternary"),
    **_each("fouroversix metal mxfp4 quark", "4 bits a weight on a grid of its own, not ternary"),
}
"""By "quant_method" of "quantization_config"."""

COUNTS_OF_EXPERTS = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")

RECURRENT_FIELDS = (
    "conv_L_cache",
    "full_attention_interval",
    "hybrid_override_pattern",
    "linear_conv_kernel_dim",
    "mamba_d_state",
    "ssm_cfg",
    "ssm_state_size",
)

MEDIA_FIELDS = ("audio_config", "text_config", "vision_config")

ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def check_parts(data: dict[str, Any]) -> None:
    """Refuses a model with a part that no family here has, whatever its model_type.

    Args:
        data: the content of config.json.

    Raises:
        SettingError: names the field, and says what it makes of the model.
    """
    for field, value in data.items():
        if field in MEDIA_FIELDS and value is not None:
            raise SettingError(field, "no such field", f"one ({MULTIMODAL})")
        if field in COUNTS_OF_EXPERTS and value not in (None, 0, 1):
            raise SettingError(field, "at most 1", f"{value!r:.80} ({EXPERTS})")
        if field in RECURRENT_FIELDS and value is not None:
            raise SettingError(field, "no such field", f"{value!r:.80} ({HYBRID})")
    if data.get("is_encoder_decoder") is True:
        raise SettingError("is_encoder_decoder", "false", f"true ({BOTH})")
    if data.get("kv_lora_rank") is not None:
        raise SettingError("kv_lora_rank", "no such field", f"{data['kv_lora_rank']!r:.80} ({LATENT})")
    kinds = data.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else ():
        if kind not in ATTENTION_LAYERS:
            known = " or ".join(map(repr, ATTENTION_LAYERS))
            raise SettingError("layer_types", known, f"{kind!r:.80} ({HYBRID})")
    quantization = data.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(method, str) and method.lower() in QUANT_METHODS:
        given = f"{method!r} ({QUANT_METHODS[method.lower()]})"
        raise SettingError("quantization_config.quant_method", "'bitnet' or 'bitnet_ops'", given)
    for field in _rotations(data):
        given = "one (the weights are in a rotated basis; read as they are, they would write fluent nonsense)"
        raise SettingError(field, "no such field", given)


def reason(model_type: Any) -> str | None:
    """What is known against a model_type; None for one that is not in `MODEL_TYPES`, whatever it is."""
    return MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None


def _rotations(data: dict[str, Any]) -> Iterator[str]:
    """Fields that tell of a Hadamard rotation, in the object itself and in those right inside it."""
    for field, value in data.items():
        if "hadamard" in field.lower() and value is not None and value is not False:
            yield f"{field:.80}"
        if isinstance(value, dict):
            for inner, what in value.items():
                if "hadamard" in inner.lower() and what is not None and what is not False:
                    yield f"{field:.80}.{inner:.80}"
