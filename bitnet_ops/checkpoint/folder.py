"""A folder in the Hugging Face layout: which format its weights have, and what else it holds."""

from pathlib import Path
from typing import Any

from ..families import Family
from .config_json import QUANT_METHOD, family_of, parse_config
from .errors import CheckpointError
from .files import TensorFiles, read_json
from .head_copy import is_bound, table_name
from .hf import PublishedWeights
from .opened import OpenCheckpoint
from .packed import CONFIG_FILE, PackedWeights
from .ternary_floats import TernaryFloats
from .text_files import load_chat_template, load_generation_config, load_tokenizer
from .weights import WeightReader


def open_folder(folder: Path, *, dense: bool, mmap: bool | None) -> OpenCheckpoint:
    """Reads everything but the weights.

    Args:
        folder: holds config.json and the safetensors files.
        dense: whether projections are wanted as they are, and not ternary.
        mmap: use tensors where they lie in the files; None leaves it to the format.

    Raises:
        CheckpointError: something is missing, damaged or not supported.
    """
    file = folder / CONFIG_FILE
    data = read_json(file)
    config = parse_config(data, file)
    family = family_of(data, file)
    weights = WeightReader(family) if dense else _weight_reader(data, family, file)
    generation_config = load_generation_config(folder, config)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    chat_template = load_chat_template(folder)
    files = TensorFiles(folder, mmap=weights.maps_files if mmap is None else mmap)
    opened = OpenCheckpoint(file, config, files, weights, tokenizer, chat_template, generation_config)
    table = table_name(config)
    if is_bound(files, data.get("quantization_config"), table):
        opened.certified_table = table
    return opened


def _weight_reader(data: dict[str, Any], family: Family, file: Path) -> WeightReader:
    quantization = data.get("quantization_config")
    if quantization is None:
        if not family.all_ternary:
            return TernaryFloats(family)
        return PublishedWeights.from_config(None, family, file)
    if not isinstance(quantization, dict):
        raise CheckpointError.at(file, "quantization_config", "an object", f"{quantization!r:.200}")
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        return PackedWeights.from_config(quantization, family, file)
    if method == "bitnet":
        return PublishedWeights.from_config(quantization, family, file)
    raise CheckpointError.at(
        file, "quantization_config.quant_method", f"'bitnet' or {QUANT_METHOD!r}", f"{method!r:.200}"
    )
