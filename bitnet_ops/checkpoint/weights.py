"""What formats of weights have in common: hf.py, packed.py and others have one each.

A `WeightReader` knows how a format stores projections, matrices (embedding, head) and norms. load.py asks it
for one module after another and knows nothing about formats.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops, packing
from ..decoder.config import DecoderConfig
from ..families import Family
from ..layers.linear import best_layout
from ..layers.matrix import TernaryMatrix
from ..layers.memory import HugePages
from ..layers.norm import RMSNorm
from .pieces import for_each_piece
from .tensor_source import FLOAT_DTYPES, TensorSource

CHUNK_ROWS = 256
"""Rows that are packed at a time: small results find room again in the memory of those before."""

BODY_PREFIX = "model."
"""In front of the names of all modules but the head."""


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The sizes [N, K] of all projections of a model, by the names of their modules."""
    hidden, inner, q_size, kv_size = (
        config.hidden_size,
        config.intermediate_size,
        config.q_size,
        config.kv_size,
    )
    shapes = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    inside = ".linear" if config.projection_norms else ""
    return {
        f"model.layers.{layer}.{name}{inside}": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in shapes.items()
    }


def tables(config: DecoderConfig) -> dict[str, str]:
    """The modules of embedding and, where it is another matrix, head, by the fields that say if ternary."""
    head = {} if config.tie_word_embeddings else {"ternary_head": "lm_head"}
    return {"ternary_embedding": "model.embed_tokens", **head}


def may_have_ternary_tables(config: DecoderConfig) -> bool:
    """Whether tables with ternary numbers are kept so, which makes the head's activations integers.

    They are in models that were trained with float activations. In others, whose projections have integers,
    the head still was trained with floats.

    Args:
        config: with the group size of its projections.
    """
    return config.activation_bits == 16 or config.group_size != 0


Rows = Callable[[int, int], Tensor]
"""Gives the rows from the first number to the second of a matrix: int8 [rows, K] in {-1, 0, 1}."""


PackedRows = Callable[[int, int, str], Tensor]
"""Gives the same rows as `ops.pack_ternary` packs them in a layout. They begin with a tile."""


class Projection(NamedTuple):
    """What a `TernaryMatrix` holds.

    Attributes:
        packed_weight: where every token reads it from, in ``layout``.
        layout: see `packing.LAYOUTS`.
        weight_scale: as `TernaryMatrix.scales` gives them. Those of groups are copied once more.
        bias: float32 [N] or None.
    """

    packed_weight: Tensor
    layout: str
    weight_scale: Tensor
    bias: Tensor | None


class WeightReader:
    """Reads a model's weights from the files of one format; the base class reads dense ones.

    Every kind of module has two methods: ``check_...`` looks at headers only and gives the names of the
    tensors that ``read_...`` will use. All checks come before the first read. Names are those of modules in
    the files, from `stored_name`.

    Attributes:
        family: says what modules are called.
        is_bare: whether the files leave out `BODY_PREFIX`; see body.py.
        in_pieces: whether weights are read in pieces that stay in a core's cache; see pieces.py.
        side_by_side: whether several projections may be read at the same time, each in a thread.
        maps_files: whether its files may be mapped where the user does not say: nobody changes them in place.
    """

    in_pieces: ClassVar[bool] = True
    side_by_side: ClassVar[bool] = False
    maps_files: ClassVar[bool] = False

    def __init__(self, family: Family) -> None:
        self.family = family
        self.is_bare = False

    def stored_name(self, module: str) -> str:
        """The name in the files of the module that is called ``module`` in the model."""
        name = self.family.stored_name(module)
        return name.removeprefix(BODY_PREFIX) if self.is_bare else name

    def complete(self, config: DecoderConfig, files: TensorSource) -> DecoderConfig:
        """The configuration with what only the weights say, such as the size of groups with one scale.

        Args:
            config: as the settings have it; its sizes are plausible for the files.
            files: where the weights lie.

        Raises:
            CheckpointError: they are not what the format allows.
        """
        return config

    def other_names(self, files: TensorSource) -> list[str]:
        """Names of tensors that may be there and belong to no module.

        Models of 2023 have RoPE's frequencies beside their weights. They follow from the settings, and the
        programs that read these models never looked at them.
        """
        return [name for name in files.tensors if name.endswith(".self_attn.rotary_emb.inv_freq")]

    def check_projection(self, files: TensorSource, name: str, layer: TernaryMatrix) -> list[str]:
        """Checks the headers of the tensors of a ternary projection, or of a ternary embedding or head.

        Args:
            files: where they lie.
            name: of the module in the files, such as "model.layers.0.self_attn.q_proj".
            layer: of the sizes and parts that the model has there; may be on the meta device.

        Returns:
            The names of the tensors that `read_projection` will use.

        Raises:
            CheckpointError: one is missing, or of another shape or dtype.
        """
        raise NotImplementedError

    def read_projection(
        self, files: TensorSource, name: str, layer: TernaryMatrix, memory: HugePages
    ) -> Projection:
        """Gets a projection that `check_projection` has passed, in ``memory`` where it is not used in files.

        Raises:
            CheckpointError: a value is not what the format allows.
        """
        raise NotImplementedError

    def check_matrix(self, files: TensorSource, name: str, module: nn.Embedding | nn.Linear) -> list[str]:
        """Checks the headers of an embedding, a head, or a projection that is not ternary."""
        files.expect(f"{name}.weight", FLOAT_DTYPES, tuple(module.weight.shape))
        if isinstance(module, nn.Linear) and module.bias is not None:
            files.expect(f"{name}.bias", FLOAT_DTYPES, tuple(module.bias.shape))
            return [f"{name}.weight", f"{name}.bias"]
        return [f"{name}.weight"]

    def read_matrix(self, files: TensorSource, name: str, memory: HugePages) -> Tensor:
        """The weight of a module that `check_matrix` has passed: float32, bfloat16 or float16, as stored.

        Whether its numbers are finite is not looked at.
        """
        return files.tensor(f"{name}.weight", memory.empty)

    def read_bias(self, files: TensorSource, name: str, layer: nn.Module) -> Tensor | None:
        """The bias of a projection that is not ternary, float32, or None where it has none."""
        return read_bias(files, name, layer)

    def check_norm(self, files: TensorSource, name: str, module: RMSNorm) -> list[str]:
        """Checks the header of a norm's weight."""
        files.expect(f"{name}.weight", FLOAT_DTYPES, tuple(module.weight.shape))
        return [f"{name}.weight"]

    def read_norm(self, files: TensorSource, name: str) -> Tensor:
        """The factors of a norm that `check_norm` has passed, float32."""
        weight = files.read(f"{name}.weight").float()
        # Norms inside projections come from the quantiser, not from the family.
        offset = 0.0 if "_proj." in name else self.family.norm_offset
        return weight + offset if offset else weight


def check_bias(files: TensorSource, name: str, layer: TernaryMatrix) -> list[str]:
    """Checks the header of a projection's bias; its name, or nothing where it has none."""
    if layer.bias is None:
        return []
    files.expect(f"{name}.bias", FLOAT_DTYPES, (layer.out_features,))
    return [f"{name}.bias"]


def read_bias(
    files: TensorSource, name: str, layer: nn.Module, factor: Tensor | float = 1.0
) -> Tensor | None:
    """The bias of a projection times ``factor``, float32 in memory of its own."""
    if layer.bias is None:
        return None
    bias = files.read(f"{name}.bias").float() * factor
    if not bias.isfinite().all():
        raise files.error(f"{name}.bias", "finite numbers", "a NaN or an infinity")
    return bias


def pack_rows(rows: Rows, layer: TernaryMatrix, memory: HugePages) -> tuple[Tensor, str]:
    """Packs a matrix some rows at a time, so that it need not be there unpacked as a whole.

    Args:
        rows: gives some rows of the matrix; called from several threads.
        layer: of the matrix's sizes.
        memory: where the packed weights go.

    Returns:
        What `ops.pack_ternary` gives for all of it, and the layout: the best one here for such a layer.
    """
    return gather_packed(lambda begin, end, layout: ops.pack_ternary(rows(begin, end), layout), layer, memory)


def gather_packed(rows: PackedRows, layer: TernaryMatrix, memory: HugePages) -> tuple[Tensor, str]:
    """`pack_rows` for rows that come packed."""
    layout = best_layout() if best_layout() in layer.layouts else "tile16"
    packed = memory.empty(packing.packed_shape(layer.out_features, layer.in_features, layout), torch.uint8)

    def pack(begin: int) -> None:
        end = min(begin + CHUNK_ROWS, layer.out_features)
        # Both layouts are made of tiles.
        tiles = slice(begin // packing.TILE_ROWS, -(-end // packing.TILE_ROWS))
        packed[tiles] = rows(begin, end, layout)

    for_each_piece(pack, range(0, layer.out_features, CHUNK_ROWS))
    return packed, layout
