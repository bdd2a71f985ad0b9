"""What the formats of projections have in common; hf.py and packed.py have one each."""

from typing import NamedTuple, Protocol

from torch import Tensor

from ..layers.linear import BitLinear
from ..layers.memory import HugePages
from .files import FLOAT_DTYPES, TensorFiles


class Projection(NamedTuple):
    """What a `BitLinear` holds, under the names of its attributes."""

    packed_weight: Tensor
    layout: str
    weight_scale: Tensor
    bias: Tensor | None


class ProjectionReader(Protocol):
    """Reads the tensors of projections from files."""

    def stored_name(self, module: str) -> str:
        """The name in the files of the module that is called ``module`` in the model."""

    def check(self, files: TensorFiles, name: str, layer: BitLinear) -> list[str]:
        """Checks the headers of a projection's tensors.

        Args:
            files: where they lie.
            name: of the module in the files, such as "model.layers.0.self_attn.q_proj".
            layer: of the sizes and parts that the model has there; may be on the meta device.

        Returns:
            The names of the tensors that `read` will use.

        Raises:
            CheckpointError: one is missing, or of another shape or dtype.
        """

    def read(self, files: TensorFiles, name: str, layer: BitLinear, memory: HugePages) -> Projection:
        """Gets a projection that `check` has passed, in ``memory`` where it is not used in the files.

        Raises:
            CheckpointError: a value is not what the format allows.
        """


def check_bias(files: TensorFiles, name: str, layer: BitLinear) -> list[str]:
    """Checks the header of a projection's bias; its name, or nothing where it has none."""
    if layer.bias is None:
        return []
    files.expect(f"{name}.bias", FLOAT_DTYPES, (layer.out_features,))
    return [f"{name}.bias"]


def read_bias(files: TensorFiles, name: str, layer: BitLinear, factor: Tensor | float = 1.0) -> Tensor | None:
    """The bias of a projection times ``factor``, float32 in memory of its own."""
    if layer.bias is None:
        return None
    bias = files.read(f"{name}.bias").float() * factor
    if not bias.isfinite().all():
        raise files.error(f"{name}.bias", "finite numbers", "a NaN or an infinity")
    return bias
