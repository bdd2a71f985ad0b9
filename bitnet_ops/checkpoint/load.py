"""From files to a model: checks everything that can be checked first, then reads tensor by tensor."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..decoder.config import DecoderConfig
from ..decoder.model import LanguageModel, LinearFactory
from ..layers.embedding import TernaryEmbedding
from ..layers.linear import BitLinear
from ..layers.matrix import TernaryMatrix
from ..layers.memory import HugePages
from ..layers.norm import RMSNorm
from ..reference import LARGEST_Q
from .errors import CheckpointError
from .folder import open_folder
from .gguf.open import open_gguf
from .head_copy import CHUNK_ROWS, is_finite, stored_head
from .location import locate
from .opened import OpenCheckpoint
from .pieces import for_each_piece, one_thread
from .tensor_source import TensorSource
from .weights import WeightReader

Model = TypeVar("Model", bound=LanguageModel)


def load(
    model: str | os.PathLike[str],
    make: Callable[[DecoderConfig, LinearFactory], Model],
    *,
    linear: type[nn.Module] = BitLinear,
    activation_bits: int | None = None,
    revision: str | None = None,
    arm_i2_s: bool = False,
    mmap: bool | None = None,
) -> Model:
    """Loads a model: `bitnet_ops.from_pretrained`, for a model of any class.

    Args:
        model: as for `bitnet_ops.from_pretrained`, like the options.
        make: makes a model of the given configuration and projections.
        linear: the class of projections.
        activation_bits: of a model with group scales.
        revision: of a name on the hub.
        arm_i2_s: how a GGUF file's type I2_S is read.
        mmap: use tensors where they lie in the files.

    Raises:
        CheckpointError: a ValueError that names the file and the tensor or field at fault.
    """
    if linear not in (BitLinear, nn.Linear):
        raise ValueError(f"linear: expected BitLinear or torch.nn.Linear, got {linear!r}")
    if activation_bits not in (None, *LARGEST_Q):
        raise ValueError(f"activation_bits: expected None, 8 or 16, got {activation_bits!r:.200}")
    if activation_bits is not None and linear is nn.Linear:
        raise ValueError(
            f"activation_bits: expected None with linear=torch.nn.Linear, whose activations are floats, "
            f"got {activation_bits}"
        )
    path = locate(model, revision)
    dense = linear is nn.Linear
    if path.is_file():
        opened = open_gguf(path, dense=dense, mmap=mmap, arm_i2_s=arm_i2_s)
    else:
        opened = open_folder(path, dense=dense, mmap=mmap)
    with opened as checkpoint:
        files, weights = checkpoint.files, checkpoint.weights
        _check_plausible(checkpoint)
        with one_thread() if weights.in_pieces else nullcontext():
            config = weights.complete(checkpoint.config, files)
        config = _with_activation_bits(config, activation_bits)
        with torch.device("meta"):  # shapes only: the tensors that are read become the model's own
            made = make(config, linear)
        table = checkpoint.certified_table
        with one_thread() if weights.in_pieces else nullcontext():
            _load_weights(made, files, weights, table)
        made.eval().requires_grad_(False)
        head = made.head_weight
        copy = stored_head(files, head) if table is not None and head is not None else None
        made.screened_head(copy, files.forget)
    made.tokenizer = checkpoint.tokenizer
    made.generation_config = checkpoint.generation_config
    made.chat_template = checkpoint.chat_template
    made.embedding_settings = checkpoint.embedding_settings
    return made


def _with_activation_bits(config: DecoderConfig, wanted: int | None) -> DecoderConfig:
    """The configuration with activations of another width, where the user asks for one.

    Group scales are what tells models of float activations, for which both widths approximate; the others
    were trained with the width that they have, or would have one 8-bit scale for all inputs of a token.
    """
    if wanted in (None, config.activation_bits):
        return config
    if config.group_size == 0:
        why = (
            "because it was trained with 8-bit activations"
            if config.activation_bits == 8
            else "because 8 bits need a scale for each group of inputs, and its weights have one for a row"
        )
        raise ValueError(
            f"activation_bits: expected None or {config.activation_bits} for this model, {why}, got {wanted}"
        )
    return config.replace(activation_bits=wanted)


def _check_plausible(checkpoint: OpenCheckpoint) -> None:
    """Refuses sizes that the files cannot hold before a model of these sizes is built.

    Even without memory a billion layers take for ever, and sizes above 2^63 overflow inside torch.
    """
    config, files, file = checkpoint.config, checkpoint.files, checkpoint.settings_file
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
                f"a matrix that fits into the {files.total_bytes} bytes of {files.file_names}",
                f"{size} x {config.hidden_size}",
            )
    for layer in range(config.num_hidden_layers):
        name = checkpoint.weights.stored_name(f"model.layers.{layer}.input_layernorm")
        if f"{name}.weight" not in files.tensors:
            raise CheckpointError.at(
                file,
                "num_hidden_layers",
                f"a number of layers that {files.file_names} has tensors for",
                f"{config.num_hidden_layers}, where the tensor '{name}.weight' is missing",
            )


def _load_weights(
    model: LanguageModel, files: TensorSource, weights: WeightReader, finite_table: str | None
) -> None:
    """Checks that the files have the tensors of the model and no others, then gives them to its modules.

    The matrix ``finite_table`` is known to be finite and not read.
    """
    memory = HugePages()
    used: list[str] = []
    projections: list[Callable[[], None]] = []
    steps: list[Callable[[], None]] = []
    for ours, module in model.named_modules():
        name = weights.stored_name(ours)
        if isinstance(module, TernaryMatrix):
            used += weights.check_projection(files, name, module)
            projections.append(partial(_load_projection, files, weights, memory, name, module))
        elif isinstance(module, RMSNorm):
            used += weights.check_norm(files, name, module)
            steps.append(partial(_load_norm, files, weights, name, module))
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            used += weights.check_matrix(files, name, module)
            finite = f"{name}.weight" == finite_table
            steps.append(partial(_load_matrix, files, weights, memory, name, module, finite))
            if isinstance(module, nn.Linear) and ours != "lm_head":
                steps.append(partial(_make_dense, files, weights, name, module))
    head = weights.stored_name("lm_head")
    if model.config.tie_word_embeddings and f"{head}.weight" in files.tensors:
        table = model.model.embed_tokens
        if isinstance(table, TernaryEmbedding):
            used += weights.check_projection(files, head, table)
            steps.append(partial(_check_tied_ternary, files, weights, memory, table))
        elif isinstance(table, nn.Embedding):
            used += weights.check_matrix(files, head, table)
            steps.append(partial(_check_tied, files, weights, memory, table))
    unexpected = sorted(files.tensors.keys() - {*used, *weights.other_names(files)})
    if unexpected:
        raise files.error(
            unexpected[0],
            f"only the {len(used)} tensors of this architecture",
            f"this and {len(unexpected) - 1} more",
        )
    # disable=None: a bar on a terminal, silence elsewhere.
    total = len(projections) + len(steps)
    with tqdm(total=total, desc="loading", unit="tensor", disable=None, leave=False) as bar:

        def take(step: Callable[[], None]) -> None:
            step()
            bar.update()

        if weights.side_by_side:
            for_each_piece(take, projections)
            projections.clear()
        for step in projections + steps:
            take(step)


def _load_projection(
    files: TensorSource, weights: WeightReader, memory: HugePages, name: str, module: TernaryMatrix
) -> None:
    projection = weights.read_projection(files, name, module, memory)
    module.packed_weight, module.layout, scales, module.bias = projection
    if module.group_size:
        module.set_scales(_in_float16(scales))
        module.weight_scale = memory.copy(module.weight_scale)
    else:
        module.weight_scale = scales


def _in_float16(scale: Tensor) -> Tensor:
    """Scales of groups in half the bytes, where that changes none of them: most files have them so."""
    half = scale.half()
    return half if half.float().equal(scale.float()) else scale


def _load_norm(files: TensorSource, weights: WeightReader, name: str, module: RMSNorm) -> None:
    weight = weights.read_norm(files, name)
    _check_finite(files, f"{name}.weight", weight)
    module.weight = nn.Parameter(weight)


def _load_matrix(
    files: TensorSource,
    weights: WeightReader,
    memory: HugePages,
    name: str,
    module: nn.Embedding | nn.Linear,
    known_finite: bool,
) -> None:
    matrix = weights.read_matrix(files, name, memory)

    def check(rows: Tensor) -> None:
        _check_finite(files, f"{name}.weight", rows)
        files.forget(rows)  # a model reads few rows of it, if the head is screened

    if not known_finite:
        for_each_piece(check, torch.split(matrix, CHUNK_ROWS))
    module.weight = nn.Parameter(matrix)


def _make_dense(files: TensorSource, weights: WeightReader, name: str, module: nn.Linear) -> None:
    """A projection that is not ternary computes in float32, the dtype of what it is given."""
    module.weight = nn.Parameter(module.weight.float())
    if module.bias is not None:
        bias = weights.read_bias(files, name, module)
        assert bias is not None
        module.bias = nn.Parameter(bias)


def _check_tied_ternary(
    files: TensorSource, weights: WeightReader, memory: HugePages, table: TernaryEmbedding
) -> None:
    """`_check_tied` for a ternary matrix."""
    name = weights.stored_name("lm_head")
    again = weights.read_projection(files, name, table, memory)
    same_scale = torch.equal(again.weight_scale.float(), table.scales().float())
    if not same_scale or not torch.equal(again.packed_weight, table.packed_weight):
        raise _not_tied(files, name)


def _check_tied(files: TensorSource, weights: WeightReader, memory: HugePages, table: nn.Embedding) -> None:
    """A tied head may be stored a second time, but it has to be the same matrix."""
    name = weights.stored_name("lm_head")
    again = torch.split(weights.read_matrix(files, name, memory), CHUNK_ROWS)
    for rows, head_rows in zip(again, torch.split(table.weight, CHUNK_ROWS), strict=True):
        if not rows.equal(head_rows):
            raise _not_tied(files, name)
        files.forget(rows)
        files.forget(head_rows)


def _not_tied(files: TensorSource, name: str) -> CheckpointError:
    expected = "the numbers of the embedding, because the settings tie them"
    return files.error(f"{name}.weight", expected, "other numbers")


def _check_finite(files: TensorSource, name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise files.error(name, "finite numbers", "a NaN or an infinity")
