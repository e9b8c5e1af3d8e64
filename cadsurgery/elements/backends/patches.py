"""Windows on whole patches: where floors keep cells of the coarsest level whole, each is a small dense map.

A patch is read with a margin, which may lie in other patches, in coarse cells (interpolated) or outside the map, and is
convolved as any dense map. Coarse cells among coarse cells are convolved densely, too: as a map with a sample a cell and
with weights in which a tap between two anchors is a share of each. What is left, at the changes of resolution and at
the border, is computed through kernel maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

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
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.kernel_map import Reading, Window, find_taps
from cadsurgery.elements.lattice import Lattice

# Bytes of the patches, with their margins, that are read and convolved at once: they stay in the cache.
_CACHED = 1 << 20


class Patches(Backend):
    """Convolutions, transposed convolutions without overlap and maxima on patches, in inference."""

    name = "patches"

    def applies(self, work: Convolution | TransposedConvolution | Pooling) -> bool:
        """Return True if the result has patches and the window reads zeros outside of the map."""
        reads = work.reads
        if not isinstance(reads, WindowRead) or not work.is_inference or work.rows.dim() != 2:
            return False
        source, target, window = reads.source, reads.target, reads.window
        plain = source.geometry.dense_shortcut and window.mode == "zeros" and not reads.drop and not work.outside
        if target.patches is None or source.part is not None or window.is_pointwise:
            return False
        if isinstance(work, TransposedConvolution):
            alone = window.kernel == (window.finer, window.finer) and not any(window.padding)
            return plain and alone and (source.patches is not None or source.uniform_side > 0)
        if isinstance(work, Pooling):
            has_form = work.largest and work.rows.is_floating_point() and not any(window.padding)
            return has_form and not reads.drop and source.geometry.dense_shortcut
        return plain and (source.stage == 0 or source.patches is not None)

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        reads, weights = work.reads, work.weights
        assert isinstance(reads, WindowRead)
        stride, dilation = reads.window.stride, reads.window.dilation
        out = work.rows.new_empty(reads.target.count, weights.weight.shape[0])
        more = work.residual
        for rows, image in _images(work.rows, reads):
            part = _image(more[rows], reads.target.patch_side) if more is not None else None
            result = convolve(weights, image, (stride, stride), (0, 0), dilation, part)
            out[rows] = result.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
        coarse, rest = _others(reads)
        if len(coarse):
            out[coarse] = _between_anchors(work, coarse)
        if len(rest):
            residual = more[rest] if more is not None else None
            out[rest] = compute(replace(work, reads=_reading(reads, rest), residual=residual))
        return out

    def pool(self, work: Pooling) -> Tensor:
        """Compute the maximum, rows (N, C)."""
        reads = work.reads
        assert isinstance(reads, WindowRead)
        out, window = work.rows.new_empty(reads.target.count, work.rows.shape[1]), reads.window
        for rows, image in _images(work.rows, reads):
            result = F.max_pool2d(image, window.kernel, window.stride, 0, window.dilation)
            out[rows] = result.permute(0, 2, 3, 1).reshape(-1, out.shape[1])
        rest = torch.arange(_in_patches(reads.target), reads.target.count)
        if len(rest):
            out[rest] = compute(replace(work, reads=_reading(reads, rest)))
        return out

    def spread(self, work: TransposedConvolution) -> Tensor:
        """Compute rows (N, O). Without overlap each sample of the result reads one sample."""
        source, target, window, weights = work.reads.source, work.reads.target, work.reads.window, work.weights
        finer, side = window.finer, target.patch_side // window.finer
        by_input = weights.weight.unflatten(0, (weights.groups, -1)).transpose(1, 2).flatten(0, 1)
        bias = weights.bias_as(work.rows.dtype)
        read = _held(work.reads)
        image = _image(work.rows.index_select(0, read[: _in_patches(target) // finer**2]), side)
        result = F.conv_transpose2d(image, by_input.to(image.dtype), bias, finer, groups=weights.groups)
        rows = [result.permute(0, 2, 3, 1).reshape(-1, weights.weight.shape[0])]
        anchors = target.anchors[_in_patches(target) :]
        step = window.output_spacing
        places = (anchors // target.size[1] // step % finer, anchors % target.size[1] // step % finer)
        phase = places[0] * finer + places[1]
        others = work.rows.index_select(0, read[_in_patches(target) // finer**2 :])
        tail = others.new_empty(len(others), weights.weight.shape[0])
        for number in phase.unique().tolist():
            chosen = (phase == number).nonzero().squeeze(1)
            plain = weights.of_phase(divmod(number, finer), finer).without_activation
            reads = torch.arange(len(chosen), dtype=torch.int32).unsqueeze(1)
            none = torch.empty(0, 4, dtype=torch.int32)
            reading = Reading(reads, none, none.double(), False)
            tail[chosen] = compute(Convolution(others[chosen], plain, reading))
        return weights.finish(torch.cat((*rows, tail)), work.residual)


def _in_patches(lattice: Lattice) -> int:
    """Return the number of rows in patches."""
    assert lattice.patches is not None
    return len(lattice.patches) * lattice.patch_side**2


def _image(rows: Tensor, side: int) -> Tensor:
    """View the rows of patches as small dense maps (n, C, side, side) in channels_last memory."""
    return rows.view(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)


def _images(rows: Tensor, reads: WindowRead) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the target's rows, and the maps (n, C, h, w) from which a window computes them. All have the same
    number of patches, so that packed weights serve them all: the last ones overlap."""
    target, reading, (height, width) = reads.target, *_with_margin(reads)
    assert target.patches is not None
    total, pixels = len(target.patches), target.patch_side**2
    many = max(1, _CACHED // (height * width * rows.shape[1] * rows.element_size()))
    many = min(total, 1 << many.bit_length() - 1)
    for start in (*range(0, total - many, many), total - many):
        part = replace(reading, table=reading.table[start : start + many])
        image = compute(Picking(rows, part)).view(many, height, width, rows.shape[1])
        yield slice(start * pixels, (start + many) * pixels), image.permute(0, 3, 1, 2)


def _with_margin(reads: WindowRead) -> tuple[Reading, tuple[int, int]]:
    """Return the reading (n, h w) of what a window reads for each patch of the target, and (h, w)."""
    source, target, window = reads.source, reads.target, reads.window
    height, width = (
        (target.patch_side - 1) * window.stride + step * (taps - 1) + 1
        for taps, step in zip(window.kernel, window.dilation, strict=True)
    )

    def build() -> Reading:
        assert target.patches is not None
        steps = [
            [window.spacing * (at - pad) for at in range(length)]
            for length, pad in ((height, window.padding[0]), (width, window.padding[2]))
        ]
        return Reading(*find_taps(source, target.patches, target.size, (steps[0], steps[1])), True)

    return source.derive(("patches", target.key, window), build), (height, width)


def _reading(reads: WindowRead, rows: Tensor) -> Reading:
    """Return the kernel map of some rows of the target."""
    source, target, window = reads.source, reads.target, reads.window

    def build() -> Reading:
        steps = [
            [window.spacing * (step * tap - pad) for tap in range(taps)]
            for taps, step, pad in zip(window.kernel, window.dilation, window.padding[::2], strict=True)
        ]
        return Reading(*find_taps(source, target.anchors[rows], target.size, (steps[0], steps[1])), True)

    return source.derive(("rest", target.key, window, len(rows)), build)


def _held(reads: WindowRead) -> Tensor:
    """Return the source rows that a transposed convolution without overlap reads: those of the target's patches, patch
    after patch, then one for each other element of the target."""
    source, target, spacing = reads.source, reads.target, reads.window.spacing

    def build() -> Tensor:
        assert target.patches is not None
        width, grid = target.size[1], torch.arange(target.patch_side // reads.window.finer) * spacing
        corners = target.patches.view(-1, 1, 1)
        y, x = corners // width + grid.view(-1, 1), corners % width + grid
        anchors = target.anchors[_in_patches(target) :]
        own_y, own_x = (at - at % spacing for at in (anchors // width, anchors % width))
        of_patches = source.pixels(torch.zeros_like(y), y, x).flatten()
        return source.index[torch.cat((of_patches, source.pixels(torch.zeros_like(own_y), own_y, own_x)))]

    return source.derive(("held", target.key, reads.window), build)


class _Coarse(NamedTuple):
    """Weights on anchors of an axis: which anchors, counted in cells from the own one, and the share (taps, anchors)
    that each tap reads of each."""

    first: int
    shares: Tensor


def _coarse_axis(window: Window, axis: int, cell: int) -> tuple[_Coarse, set[int]]:
    """Return the weights on anchors along an axis, and the cells, counted from the own one, that hold the taps."""
    places = [
        window.spacing * (window.dilation[axis] * tap - window.padding[2 * axis]) for tap in range(window.kernel[axis])
    ]
    first, last = min(place // cell for place in places), max(-(-place // cell) for place in places)
    shares = torch.zeros(len(places), last - first + 1)
    for tap, place in enumerate(places):
        at, share = place // cell - first, place % cell / cell
        shares[tap, at] += 1 - share
        if share:
            shares[tap, at + 1] += share
    return _Coarse(first, shares), {place // cell for place in places}


def _others(reads: WindowRead) -> tuple[Tensor, Tensor]:
    """Return the target's rows outside of patches: those of coarse cells whose taps lie in coarse cells alone, with all
    anchors that they read, and the rest."""
    source, target, window = reads.source, reads.target, reads.window

    def build() -> tuple[Tensor, Tensor]:
        start, cell = _in_patches(target), target.geometry.sides[target.geometry.max_level]
        rows = torch.arange(start, target.count)
        if source.patches is None or source.geometry.fill != "linear":
            return rows[:0], rows
        low = source.levels[0, ::cell, ::cell] == source.geometry.max_level
        inner = torch.zeros_like(low)
        (down, held_y), (across, held_x) = (_coarse_axis(window, axis, cell) for axis in (0, 1))
        spans = [(way.first, way.first + way.shares.shape[1] - 1) for way in (down, across)]
        (top, bottom), (left, right) = ((max(0, -first), max(0, last)) for first, last in spans)
        height, width = low.shape
        if top + bottom < height and left + right < width:
            part = torch.ones_like(low[top : height - bottom, left : width - right])
            for dy in held_y:
                for dx in held_x:
                    part &= low[top + dy : height - bottom + dy, left + dx : width - right + dx]
            inner[top : height - bottom, left : width - right] = part
        anchors = target.anchors[start:]
        y, x = anchors // target.size[1], anchors % target.size[1]
        is_inner = (y % cell == 0) & (x % cell == 0) & inner[y // cell, x // cell]
        return rows[is_inner], rows[~is_inner]

    return source.derive(("coarse and rest", target.key, window), build)


def _between_anchors(work: Convolution, rows: Tensor) -> Tensor:
    """Convolve the map of anchors with the weights' shares and return the values at coarse cells."""
    reads, weights = work.reads, work.weights
    assert isinstance(reads, WindowRead)
    source, target, cell = reads.source, reads.target, reads.source.geometry.sides[reads.source.geometry.max_level]
    height, width = (-(-length // cell) for length in source.size)
    of_cell = source.index.view(source.size)[::cell, ::cell].flatten()
    image = work.rows.index_select(0, of_cell).view(1, height, width, -1).permute(0, 3, 1, 2)
    (down, _), (across, _) = (_coarse_axis(reads.window, axis, cell) for axis in (0, 1))

    def fold() -> FusedConv:
        shares = (down.shares.to(weights.weight), across.shares.to(weights.weight))
        folded = torch.einsum("ochw,hy,wx->ocyx", weights.weight, *shares).contiguous()
        return weights.changed(weight=folded, activation=None)

    folded = weights.form(("between anchors", cell, reads.window), fold)
    padding = (-across.first, across.first + across.shares.shape[1] - 1, -down.first, down.first + down.shares.shape[1] - 1)
    result = convolve(folded, F.pad(image, padding), (1, 1), (0, 0), (1, 1))
    anchors = target.anchors[rows]
    places = anchors // target.size[1] // cell * width + anchors % target.size[1] // cell
    values = result.permute(0, 2, 3, 1).reshape(height * width, -1).index_select(0, places)
    return weights.finish(values, work.residual[rows] if work.residual is not None else None)
