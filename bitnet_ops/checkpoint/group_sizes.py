"""Which inputs of a row share a scale: the coarsest groups that fit the scales of a whole model."""

import torch.nn.functional as F
from torch import Tensor

FINEST = 64
GROUP_SIZES = (0, 256, 128, FINEST)
"""What `DecoderConfig.group_size` may be, the coarsest first; 0 stands for whole rows."""


def merge_scales(scales: Tensor, group_size: int, finest: int = FINEST) -> tuple[Tensor, Tensor]:
    """The scales of coarser groups, and which of them fit.

    Args:
        scales: [n, G], one for each ``finest`` inputs of a row; 0 for a group of zeros.
        group_size: one of `GROUP_SIZES`, and a multiple of ``finest``.
        finest: inputs that share one in ``scales``.

    Returns:
        ``(merged, fits)``: [n, G'] in the dtype of ``scales``, 0 for a group of zeros; and bool [n, G']:
        whether the groups inside have the same scale, but for those of zeros.
    """
    count = group_size // finest or max(scales.shape[1], 1)
    parts = F.pad(scales, (0, -scales.shape[1] % count)).unflatten(1, (-1, count))
    merged = parts.amax(-1)
    return merged, ((parts == 0) | (parts == merged.unsqueeze(-1))).all(-1)


class FittingSizes:
    """Finds the coarsest groups with one scale each, over any number of matrices.

    Attributes:
        finest: inputs that share one of the scales that it sees.
        fitting: the sizes that fit all of them, the coarsest first.
    """

    def __init__(self, finest: int = FINEST) -> None:
        """Has seen nothing, which every size fits."""
        self.finest = finest
        self.fitting = tuple(size for size in GROUP_SIZES if size == 0 or size >= finest)

    @property
    def coarsest(self) -> int:
        """The one to use."""
        return self.fitting[0]

    def join(self, other: "FittingSizes") -> None:
        """Has seen what another has seen, too."""
        self.fitting = tuple(size for size in self.fitting if size in other.fitting)

    def see(self, scales: Tensor) -> bool:
        """Looks at scales [n, G], as for `merge_scales`; whether a size is left that fits them all."""
        # What fits a group fits the smaller ones inside.
        while self.fitting and not merge_scales(scales, self.coarsest, self.finest)[1].all():
            self.fitting = self.fitting[1:]
        return bool(self.fitting)
