"""A folder in the Hugging Face layout: which format its weights have, and what else it holds."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..families import Family
from .body import Body, find_body
from .config_json import QUANT_METHOD, family_of, parse_config
from .errors import CheckpointError
from .files import TensorFiles, read_json
from .head_copy import is_bound, table_name
from .hf import PublishedWeights
from .mlx import MlxWeights, mlx_settings
from .opened import OpenCheckpoint
from .packed import CONFIG_FILE, PackedWeights
from .pooling import BITNET_EMBEDDING, appended_eos, load_embedding_settings
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
    if not file.exists():
        others = [found.name for found in folder.glob("*.gguf")]
        if others:
            raise CheckpointError.at(
                file, "file", "a file", f"no such file (to load {others[0]}, pass it instead of the folder)"
            )
    data = read_json(file)
    config = parse_config(data, file)
    family = family_of(data, file)
    generation_config = load_generation_config(folder, config)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    chat_template = load_chat_template(folder)
    embedding = load_embedding_settings(folder, config.vocab_size, tokenizer)
    reader = PackedWeights if _is_own(data) else WeightReader
    with ExitStack() as stack:
        files = TensorFiles(folder, mmap=reader.maps_files if mmap is None else mmap)
        files.map_all = mmap is True
        stack.push(files)
        body = find_body(files)
        weights = _weight_reader(data, family, file, body, dense)
        if not isinstance(weights, PackedWeights):
            config = body.fit(config, weights)
        if embedding is None and body.has_norms:
            embedding = replace(BITNET_EMBEDDING, eos_token_id=appended_eos(folder, tokenizer))
        table = table_name(config)
        certified = table if is_bound(files, data.get("quantization_config"), table) else None
        stack.pop_all()  # from here on they are the checkpoint's to close
    return OpenCheckpoint(
        file, config, files, weights, tokenizer, chat_template, generation_config, embedding, certified
    )


def _is_own(data: dict[str, Any]) -> bool:
    quantization = data.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _weight_reader(data: dict[str, Any], family: Family, file: Path, body: Body, dense: bool) -> WeightReader:
    mlx = mlx_settings(data)
    if mlx is not None:
        return MlxWeights.from_config(mlx, family, file, dense)
    if dense:
        return WeightReader(family)
    quantization = data.get("quantization_config")
    if quantization is None:
        if family.all_ternary or body.has_norms:  # masters
            return PublishedWeights.from_config(None, family, file)
        return TernaryFloats(family)
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
