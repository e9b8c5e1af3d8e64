"""Computed neighbours of the positions of a map of one resolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.lattice import Lattice


class Near(NamedTuple):
    """Where the rows of a lattice are found among those of a part of it.

    Attributes:
        table: (T,) int32: a row, the padding row of what is far from all, or behind it that of a gap that is near some.
        has_far: whether any is far.
        sources: (M, taps) int32, what is around each such gap; where there is nothing any of the others.
        there: (M, taps) bool, where there is something.
        share: (M,) how much of each gap itself was computed.
    """

    table: Tensor
    has_far: bool
    sources: Tensor
    there: Tensor
    share: Tensor


def find_near(source: Lattice, target: Lattice, reach: int, shares: Tensor | None) -> Near:
    """See `Near`; elements of which only a share was computed are gaps, too."""

    def build() -> Near:
        (height, width), count = source.size, source.count
        rows = torch.arange(count, dtype=torch.int32, device=source.anchors.device)
        index = torch.full((source.batch * height * width,), count, dtype=torch.int32, device=rows.device)
        index[source.anchors] = rows
        table = index[target.anchors]
        share = torch.zeros(
            count + 1, dtype=torch.float32 if shares is None else shares.dtype, device=rows.device
        )
        share[:count] = 1 if shares is None else shares
        of_target = share[table.long()]
        padded = F.pad(index.view(-1, height, width), (reach,) * 4, value=count).flatten()
        gaps = (of_target < 1).nonzero().squeeze(1)
        at, wide = target.anchors[gaps], width + 2 * reach
        image, y, x = at // (height * width), at // width % height, at % width
        place = (image * (height + 2 * reach) + y) * wide + x  # of the first tap
        side = torch.arange(2 * reach + 1, device=rows.device)
        around = padded[place.unsqueeze(1) + (side.unsqueeze(1) * wide + side).flatten()]
        there = around < count
        near = there.any(1)
        around, there, gaps, far = around[near], there[near], gaps[near], gaps[~near]
        any_other = around.amin(1, keepdim=True)
        sources = torch.where(there, around, any_other).contiguous()
        table[gaps] = torch.arange(len(gaps), dtype=torch.int32, device=rows.device) + count + 1
        table[far] = count
        return Near(table, len(far) > 0, sources, there, of_target[gaps])

    if shares is not None:
        return build()
    return source.derive(("near", target.key, reach), build)
