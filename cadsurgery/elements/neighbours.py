"""Computed neighbours of the positions of a single-resolution map."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.lattice import Lattice


class Near(NamedTuple):
    """The computed rows that each position of a lattice reads; positions not or only partly computed are gaps.

    Attributes:
        table: (T,) int32: a computed row; N (the padding row) for a far gap; N + 1 + i for near gap i.
        has_far: True if any gap is far: no position of its window was computed.
        sources: (M, taps) int32, the rows around each near gap; where there is no row, any other row of the gap.
        there: (M, taps) bool, True where a neighbour was computed.
        share: (M,), the share of each near gap that was computed.
    """

    table: Tensor
    has_far: bool
    sources: Tensor
    there: Tensor
    share: Tensor


def find_near(source: Lattice, target: Lattice, reach: int, shares: Tensor | None) -> Near:
    """Find the computed neighbours of each position (see `Near`); elements with a share below 1 are gaps, too."""

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
        place = (image * (height + 2 * reach) + y) * wide + x  # position of the first tap
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
