"""Kernel maps: for each output element and tap, the input element that is read.

    table[e, t] = row of the source element holding  a(e) + S (d t - p)                        (*)

where a(e) is the anchor of output element e, d the dilation, p the padding and S the spacing in fine pixels of
the samples the window was written for. Points outside the map read the padding row. Points inside a cell
that are not its anchor are read by `fill` and, unless it is nearest, appended as interpolated halo rows.

A transposed convolution of stride f is described from its output: tap t takes input sample i to output sample
o = f i - p + t. An element therefore reads only the taps of its own phase, t = o + p modulo f, at

    a(e) + (S / f) (p - t)                                                                     (**)

On the network's own grid these points are the samples i. Other elements use the same offsets, as in a shifted image.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import Work, compute
from cadsurgery.elements.backends.graph_sizes import quotients
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.sizes import (
    as_number,
    as_numbers,
    constant,
    divide_up,
    is_statically_true,
    least,
    most,
)
from cadsurgery.support.errors import InvalidInput


class Window(NamedTuple):
    """Kernel size, stride, dilation and padding of an operation, as written in the network.

    Attributes:
        kernel: (height, width).
        stride: stride of both axes.
        dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        mode: `"zeros"`, `"reflect"` or `"replicate"`.
        ceil_mode: True if a last partial window counts (pooling).
        spacing: fine pixels between the samples of the grid these numbers refer to.
        same: True for "same" padding: n samples give ceil(n / stride) outputs. The amount depends on the map.
        outside: value that zero padding reads; None for the neutral value of the operation.
        finer: output samples per input sample: the stride of a transposed convolution, whose `stride` is 1 and whose
            `padding` crops the output, as in torch.
        lower: true if the larger half of "same" padding of an odd amount lies before the map, as SAME_LOWER of ONNX.
    """

    kernel: tuple[int, int]
    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: str = "zeros"
    ceil_mode: bool = False
    spacing: int = 1
    same: bool = False
    outside: float | None = None
    finer: int = 1
    lower: bool = False

    @property
    def taps(self) -> int:
        """Number of taps."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_pointwise(self) -> bool:
        """True if the only tap is at the element itself."""
        return self.kernel == (1, 1) and not any(self.padding) and self.finer == 1

    @property
    def reads_one_sample(self) -> bool:
        """True if each sample of the result reads one sample, whose cell its own lies in: a 1x1 window, or a transposed
        convolution without overlap."""
        return self.kernel == (self.finer, self.finer) and not any(self.padding)

    @property
    def taps_of_phase(self) -> tuple[int, int]:
        """Largest number of taps (vertical, horizontal) that an element reads."""
        return -(-self.kernel[0] // self.finer), -(-self.kernel[1] // self.finer)

    @property
    def has_equal_phases(self) -> bool:
        """True if every element reads the same number of taps."""
        return not any(taps % self.finer for taps in self.kernel)

    @property
    def transposed(self) -> Window:
        """The window on maps whose two axes are exchanged."""
        top, bottom, left, right = self.padding
        return self._replace(
            kernel=self.kernel[::-1], dilation=self.dilation[::-1], padding=(left, right, top, bottom)
        )

    @property
    def offsets(self) -> tuple[list[int], list[int]]:
        """Fine pixels down and across from an element to its taps."""
        down, across = (
            [self.spacing * (step * tap - pad) for tap in range(taps)]
            for taps, step, pad in zip(self.kernel, self.dilation, self.padding[::2], strict=True)
        )
        return down, across

    @property
    def output_spacing(self) -> int:
        """Fine pixels between the samples of the output's own grid."""
        return self.spacing * self.stride // self.finer

    @property
    def steps(self) -> tuple[int, ...]:
        """Dilations and paddings in samples, which must be multiples of the cells that the window reads."""
        unknown = (1,) if self.same and self.taps > 1 else ()
        return (*self.dilation, *self.padding, *unknown)

    def fit(self, size: tuple[int, int]) -> Window:
        """Return the window with "same" padding resolved for a fine map of `size`; other windows are unchanged."""
        if not self.same:
            return self
        (top, bottom), (left, right) = map(self._same, size, (0, 1))
        return self._replace(padding=(top, bottom, left, right), same=False, lower=False)

    def _same(self, fine: int, axis: int) -> tuple[int, int]:
        samples = divide_up(fine, self.spacing)
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        total = most((divide_up(samples, self.stride) - 1) * self.stride + span - samples, 0)
        pads = total // 2, total - total // 2
        return pads[::-1] if self.lower else pads

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the fine size of the output for a fine map of `size`: H' = min(H, n' R), with n' output samples."""
        height, width = map(self._output_length, size, (0, 1))
        return height, width

    def finer_samples(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the output samples (height, width) that a transposed convolution gives for a fine map of `size`."""
        samples = [divide_up(length, self.spacing) for length in size]
        pads = (sum(self.padding[:2]), sum(self.padding[2:]))
        height, width = (
            (count - 1) * self.finer + kernel - pad
            for count, kernel, pad in zip(samples, self.kernel, pads, strict=True)
        )
        if is_statically_true(least(height, width) < 1):
            raise InvalidInput(
                f"a transposed convolution of {samples[0]}x{samples[1]} samples has no output.",
                why="the image is too small for this network.",
                next="use a larger image.",
            )
        return height, width

    def _output_length(self, fine: int, axis: int) -> int:
        samples = divide_up(fine, self.spacing)
        before, after = self.padding[2 * axis : 2 * axis + 2]
        if self.mode == "reflect" and is_statically_true(most(before, after) >= samples):
            raise InvalidInput(
                f"a border of {most(before, after)} samples is reflected in a map of {samples}.",
                why="the image is too small for this network: torch reflects maps longer than their border.",
                next="use a larger image.",
            )
        span = self.dilation[axis] * (self.kernel[axis] - 1)
        if not self.ceil_mode and before + after >= span:
            return fine  # at least ceil(samples / stride) outputs
        room = samples + before + after - span - 1
        count = (divide_up(room, self.stride) if self.ceil_mode else room // self.stride) + 1
        if self.ceil_mode:  # torch: a window must start inside the map or its left padding
            count = least(count, (samples + before - 1) // self.stride + 1)
        too_small = count < 1 if self.ceil_mode else room < 0  # a last partial window may be the only one
        if is_statically_true(too_small):
            raise InvalidInput(
                f"a {self.kernel[0]}x{self.kernel[1]} window does not fit into {samples} samples.",
                why="the image is too small for this network.",
                next="use a larger image.",
            )
        return least(fine, count * self.spacing * self.stride)


@dataclass(frozen=True, eq=False)
class Reading:
    """Where points are read: a table into the N rows, followed by one padding row and M interpolated halo rows.

    Attributes:
        table: integer tensor of any shape with entries in 0..N+M; N is the padding row.
        sources: (M, 4) int32, the four elements that each halo row interpolates.
        mix: (M, 4) float64, their weights, which sum to one; float32 in graphs for engines with kernels.
        has_outside: True if any entry can be the padding row.
        used: how many of the halo rows, counted from the first, are read when shapes must be static; None for all.
    """

    table: Tensor
    sources: Tensor
    mix: Tensor
    has_outside: bool
    used: Tensor | None = None

    @property
    def reading(self) -> Reading:
        """The reading itself, so that a `Reading` can stand in for a `WindowRead`."""
        return self


@dataclass(frozen=True, eq=False)
class TapSearch(Work):
    """The reading of points, or of taps so many fine pixels down and across from the anchors of a lattice, see
    `kernel_map`.

    Attributes:
        rows: the levels (B, H, W) of the source.
        source: the lattice that is read.
        target: the lattice of the anchors; None for points.
        points: numbers of fine pixels of the source, int64, of any shape; None for taps.
        steps: fine pixels from an anchor to its taps, down and across.
        has_outside: taps may lie outside the map.
    """

    source: Lattice
    target: Lattice | None = None
    points: Tensor | None = None
    steps: tuple[list[int], list[int]] = ([0], [0])
    has_outside: bool = False
    task: ClassVar[str] = "find_taps"

    @property
    def pixels(self) -> Tensor:
        """(n,) int64: the pixels that steps begin at."""
        if self.points is not None:
            return self.points.flatten()
        assert self.target is not None
        return self.target.anchors

    @property
    def size(self) -> tuple[int, int]:
        """Fine (height, width) of the maps in which these pixels are numbered."""
        return self.source.size if self.target is None else self.target.size

    def shaped(self, table: Tensor) -> Tensor:
        """Return a table (n, taps), or of points one of their shape."""
        return table if self.points is None else table.view(self.points.shape)

    @property
    def is_counted(self) -> bool:
        """True if the numbers of cells are known, not bounded."""
        return self.source.capacity is None and (self.target is None or self.target.capacity is None)

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The device, and what is known of the numbers of cells."""
        return *super().case, self.is_counted, self.source.capacity is None


def read_rows(table: Tensor, has_outside: bool = False) -> Reading:
    """Return a reading of a table of rows without a halo."""
    none = torch.empty(0, 4, dtype=torch.int32, device=table.device)
    return Reading(table, none, none.double(), has_outside)


def read_points(lattice: Lattice, points: Tensor, inside: Tensor | None = None) -> Reading:
    """Return a reading of flat fine pixels `points` (int64, any shape); padding is read where `inside` is False."""
    if inside is None and lattice.part is None:
        reading: Reading = compute(TapSearch(lattice.levels, lattice, points=points))
        return reading
    table = _rows_or_pixels(lattice)[points]
    has_outside = inside is not None and not (
        lattice.capacity is None and not lattice.is_open and bool(inside.all())
    )
    if has_outside:
        table = torch.where(inside, table, as_number(lattice.count, table))  # type: ignore[arg-type]
    return _with_halo(lattice, table, has_outside)


def every_pixel(lattice: Lattice, spacing: int) -> Reading:
    """Return a reading of every `spacing`-th fine pixel of a lattice, (B, h, w)."""

    def build() -> Reading:
        height, width = lattice.size
        pixels = torch.arange(lattice.batch * height * width, device=lattice.levels.device)
        return read_points(lattice, pixels.view(lattice.batch, height, width)[..., ::spacing, ::spacing])

    return lattice.derive(("every pixel", spacing), build)


# Placeholder for the padding row while its number is unknown. It is exact in float32, in which OpenVINO pads integers.
_OUTSIDE = 2**30


def has_halo(lattice: Lattice) -> bool:
    """Return True if points inside cells are interpolated from several elements."""
    return lattice.geometry.interpolates and lattice.uniform_level != 0


def _rows_or_pixels(lattice: Lattice) -> Tensor:
    """Return the row that each fine pixel is read from, (B*H*W,) int32. A pixel that is interpolated from several
    elements gets -1 minus its pixel number until it has a halo row."""

    def build() -> Tensor:
        pixels = torch.arange(lattice.index.shape[0], dtype=torch.int32, device=lattice.index.device)
        at_anchor = torch.zeros_like(pixels, dtype=torch.bool)
        _mark(at_anchor, lattice.anchors)
        return torch.where(at_anchor, lattice.index, -1 - pixels)

    return lattice.derive("rows or pixels", build) if has_halo(lattice) else lattice.index


def _with_halo(lattice: Lattice, table: Tensor, has_outside: bool) -> Reading:
    """Return the reading of a table of `_rows_or_pixels`, which is overwritten: each pixel in it gets a halo row.

    If only bounds are known, shapes follow from the bounds: the halo has a row for every pixel that may not be an
    anchor. The halo rows that are read come first.
    """
    if not has_halo(lattice):
        return read_rows(table, has_outside)
    between, pixels = table < 0, lattice.index.shape[0]
    if lattice.capacity is None and not lattice.is_open:
        wanted = torch.zeros(pixels, dtype=torch.bool, device=table.device)
        mixed = (-1 - table[between]).long()
        _mark(wanted, mixed)
        table[between] = (wanted.cumsum(0, dtype=torch.int32) + lattice.count)[mixed]
        return Reading(table, *interpolation(lattice, wanted.nonzero().squeeze(1)), has_outside)
    wanted = torch.zeros(pixels + 1, dtype=torch.bool, device=table.device)
    _mark(wanted, torch.where(between, -1 - table, pixels).long())
    wanted = wanted[:pixels]
    rank = wanted.cumsum(0) + lattice.count
    table = torch.where(between, rank[torch.where(between, -1 - table, 0).long()], table).to(torch.int32)
    if lattice.capacity is None:
        return Reading(table, *interpolation(lattice, wanted.nonzero().squeeze(1)), has_outside)
    points = torch.nonzero_static(wanted, size=pixels - lattice.capacity[0], fill_value=0).squeeze(1)
    return Reading(table, *interpolation(lattice, points), has_outside, wanted.sum())


def _mark(flags: Tensor, places: Tensor) -> None:
    """Set the flags at some places (int64, any shape)."""
    if flags.device.type == "cuda":  # where an assignment would copy the value from the CPU, and wait
        flags.index_fill_(0, places.flatten(), True)
    else:
        flags[places] = True


def interpolation(lattice: Lattice, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return elements and weights of bilinear interpolation: per axis (1 - delta/R) D(a) + (delta/R) D(a + R).

    D is the nearest-filled map, replicated at the border; a and R are anchor and side of the cell with the point.
    """
    height, width = lattice.size
    side = constant(lattice.geometry.sides, torch.int64, points.device)[
        lattice.levels.flatten()[points].long()
    ]
    y, x = quotients(points, width) % height, points % width
    first = points - y * width - x  # first pixel of the image
    top, left = y - y % side, x - x % side
    bottom, right = (top + side).clamp(max=height - 1), (left + side).clamp(max=width - 1)
    down, across = (y - top) / side.double(), (x - left) / side.double()
    rows = lattice.index[
        torch.stack([first + line * width + column for line in (top, bottom) for column in (left, right)], -1)
    ]
    # Between a row and itself lies the row, to the bit: equal values stay equal, for maxima and their places.
    down = torch.where((rows[:, :2] == rows[:, 2:]).all(1), 0.0, down)
    across = torch.where((rows[:, 0] == rows[:, 1]) & ((down == 0) | (rows[:, 2] == rows[:, 3])), 0.0, across)
    mix = torch.stack(
        [vertical * along for vertical in (1 - down, down) for along in (1 - across, across)], -1
    )
    # A corner of weight zero is replaced by the point's own cell, whose weight is never zero.
    return torch.where(mix > 0, rows, rows[:, :1]), mix


def kernel_map(source: Lattice, target: Lattice, window: Window, *, drop: bool = False) -> Reading:
    """Return the kernel map (*) from `source` to `target`, computed once per pair of lattices and window.

    Args:
        source: lattice of the input elements.
        target: lattice of the output elements, of the same level map, stage at least the source's.
        window: window of the operation.
        drop: cells that this operation does not downsample read only themselves (`pool="drop"`).

    Returns:
        A reading with a table (N_target, taps); for a transposed convolution (N_target, largest taps of a phase).
    """

    def build() -> Reading:
        if source.part is not None:
            return _of_part(source, target, window, drop)
        if window.finer > 1:
            return _taps_of_phases(source, target, window)
        if window.mode == "zeros" and not drop and source.geometry.anchor == "corner":
            return _shift_taps(source, target, window)
        # Taps are folded back at the border, shifted to the centre of cells, or dropped.
        points, inside, _ = _taps(source, target, window, drop)
        return read_points(source, points, inside)

    return source.derive(("kernel_map", target.key, window, drop), build)


def row_numbers(source: Lattice, target: Lattice) -> Tensor | None:
    """Return the numbers (N_target,) of the rows of `source` at the anchors of `target`; None if these are all."""
    if source is target:
        return None
    static = source.capacity is not None or target.capacity is not None or source.is_open
    if source == target or (not static and source.size == target.size and source.count == target.count):
        return None  # none of its cells is downsampled in between
    return kernel_map(source, target, Window((1, 1))).table.squeeze(1)


def _of_part(source: Lattice, target: Lattice, window: Window, drop: bool) -> Reading:
    """Return the kernel map of a part: the kernel map of the whole lattice with its rows renumbered. Missing cells
    read the padding row; halo rows interpolate the cells of the part."""
    assert source.part is not None and isinstance(source.part.rows, Tensor)
    whole = source.whole
    whole_map = kernel_map(whole, target, window, drop=drop)
    outside = as_number(source.count, source.index)
    rows = torch.where(source.part.rows, source.index[whole.anchors], outside)
    behind = torch.arange(1 + whole_map.sources.shape[0], dtype=rows.dtype, device=rows.device) + source.count
    table = torch.cat((rows, behind))[whole_map.table]
    has_outside = whole_map.has_outside or bool((table == source.count).any())
    return replace(whole_map, table=table, sources=rows[whole_map.sources], has_outside=has_outside)


def divisors(
    source: Lattice, target: Lattice, window: Window, *, drop: bool = False, padding: bool = True
) -> Tensor:
    """Count the taps of each element (N_target,) that lie in the map or, if `padding`, in its padding."""
    key = ("divisors", target.key, window, drop, padding)

    def build() -> Tensor:
        _, inside, counted = _taps(source, target, window, drop)
        return (counted if padding else inside).sum(1)

    return source.derive(key, build)


def _shift_taps(source: Lattice, target: Lattice, window: Window) -> Reading:
    """Compute the kernel map of the common case: tap offsets are the same for all elements, outside the map is zero."""
    has_outside = not is_statically_true(most(*map(_reach, window.offsets)) == 0)
    work = TapSearch(source.levels, source, target, steps=window.offsets, has_outside=has_outside)
    reading: Reading = compute(work)
    return reading


def _reach(steps: list[int]) -> int:
    """Return how far steps along an axis lead at most, in either direction."""
    return most(most(0, -steps[0]), most(0, steps[-1]))


def find_taps(work: TapSearch) -> Reading:
    """Find taps in a padded map of rows: a position in it is one number for each target plus one for each tap."""
    source, (down, across), (height, width) = work.source, work.steps, work.source.size
    if work.points is not None:
        return _with_halo(source, _rows_or_pixels(source)[work.points], False)
    assert work.target is not None
    above, below, before, after = (
        most(0, -down[0]),
        most(0, down[-1]),
        most(0, -across[0]),
        most(0, across[-1]),
    )
    padding = (before, after, above, below)
    outside = _OUTSIDE if source.is_open else source.count
    padded = F.pad(_rows_or_pixels(source).view(-1, height, width), padding, value=outside).flatten()
    image, y, x = work.target.coordinates
    wide = width + before + after
    place = (image * (height + above + below) + y + above) * wide + x + before
    steps = (as_numbers(down, place).unsqueeze(1) * wide + as_numbers(across, place)).flatten()
    table = padded[place.unsqueeze(1) + steps]
    if source.is_open:
        table = torch.where(table == _OUTSIDE, as_number(source.count, table), table)
    return _with_halo(source, table, work.has_outside)


def _taps_of_phases(source: Lattice, target: Lattice, window: Window) -> Reading:
    """Compute the kernel map (**) of a transposed convolution; later taps of a phase read earlier positions."""
    (height, width), (image, y, x) = source.size, target.coordinates
    side = source.side_map.flatten()[source.pixels(image, y, x)]
    shift = side // 2 if source.geometry.anchor == "center" else torch.zeros_like(side)
    places, inside = [], []
    for anchor, length, axis in ((y, height, 0), (x, width, 1)):
        phase = _phase(anchor, window, axis).unsqueeze(1)
        taps = phase + window.finer * torch.arange(window.taps_of_phase[axis], device=phase.device)
        place = anchor.unsqueeze(1) + window.output_spacing * (window.padding[2 * axis] - taps)
        inside.append((taps < window.kernel[axis]) & (place >= 0) & (place < length))
        places.append((place + shift.unsqueeze(1)).clamp(0, length - 1))
    points = ((image * height)[:, None, None] + places[0][:, :, None]) * width + places[1][:, None, :]
    return read_points(source, points.flatten(1), (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1))


def _phase(anchor: Tensor, window: Window, axis: int) -> Tensor:
    """Return the first tap that elements with these anchors read along an axis (0 vertical, 1 horizontal)."""
    return (anchor // window.output_spacing + window.padding[2 * axis]) % window.finer


class Phase(NamedTuple):
    """The output elements of a transposed convolution that read the same taps.

    Attributes:
        first: the first tap of each axis; the other taps follow in steps of `Window.finer`.
        rows: (n,) int64, the rows of these elements.
        table: (n, taps) int32, the columns of the kernel map that hold taps of this phase.
    """

    first: tuple[int, int]
    rows: Tensor
    table: Tensor


def phases(source: Lattice, target: Lattice, window: Window) -> tuple[list[Phase], Tensor]:
    """Return the phases of a transposed convolution and each element's position (N_target,) in their concatenation.

    If only bounds are known, a phase has one row per fine pixel of the phase, but no more rows than the lattice.
    """
    table = kernel_map(source, target, window).table.unflatten(1, window.taps_of_phase)

    def build() -> tuple[list[Phase], Tensor]:
        _, y, x = target.coordinates
        down, across = _phase(y, window, 0), _phase(x, window, 1)
        place, joined = torch.zeros_like(y), 0
        every = []
        for number in range(window.finer**2):
            first = divmod(number, window.finer)
            is_of = (down == first[0]) & (across == first[1])
            if target.capacity is None:
                rows = is_of.nonzero().squeeze(1)
            else:
                room = min(target.count, target.batch * _pixels_of(target, window, first))
                rows = torch.nonzero_static(is_of, size=room, fill_value=0).squeeze(1)
            many = [
                -(-(kernel - tap) // window.finer) for kernel, tap in zip(window.kernel, first, strict=True)
            ]
            every.append(Phase(first, rows, table[rows, : many[0], : many[1]].flatten(1)))
            # There may be more padding rows than the phase has room for; their values do not matter.
            at = joined + (is_of.cumsum(0) - 1).clamp(max=most(rows.shape[0] - 1, 0))
            place, joined = torch.where(is_of, at, place), joined + rows.shape[0]
        return every, place

    return target.derive(("phases", source.key, window), build)


def _pixels_of(lattice: Lattice, window: Window, first: tuple[int, int]) -> int:
    """Count the fine pixels of an image that belong to a phase; without tensors, which an export could not ask."""
    counts = [
        sum((at // window.output_spacing + before) % window.finer == tap for at in range(length))
        for length, before, tap in zip(lattice.size, window.padding[::2], first, strict=True)
    ]
    return counts[0] * counts[1]


def _taps(source: Lattice, target: Lattice, window: Window, drop: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the flat fine pixels (N, taps), whether each lies in the map, and whether it lies in map or padding."""
    height, width = source.size
    image, y, x = target.coordinates
    anchor = (image * height + y) * width + x
    side = source.side_map.flatten()[anchor]
    shift = side // 2 if source.geometry.anchor == "center" else torch.zeros_like(side)
    rows, row_in, row_counted = _axis(y, window, 0, height, shift)
    columns, col_in, col_counted = _axis(x, window, 1, width, shift)
    points = ((image * height)[:, None, None] + rows[:, :, None]) * width + columns[:, None, :]
    inside = (row_in[:, :, None] & col_in[:, None, :]).flatten(1)
    counted = (row_counted[:, :, None] & col_counted[:, None, :]).flatten(1)
    points = points.flatten(1)
    if drop:
        target_side = target.side_map.flatten()[target.anchors]
        passed = (target_side == side).unsqueeze(1)
        points = torch.where(passed, anchor.unsqueeze(1), points)
        inside, counted = inside | passed, counted | passed
    return points, inside, counted


def _axis(
    anchor: Tensor, window: Window, axis: int, length: int, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the positions (N, kernel) of the taps along one axis, whether they are inside, and whether they count.

    The map is treated as `spacing` interleaved grids, one per phase of the anchor. Each grid is padded the way the
    network pads its own grid, so reflected and replicated borders are correct for any size. A grid beside the network's
    own may have a sample less; a border that is too long for it is reflected at one end after the other.
    """
    spacing, (before, after) = window.spacing, window.padding[2 * axis : 2 * axis + 2]
    phase, cell = anchor % spacing, quotients(anchor, spacing)
    samples = ((length - phase + spacing - 1) // spacing).unsqueeze(1)
    taps = torch.arange(window.kernel[axis], device=anchor.device)
    sample = cell.unsqueeze(1) + taps * window.dilation[axis] - before
    counted = (sample >= -before) & (sample < samples + after)
    inside = (sample >= 0) & (sample < samples)
    if window.mode == "reflect":
        period = (2 * (samples - 1)).clamp(min=1)
        folded = sample.remainder(period)
        inside = torch.ones_like(inside)
        sample = torch.minimum(folded, period - folded)
    elif window.mode == "replicate":
        inside = torch.ones_like(inside)
    sample = torch.minimum(sample.clamp(min=0), samples - 1)
    position = phase.unsqueeze(1) + sample * spacing + shift.unsqueeze(1)
    return position.clamp(max=length - 1), inside, counted
