"""Ternary (1.58-bit) language models in PyTorch, on ordinary CPUs at the speed of the memory bus."""

import os
import warnings
from importlib.metadata import version
from pathlib import Path

with warnings.catch_warnings():
    # torch warns where NumPy is not installed; nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

from bitnet_ops.checkpoint import CheckpointError, save_gguf, save_pretrained, save_published
from bitnet_ops.decoder.cache import KVCache
from bitnet_ops.decoder.config import BitNetConfig, DecoderConfig, RopeScaling
from bitnet_ops.decoder.pooling import EmbeddingSettings
from bitnet_ops.embedding.sentence_encoder import SentenceEncoder
from bitnet_ops.evaluation.perplexity import TextLoss, perplexity
from bitnet_ops.integrations.transformers import accelerate
from bitnet_ops.integrations.transformers_registration import register_transformers, unregister_transformers
from bitnet_ops.isa import isa, known_isas, supported_isas, use_isa  # loads the kernels
from bitnet_ops.layers.embedding import TernaryEmbedding
from bitnet_ops.layers.linear import BitLinear, BitLinearQAT, best_layout
from bitnet_ops.layers.replace import pack, repack, replace_linear
from bitnet_ops.model import BitNet, from_pretrained
from bitnet_ops.ops import (
    lm_head,
    pack_ternary,
    quantize_activations,
    repack_ternary,
    rms_norm,
    ternary_linear,
    ternary_matmul,
    unpack_ternary,
)
from bitnet_ops.packing import packed_shape

if hasattr(os, "register_at_fork"):
    # GNU OpenMP, which torch's wheels bring, waits for ever in a forked child for threads that only the
    # parent has, as soon as torch splits an operator. One thread, as in a DataLoader's workers, needs none.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

__version__ = version("bitnet_ops")

DEFAULT_MODEL = Path(__file__).parent / "default_model"
"""Folder of the small model that ships in the package; its README.md is the model card."""

__all__ = [
    "DEFAULT_MODEL",
    "BitLinear",
    "BitLinearQAT",
    "BitNet",
    "BitNetConfig",
    "CheckpointError",
    "DecoderConfig",
    "EmbeddingSettings",
    "KVCache",
    "RopeScaling",
    "SentenceEncoder",
    "TernaryEmbedding",
    "TextLoss",
    "accelerate",
    "best_layout",
    "from_pretrained",
    "isa",
    "known_isas",
    "lm_head",
    "pack",
    "pack_ternary",
    "packed_shape",
    "perplexity",
    "quantize_activations",
    "register_transformers",
    "repack",
    "repack_ternary",
    "replace_linear",
    "rms_norm",
    "save_gguf",
    "save_pretrained",
    "save_published",
    "supported_isas",
    "ternary_linear",
    "ternary_matmul",
    "unpack_ternary",
    "unregister_transformers",
    "use_isa",
]
