"""`Elements`, the value type of the region, and conversions: from and to dense maps, and to rows of another lattice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import NCHW, as_rows, channel_dims, fast_layout, image_dims, is_flat
from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.graph_sizes import require_equal
from cadsurgery.elements.backends.works import PixelReading, mix, pick, select_rows
from cadsurgery.elements.bilinear import corners, ends_of, place_on_map
from cadsurgery.elements.kernel_map import Reading, every_pixel
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.elements.sizes import is_statically_true, least, pair_of
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Elements:
    """Feature vectors of the cells of a lattice.

    Attributes:
        rows: (N, C), contiguous, in the lattice's order; (N, *channel axes) if the map has several channel axes.
        lattice: the cells that the rows belong to.
    """

    rows: Tensor
    lattice: Lattice


@operation(reads="element")
def to_elements(dense: Tensor, lattice: Lattice, layout: str = NCHW) -> Elements:
    """Convert a dense map at the high output stride to elements of stage 0; a view if its memory is channels_last."""
    if dense.dim() != len(layout) or dense.shape[layout.index("b")] != lattice.batch:
        raise InvalidInput(
            f"a batch of {lattice.batch} maps is expected here, not {describe(dense)}.",
            next="give one level map per image.",
        )
    image = [layout.index(axis) for axis in "bhwp" if axis in layout]
    by_pixel = dense.permute(*image, *channel_dims(layout))
    size = lattice.size if "p" in layout else (by_pixel.shape[1], by_pixel.shape[2])
    return Elements(by_pixel.flatten(0, len(image) - 1).contiguous(), lattice.resample(0, size))


@operation(reads="element", gives="other")
def fine_map(dense: Tensor, layout: str) -> Tensor:
    """Return a dense map of any layout as (B, C, H, W), the form in which mask providers receive it."""
    if layout == NCHW:
        return dense
    image = [layout.index(axis) for axis in "bhw"]
    return dense.permute(*image, *channel_dims(layout)).flatten(3).permute(0, 3, 1, 2)


@operation(reads="window", gives="dense")
def to_dense(x: Elements, spacing: int = 1, layout: str = NCHW, guide: Tensor | None = None) -> Tensor:
    """Convert elements to a dense map by reading every `spacing`-th fine pixel with the lattice's fill.

    Args:
        x: elements.
        spacing: 1 for the fine size, the network's own sample distance for its native size.
        layout: layout of the result.
        guide: (B, D, H, W) on the fine map; a pixel takes more from anchors whose guide features are similar.

    Returns:
        By default (B, C, ceil(H / spacing), ceil(W / spacing)), in channels_last memory.
    """
    by_pixel = _by_pixel_of_uniform(x, spacing)
    if by_pixel is None:
        by_pixel = _by_pixel(x, spacing, guide)
    present = "bhw" + "c" * (x.rows.dim() - 1)
    if "p" in layout:
        by_pixel, present = by_pixel.flatten(1, 2), present.replace("hw", "p")
    channels = iter(channel_dims(present))
    dense = by_pixel.permute([next(channels) if axis == "c" else present.index(axis) for axis in layout])
    return fast_layout(dense) if layout == NCHW else dense


def _by_pixel_of_uniform(x: Elements, spacing: int) -> Tensor | None:
    """Return the pixels (B, h, w, ...) if they all are anchors of a uniform lattice; otherwise None. The result is a
    view if every anchor is read."""
    side = x.lattice.uniform_side
    if not side or spacing % side:
        return None
    step = spacing // side
    by_pixel = x.rows.view(x.lattice.batch, *x.lattice.samples(side), *x.rows.shape[1:])
    return by_pixel[:, ::step, ::step].contiguous()


def _by_pixel(x: Elements, spacing: int, guide: Tensor | None) -> Tensor:
    """Read every `spacing`-th fine pixel (B, h, w, ...); see `to_dense`."""
    lattice = x.lattice
    height, width = lattice.size
    if x.rows.is_meta:
        return x.rows.new_empty((lattice.batch, *lattice.samples(spacing), *x.rows.shape[1:]))
    if not x.rows.is_floating_point():  # truth values and whole numbers: those of the cell
        cells = lattice.index.view(lattice.batch, height, width)[..., ::spacing, ::spacing]
        return x.rows[cells.to(x.rows.device)]

    flat = x.rows.reshape(x.rows.shape[0], math.prod(x.rows.shape[1:]))
    if guide is None or spacing != 1:
        pixels = compute(PixelReading(flat, lattice, spacing))
        return pixels.view(*pixels.shape[:3], *x.rows.shape[1:])
    reading = every_pixel(lattice, spacing)
    if not is_statically_true(reading.sources.shape[0] == 0):
        pixels = torch.arange(reading.table.numel(), device=reading.table.device)
        reading = guided(reading, pixels.view(reading.table.shape), lattice, guide)
    return pick(flat, reading).view(*reading.table.shape, *x.rows.shape[1:])


# Every distance grows by this share of the mean distance, so that an anchor at distance zero does not decide alone.
_SLACK = 0.01


def guided(reading: Reading, pixels: Tensor, lattice: Lattice, guide: Tensor) -> Reading:
    """Return a reading of fine pixels whose interpolation weights follow the similarity of a guide (B, D, H, W).

    Let b_i be the bilinear weights of a pixel p and d_i = |g(p) - g(a_i)|^2 its distance to the anchor of source i.
    The weights are b_i / (d_i + s (sum_j b_j d_j + e |g(p)|^2))^2, normalised: inverse distance weighting (Shepard
    1968) without a length scale. e is the machine epsilon of the guide's dtype. Distances that are equal up to
    rounding give the bilinear weights. Anchors and pixels at level 0 are not interpolated.
    """
    height, width = lattice.size
    rounding = torch.finfo(guide.dtype).eps
    guide = guide[..., :height, :width]
    beyond = (0, width - guide.shape[3], 0, height - guide.shape[2])
    if not all(
        is_statically_true(length == 0) for length in beyond
    ):  # an upsampled map may extend beyond the image, where the border of the guide is replicated
        guide = F.pad(guide, beyond, mode="replicate")
    rows = as_rows(guide)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    halo = reading.sources.shape[0]
    place = (reading.table.flatten() - lattice.count).clamp(min=0).long()  # 0: no halo row
    points = torch.zeros(halo + 1, dtype=torch.long, device=place.device)
    points = points.scatter(0, place, pixels.flatten())[1:]
    anchors = lattice.anchors[reading.sources.long()].to(rows.device)
    here = rows.index_select(0, points.to(rows.device))
    apart = torch.stack([(rows.index_select(0, one) - here).square().mean(1) for one in anchors.unbind(1)], 1)
    mix = reading.mix.to(apart)
    typical = ((mix * apart).sum(1) + rounding * here.square().mean(1)).unsqueeze(1)
    # If all distances are zero, divide zero by one, so that the gradient does not divide by zero either.
    likeness = mix / (apart / torch.where(typical > 0, typical, 1) + _SLACK).square()
    return replace(reading, mix=likeness / likeness.sum(1, keepdim=True))


@dataclass(frozen=True, eq=False)
class SmallMap:
    """A dense map that the region reads: a small map to be resized, such as the bins of adaptive pooling, or one of
    the network's own maps that was computed densely.

    Attributes:
        values: (B, C, h, w), or (1, C, h, w) for all images.
        spacing: fine pixels between the samples of the resized map in the network.
        size: samples (height, width) of the resized map; None if the map is not resized.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.
        name: of the operation that joins it with maps of the region.
        top: fine row of the map at which the lattices that read it begin, those of a band of rows; None if they are of
            the whole map, whose size is checked then.
    """

    values: Tensor
    spacing: int
    size: tuple[int, int] | None
    mode: str = "nearest"
    align_corners: bool = False
    name: str = "an operation"
    top: int | None = None

    def rows_on(self, lattice: Lattice) -> Tensor:
        """Return the map's values (N, C) on the elements of a lattice, interpolated as torch resizes. `bilinear` reads
        the centres of the cells (of the anchor's sample, if level maps are floors), or their anchors with aligned
        corners; `nearest` reads the sample that contains the
        cell. A map that is not resized is read at the anchors, or by `nearest` if that is the lattice's fill.

        Raises:
            InvalidInput: see `check_joint`.
        """
        if self.top is None:
            check_samples(lattice.samples(self.spacing), self.size or self.values.shape[2:], self.name)
        if self.values.is_meta:
            return self.values.new_empty((lattice.count, self.values.shape[1]))
        key = ("small map", tuple(self.values.shape[2:]), self.spacing, self.size)
        build = partial(self._corners, lattice)
        sources, shares = lattice.derive((*key, self.mode, self.align_corners), build)
        if self.values.shape[0] > 1:
            image = lattice.coordinates[0].unsqueeze(1) * self.values[0, 0].numel()
            sources = sources + image.to(sources)
        return mix(as_rows(self.values).contiguous(), sources, shares)

    def _corners(self, lattice: Lattice) -> tuple[Tensor, Tensor]:
        """Return the four samples (N, 4) that each element is interpolated from, and their weights."""
        # The network's own sample at the anchor, where cells are coarser than its grid.
        floors = lattice.geometry.floors
        side: Any = self.spacing if floors else lattice.side_map.flatten()[lattice.anchors]
        counts = self.values.shape[2:]
        ends = []
        tops, wanted = (self.top or 0, 0), self.size or counts
        for at, top, have, want in zip(lattice.coordinates[1:], tops, counts, wanted, strict=True):
            at = (at + top).double()
            if self.size is None:
                place = at / self.spacing if lattice.geometry.interpolates else at // self.spacing
                place = place.clamp(0, have - 1)
            else:
                if self.mode == "nearest":
                    at = (at // self.spacing).clamp(max=want - 1)
                else:
                    at = (at if self.align_corners else at + side / 2) / self.spacing
                place = place_on_map(at, have, want, self.mode, self.align_corners)
            ends.append(ends_of(place, have))
        samples, shares = corners(ends, lambda y, x: y * self.values.shape[3] + x)
        return samples.to(torch.int32), shares


@operation(reads="image", gives="other")
def small_map(
    values: Tensor,
    spacing: int,
    size: Sequence[int] | int | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    name: str = "an operation",
) -> SmallMap:
    """Wrap a dense map and its resizing (if any), to be read by `rows_on` where the operation `name` joins it."""
    wanted = None if size is None else pair_of(size)
    return SmallMap(values, spacing, wanted, mode, bool(align_corners), name)


@operation(reads="nothing", gives="other")
def one_sample(values: Tensor, like: Elements, spacing: int, name: str) -> Tensor:
    """Return one sample of a tensor that holds the same number everywhere, which the operation `name` joins with maps.

    Raises:
        InvalidInput: see `check_joint`; a tensor of a single sample fits maps of any size, as in torch.
    """
    size = values.shape[-2:]
    if not all(is_statically_true(length == 1) for length in size):
        check_samples(like.lattice.samples(spacing), size, name)
    return values[..., :1, :1]


def rows_on(value: Elements | Tensor | SmallMap, lattice: Lattice, layout: str = NCHW) -> Tensor:
    """Return the rows (N, *channel axes) of a value on a lattice of the same or a later stage.

    Elements are subsampled to the remaining anchors. A tensor whose image axes have size 1, such as one
    vector per image (B, C, 1, 1) or one for all images (C, 1, 1), is repeated for every element as torch
    would broadcast it against a map of `layout`.
    """
    if isinstance(value, Elements):
        return select_rows(value.rows, value.lattice, lattice)
    if isinstance(value, SmallMap):
        return value.rows_on(lattice)
    if value.dim() == 0:
        return value
    if not is_flat(value.shape, layout):
        raise InvalidInput(
            f"{describe(value)} has spatial extent and cannot be combined with elements.",
            next="end the region before this operation: region=[...] takes module names.",
        )
    value = value.reshape(*(1,) * (len(layout) - value.dim()), *value.shape)
    channels = channel_dims(layout)
    per_image = value.permute(layout.index("b"), *channels, *image_dims(layout))
    per_image = per_image.reshape(per_image.shape[: 1 + len(channels)])
    if per_image.shape[0] == 1:
        return per_image.expand(lattice.count, *per_image.shape[1:])
    return per_image.index_select(0, lattice.coordinates[0].to(value.device))


def own_image(every: Tensor, lattice: Lattice) -> Tensor:
    """Select the rows of each image from rows (B, N, ...) that were computed for all elements with each image's values.

    Needed while a graph is traced, because the number of rows per image is unknown then. The work grows by a factor
    of the batch size; a single image costs nothing extra.
    """
    if is_statically_true(lattice.batch == 1):
        return every[0]
    image = lattice.coordinates[0].to(every.device)
    return every[image, torch.arange(lattice.count, device=image.device)]


def common_lattice(stage: int | Lattice, *values: Elements, joint: tuple[int, str] | None = None) -> Lattice:
    """Return the lattice for the operands of an addition or concatenation: the given one, or the smallest fine size.

    Args:
        stage: stage of the result, or its lattice.
        values: the operands.
        joint: see `check_joint`.

    Raises:
        InvalidInput: see `check_joint`.
    """
    if isinstance(stage, Lattice):
        return stage
    first, *others = [value.lattice for value in values]
    check_joint(joint, first, *others)
    height, width = first.size
    for other in others:
        if other.size is not first.size:
            height, width = least(height, other.size[0]), least(width, other.size[1])
    return first.at(stage, (height, width))


def check_joint(joint: tuple[int, str] | None, *lattices: Lattice) -> None:
    """Check that joined maps have equal sizes in the network itself, where rounded sizes may differ at some images.

    Args:
        joint: fine pixels between the samples of the maps, and the name of the operation that joins them; None for no
            check. Sizes that are symbols are checked in each call of the graph, see `require_equal`.
        lattices: the lattices of the maps.

    Raises:
        InvalidInput: the sizes differ: torch refuses them, or repeats the only row or column of a map.
    """
    if joint is None:
        return
    spacing, name = joint
    first, *others = lattices
    for other in others:
        if other.size is not first.size:
            check_samples(first.samples(spacing), other.samples(spacing), name)


def check_samples(own: Sequence[int], other: Sequence[int], name: str) -> None:
    """Check that two maps which the operation `name` joins have equal sizes; see `check_joint`."""
    reason = f"{name} joins maps of equal sizes"
    # Both axes, because symbols record a condition for each.
    if all([require_equal(one, two, reason) for one, two in zip(own, other, strict=True)]):
        return
    refused = any(one != two and 1 not in (one, two) for one, two in zip(own, other, strict=True))
    torch_does = (
        "torch refuses that, too" if refused else "torch repeats the only row or column, which cells do not"
    )
    raise InvalidInput(
        f"at this image size {name} joins maps of {own[0]}x{own[1]} and {other[0]}x{other[1]} samples.",
        why=f"{torch_does}.",
        next="pad or resize the image, best to a multiple of the network's lowest output stride.",
    )


@operation(reads="nothing", gives="other")
def native_shape(x: Elements, spacing: int, layout: str = NCHW) -> torch.Size:
    """Return the shape of the map in the original network, with one sample per `spacing` fine pixels."""
    height, width = x.lattice.samples(spacing)
    channels = iter(x.rows.shape[1:])
    known = {"b": x.lattice.batch, "h": height, "w": width, "p": height * width}
    return torch.Size(next(channels) if axis == "c" else known[axis] for axis in layout)
