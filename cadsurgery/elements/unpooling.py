"""Max pooling that returns the indices of the maxima.

On a dense map torch stores flat positions. On elements a value stores the number of its tap in the window, which is
valid on any map and at any level, until the indices leave the region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cadsurgery.elements.backends.reference import gather_blocks
from cadsurgery.elements.backends.works import WindowRead, extend
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.elements.windows import drops, target_of


@dataclass(frozen=True, eq=False)
class Taps:
    """The tap of the window at which each maximum of a pooling was found; the rows of an `Elements` of indices.

    Attributes:
        rows: (N, C) int16, numbers of taps in row-major order of the window.
        window: window of the pooling, with its padding resolved.
        samples: (height, width) of the map that was pooled, on the network's own grid.
    """

    rows: Tensor
    window: Window
    samples: tuple[int, int]


@operation(reads="window", outside=-math.inf, drops=True)
def max_pool2d_with_indices(x: Elements, window: Window, stage: int | Lattice) -> Elements:
    """Compute `max_pool2d` and the taps of the maxima: elements whose rows are a pair (values, `Taps`).

    The first of several equal maxima counts, as in torch. With floors those that differ by rounding are equal: beyond
    the last anchor of a row all samples are interpolated between equal values.
    """
    window, target = target_of(x, window, stage)
    reading = WindowRead(x.lattice, target, window, drops(target, window)).reading
    rows = extend(x.rows, reading, -torch.inf if window.outside is None else window.outside)
    find = _first_of_nearly_equal if target.geometry.floors else _first
    largest = [find(block) for block in gather_blocks(rows, reading.table)]
    taps = torch.cat([places.to(torch.int16) for _, places in largest])
    samples = x.lattice.samples(window.spacing)
    pair = torch.cat([values for values, _ in largest]), Taps(taps, window, samples)
    return Elements(pair, target)  # type: ignore[arg-type] # parts of a map, until one is taken


def _first(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maxima (n, C) of windows (n, taps, C), and the first tap of each."""
    values, places = block.max(1)
    return values, places


def _first_of_nearly_equal(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maxima (n, C) of windows (n, taps, C), and the first tap that differs from each by rounding alone."""
    values = block.amax(1, keepdim=True)
    least_value = values - 64 * torch.finfo(block.dtype).eps * values.abs()
    return values.squeeze(1), (block >= least_value).int().argmax(1)


@operation(reads="element", gives="other")
def dense_indices(indices: Elements, spacing: int) -> Tensor:
    """Convert the indices of a pooling to torch's flat positions on a dense map, (B, C, h, w) int64.

    Args:
        indices: elements whose rows are `Taps`.
        spacing: fine pixels between the samples of the network's own grid, on which the indices are read.
    """
    taps: Taps = indices.rows  # type: ignore[assignment]
    lattice, window, (height, width) = indices.lattice, taps.window, taps.samples
    cells = lattice.index.view(lattice.batch, *lattice.size)[..., ::spacing, ::spacing]
    numbers = taps.rows.index_select(0, cells.flatten().to(taps.rows.device)).long()
    numbers = numbers.view(*cells.shape, -1).permute(0, 3, 1, 2)
    places = []
    for axis, (tap, length) in enumerate(
        ((numbers // window.kernel[1], height), (numbers % window.kernel[1], width))
    ):
        own = torch.arange(numbers.shape[2 + axis], device=numbers.device).view(-1, *(1,) * (1 - axis))
        first = own * window.stride - window.padding[2 * axis]
        places.append((first + window.dilation[axis] * tap).clamp(0, length - 1))
    return places[0] * width + places[1]
