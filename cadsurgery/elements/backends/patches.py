"""Windows on whole patches: where floors keep cells of the coarsest level whole, each is a small dense map.

A patch is read with a margin, which may lie in other patches, in coarse cells (interpolated) or outside of the map, and
is convolved as any dense map; coarse cells are computed through kernel maps. So is all of a convolution of many
channels, whose products cost more than the copies of patches save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import (
    Backend,
    Convolution,
    Picking,
    Pooling,
    TransposedConvolution,
    WindowRead,
    compute,
)
from cadsurgery.elements.backends.onednn import convolve
from cadsurgery.elements.backends.weights import transpose_weight
from cadsurgery.elements.kernel_map import Reading, find_taps, interpolation, is_found, read_rows
from cadsurgery.elements.lattice import Lattice

# Bytes of the patches, with their margins, that are read and convolved at once: they stay in the cache.
_CACHED = 1 << 22
# Smaller patches are computed through kernel maps, whose products do not depend on the shape of a map.
_SMALLEST = 8
# With so many channels in a group the products cost more than the copy of a patch and its margin saves.
_WIDE = 48


class Patches(Backend):
    """Convolutions, transposed convolutions without overlap and maxima on patches, in inference."""

    name = "patches"

    def applies(self, work: Convolution | TransposedConvolution | Pooling) -> bool:
        """Return True if the result has patches and the window reads zeros outside of the map."""
        reads = work.reads
        if not isinstance(reads, WindowRead) or not work.is_inference or work.rows.dim() != 2:
            return False
        source, target, window = reads.source, reads.target, reads.window
        plain = (
            source.geometry.dense_shortcut and window.mode == "zeros" and not reads.drop and not work.outside
        )
        if not source.is_patched or not target.is_patched or target.stage == 0 or window.is_pointwise:
            return False
        if isinstance(work, TransposedConvolution):
            alone = window.kernel == (window.finer, window.finer) and not any(window.padding)
            return plain and alone and target.patch_side >= window.finer
        if isinstance(work, Pooling):
            has_form = work.largest and work.rows.is_floating_point() and not any(window.padding)
            return has_form and not reads.drop and source.geometry.dense_shortcut
        return plain and (source.stage == 0 or source.patch_side > 1)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        reads = work.reads
        assert isinstance(reads, WindowRead)
        if reads.target.patch_side < _SMALLEST or work.weights.weight.shape[1] >= _WIDE:
            return compute(replace(work, reads=_reading(reads)))
        out = work.rows.new_empty(reads.target.count, work.weights.weight.shape[0])
        for rows, image in _images(work.rows, reads):
            out[rows] = _convolve_image(work, image, rows)
        others = slice(_in_patches(reads.target), None)
        if len(out[others]):
            residual = work.residual[others] if work.residual is not None else None
            out[others] = compute(replace(work, reads=_reading(reads, others), residual=residual))
        return out

    def pool(self, work: Pooling) -> Tensor:
        """Compute the maximum, rows (N, C)."""
        reads = work.reads
        assert isinstance(reads, WindowRead)
        out, window = work.rows.new_empty(reads.target.count, work.rows.shape[1]), reads.window
        for rows, image in _images(work.rows, reads):
            result = F.max_pool2d(image, window.kernel, window.stride, 0, window.dilation)
            out[rows] = result.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
        others = slice(_in_patches(reads.target), None)
        if len(out[others]):
            out[others] = compute(replace(work, reads=_reading(reads, others)))
        return out

    def spread(self, work: TransposedConvolution) -> Tensor:
        """Compute rows (N, O). Without overlap each sample of the result reads one sample."""
        target, window, weights = work.reads.target, work.reads.window, work.weights
        finer, side = window.finer, target.patch_side // window.finer
        by_input = transpose_weight(weights.weight, weights.groups)
        bias = weights.bias_as(work.rows.dtype)
        read = _held(work.reads)
        image = _image(work.rows.index_select(0, read[: _in_patches(target) // finer**2]), side)
        if len(image):
            result = F.conv_transpose2d(image, by_input.to(image.dtype), bias, finer, groups=weights.groups)
        rows = [result.permute(0, 2, 3, 1).reshape(-1, weights.weight.shape[0])] if len(image) else []
        anchors = target.anchors[_in_patches(target) :]
        step = window.output_spacing
        places = (anchors // target.size[1] // step % finer, anchors % target.size[1] // step % finer)
        phase = places[0] * finer + places[1]
        others = work.rows.index_select(0, read[_in_patches(target) // finer**2 :])
        tail = others.new_empty(len(others), weights.weight.shape[0])
        for number in phase.unique().tolist():
            chosen = (phase == number).nonzero().squeeze(1)
            plain = weights.of_phase(divmod(number, finer), finer).without_activation
            tail[chosen] = compute(Convolution(others[chosen], plain, None))
        return weights.finish(torch.cat((*rows, tail)), work.residual)


def _corners(lattice: Lattice) -> Tensor:
    """Return the corners of the patches (n,) as pixel numbers."""
    return lattice.patches if lattice.patches is not None else torch.empty(0, dtype=torch.long)


def _in_patches(lattice: Lattice) -> int:
    """Return the number of rows in patches."""
    return len(_corners(lattice)) * lattice.patch_side**2


def _image(rows: Tensor, side: int) -> Tensor:
    """View the rows of patches as small dense maps (n, C, side, side) in channels_last memory."""
    return rows.view(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)


def _images(rows: Tensor, reads: WindowRead) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the target's rows, and the maps (n, C, h, w) from which a window computes them. All have the same
    number of patches, so that packed weights serve them all: the last ones overlap."""
    target = reads.target
    total, pixels = len(_corners(target)), target.patch_side**2
    if not total:
        return
    margin = _with_margin(reads)
    (height, width), channels = margin.size, rows.shape[1]
    many = max(1, _CACHED // (height * width * channels * rows.element_size()))
    many = min(total, 1 << many.bit_length() - 1)
    for start in (*range(0, total - many, many), total - many):
        part = replace(margin.reading, table=margin.reading.table[start : start + many])
        edge = compute(Picking(rows, part)) if part.table.numel() else rows[:0]
        if margin.own is None:
            image = edge
        else:
            side, (top, left, bottom, right) = margin.side, margin.own
            own = rows[start * side**2 : (start + many) * side**2].view(many, side, side, channels)
            if part.table.numel() == 0:
                image = own[:, : bottom - top, : right - left]
            else:
                image = rows.new_empty(many, height, width, channels)
                image[:, top:bottom, left:right] = own[:, : bottom - top, : right - left]
                image.view(many, -1, channels)[:, margin.places] = edge.view(many, -1, channels)
        yield (
            slice(start * pixels, (start + many) * pixels),
            image.reshape(many, height, width, channels).permute(0, 3, 1, 2),
        )


@dataclass(frozen=True, eq=False)
class _Margin:
    """What a window reads for each patch.

    Attributes:
        size: (height, width) of the map that is read.
        reading: of the samples around the source's own patch (n, margin), or of all (n, height width).
        own: top, left, bottom and right of the own patch in that map; None if all samples are read one by one.
        side: side of the own patch in samples.
        places: (margin,) places of the samples around it.
    """

    size: tuple[int, int]
    reading: Reading
    own: tuple[int, int, int, int] | None = None
    side: int = 0
    places: Tensor | None = None


def _with_margin(reads: WindowRead) -> _Margin:
    """Return what a window reads for each patch of the target."""
    source, target, window = reads.source, reads.target, reads.window
    height, width = (
        (target.patch_side - 1) * window.stride + step * (taps - 1) + 1
        for taps, step in zip(window.kernel, window.dilation, strict=True)
    )

    def build() -> _Margin:
        (top, left), corners = window.padding[::2], _corners(target).unsqueeze(1)

        def read(places: Tensor) -> Reading:
            y = corners // target.size[1] + window.spacing * (places // width - top)
            return _read_at(source, y, corners % target.size[1] + window.spacing * (places % width - left))

        if source.size != target.size or source.stage == 0:
            places = torch.arange(height * width)
            return _Margin((height, width), read(places))
        side = source.patch_side
        own = (top, left, min(top + side, height), min(left + side, width))
        is_own = torch.zeros(height, width, dtype=torch.bool)
        is_own[own[0] : own[2], own[1] : own[3]] = True
        places = (~is_own).flatten().nonzero().squeeze(1)
        return _Margin((height, width), read(places), own, side, places)

    return source.derive(("patches", target.key, window), build)


def _read_at(source: Lattice, y: Tensor, x: Tensor) -> Reading:
    """Return the reading of points (any shape) of a lattice with two levels; those outside of the map read padding."""
    (height, width), cell = source.size, source.geometry.sides[source.geometry.max_level]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    points = y * width + x
    if source.stage == 0:  # its rows are the pixels of a dense map
        return read_rows(torch.where(inside, points, source.count).to(torch.int32), True)
    table = torch.where(inside, source.index[points], source.count).to(torch.int32)
    is_low = source.levels.view(-1)[points] == source.geometry.max_level
    mixed = inside & is_low & ((y % cell > 0) | (x % cell > 0))
    if not source.geometry.interpolates:
        return read_rows(table, True)
    sources, shares = interpolation(source, points[mixed])
    table[mixed] = torch.arange(len(sources), dtype=torch.int32) + source.count + 1
    return Reading(table, sources, shares, True)


def _reading(reads: WindowRead, rows: slice = slice(None)) -> Reading:
    """Return the kernel map of some rows of the target."""
    source, target, window = reads.source, reads.target, reads.window

    def build() -> Reading:
        anchors = target.anchors[rows]
        if source.stage and is_found(source):
            return Reading(*find_taps(source, anchors, target.size, window.offsets), True)
        down, across = map(torch.tensor, window.offsets)
        anchors = anchors.view(-1, 1, 1)
        y, x = anchors // target.size[1] + down.view(-1, 1), anchors % target.size[1] + across
        return _read_at(source, *(at.flatten(1) for at in torch.broadcast_tensors(y, x)))

    return source.derive(("kernel map of rows", rows.start, target.key, window), build)


def _convolve_image(work: Convolution, image: Tensor, rows: slice) -> Tensor:
    """Convolve patches with their margins; return rows."""
    reads, weights, more = work.reads, work.weights, work.residual
    assert isinstance(reads, WindowRead)
    stride, dilation = reads.window.stride, reads.window.dilation
    part = _image(more[rows], reads.target.patch_side) if more is not None else None
    result = convolve(weights, image, (stride, stride), (0, 0), dilation, part)
    return result.permute(0, 2, 3, 1).reshape(-1, weights.weight.shape[0])


def _held(reads: WindowRead) -> Tensor:
    """Return the source rows that a transposed convolution without overlap reads: those of the target's patches, patch
    after patch, then one for each other element of the target."""
    source, target, spacing = reads.source, reads.target, reads.window.spacing

    def build() -> Tensor:
        width, grid = target.size[1], torch.arange(target.patch_side // reads.window.finer) * spacing
        corners = _corners(target).view(-1, 1, 1)
        y, x = corners // width + grid.view(-1, 1), corners % width + grid
        anchors = target.anchors[_in_patches(target) :]
        own_y, own_x = (at - at % spacing for at in (anchors // width, anchors % width))
        of_patches = source.pixels(torch.zeros_like(y), y, x).flatten()
        return source.index[torch.cat((of_patches, source.pixels(torch.zeros_like(own_y), own_y, own_x)))]

    return source.derive(("held", target.key, reads.window), build)


def has_pixels(lattice: Lattice, spacing: int) -> bool:
    """True if `to_pixels` can read a lattice: no kept cell is cut by the border."""
    geometry = lattice.geometry
    if (
        not geometry.floors
        or geometry.fill != "linear"
        or not geometry.dense_shortcut
        or lattice.patches is None
    ):
        return False
    cell = geometry.sides[geometry.max_level]
    cells = -(-lattice.size[0] // cell) * -(-lattice.size[1] // cell)
    is_uncut = lattice.count == _in_patches(lattice) + cells - len(lattice.patches)
    return is_uncut and cell % spacing == 0 and spacing % (cell // lattice.patch_side) == 0


def to_pixels(rows: Tensor, lattice: Lattice, spacing: int) -> Tensor:
    """Read every `spacing`-th fine pixel of a lattice with linear fill, (1, h, w, C): coarse cells are interpolated as
    one small map of their anchors, whole patches are copied."""
    cell, side = lattice.geometry.sides[lattice.geometry.max_level], lattice.patch_side
    (height, width), many = lattice.size, cell // spacing
    # Beyond the last anchors the border is replicated, which may be kept fine.
    y, x = (torch.cat((torch.arange(0, length, cell), torch.tensor([length - 1]))) for length in lattice.size)
    of_ends = lattice.index.view(lattice.size)[y][:, x]
    ends = rows.index_select(0, of_ends.flatten()).view(1, *of_ends.shape, -1).permute(0, 3, 1, 2)
    ends = ends.to(torch.promote_types(rows.dtype, torch.float32))
    size = [(length - 1) * many + 1 for length in of_ends.shape]
    every = F.interpolate(ends, size=size, mode="bilinear", align_corners=True)
    by_pixel = every[:, :, :-1, :-1].permute(0, 2, 3, 1).to(rows.dtype).contiguous()
    corners, step = _corners(lattice), side // many
    patches = rows[: _in_patches(lattice)].view(-1, side, side, rows.shape[1])[:, ::step, ::step]
    by_cell = by_pixel[0].unflatten(1, (-1, many)).unflatten(0, (-1, many)).transpose(1, 2)
    by_cell[corners // width // cell, corners % width // cell] = patches
    return by_pixel[:, : -(-height // spacing), : -(-width // spacing)]
