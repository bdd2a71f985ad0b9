"""The models that the comparison times: real shapes, random weights.

Speed and memory don't depend on what the weights are, so nothing has to be downloaded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitnet_ops import BitLinear, BitNet, BitNetConfig, KVCache, accelerate, ops, repack

CONTEXT = 512
"""Tokens a cache has room for."""


@dataclass
class Subject:
    """A model behind the two calls that are timed; both sides run inside torch.inference_mode.

    Attributes:
        name: as it stands in the table.
        prefill: takes ids [1, T], gives the best-scored next id [1, 1] and a cache.
        step: takes one id [1, 1] and the cache, gives the next id likewise; the cache grows.
        weight_bytes: bytes of all weights a decoded token has to read.
    """

    name: str
    prefill: Callable[[Tensor], tuple[Tensor, object]]
    step: Callable[[Tensor, object], Tensor]
    weight_bytes: int


def bitnet_2b4t() -> Subject:
    """BitNet b1.58 2B4T in its published shape, with random ternary weights."""
    config = BitNetConfig()
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = BitNet(config)
        model.model.embed_tokens.to(torch.bfloat16)
    # All memory that stays before any that does not: freed pieces in between would be holes in the heap.
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, BitLinear):
            shape = (module.out_features, module.in_features)
            w = torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator)
            module.packed_weight.copy_(ops.pack_ternary(w))
            module.weight_scale.fill_(variance_scale(module.in_features))
    fill(model.parameters(), generator)
    model.eval()

    repack(model)
    head = model.screened_head()  # as `generate` has it
    assert head is not None

    def prefill(ids: Tensor) -> tuple[Tensor, object]:
        cache = KVCache(config, len(ids), CONTEXT)
        return step(ids, cache), cache

    def step(ids: Tensor, cache: object) -> Tensor:
        assert isinstance(cache, KVCache)
        return head.top_k(model.hidden_states(ids, cache=cache)[:, -1], 1)[1]

    read = [head.codes, *model.buffers()]
    return Subject("BitNet b1.58 2B4T, bitnet_ops", prefill, step, sum(tensor.nbytes for tensor in read))


def llama_3_2_1b(dtype: torch.dtype, weight_bits: int = 0) -> Subject:
    """Llama 3.2 1B in transformers, in its published shape, with random weights.

    Args:
        dtype: of weights and activations.
        weight_bits: 8 or 4 to quantise the weights of all linear layers, head included, with torchao.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    fill(model.parameters(), generator)
    # to_empty left the rotary frequencies, a buffer, unset.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.eval()
    if weight_bits:
        quantize_weights(model, weight_bits)

    name = f"Llama 3.2 1B {str(dtype).removeprefix('torch.')}, transformers"
    if not weight_bits:
        return in_transformers(name, model, sum(p.nbytes for p in model.parameters()))
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    read = sum(getattr(w, part).nbytes for w in linears for part in w.tensor_data_names)
    return in_transformers(f"{name}, torchao int{weight_bits} weights", model, read)


def transformers_bitnet(*, accelerated: bool) -> Subject:
    """BitNet b1.58 2B4T in transformers' own modules, bfloat16, random weights; accelerated by us or not."""
    import transformers
    from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

    config = BitNetConfig()
    with torch.device("meta"):
        model = transformers.BitNetForCausalLM(
            transformers.BitNetConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=True,
            )
        ).bfloat16()
    quantization = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="offline")
    model = replace_with_bitnet_linear(model, ["lm_head"], quantization).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    generator = torch.Generator().manual_seed(0)
    fill(model.parameters(), generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AutoBitLinear):
                module.weight.copy_(
                    torch.randint(-1, 2, module.weight.shape, dtype=torch.int8, generator=generator)
                )
                module.weight_scale.fill_(variance_scale(module.in_features))
    model.eval()
    name = "BitNet b1.58 2B4T bfloat16, transformers"
    if accelerated:
        accelerate(model)
        name += ", accelerated"
    return in_transformers(name, model, sum(t.nbytes for t in (*model.parameters(), *model.buffers())))


def variance_scale(in_features: int) -> float:
    """Two thirds of random ternary weights are not zero: this scale keeps the variance of the input."""
    return (1.5 / in_features) ** 0.5


def in_transformers(name: str, model: nn.Module, weight_bytes: int) -> Subject:
    """A model of transformers behind the two calls."""

    def prefill(ids: Tensor) -> tuple[Tensor, object]:
        # Where layers are compiled, for single tokens: prompts are slower by it.
        with torch.compiler.set_stance("force_eager"):
            output = model(ids, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    def step(ids: Tensor, cache: object) -> Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    return Subject(name, prefill, step, weight_bytes)


def quantize_weights(model: nn.Module, bits: int) -> None:
    """Weight-only quantisation by torchao, in the way that is fastest on a CPU."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if bits == 4:
        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))  # a kernel of torch
        return
    quantize_(model, Int8WeightOnlyConfig())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile(dynamic=False)  # without it every call makes a float copy of the weight


def fill(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    """Norms of ones, small random matrices."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.uniform_(-0.03, 0.03, generator=generator)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "bitnet": bitnet_2b4t,
    "bitnet-transformers": lambda: transformers_bitnet(accelerated=False),
    "bitnet-accelerated": lambda: transformers_bitnet(accelerated=True),
    "llama-bf16": lambda: llama_3_2_1b(torch.bfloat16),
    "llama-fp16": lambda: llama_3_2_1b(torch.float16),
    "llama-fp32": lambda: llama_3_2_1b(torch.float32),
    "llama-int8": lambda: llama_3_2_1b(torch.bfloat16, weight_bits=8),
    "llama-int4": lambda: llama_3_2_1b(torch.bfloat16, weight_bits=4),
}
