"""The rows of the comparison: which models there are, in which programs, and what each program needs.

Other programs run in Pythons of their own, because their wheels may need other versions of what we need.
Environment variables name them; where one is not set, this Python is tried.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_ops import DecoderConfig

from .random_gguf import bytes_read, write_random
from .shapes import shape

LLAMA_CPP = "BITNET_OPS_LLAMA_CPP_PYTHON"
LITESPARK = "BITNET_OPS_LITESPARK_PYTHON"
IK_LLAMA = "BITNET_OPS_IK_LLAMA_BENCH"

MODELS = "BitNet 2B4T, Llama 3.2 1B and Gemma 3 1B"
GROUPS = "Qwen3 1.7B with a scale for each 128 weights"
"""Tables."""


@dataclass(frozen=True)
class Program:
    """What a worker runs in.

    Attributes:
        command: that starts its Python; None where it is missing.
        missing: why, and how to have it.
    """

    command: str | None
    missing: str = ""


@dataclass(frozen=True)
class Row:
    """A model in a program.

    Attributes:
        name: in tables.
        table: that it belongs to.
        program: that runs it.
        options: for the worker; called when the model's first turn comes, because it may write a file. Gets
            the folder for it.
        gigabytes: memory to have free before the model is made.
        read: bytes of weights that a decoded token reads; None where the worker says it.
        chart: name in the chart; empty for a row that is not in it.
    """

    name: str
    table: str
    program: Program
    options: Callable[[Path], dict[str, Any]]
    gigabytes: float
    read: int | None = None
    chart: str = ""


def comparison_rows(packed: Path, tiny: bool = False) -> dict[str, Row]:
    """All rows by their keys, in the order of the tables.

    Args:
        packed: folder of the synthetic 2B4T, in the layouts of this machine.
        tiny: small sizes, to try the code.
    """
    return {**_models(packed, tiny), **_group_scales(tiny)}


def _models(packed: Path, tiny: bool) -> dict[str, Row]:
    bitnet, llama = shape("bitnet-2b4t", tiny), shape("llama-3.2-1b", tiny)
    rows: dict[str, Row] = {}
    rows["bitnet"] = Row(
        "BitNet 2B4T, bitnet_ops",
        MODELS,
        _ours(),
        partial(_same, {"engine": "torch_engine", "file": str(packed)}),
        1.5,
        chart="BitNet 2B4T\nbitnet_ops",
    )
    # llama.cpp has no squared ReLU for BitNet: "bitnet" is the same graph with SiLU, and the same products.
    silu = bitnet.replace(activation="silu")
    for head, label in (("Q6_K", "6-bit head"), ("F16", "float16 head")):
        rows[f"bitnet-tq2_0-{head}"] = _gguf(
            f"BitNet 2B4T with SiLU, TQ2_0, {label}, llama.cpp",
            silu,
            ("bitnet", "TQ2_0", head),
            1.5,
            chart="BitNet 2B4T with SiLU\nllama.cpp TQ2_0" if head == "Q6_K" else "",
        )
    for head, label in (("Q6_K", "6-bit head"), ("F16", "float16 head")):
        rows[f"bitnet-iq2_bn-{head}"] = _llama_bench(
            f"BitNet 2B4T, IQ2_BN, {label}, ik_llama.cpp",
            bitnet,
            ("bitnet-b1.58", "IQ2_BN", head),
            chart="BitNet 2B4T\nik_llama.cpp IQ2_BN" if head == "Q6_K" else "",
        )
    sizes = {name: value for name, value in vars(bitnet).items() if isinstance(value, (int, float))}
    head = bitnet.vocab_size * bitnet.hidden_size // 2
    rows["bitnet-litespark"] = Row(
        "BitNet 2B4T, 4-bit head, Litespark",
        MODELS,
        _other(LITESPARK, "litespark_inference", "litespark-inference"),
        partial(_same, {"engine": "litespark_engine", "sizes": sizes}),
        1.5,
        # Its projections lie as those of IQ2_BN do, a scale for the matrix apart.
        bytes_read(bitnet, "IQ2_BN", "F16") - bitnet.vocab_size * bitnet.hidden_size * 2 + head,
        chart="BitNet 2B4T\nLitespark",
    )
    in_transformers = {
        "bitnet-transformers": ("bitnet", "BitNet 2B4T bfloat16, transformers", 6.5),
        "bitnet-accelerated": (
            "bitnet-accelerated",
            "BitNet 2B4T bfloat16, transformers, accelerated by bitnet_ops",
            6.5,
        ),
        "llama-bf16": ("llama-bf16", "Llama 3.2 1B bfloat16, transformers", 4.0),
        "llama-fp16": ("llama-fp16", "Llama 3.2 1B float16, transformers", 4.0),
        "llama-fp32": ("llama-fp32", "Llama 3.2 1B float32, transformers", 6.5),
        "llama-int8": ("llama-int8", "Llama 3.2 1B bfloat16, int8 weights of torchao, transformers", 5.0),
        "llama-int4": ("llama-int4", "Llama 3.2 1B bfloat16, int4 weights of torchao, transformers", 5.0),
        "gemma-bf16": ("gemma-bf16", "Gemma 3 1B bfloat16, transformers", 3.5),
    }
    charts = {
        "bitnet-transformers": "BitNet 2B4T bfloat16\ntransformers",
        "llama-bf16": "Llama 3.2 1B bfloat16\ntransformers",
        "gemma-bf16": "Gemma 3 1B bfloat16\ntransformers",
    }
    for key, (subject, name, gigabytes) in in_transformers.items():
        options = {"engine": "torch_engine", "subject": subject, "tiny": tiny}
        program = _ours("transformers", *(["torchao"] if "torchao" in name else []))
        chart = charts.get(key, "")
        rows[key] = Row(name, MODELS, program, partial(_same, options), gigabytes, chart=chart)
    rows["llama-q4_0"] = _gguf(
        "Llama 3.2 1B, Q4_0, 6-bit head, llama.cpp",
        llama,
        ("llama", "Q4_0", "Q6_K"),
        1.5,
        chart="Llama 3.2 1B\nllama.cpp Q4_0",
    )
    rows["llama-f16"] = _gguf("Llama 3.2 1B, F16, llama.cpp", llama, ("llama", "F16", "F16"), 3.0)
    return rows


def _group_scales(tiny: bool) -> dict[str, Row]:
    config = shape("qwen3-1.7b", tiny)
    rows = {}
    for key, name, arguments in (
        ("qwen3-16", "16-bit activations, bitnet_ops", {}),
        ("qwen3-8", "8-bit activations, bitnet_ops", {"activation_bits": 8}),
    ):
        rows[key] = Row(
            name,
            GROUPS,
            _ours(),
            partial(_written, config, ("qwen3", "PQ2_0", "PQ2_0"), {"arguments": arguments}),
            3.0,
        )
    for type_, label in (("Q2_0", "Q2_0 (two scales for 128)"), ("TQ2_0", "TQ2_0 (a scale for 256: lossy)")):
        rows[f"qwen3-{type_.lower()}"] = _gguf(
            f"{label}, llama.cpp", config, ("qwen3", type_, type_), 1.5, table=GROUPS
        )
    return rows


def _ours(*modules: str) -> Program:
    """This Python, where it has some modules."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return Program(None, f"no {module}")
    return Program(sys.executable)


def _other(variable: str, module: str, package: str) -> Program:
    python = os.environ.get(variable)
    if python or importlib.util.find_spec(module) is not None:
        return Program(python or sys.executable)
    return Program(None, f"no {package}, here or in a Python that {variable} names")


def _same(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    return options


def _written(
    config: DecoderConfig, types: tuple[str, str, str], options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Options of a worker that loads a GGUF file, after writing it where it is not there yet."""
    file = folder / f"{'-'.join(types)}-{config.vocab_size}-{config.num_hidden_layers}.gguf".lower()
    if not file.exists():
        write_random(file, config, *types)
    return {"engine": "torch_engine", **options, "file": str(file)}


def _gguf(
    name: str,
    config: DecoderConfig,
    types: tuple[str, str, str],
    gigabytes: float,
    table: str = MODELS,
    chart: str = "",
) -> Row:
    """A file of random weights in llama.cpp; ``types`` as `write_random` takes them."""
    options = {"engine": "llama_cpp_engine", "vocab_size": config.vocab_size}
    return Row(
        name,
        table,
        _other(LLAMA_CPP, "llama_cpp", "llama-cpp-python"),
        partial(_written, config, types, options),
        gigabytes,
        bytes_read(config, *types[1:]),
        chart,
    )


def _llama_bench(name: str, config: DecoderConfig, types: tuple[str, str, str], chart: str) -> Row:
    """A file of random weights in ik_llama.cpp's llama-bench."""
    program = os.environ.get(IK_LLAMA)
    options = {"engine": "llama_bench_engine", "program": program}
    return Row(
        name,
        MODELS,
        Program(sys.executable if program else None, f"{IK_LLAMA} does not name a llama-bench"),
        partial(_written, config, types, options),
        2.0,
        bytes_read(config, *types[1:]),
        chart,
    )
