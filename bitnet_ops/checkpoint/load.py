"""From a folder to a model: checks everything that can be checked first, then reads tensor by tensor."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..decoder.config import DecoderConfig
from ..decoder.model import LanguageModel
from ..layers.linear import BitLinear
from ..layers.memory import HugePages
from ..layers.norm import RMSNorm
from .config_json import QUANT_METHOD, family_of, parse_config
from .errors import CheckpointError
from .files import FLOAT_DTYPES, TensorFiles, local_folder, read_json
from .head_copy import CHUNK_ROWS, HEAD, is_bound, is_finite, stored_head, stored_names, table_name
from .hf import PublishedProjections
from .packed import CONFIG_FILE, PackedProjections
from .projections import ProjectionReader
from .text_files import load_chat_template, load_generation_config, load_tokenizer

Model = TypeVar("Model", bound=LanguageModel)


def load(
    folder: str | os.PathLike[str],
    make: Callable[[DecoderConfig], Model],
    *,
    mmap: bool | None = None,
) -> Model:
    """Loads a model from a folder: `bitnet_ops.from_pretrained`, for a model of any class.

    Args:
        folder: as for `bitnet_ops.from_pretrained`, like ``mmap``.
        make: makes a model of the given shape.
        mmap: use tensors where they lie in the files.

    Raises:
        CheckpointError: a ValueError that names the file and the tensor or field at fault.
    """
    path = local_folder(folder)
    data = read_json(path / CONFIG_FILE)
    config = parse_config(data, path / CONFIG_FILE)
    projections = _projection_reader(data, path / CONFIG_FILE)
    generation_config = load_generation_config(path, config)
    tokenizer = load_tokenizer(path, config.vocab_size)
    chat_template = load_chat_template(path)
    if mmap is None:
        mmap = isinstance(projections, PackedProjections)
    with TensorFiles(path, mmap=mmap) as files:
        _check_plausible(config, files, path / CONFIG_FILE)
        with torch.device("meta"):  # shapes only: the tensors that are read become the model's own
            model = make(config)
        table = table_name(config)
        bound = is_bound(files, data.get("quantization_config") or {}, table)
        _load_weights(model, files, projections, {table} if bound else set())
        model.eval().requires_grad_(False)
        copy = stored_head(files, model.head_weight) if bound else None
        model.screened_head(copy, files.forget)
    model.tokenizer = tokenizer
    model.generation_config = generation_config
    model.chat_template = chat_template
    return model


def _projection_reader(data: dict[str, Any], file: Path) -> ProjectionReader:
    quantization = data.get("quantization_config")
    family = family_of(data, file)
    if quantization is None:
        return PublishedProjections.from_config(None, family, file)
    if not isinstance(quantization, dict):
        raise CheckpointError.at(file, "quantization_config", "an object", f"{quantization!r:.200}")
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        return PackedProjections.from_config(quantization, file)
    if method == "bitnet":
        return PublishedProjections.from_config(quantization, family, file)
    raise CheckpointError.at(
        file, "quantization_config.quant_method", f"'bitnet' or {QUANT_METHOD!r}", f"{method!r:.200}"
    )


def _check_plausible(config: DecoderConfig, files: TensorFiles, file: Path) -> None:
    """Refuses sizes that the files cannot hold before a model of these sizes is built.

    Even without memory a billion layers take for ever, and sizes above 2^63 overflow inside torch.
    """
    most = 5 * files.total_bytes  # no format stores more than 5 weights a byte
    for name, size in (
        ("vocab_size", config.vocab_size),
        ("intermediate_size", config.intermediate_size),
        ("num_attention_heads, head_dim", config.q_size),
    ):
        if size * config.hidden_size > most:
            raise CheckpointError.at(
                file,
                f"{name} and hidden_size",
                f"a matrix that fits into safetensors files of {files.total_bytes} bytes",
                f"{size} x {config.hidden_size}",
            )
    layers = {".".join(name.split(".")[:3]) for name in files.tensors}
    for layer in range(config.num_hidden_layers):
        if f"model.layers.{layer}" not in layers:
            raise CheckpointError.at(
                file,
                "num_hidden_layers",
                "a number of layers that the safetensors files have tensors for",
                f"{config.num_hidden_layers}, where the tensors 'model.layers.{layer}.*' are missing",
            )


def _load_weights(
    model: LanguageModel, files: TensorFiles, projections: ProjectionReader, known_finite: set[str]
) -> None:
    """Checks that the files have the tensors of the model and no others, then gives them to its modules.

    Matrices that are ``known_finite`` are not read.
    """
    memory = HugePages()
    used: list[str] = []
    steps: list[Callable[[], None]] = []
    for ours, module in model.named_modules():
        name = projections.stored_name(ours)
        if isinstance(module, BitLinear):
            used += projections.check(files, name, module)
            steps.append(partial(_load_projection, files, projections, memory, name, module))
        elif isinstance(module, (RMSNorm, nn.Embedding, nn.Linear)):
            weight = f"{name}.weight"
            files.expect(weight, FLOAT_DTYPES, tuple(module.weight.shape))
            used.append(weight)
            if isinstance(module, RMSNorm):
                steps.append(partial(_load_norm, files, weight, module))
            else:
                steps.append(partial(_load_matrix, files, memory, weight, module, weight in known_finite))
    if model.config.tie_word_embeddings and HEAD in files.tensors:
        files.expect(HEAD, FLOAT_DTYPES, tuple(model.head_weight.shape))
        used.append(HEAD)
        steps.append(partial(_check_tied, files, model))
    if isinstance(projections, PackedProjections):
        used += stored_names(files)
    unexpected = sorted(files.tensors.keys() - set(used))
    if unexpected:
        raise files.error(
            unexpected[0],
            f"only the {len(used)} tensors of this architecture",
            f"this and {len(unexpected) - 1} more",
        )
    # disable=None: a bar on a terminal, silence elsewhere.
    for step in tqdm(steps, desc="loading", unit="tensor", disable=None, leave=False):
        step()


def _load_projection(
    files: TensorFiles, projections: ProjectionReader, memory: HugePages, name: str, module: BitLinear
) -> None:
    for attribute, value in projections.read(files, name, module, memory)._asdict().items():
        setattr(module, attribute, value)


def _load_norm(files: TensorFiles, name: str, module: RMSNorm) -> None:
    weight = files.read(name).float()
    _check_finite(files, name, weight)
    module.weight = nn.Parameter(weight)


def _load_matrix(
    files: TensorFiles,
    memory: HugePages,
    name: str,
    module: nn.Embedding | nn.Linear,
    known_finite: bool,
) -> None:
    matrix = files.tensor(name, memory.empty)
    for rows in () if known_finite else torch.split(matrix, CHUNK_ROWS):
        _check_finite(files, name, rows)
        files.forget(rows)  # a model reads few rows of it, if the head is screened
    module.weight = nn.Parameter(matrix)


def _check_tied(files: TensorFiles, model: LanguageModel) -> None:
    """A tied head may be stored a second time, but it has to be the same matrix."""
    again = torch.split(files.tensor(HEAD), CHUNK_ROWS)
    for rows, head_rows in zip(again, torch.split(model.head_weight, CHUNK_ROWS), strict=True):
        if not rows.equal(head_rows):
            raise files.error(
                HEAD, "the numbers of the embedding, because config.json ties them", "other numbers"
            )
        files.forget(rows)
        files.forget(head_rows)


def _check_finite(files: TensorFiles, name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise files.error(name, "finite numbers", "a NaN or an infinity")
