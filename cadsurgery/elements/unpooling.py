"""Max pooling that returns the indices of the maxima, and unpooling that puts values back at these positions.

On a dense map torch stores flat positions. On elements a value stores the number of its tap in the window, which is
valid on any map and at any level. In unpooling an element belongs to one tap of one window: it reads the window's
value if that tap was the maximum, and zero otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import WindowRead, extend, select_rows
from cadsurgery.elements.backends.reference import gather_blocks
from cadsurgery.elements.backends.target import require_equal
from cadsurgery.elements.elements import Elements, common_lattice
from cadsurgery.elements.kernel_map import Window, kernel_map, phases
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.elements.sizes import least, most
from cadsurgery.elements.windows import drops, target_of
from cadsurgery.support.errors import InvalidInput


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

    def on(self, source: Lattice, target: Lattice) -> Taps:
        """Return the taps of the cells that the same or a later lattice still has."""
        return replace(self, rows=select_rows(self.rows, source, target))


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


@operation(reads="window")
def max_unpool2d(
    x: Elements,
    indices: Elements,
    stage: int,
    spacings: tuple[int, int],
    scale: int,
    size: Sequence[int] | None = None,
) -> Elements:
    """Unpool onto the lattice of an earlier stage: values go to the positions of the maxima, all others are zero.

    Let u_t = X where the maximum is tap t, and 0 elsewhere. As in a transposed convolution with windows that do not
    overlap, output sample o reads the tap of its own phase, t = o modulo the scale: out(e) = u_t(a(e) - s t), with s
    the spacing of the output's samples. Points inside cells read u_t by the lattice's fill.

    Args:
        x: elements (N, C).
        indices: elements of the pooling, whose windows must not overlap; their rows are `Taps`.
        stage: stage of the output, at most the input's.
        spacings: fine pixels between the samples of the network's own grid, before and after.
        scale: side of the windows.
        size: size of the output; the last two numbers are samples. Default: all windows, complete or not.

    Raises:
        InvalidInput: the output differs in size from the pooled map, where torch would misplace values.
    """
    taps: Taps = indices.rows  # type: ignore[assignment]
    samples = x.lattice.samples(spacings[0])
    counts = tuple(count * scale for count in samples) if size is None else tuple(size[-2:])
    lowest, highest = least(samples[0] * scale, taps.samples[0]), samples[0] * scale + scale
    pairs = (
        (counts[1], taps.samples[1]),
        (counts[0], most(lowest, least(counts[0], highest))),
        *zip(samples, indices.lattice.samples(spacings[0]), strict=True),
    )
    # All of them, because symbols record a condition for each.
    if not all([require_equal(*pair, "an unpooling and its pooling fit") for pair in pairs]):
        raise InvalidInput(
            f"unpooling {samples[0]}x{samples[1]} samples to {counts[0]}x{counts[1]} puts values elsewhere than they "
            f"were pooled from, a map of {taps.samples[0]}x{taps.samples[1]}.",
            why="torch numbers the places of the map that was pooled, row by row.",
            next="pad or resize the image to a multiple of the lowest output stride, or give the unpooling the size of "
            "the map that was pooled as its output_size.",
        )
    lattice = common_lattice(max(x.lattice.stage, indices.lattice.stage), x, indices)
    values, taps = select_rows(x.rows, x.lattice, lattice), taps.on(indices.lattice, lattice)
    window = Window((scale, scale), spacing=spacings[0], finer=scale)
    target = lattice.resample(stage, lattice.holding(counts, spacings[1]))
    reading = kernel_map(lattice, target, window)
    every, place = phases(lattice, target, window)
    parts = []
    for phase in every:
        chosen = torch.where(taps.rows == phase.first[0] * scale + phase.first[1], values, 0)
        parts.append(extend(chosen, reading, 0.0).index_select(0, phase.table.flatten().to(values.device)))
    return Elements(torch.cat(parts).index_select(0, place.to(values.device)), target)


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
