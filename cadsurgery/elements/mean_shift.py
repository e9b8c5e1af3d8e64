"""The shift of what a layer makes of a mean over the image, by level; nothing changes at level 0.

Features at anchors equal those of full resolution behind convolutions, and a mean over fewer of them does not: on
average it is off by an amount for each level and channel, which `cadsurgery.finetune.calibrate_means` measures.
"""

from __future__ import annotations

from torch import Tensor, nn

from cadsurgery.elements.elements import Elements
from cadsurgery.elements.operations import operation


class MeanShift(nn.Module):
    """A shift per channel for each level above 0, initialised to 0.

    Attributes:
        shift: (levels, C).
    """

    def __init__(self, levels: int, channels: int, like: Tensor) -> None:
        """Create shifts for `levels` levels (1, 2, ...), with the dtype and device of the tensor `like`."""
        super().__init__()
        self.shift = nn.Parameter(like.new_zeros(levels, channels))


@operation(reads="image", gives="vector")
def shift_vector(x: Elements, vector: Tensor, by: MeanShift) -> Tensor:
    """Shift a vector (B, C, ...) that was pooled from the elements x; its image axes have size 1.

    The levels contribute in proportion to their share of the image. If all is at level 0, the vector is unchanged."""
    if x.lattice.stage == 0 or x.lattice.uniform_level == 0:
        return vector
    shares = x.lattice.level_shares[:, 1:].to(vector)
    shift = (shares @ by.shift.to(vector)).view(*vector.shape[:2], *(1,) * (vector.dim() - 2))
    return vector + shift
