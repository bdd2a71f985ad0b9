"""From a folder to a model: checks everything that can be checked first, then reads tensor by tensor."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..config import BitNetConfig
from ..linear import BitLinear
from ..model import BitNet, RMSNorm
from .config_json import parse_config
from .errors import CheckpointError
from .files import FLOAT_DTYPES, TORCH_DTYPE, TensorFiles, local_folder, read_json
from .hf import PublishedProjections
from .huge_pages import HugePages
from .packed import CONFIG_FILE, QUANT_METHOD, PackedProjections
from .text_files import load_chat_template, load_generation_config, load_tokenizer

CHUNK_ROWS = 1024
"""Rows of the embedding matrix that are looked at together; a few MB of temporaries at 2560 columns."""


EMBEDDING = "model.embed_tokens.weight"


class ProjectionReader(Protocol):
    """How the weights of a projection are stored; `hf` and `packed` have one each."""

    def check(self, files: TensorFiles, name: str, out_features: int, in_features: int) -> list[str]:
        """Checks the headers and returns the names of the tensors that `read` uses."""

    def read(
        self, files: TensorFiles, name: str, out_features: int, in_features: int
    ) -> tuple[Tensor, Tensor]:
        """Reads ``(packed_weight, weight_scale)``."""


def from_pretrained(folder: str | os.PathLike[str]) -> BitNet:
    """Loads a model from a local folder; nothing is ever downloaded.

    Understands the published layout of BitNet b1.58 2B4T (packed), its bf16 master weights (quantised
    here), and what `save_pretrained` writes. Weights come from model.safetensors, or from several files
    with model.safetensors.index.json. Peak memory stays near the size of the packed model, because
    tensors are read and packed one at a time. A bar shows the progress on a terminal.

    Args:
        folder: holds config.json and the safetensors files; may hold tokenizer.json,
            generation_config.json, and chat_template.jinja or tokenizer_config.json.

    Returns:
        The model in eval mode and without gradients. The embedding keeps its stored dtype, norms are
        float32. ``model.tokenizer`` (a tokenizers.Tokenizer or None), ``model.chat_template`` (str or None)
        and ``model.generation_config`` (dict) are what the folder has.

    Raises:
        CheckpointError: a ValueError that names the file and the tensor or field at fault.

    Example:
        >>> model = bitnet_ops.from_pretrained("bitnet-2b4t")
        >>> model(torch.tensor([model.tokenizer.encode("The sea").ids])).shape
        torch.Size([1, 3, 128256])
    """
    path = local_folder(folder)
    data = read_json(path / CONFIG_FILE)
    config = parse_config(data, path / CONFIG_FILE)
    projections = _projection_reader(data, path / CONFIG_FILE)
    generation_config = load_generation_config(path, config)
    tokenizer = load_tokenizer(path, config.vocab_size)
    chat_template = load_chat_template(path)
    with TensorFiles(path) as files:
        _check_plausible(config, files, path / CONFIG_FILE)
        with torch.device("meta"):  # shapes only: the tensors that are read become the model's own
            model = BitNet(config)
        state = _read_state(model, files, projections)
    model.load_state_dict(state, assign=True)
    model.tokenizer = tokenizer
    model.generation_config = generation_config
    model.chat_template = chat_template
    return model.eval().requires_grad_(False)


def _projection_reader(data: dict[str, Any], file: Path) -> ProjectionReader:
    quantization = data.get("quantization_config")
    if quantization is None:
        return PublishedProjections.from_config(None, file)
    if not isinstance(quantization, dict):
        raise CheckpointError.at(file, "quantization_config", "an object", f"{quantization!r:.200}")
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        return PackedProjections.from_config(quantization, file)
    if method == "bitnet":
        return PublishedProjections.from_config(quantization, file)
    raise CheckpointError.at(
        file, "quantization_config.quant_method", f"'bitnet' or {QUANT_METHOD!r}", f"{method!r:.200}"
    )


def _check_plausible(config: BitNetConfig, files: TensorFiles, file: Path) -> None:
    """Refuses sizes that the files cannot hold before a model of these sizes is built.

    Even without memory a billion layers take for ever, and sizes above 2^63 overflow inside torch.
    """
    most = 4 * files.total_bytes  # no format stores more than 4 weights a byte
    for name in ("vocab_size", "intermediate_size"):
        size = getattr(config, name)
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


def _read_state(model: BitNet, files: TensorFiles, projections: ProjectionReader) -> dict[str, Tensor]:
    """Checks that the files have the tensors of the model and no others, then reads them.

    What stays lies in one region of huge pages, so the temporaries of reading leave no holes between.
    """
    memory = HugePages(*_room(model, files))
    state: dict[str, Tensor] = {}
    used: list[str] = []
    steps: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            sizes = module.out_features, module.in_features
            used += projections.check(files, name, *sizes)
            packed = state[f"{name}.packed_weight"] = memory.empty(module.packed_weight.shape, torch.uint8)
            scale = state[f"{name}.weight_scale"] = memory.empty(module.weight_scale.shape, torch.float32)
            steps.append(partial(_read_projection, files, projections, name, *sizes, packed, scale))
        elif isinstance(module, (RMSNorm, nn.Embedding, nn.Linear)):
            weight = f"{name}.weight"
            stored = files.expect(weight, FLOAT_DTYPES, tuple(module.weight.shape))
            used.append(weight)
            if isinstance(module, RMSNorm):
                norm = state[weight] = torch.empty(module.weight.shape)
                steps.append(partial(_read_norm, files, weight, norm))
            else:
                matrix = state[weight] = memory.empty(stored.shape, TORCH_DTYPE[stored.dtype])
                steps.append(partial(_read_matrix, files, weight, matrix))
    if model.config.tie_word_embeddings and "lm_head.weight" in files.tensors:
        files.expect("lm_head.weight", FLOAT_DTYPES, tuple(model.head_weight.shape))
        used.append("lm_head.weight")
        steps.append(partial(_check_tied, files, "lm_head.weight", state))
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
    return state


def _read_projection(
    files: TensorFiles,
    projections: ProjectionReader,
    name: str,
    out_features: int,
    in_features: int,
    packed: Tensor,
    scale: Tensor,
) -> None:
    packed_read, scale_read = projections.read(files, name, out_features, in_features)
    packed.copy_(packed_read)
    scale.copy_(scale_read)


def _room(model: BitNet, files: TensorFiles) -> tuple[int, int]:
    """Bytes and number of the tensors that stay."""
    sizes = []
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            sizes += [module.packed_weight.nbytes, module.weight_scale.nbytes]
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            stored = files.expect(f"{name}.weight", FLOAT_DTYPES, tuple(module.weight.shape))
            sizes.append(module.weight.numel() * TORCH_DTYPE[stored.dtype].itemsize)
    return sum(sizes), len(sizes)


def _read_norm(files: TensorFiles, name: str, out: Tensor) -> None:
    out.copy_(files.read(name))
    _check_finite(files, name, out)


def _read_matrix(files: TensorFiles, name: str, out: Tensor) -> None:
    files.read_into(name, out)
    for rows in torch.split(out, CHUNK_ROWS):
        _check_finite(files, name, rows)


def _check_tied(files: TensorFiles, head: str, state: dict[str, Tensor]) -> None:
    """A tied head may be stored a second time, but it has to be the same matrix."""
    if not files.read(head).equal(state[EMBEDDING]):
        raise files.error(
            head, "the numbers of the embedding, because config.json ties them", "other numbers"
        )


def _check_finite(files: TensorFiles, name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise files.error(name, "finite numbers", "a NaN or an infinity")
