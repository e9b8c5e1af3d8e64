"""Level adapters: a scale and a shift per channel for elements below full resolution, which level 0 does not have.

Downsampled features have other statistics than those the network was trained on. As batch norms of their own for each
width make one network good at several (Yu et al. 2019, slimmable networks), so do these for each level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cadsurgery.elements.backends.weights import Factors
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.operations import operation


class LevelAdapter(nn.Module):
    """Scale and shift of what one layer gives at each level below the finest: x + scale x + shift, both 0 at first.

    Attributes:
        scale: (levels, C), without the one.
        shift: (levels, C).
    """

    def __init__(self, levels: int, channels: int, like: Tensor) -> None:
        """For so many levels below the finest, in the type and on the device of a tensor."""
        super().__init__()
        self.scale = nn.Parameter(like.new_zeros(levels, channels))
        self.shift = nn.Parameter(like.new_zeros(levels, channels))

    @property
    def factors(self) -> Factors:
        """Those of all levels."""
        none = torch.zeros_like(self.scale[:1])
        return Factors(1 + torch.cat((none, self.scale)), torch.cat((none, self.shift)))


@operation(reads="element")
def adapt(x: Elements, adapter: LevelAdapter) -> Elements:
    """Elements scaled and shifted by their levels; those at level 0 as they are."""
    if x.lattice.stage == 0 or x.lattice.uniform_level == 0:
        return x
    return Elements(adapter.factors.apply(x.rows, x.lattice), x.lattice)


@operation(reads="image", gives="vector")
def adapt_vector(x: Elements, vector: Tensor, adapter: LevelAdapter) -> Tensor:
    """Apply a layer to a mean over the elements x, (B, C, ...) with nothing in the image axes, scaled and shifted
    by the share of the image that is at each level: a mean over fewer samples is another one. All at level 0 as it is.
    """
    if x.lattice.stage == 0 or x.lattice.uniform_level == 0:
        return vector
    shares = x.lattice.level_shares[:, 1:].to(vector)
    scale, shift = (
        (shares @ value.to(vector)).view(*vector.shape[:2], *(1,) * (vector.dim() - 2))
        for value in (adapter.scale, adapter.shift)
    )
    return vector + (vector * scale + shift)
