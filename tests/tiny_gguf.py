"""Small GGUF files for the tests, written by the `gguf` package or byte by byte, and by nothing of ours."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import gguf_encoders
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from bitnet_ops import BitLinear, BitNet, DecoderConfig
from bitnet_ops.layers.norm import RMSNorm

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?",
           U64: "Q", I64: "q", F64: "d"}  # fmt: skip


@dataclass(frozen=True)
class Typed:
    """A value of metadata with its type; of an array also that of its elements."""

    value: Any
    kind: int
    of: int = U32


@dataclass(frozen=True)
class Entry:
    """A tensor: name, shape in PyTorch's order, number of its type, bytes; offset None for the next one."""

    name: str
    shape: tuple[int, ...]
    number: int
    data: bytes
    offset: int | None = None


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> Typed:
    """What writers make of Python's types."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, list):
        return Typed(value, ARRAY, typed(value[0]).kind if value else STRING)
    kinds = {bool: BOOL, int: U32, float: F32, str: STRING, bytes: STRING}
    return Typed(value, kinds[type(value)])


def value_bytes(value: Any, kind: int) -> bytes:
    return text(value) if kind == STRING else struct.pack(f"<{LETTERS[kind]}", value)


def gguf_bytes(
    metadata: dict[str, Any], entries: list[Entry], *, version: int = 3, alignment: int = 32
) -> bytes:
    """A whole file, from the public description of the format."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(entries), len(metadata)))
    for key, given in metadata.items():
        value = typed(given)
        head += text(key) + struct.pack("<I", value.kind)
        if value.kind == ARRAY:
            head += struct.pack("<IQ", value.of, len(value.value))
            head += b"".join(value_bytes(one, value.of) for one in value.value)
        else:
            head += value_bytes(value.value, value.kind)
    data = bytearray()
    for entry in entries:
        offset = len(data) if entry.offset is None else entry.offset
        head += text(entry.name) + struct.pack("<I", len(entry.shape))
        head += struct.pack(f"<{len(entry.shape)}Q", *entry.shape[::-1])
        head += struct.pack("<IQ", entry.number, offset)
        data += entry.data + bytes(-len(entry.data) % alignment)
    return bytes(head) + bytes(-len(head) % alignment) + bytes(data)


# Types: (number, weights and scales [G, N] to bytes)


def as_floats(w: Tensor, scales: Tensor) -> np.ndarray[Any, Any]:
    """The matrix itself, float32."""
    return (w * scales.T.repeat_interleave(w.shape[1] // len(scales), 1)).numpy()


def by_gguf(number: int) -> tuple[int, Callable[[Tensor, Tensor], bytes]]:
    """A type that the gguf package quantises to."""
    kind = GGMLQuantizationType(number)
    return number, lambda w, scales: quants.quantize(as_floats(w, scales), kind).tobytes()


def by_formula(number: int, name: str, block: int) -> tuple[int, Callable[[Tensor, Tensor], bytes]]:
    """A type of `gguf_encoders`, with a scale for each ``block`` inputs, or 0 for one of a row."""

    def encode(w: Tensor, scales: Tensor) -> bytes:
        groups = w.shape[1] // block if block else 1
        spread = scales.repeat_interleave(max(1, groups // len(scales)), 0)
        return gguf_encoders.encode(name, w.numpy(), spread.numpy())

    return number, encode


TYPES: dict[str, tuple[int, Callable[[Tensor, Tensor], bytes]]] = {
    "F32": by_gguf(0),
    "F16": by_gguf(1),
    "BF16": by_gguf(30),
    "Q8_0": by_gguf(8),
    "TQ1_0": by_gguf(34),
    "TQ2_0": by_gguf(35),
    "I2_S": by_formula(36, "I2_S", 0),
    "Q2_0": by_formula(42, "Q2_0", 64),
    "Q2_0_128": by_formula(42, "Q2_0_128", 128),
    "PQ2_0": by_formula(142, "PQ2_0", 128),
    "IQ2_BN": by_formula(135, "IQ2_BN", 0),
    "IQ1_BN": by_formula(134, "IQ1_BN", 0),
    "PTQ1_0": by_formula(143, "PTQ1_0", 128),
    "I2_S_ARM": by_formula(36, "I2_S_ARM", 0),
}
GROUPS = {"TQ1_0": 256, "TQ2_0": 256, "Q2_0": 64, "Q2_0_128": 128, "PQ2_0": 128, "PTQ1_0": 128}
"""Inputs with a scale of their own."""


@dataclass
class Tiny:
    """A random model under our names: ternary projections with scales [G, N], and floats."""

    config: DecoderConfig
    ternary: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def random(cls, config: DecoderConfig, seed: int = 0, scales: str = "tensor", group: int = 256) -> "Tiny":
        """``scales``: one for a "tensor", a "row" or a "group" of as many inputs; exact in float16."""
        generator = torch.Generator().manual_seed(seed)
        tiny = cls(config)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        for name, module in BitNet(config).named_modules():
            if isinstance(module, BitLinear):
                n, k = module.out_features, module.in_features
                w = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
                w[:, ::32] = 1  # quantisers take the largest of a block for its scale
                shape = {"tensor": (1, 1), "row": (1, n), "group": (k // group, n)}[scales]
                tiny.ternary[name] = w
                tiny.scales[name] = (normal(*shape).exp() * k**-0.5).half().float().expand(shape[0], n)
                if module.bias is not None:
                    tiny.floats[f"{name}.bias"] = normal(n)
            elif isinstance(module, RMSNorm):
                tiny.floats[f"{name}.weight"] = 1 + 0.2 * normal(*module.weight.shape)
            elif name == "model.embed_tokens" or name == "lm_head":
                tiny.floats[f"{name}.weight"] = normal(config.vocab_size, config.hidden_size).half()
        return tiny

    def model(self, **changes: Any) -> BitNet:
        """The model, made of modules and without a file; changes are of its configuration."""
        config = self.config.replace(**changes)
        model = BitNet(config)
        for name, module in model.named_modules():
            if isinstance(module, BitLinear):
                options = {"activation_bits": config.activation_bits, "group_size": config.group_size}
                scale = self.scales[name]
                scale = (
                    scale.repeat_interleave(-(-module.in_features // config.group_size) // len(scale), 0)
                    if config.group_size
                    else scale[0]
                )
                bias = self.floats.get(f"{name}.bias")
                made = BitLinear.from_ternary(self.ternary[name], scale.contiguous(), bias, **options)
                module.load_state_dict(made.state_dict())
            elif f"{name}.weight" in self.floats:
                module.weight = torch.nn.Parameter(self.floats[f"{name}.weight"])
        return model.eval()


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(module: str, architecture: str) -> str:
    """The name by llama.cpp's list of tensors; norms inside projections as in the embedding models."""
    names = GEMMA_NAMES if architecture == "gemma3" else NAMES
    if not module.startswith("model.layers."):
        return names[module]
    _, _, layer, inner = module.split(".", 3)
    ending = ""
    if inner.endswith(("_proj.linear", "_proj.norm")):
        inner, part = inner.rsplit(".", 1)
        ending = "_norm_in" if part == "norm" else ""
    return f"blk.{layer}.{names[inner]}{ending}"


def permute(matrix: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The order of rows that llama.cpp's converter gives q and k of a Llama."""
    shape = matrix.shape
    return matrix.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def settings(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """The keys of a model, as converters write them."""
    a = architecture
    metadata: dict[str, Any] = {
        "general.architecture": a,
        f"{a}.block_count": config.num_hidden_layers,
        f"{a}.context_length": config.max_position_embeddings,
        f"{a}.embedding_length": config.hidden_size,
        f"{a}.feed_forward_length": config.intermediate_size,
        f"{a}.attention.head_count": config.num_attention_heads,
        f"{a}.attention.head_count_kv": config.num_key_value_heads,
        f"{a}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{a}.rope.freq_base": config.rope_theta,
        f"{a}.rope.dimension_count": config.head_dim,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        metadata |= {
            f"{a}.attention.key_length": config.head_dim,
            f"{a}.attention.value_length": config.head_dim,
        }
    if config.window:
        metadata |= {
            f"{a}.attention.sliding_window": config.window,
            f"{a}.attention.sliding_window_pattern": 2,
        }
    return metadata


def entries(tiny: Tiny, architecture: str, kind: str = "I2_S") -> list[Entry]:
    """The tensors of a model, its projections of the type ``kind`` (a name of `TYPES`)."""
    config = tiny.config
    number, encode = TYPES[kind]
    made = []

    def order(name: str, matrix: Tensor) -> Tensor:
        """``matrix`` has its rows first."""
        if architecture != "llama" or (".q_proj" not in name and ".k_proj" not in name):
            return matrix
        heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
        return torch.from_numpy(permute(matrix.numpy(), heads).copy())

    for name, w in tiny.ternary.items():
        scales = order(name, tiny.scales[name].T.contiguous()).T
        data = encode(order(name, w), scales)
        made.append(Entry(f"{gguf_name(name, architecture)}.weight", tuple(w.shape), number, data))
    for name, value in tiny.floats.items():
        module, _, ending = name.rpartition(".")
        if ending == "bias":
            value = order(name, value)
        data = value.numpy().tobytes()
        stored = f"{gguf_name(module, architecture)}.{ending}"
        made.append(Entry(stored, tuple(value.shape), int(value.dtype == torch.float16), data))
    return made


def write_tiny(file: Path, tiny: Tiny, architecture: str, kind: str = "I2_S", **changes: Any) -> Path:
    """A whole model; changes are of its metadata, with "__" for a dot and None for an absent key."""
    metadata = settings(tiny.config, architecture)
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    file.write_bytes(gguf_bytes(metadata, entries(tiny, architecture, kind)))
    return file


def write_with_gguf(file: Path, tiny: Tiny, architecture: str, kind: str) -> Path:
    """The same by the gguf package's own writer; ``kind`` is a type that it knows."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in settings(tiny.config, architecture).items():
        if key != "general.architecture":
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for entry in entries(tiny, architecture, kind):
        data = np.frombuffer(entry.data, dtype=np.uint8).reshape(*entry.shape[:-1], -1)
        writer.add_tensor(entry.name, data, raw_dtype=GGMLQuantizationType(entry.number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


SMALL = DecoderConfig(
    vocab_size=61,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.02,
)
"""K that blocks of 256 fit; heads of 64."""

CONFIGS = {
    "bitnet-b1.58": SMALL.replace(activation="relu2", sub_norms=True),
    "bitnet-25": SMALL.replace(activation="relu2", sub_norms=True),
    "bitnet": SMALL.replace(sub_norms=True),
    "llama": SMALL.replace(attention_bias=True, attention_output_bias=True, mlp_bias=True,
                     tie_word_embeddings=False),
    "qwen3": SMALL.replace(qk_norm=True, head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6),
    "gemma3": SMALL.replace(qk_norm=True, post_norms=True, activation="gelu_tanh", rope_theta=1e6,
                      num_hidden_layers=3, window=5, local_layers=(0, 2), local_rope_theta=1e4,
                      embedding_scale=16.0, rms_norm_eps=1e-6),
}  # fmt: skip
"""By architecture; every part that GGUF files of it have. Of Gemma's layers every second one is global."""

IDS = torch.arange(24).view(2, 12) * 5 % 61


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    """The same logits, bit for bit, and not all alike."""
    logits = model(IDS)
    assert torch.equal(logits, expected(IDS))
    assert logits.std() > 1e-3


ONE_LAYER = {name: config.replace(num_hidden_layers=1, local_layers=(), window=0, local_rope_theta=None)
             for name, config in CONFIGS.items()}  # fmt: skip
