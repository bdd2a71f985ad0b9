"""Models made in this process: real shapes, random weights.

Speed and memory don't depend on what the weights are, so nothing has to be downloaded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from comparison.shapes import shape
from torch import Tensor, nn

from bitnet_ops import BitLinear, BitNet, BitNetConfig, DecoderConfig, KVCache, accelerate, ops, repack

CONTEXT = 512
"""Tokens a cache has room for."""

REPEATED = 1 << 22
"""Random numbers that a large matrix repeats."""


@dataclass
class Subject:
    """A model behind the two calls that are timed; both sides run inside torch.inference_mode.

    Attributes:
        prefill: takes ids [1, T], gives the best-scored next id [1, 1] and a cache.
        step: takes one id [1, 1] and the cache, gives the next id likewise; the cache grows.
        weight_bytes: bytes of all weights a decoded token has to read.
        vocab_size: ids are below it.
    """

    prefill: Callable[[Tensor], tuple[Tensor, object]]
    step: Callable[[Tensor, object], Tensor]
    weight_bytes: int
    vocab_size: int


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
    return Subject(prefill, step, sum(tensor.nbytes for tensor in read), config.vocab_size)


def llama_3_2_1b(tiny: bool, dtype: torch.dtype, weight_bits: int = 0) -> Subject:
    """Llama 3.2 1B in transformers, in its published shape, with random weights.

    Args:
        tiny: the same with small sizes.
        dtype: of weights and activations.
        weight_bits: 8 or 4 to quantise the weights of all linear layers, head included, with torchao.
    """
    import transformers

    sizes = shape("llama-3.2-1b", tiny)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **common_sizes(sizes),
                head_dim=sizes.head_dim,
                rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    model = filled(model.to(dtype))
    if not weight_bits:
        return in_transformers(model, sum(p.nbytes for p in model.parameters()))
    quantize_weights(model, weight_bits)
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return in_transformers(
        model, sum(getattr(w, part).nbytes for w in linears for part in w.tensor_data_names)
    )


def gemma_3_1b(tiny: bool) -> Subject:
    """Gemma 3 1B in transformers, in its published shape, bfloat16, random weights."""
    import transformers

    sizes = shape("gemma-3-1b", tiny)
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **common_sizes(sizes),
                head_dim=sizes.head_dim,
                sliding_window=sizes.window,
                query_pre_attn_scalar=sizes.head_dim,
            )
        ).bfloat16()
    model = filled(model)
    model.model.embed_tokens.embed_scale.fill_(sizes.hidden_size**0.5)
    return in_transformers(model, sum(p.nbytes for p in model.parameters()))


def transformers_bitnet(tiny: bool, *, accelerated: bool) -> Subject:
    """BitNet b1.58 2B4T in transformers' own modules, bfloat16, random weights; accelerated by us or not."""
    import transformers
    from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

    sizes = shape("bitnet-2b4t", tiny)
    with torch.device("meta"):
        model = transformers.BitNetForCausalLM(
            transformers.BitNetConfig(
                **common_sizes(sizes),
                rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
                bos_token_id=None,
                eos_token_id=None,
            )
        ).bfloat16()
    quantization = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="offline")
    model = filled(replace_with_bitnet_linear(model, ["lm_head"], quantization))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AutoBitLinear):
                w = torch.randint(-1, 2, module.weight.shape, dtype=torch.int8, generator=generator)
                module.weight.copy_(w)
                module.weight_scale.fill_(variance_scale(module.in_features))
    if accelerated:
        accelerate(model)
    return in_transformers(model, sum(t.nbytes for t in (*model.parameters(), *model.buffers())))


def common_sizes(sizes: DecoderConfig) -> dict[str, int | float | bool]:
    """What every configuration of transformers calls by the same name."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return {name: getattr(sizes, name) for name in names}


def filled(model: nn.Module) -> nn.Module:
    """A model of transformers, made on "meta", with memory and random weights."""
    model = model.to_empty(device="cpu")
    model.tie_weights()
    fill(model.parameters(), torch.Generator().manual_seed(0))
    # to_empty left the rotary frequencies, buffers, unset.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def variance_scale(in_features: int) -> float:
    """Two thirds of random ternary weights are not zero: this scale keeps the variance of the input."""
    return (1.5 / in_features) ** 0.5


def in_transformers(model: nn.Module, weight_bytes: int) -> Subject:
    """A model of transformers behind the two calls."""

    def prefill(ids: Tensor) -> tuple[Tensor, object]:
        # Where layers are compiled, for single tokens: prompts are slower by it.
        with torch.compiler.set_stance("force_eager"):
            output = model(ids, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values

    def step(ids: Tensor, cache: object) -> Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    return Subject(prefill, step, weight_bytes, model.config.vocab_size)


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
                some = torch.empty(REPEATED).uniform_(-0.03, 0.03, generator=generator).to(parameter.dtype)
                flat = parameter.view(-1)  # filled from a small piece, in a tenth of the time
                for part in flat.split(REPEATED):
                    part.copy_(some[: len(part)])


SUBJECTS: dict[str, Callable[[bool], Subject]] = {
    "bitnet": partial(transformers_bitnet, accelerated=False),
    "bitnet-accelerated": partial(transformers_bitnet, accelerated=True),
    "llama-bf16": partial(llama_3_2_1b, dtype=torch.bfloat16),
    "llama-fp16": partial(llama_3_2_1b, dtype=torch.float16),
    "llama-fp32": partial(llama_3_2_1b, dtype=torch.float32),
    "llama-int8": partial(llama_3_2_1b, dtype=torch.bfloat16, weight_bits=8),
    "llama-int4": partial(llama_3_2_1b, dtype=torch.bfloat16, weight_bits=4),
    "gemma-bf16": gemma_3_1b,
}
"""Models of transformers by the names that the comparison has for them; the argument asks for small sizes."""
