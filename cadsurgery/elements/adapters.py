"""Level adapters: a learned scale and shift per channel for downsampled elements; level 0 is left unchanged.

Downsampled features have different statistics from the features the network was trained on. Slimmable networks
(Yu et al. 2019) use separate batch norms for each width; adapters do the same for each level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cadsurgery.elements.backends.weights import Factors
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.operations import operation


class LevelAdapter(nn.Module):
    """Scale and shift the output of one layer at each level above 0: x + scale x + shift, both initialised to 0.

    Attributes:
        scale: (levels, C), minus one: 0 leaves the values unchanged.
        shift: (levels, C).
    """

    def __init__(self, levels: int, channels: int, like: Tensor) -> None:
        """Create adapters for `levels` levels (1, 2, ...), with the dtype and device of the tensor `like`."""
        super().__init__()
        self.scale = nn.Parameter(like.new_zeros(levels, channels))
        self.shift = nn.Parameter(like.new_zeros(levels, channels))

    @property
    def factors(self) -> Factors:
        """The multiplicative factors and shifts of all levels, level 0 included (factor 1, shift 0)."""
        none = torch.zeros_like(self.scale[:1])
        return Factors(1 + torch.cat((none, self.scale)), torch.cat((none, self.shift)))


@operation(reads="element")
def adapt(x: Elements, adapter: LevelAdapter) -> Elements:
    """Scale and shift each element according to its level; elements at level 0 are unchanged."""
    if x.lattice.stage == 0 or x.lattice.uniform_level == 0:
        return x
    return Elements(adapter.factors.apply(x.rows, x.lattice), x.lattice)


@operation(reads="image", gives="vector")
def adapt_vector(x: Elements, vector: Tensor, adapter: LevelAdapter) -> Tensor:
    """Scale and shift a vector (B, C, ...) that was pooled from the elements x; its image axes have size 1.

    The levels contribute in proportion to their share of the image. If all is at level 0, the vector is unchanged."""
    if x.lattice.stage == 0 or x.lattice.uniform_level == 0:
        return vector
    shares = x.lattice.level_shares[:, 1:].to(vector)
    scale, shift = (
        (shares @ value.to(vector)).view(*vector.shape[:2], *(1,) * (vector.dim() - 2))
        for value in (adapter.scale, adapter.shift)
    )
    return vector + (vector * scale + shift)
