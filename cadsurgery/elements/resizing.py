"""Operations that upsample a map: onto the lattice of an earlier stage, or beyond the high output stride."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_rows, in_order
from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.works import MapResizing, MixingLines, extend, mix
from cadsurgery.elements.bilinear import corners, ends_of, place_on_map
from cadsurgery.elements.elements import Elements, to_dense
from cadsurgery.elements.kernel_map import Reading, read_points
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.elements.sizes import as_number, divide_up, is_for_any_size, is_statically_true, pair_of
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.running import running


@operation(reads="image")
def resize(
    x: Elements,
    stage: int,
    spacings: tuple[int, int],
    scale: int,
    size: Sequence[int] | int | None = None,
    mode: str = "nearest",
    align_corners: bool | None = False,
) -> Elements:
    """Upsample inside the region, onto the lattice of an earlier stage.

    If an output cell is as large as the input cell that contains it (it was never downsampled), its value is copied:
    the dense network at that stride has nothing to resize. Other cells interpolate between coarse cells as
    torch.nn.functional.interpolate does between samples. With a scale of 1 a map is stretched by a sample or so, as in
    decoders that correct rounded sizes; then cells of every size are interpolated.

    Args:
        x: elements.
        stage: stage of the output, at most the input's.
        spacings: fine pixels between the samples of the network's own grid, before and after.
        scale: how many times finer the output is.
        size: samples (height, width) of the output on the network's own grid; default `scale` times the input's.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.

    Raises:
        InvalidInput: the output would be larger than the fine map.
    """
    before = x.lattice.samples(spacings[0])
    after = tuple(count * scale for count in before) if size is None else pair_of(size)
    fine, room = x.lattice.holding(after, spacings[1]), x.lattice.most_size
    if any(is_statically_true(length > most) for length, most in zip(fine, room, strict=True)):
        raise InvalidInput(
            f"upsampling to {after[0]}x{after[1]} samples gives more than the network's own maps have.",
            why="the image is not divisible by the network's strides.",
            next="pad or resize the image to a multiple of the lowest output stride.",
        )
    target = x.lattice.resample(stage, fine)
    return resize_onto(x, target, Resizing(spacings, before, after, mode, bool(align_corners)))


class Resizing(NamedTuple):
    """How a map of the region is resized.

    Attributes:
        spacings: fine pixels between the samples of the network's own grid, before and after.
        before: samples (height, width) of the map.
        after: samples (height, width) of the resized map.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.
    """

    spacings: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, ...]
    mode: str
    align_corners: bool


def resize_onto(
    x: Elements, target: Lattice, by: Resizing, top: int = 0, whole: tuple[int, int] | None = None
) -> Elements:
    """Compute `resize` at the elements of a lattice of the same level map, which begins at the fine row `top` of a map
    of the fine size `whole`, by default that of the elements."""
    if x.rows.is_meta:  # the places that elements are read from have no influence on shapes
        return Elements(x.rows.new_empty((target.count, *x.rows.shape[1:])), target)
    if not x.lattice.geometry.floors:
        cells = partial(_between_cells, x.lattice, target, by, top, whole or x.lattice.size)
        return Elements(mix(x.rows, *x.lattice.derive(("resize", target.key, by), cells)), target)
    scale, pairs = by.spacings[0] // by.spacings[1], zip(by.after, by.before, strict=True)
    if by.mode == "nearest" and all(want == have * scale for want, have in pairs):
        same = partial(_same_sample, x.lattice, target, by.spacings[0])
        return Elements(x.rows.index_select(0, x.lattice.derive(("same sample", target.key), same)), target)
    corners = partial(_own_corners, x.lattice, target, by, top)
    reading, shares = x.lattice.derive(("own corners", target.key, by), corners)
    return Elements(mix(extend(x.rows, reading, 0.0), reading.table.to(torch.int32), shares), target)


def _same_sample(source: Lattice, target: Lattice, spacing: int) -> Tensor:
    """Return the row of the sample that each element of a map, repeated a whole number of times, is a copy of."""
    image, y, x = target.coordinates
    return source.index[source.pixels(image, y - y % spacing, x - x % spacing)]


def _own_corners(source: Lattice, target: Lattice, by: Resizing, top: int) -> tuple[Reading, Tensor]:
    """Return where each element of a resized map reads the four samples of the network's own map around it, which may
    lie inside cells, and their weights (M, 4)."""
    (image, *coordinates), ends = target.coordinates, []
    spacings, before, after, mode, align_corners = by
    for at, have, want, origin in zip(coordinates, before, after, (top, 0), strict=True):
        number = ((at + origin) // spacings[1]).double()
        number = number if mode == "nearest" or align_corners else number + 0.5
        found = ends_of(place_on_map(number, have, want, mode, align_corners), have, slack=1e-9)
        (first, one), (second, other) = found
        ends.append(((first - origin // spacings[0], one), (second - origin // spacings[0], other)))
    pixels, shares = corners(ends, lambda y, x: source.pixels(image, y * spacings[0], x * spacings[0]))
    return read_points(source, pixels), shares


@operation(reads="image", gives="dense", exit_of=resize)
def resize_to_dense(
    x: Elements,
    spacing: int,
    *,
    size: Sequence[int] | int | None = None,
    scale_factor: Sequence[float] | float | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    guide: Tensor | None = None,
) -> Tensor:
    """Resize at the exit of the region: return the dense result of the network's own resize, read from elements.

    Torch maps output pixel p to the coordinate u(p) on the map that the *network* resizes, which has a sample on
    every `spacing`-th fine pixel. The value is read at the fine position q = spacing u(p):

    - `bilinear`: interpolates the fine map of `to_dense` between the pixels around q. With a linear fill this equals
      the original resize where cells are as large as the network's samples, and smaller cells add detail. With the
      other fills the fine map is not linear between the network's samples; then the distance of the interpolated points
      is the side of the cell around q, at most one sample of the network.
    - `nearest`: takes the value of the cell that contains torch's index on the fine grid, for every fill.

    Args:
        x: elements.
        spacing: fine pixels between the samples of the network's own grid.
        size: samples (height, width) of the output, as in torch.nn.functional.interpolate.
        scale_factor: ratio of the output's size to the size of the network's own map.
        mode: `nearest`, `nearest-exact` or `bilinear`.
        align_corners: as in torch.
        recompute_scale_factor: as in torch.
        guide: (B, D, H, W) on the fine map, see `to_dense`.

    Returns:
        (B, C, height, width), with the same size as in the network.
    """
    scaling = Scaling(size, scale_factor, mode, align_corners, recompute_scale_factor)
    lattice, bilinear = x.lattice, mode == "bilinear"
    side = lattice.uniform_side
    if side == spacing and lattice.geometry.dense_shortcut:
        return scaling.of(to_dense(x, spacing))
    if bilinear and spacing == 1:
        return scaling.of(to_dense(x, 1, guide=guide))
    places = scaling.places(lattice.size, spacing, x.rows.dtype, lattice.levels.device)
    if not bilinear:
        return _nearest(x, places)
    every_pixel = lattice.geometry.fill == "linear"
    if side and (every_pixel or side <= spacing):  # only anchors are read
        return read_at(to_dense(x, side), [place / side for place in places])
    dense = to_dense(x, 1, guide=guide)
    return read_at(dense, places) if every_pixel else _between_sides(dense, lattice, places, spacing)


def interpolate(
    input: Tensor,  # as torch calls it
    size: Sequence[int] | int | None = None,
    scale_factor: Sequence[float] | float | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Resize a dense map as `F.interpolate` does, in contiguous memory: to put the larger map in order takes longer
    than to resize it."""
    if mode != "bilinear" or antialias or recompute_scale_factor or input.dim() != 4 or input.is_meta:
        options = size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
        return F.interpolate(in_order(input), *options)
    factors = None
    if size is None:
        factors = pair_of(scale_factor)
        size = [math.floor(have * factor) for have, factor in zip(input.shape[2:], factors, strict=True)]
    height, width = pair_of(size)
    if not running.in_graph and min(height, width) < 1:
        return F.interpolate(input, (height, width))  # torch refuses it
    out: Tensor = compute(MapResizing(input, (height, width), factors, bool(align_corners)))
    return out


def read_as_resized(fine: Tensor, spacing: int, **scaling: Any) -> Tensor:
    """Read another fine map (B, C, H, W) at the positions that `resize_to_dense` reads with the same arguments."""
    how = Scaling(**scaling)
    device = torch.device("cpu") if fine.is_meta else fine.device
    places = how.places((fine.shape[2], fine.shape[3]), spacing, fine.dtype, device)
    if how.mode == "bilinear":
        return read_at(fine, places)
    y, x = (place.to(fine.device) for place in places)
    return fine.index_select(2, y).index_select(3, x)


@dataclass(frozen=True)
class Scaling:
    """The arguments of torch.nn.functional.interpolate, which map output samples to input positions."""

    size: Sequence[int] | int | None = None
    scale_factor: Sequence[float] | float | None = None
    mode: str = "nearest"
    align_corners: bool | None = None
    recompute_scale_factor: bool | None = None

    @property
    def transposed(self) -> Scaling:
        """The scaling of maps whose two axes are exchanged."""
        size, factor = self.size, self.scale_factor
        return replace(
            self,
            size=size[::-1] if isinstance(size, (tuple, list)) else size,
            scale_factor=factor[::-1] if isinstance(factor, (tuple, list)) else factor,
        )

    def of(self, dense: Tensor) -> Tensor:
        """Resize a dense map with torch."""
        align = self.align_corners if self.mode == "bilinear" else None
        again = self.recompute_scale_factor
        return F.interpolate(dense, self.size, self.scale_factor, self.mode, align, again)

    def places(
        self, fine: tuple[int, int], spacing: int, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """Return, per axis, the position q of each sample on a fine map: float64, or int64 if one pixel is read.

        The positions come from torch itself, by resizing a map that holds the sample numbers. If one sample is read,
        that map has the size, dtype and device of the values, because torch's rounding depends on them.
        """
        counts = [divide_up(length, spacing) for length in fine]
        if self.mode == "bilinear":
            return self._between(counts, spacing, device)
        return self._single(counts, spacing, fine, dtype, device)

    def _between(self, counts: Sequence[int], spacing: int, device: torch.device) -> list[Tensor]:
        places = []
        for axis, count in enumerate(counts):
            alone = replace(
                self, size=_along(self.size, axis, 1), scale_factor=_along(self.scale_factor, axis, 1.0)
            )
            if is_for_any_size([count]):
                own = self._formula(count, axis, torch.float64, device)
            else:
                numbers = torch.arange(count, dtype=torch.float64, device=device)
                own = alone.of(numbers.view(1, 1, count, 1)).flatten()
            place = own * spacing
            whole = place.round()  # a rounding error must not change which cell is read
            places.append(torch.where((place - whole).abs() < 1e-6, whole, place))
        return places

    def _single(
        self,
        counts: Sequence[int],
        spacing: int,
        fine: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[Tensor]:
        dtype = torch.promote_types(dtype, torch.float32)
        if is_for_any_size(counts):
            numbers = [self._formula(count, axis, dtype, device) for axis, count in enumerate(counts)]
        else:  # one axis at a time: the map may be as large as the picture
            rows, columns = (torch.arange(count, dtype=dtype, device=device) for count in counts)
            numbers = [
                self.of(rows.view(1, 1, -1, 1).expand(1, 1, *counts))[0, 0, :, 0].clone(),
                self.of(columns.expand(1, 1, *counts))[0, 0, 0].clone(),
            ]
        places = []
        for axis, own in enumerate(numbers):
            own = own.double()
            exact = self._exact(counts[axis], axis, own.shape[0], torch.float64, device)
            within = ((exact - own) * spacing + 1e-6).floor().clamp(0, spacing - 1)
            places.append((own * spacing + within).long().clamp(max=fine[axis] - 1))
        return places

    def _exact(self, count: int, axis: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the positions of `length` output samples on an axis of `count` samples, not rounded or clamped."""
        number = torch.arange(length, dtype=dtype, device=device)
        before, after = (torch.scalar_tensor(value, dtype=dtype, device=device) for value in (count, length))
        if self.mode == "bilinear" and self.align_corners:
            return number * ((before - 1) / (after - 1).clamp(min=1))
        factor = None if self.recompute_scale_factor else _along(self.scale_factor, axis, 1.0)
        ratio = before / after if factor is None else 1 / factor[0]
        if self.mode == "bilinear":
            return (number + 0.5) * ratio - 0.5
        return (number + (0.5 if self.mode == "nearest-exact" else 0.0)) * ratio

    def _formula(self, count: int, axis: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Compute the positions of samples along an axis with torch's formula, for a map of any size."""
        if self.size is not None:
            length = _along(self.size, axis, 1)[0]
        else:
            factor = _along(self.scale_factor, axis, 1.0)[0]
            length = count * int(factor) if factor == int(factor) else torch.sym_int(count * factor)
        own = self._exact(count, axis, length, dtype, device).clamp(min=0)
        return (own if self.mode == "bilinear" else own.floor()).clamp(max=count - 1)


def _along(value: Any, axis: int, other: float) -> Any:
    """Return the entry of one image axis of a size or factor, and `other` for the unchanged axis; None stays None."""
    if value is None:
        return None
    return (value[axis] if isinstance(value, (tuple, list)) else value, other)


def _nearest(x: Elements, places: Sequence[Tensor]) -> Tensor:
    """Return the values of the cells that contain the pixels at `places`, (B, C, height, width)."""
    y, x_ = (place.to(x.lattice.index.device) for place in places)
    cell = x.lattice.index.view(x.lattice.batch, *x.lattice.size).index_select(1, y).index_select(2, x_)
    rows = x.rows.index_select(0, cell.flatten().to(x.rows.device))
    return rows.view(*cell.shape, -1).permute(0, 3, 1, 2)


def read_at(dense: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Interpolate a map (B, C, h, w) bilinearly at the grid that `places` of both axes form."""
    rows = dense.permute(0, 2, 3, 1)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    for axis, place in enumerate(places, 1):
        low = place.floor()
        first = low.long().to(rows.device)
        second = (first + 1).clamp(max=rows.shape[axis] - 1)
        share = (place - low).to(wide)
        if axis == 1:
            share = share.view(-1, 1, 1)
            wide = torch.lerp(wide.index_select(1, first), wide.index_select(1, second), share)
        else:
            work = MixingLines(wide.flatten(0, 1), first, second, share)
            wide = compute(work).view(*wide.shape[:2], place.shape[0], -1)
    return wide.to(dense.dtype).permute(0, 3, 1, 2)


def _between_sides(dense: Tensor, lattice: Lattice, places: Sequence[Tensor], spacing: int) -> Tensor:
    """Interpolate a fine map (B, C, H, W) between points one cell side apart, but at most `spacing` apart."""
    batch, (height, width), device = lattice.batch, lattice.size, lattice.levels.device
    places = [place.to(device) for place in places]
    inside = [place.long() for place in places]
    step = lattice.side_map.index_select(1, inside[0]).index_select(2, inside[1]).clamp(max=spacing)
    ends = []
    shapes = ((1, -1, 1), (1, 1, -1))
    for place, pixel, length, shape in zip(places, inside, (height, width), shapes, strict=True):
        first = pixel.view(shape) // step * step
        second = (first + step).clamp(max=(length - 1) // spacing * spacing)
        share = (place.view(shape) - first) / step
        ends.append(((first, 1 - share), (second, share)))
    image = torch.arange(batch, device=device).view(-1, 1, 1) * height
    points, shares = corners(ends, lambda y, x: (image + y) * width + x)
    rows = as_rows(dense).contiguous()
    values = mix(rows, points.flatten(0, 2).int(), shares.flatten(0, 2))
    return values.view(*step.shape, -1).permute(0, 3, 1, 2)


@operation(reads="window")
def pixel_shuffle(x: Elements, stage: int, spacings: tuple[int, int], scale: int) -> Elements:
    """Compute depth to space: an element reads the channels of its phase on the output's own grid.

    Args:
        x: elements (N, C r r).
        stage: stage of the output.
        spacings: fine pixels between the samples of the network's own grid, before and after.
        scale: r.
    """
    counts = [length * scale for length in x.lattice.samples(spacings[0])]
    target = x.lattice.resample(stage, x.lattice.holding(counts, spacings[1]))
    image, y, x_ = target.coordinates
    down, across = (at // spacings[1] % scale for at in (y, x_))
    # The last samples may lie beyond the input map.
    points = x.lattice.pixels(image, y - down * spacings[1], x_ - across * spacings[1])
    reading = read_points(x.lattice, points)
    rows = extend(x.rows, reading, 0.0).index_select(0, reading.table.to(x.rows.device))
    phase = (down * scale + across).to(rows.device)
    rows = rows.unflatten(1, (-1, scale * scale))
    return Elements(rows.gather(2, phase.view(-1, 1, 1).expand(-1, rows.shape[1], 1)).squeeze(2), target)


def _between_cells(
    source: Lattice, target: Lattice, by: Resizing, top: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the four elements of `source` (M, 4), and their weights, that each element of a finer lattice
    interpolates. Elements in cells of equal size copy their value unless the map is stretched. The lattices begin at
    the fine row `top` of a map of a fine `size`."""
    spacings, before, after, mode, align_corners = by
    has_sizes = [is_statically_true(one == two) for one, two in zip(before, after, strict=True)]
    stretched = spacings[0] == spacings[1] and not all(has_sizes)
    if align_corners:  # the outermost samples coincide
        before, after = (before[0] - 1, before[1] - 1), tuple(max(want - 1, 1) for want in after)
    height, width = source.size
    image, *place = target.coordinates
    side = target.side_map.flatten()[target.anchors]
    cell = source.side_map.flatten()[source.pixels(image, *place)]
    same = (cell == side) & (not stretched)
    ends = []
    for fine, length, have, want, origin in zip(place, size, before, after, (top, 0), strict=True):
        at, above, below = (fine + origin).double(), have * spacings[0], want * spacings[1]
        # Sizes that are symbols are divided as tensors: engines divide plain sizes in float32, and a point that is
        # rounded down below a whole number reads the neighbouring sample.
        whole = isinstance(above, int) and isinstance(below, int)
        ratio: Any = above / below if whole else as_number(above, at) / as_number(below, at)
        if mode == "nearest":
            point = (at * ratio / cell).floor() * cell
        else:
            point = at * ratio if align_corners else (at + side / 2) * ratio - cell / 2
        point = torch.where(same, at, point).clamp(min=0)
        low = (point / cell + 1e-9).floor()
        share = torch.where(same, 0.0, (point / cell - low).clamp(min=0))
        first = (low * cell).long().clamp(max=length - 1)
        second = (first + cell).clamp(max=length - 1)
        ends.append(((first - origin, 1 - share), (second - origin, share)))
    points, shares = corners(ends, lambda y, x: (image * height + y) * width + x)
    return source.index[points], shares
