"""Where the samples of a resized map lie on the map, and what bilinear interpolation there reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cadsurgery.elements.sizes import as_number

End = tuple[Tensor, Tensor]  # a place along an axis, and its share


def place_on_map(at: Tensor, have: int, want: int, mode: str, align_corners: bool) -> Tensor:
    """Return the place along an axis of `have` samples that is read for samples of the map resized to `want`, as torch
    resizes; float64.

    Args:
        at: number of a sample, from 0 on; its middle if `mode` is not `nearest` and corners are not aligned.
        have: number of samples of the map.
        want: number of samples of the resized map.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.
    """
    if mode == "nearest":
        at = at.float()  # torch rounds in float32
        place = (at * (as_number(have, at) / as_number(want, at))).floor().double()
    elif align_corners:
        place = at * ((have - 1) / max(want - 1, 1))
    else:
        place = at * (have / want) - 0.5
    return place.clamp(0, have - 1)


def ends_of(place: Tensor, have: int, slack: float = 0.0) -> tuple[End, End]:
    """Return the samples before and after a place on an axis of `have` samples, and their shares. A place that misses a
    sample by no more than `slack` has that sample before it."""
    low = (place + slack if slack else place).floor()
    first, share = low.long(), place - low
    return (first, 1 - share), ((first + 1).clamp(max=have - 1), share)


def corners(
    axes: Sequence[tuple[End, End]], number: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the four samples that points are interpolated from, and their shares: two tensors (..., 4).

    Args:
        axes: the ends of the height and those of the width.
        number: returns the number of the sample at a row and a column.
    """
    samples = [number(y, x) for y, _ in axes[0] for x, _ in axes[1]]
    shares = [down * across for _, down in axes[0] for _, across in axes[1]]
    return torch.stack(samples, -1), torch.stack(shares, -1)
