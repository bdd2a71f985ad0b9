"""Rows of a table: what token ids stand for."""

from torch import Tensor

from .. import reference
from ._registry import OPS, batch_rows, check_device, fake_kernel, use_on_accelerators, without_gradient


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """``weight[ids]``, for inference.

    Where ``weight`` lies in a checkpoint's mapped file (``from_pretrained``), rows whose pages are not in
    memory are read from the file, so that the table does not become resident bit by bit.

    Args:
        ids: int64 [...], from 0 to V - 1, on the CPU.
        weight: float32, bfloat16 or float16 [V, K].

    Returns:
        [..., K] in the dtype of ``weight``.

    Raises:
        RuntimeError: if an id is not in the table, if dtypes or shapes do not fit together, or if the file
            cannot be read any more.

    Example:
        >>> embedding(torch.tensor([2, 0]), torch.eye(3))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    result: Tensor = without_gradient(OPS.embedding.default, ids, weight)
    return result


@fake_kernel("embedding")
def _(ids: Tensor, weight: Tensor) -> Tensor:
    check_device("embedding", ids, weight=weight)
    return weight.new_empty((*ids.shape, weight.shape[1]))


batch_rows("embedding")


use_on_accelerators("embedding", reference.embedding)
