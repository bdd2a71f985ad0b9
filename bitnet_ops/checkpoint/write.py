"""Writes a safetensors file whose tensors begin at cache lines, so that a mapped file is fast to read.

The format allows it (a header may end in spaces), but the library's own writer does not do it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .tensor_source import TORCH_DTYPE, tensor_bytes

ALIGNMENT = 64
_DTYPE_NAME: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def write_tensors(
    file: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    data: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes a new safetensors file, one tensor after another, without a copy of the whole.

    Args:
        file: is made, or replaced.
        tensors: CPU tensors of the dtypes in `tensor_source.TORCH_DTYPE`, by their names.
        metadata: texts for the header.
        data: gives each tensor when its turn comes, where ``tensors`` has only shapes, on the meta device.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    # Tensors follow one another without gaps: those of odd sizes come last.
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAME[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    # A space behind colons only: safetensors' own writer puts none, Python's default more. So a header with
    # these bytes is ours, and nobody has written the file again (`head_copy` counts on it).
    text = json.dumps(header, separators=(",", ": ")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for name in order:
            tensor = tensors[name] if data is None else data(name)
            handle.write(tensor_bytes(tensor.contiguous()))
