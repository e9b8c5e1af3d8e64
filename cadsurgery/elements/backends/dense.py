"""Convolutions and pooling on dense maps: for uniform lattices, and for other lattices if the whole map is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_map, as_rows
from cadsurgery.elements.backends.choose import (
    Backend,
    Convolution,
    Pooling,
    TransposedConvolution,
    WindowRead,
)
from cadsurgery.elements.backends.costs import Costs, costs_of, kind_of, largest_dense_dilation
from cadsurgery.elements.backends.native import Native
from cadsurgery.elements.backends.onednn import convolve
from cadsurgery.elements.backends.weights import FusedConv, transpose_weight
from cadsurgery.elements.elements import Elements, to_dense
from cadsurgery.elements.lattice import Lattice
from cadsurgery.kernels.load import is_observed


class _Dense(NamedTuple):
    """An ordinary operation on a dense map, in samples of the map. Padding is (left, right, top, bottom); at the right
    and bottom it is the amount that the last output needs, independent of the network's own padding."""

    stride: int
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]


def _dense(reads: WindowRead) -> _Dense | None:
    """Return the equivalent dense operation if both lattices are uniform; otherwise None."""
    window, sides = reads.window, _sides(reads)
    if sides is None or any(step * window.spacing % sides[0] for step in (*window.dilation, *window.padding)):
        return None
    return _on_samples(reads, *sides)


def _on_samples(reads: WindowRead, before: int, after: int) -> _Dense:
    """Return the operation on a map with a sample on every `before`-th fine pixel and outputs on every `after`-th."""
    window = reads.window
    down, across, top, _, left, _ = (
        step * window.spacing // before for step in (*window.dilation, *window.padding)
    )
    (height, width), (rows, columns) = reads.source.samples(before), reads.target.samples(after)
    stride = after // before
    bottom = (rows - 1) * stride + down * (window.kernel[0] - 1) + 1 - height - top
    right = (columns - 1) * stride + across * (window.kernel[1] - 1) + 1 - width - left
    return _Dense(stride, (left, right, top, bottom), (down, across))


class _Spread(NamedTuple):
    """An ordinary transposed convolution of maps that are interleaved in the map of a uniform lattice.

    Attributes:
        step: cells between the samples of one interleaved map.
        shifts: number of interleaved maps along each axis.
        apart: cells between neighbouring interleaved maps.
        samples: (height, width) of each interleaved map; missing samples are zero.
        wanted: (height, width) of each result.
    """

    step: int
    shifts: int
    apart: int
    samples: tuple[int, int]
    wanted: tuple[int, int]


def spread_of(reads: WindowRead) -> _Spread | None:
    """Return the equivalent dense transposed convolution if both lattices are uniform; otherwise None."""
    window, sides = reads.window, _sides(reads)
    if sides is None:
        return None
    before, after = sides
    shifts = window.output_spacing // after
    if window.spacing % before or window.output_spacing % after or (shifts > 1 and after % before):
        return None
    samples = reads.source.samples(window.spacing)
    wanted = reads.target.samples(window.output_spacing)
    return _Spread(window.spacing // before, shifts, after // before, samples, wanted)


def _sides(reads: WindowRead) -> tuple[int, int] | None:
    """Return the cell sides of both uniform lattices if a dense operation is possible and allowed; otherwise None."""
    if not _has_whole_map(reads) or not reads.source.uniform_side or not reads.target.uniform_side:
        return None
    return reads.source.uniform_side, reads.target.uniform_side


def _has_whole_map(reads: WindowRead) -> bool:
    """Return True if the geometry allows dense operations and the window has a dense equivalent."""
    geometry = reads.source.geometry
    plain = geometry.anchor == "corner" and reads.window.mode == "zeros" and not reads.drop
    return geometry.dense_shortcut and plain


def _image_of(rows: Tensor, lattice: Lattice) -> Tensor:
    """View rows on a uniform lattice as a dense channels_last map."""
    return as_map(rows, lattice.batch, lattice.samples(lattice.uniform_side))


def _has_faster_kernel(work: Convolution, operation: _Dense) -> bool:
    """Return True if a kernel for elements is preferred to a grouped convolution of a dense map."""
    weights = work.weights
    if weights.groups == 1 or weights.packed_cache is None or not Native().applies(work):
        return False
    return max(operation.dilation) > largest_dense_dilation(kind_of(weights, work.rows.dtype))


class Uniform(Backend):
    """Operations on uniform lattices, whose rows are the memory of a dense map. In inference products of rows are left
    to backends whose packed weights serve any number of rows, and grouped convolutions to kernels that are faster."""

    name = "uniform"

    def applies(self, work: Convolution | TransposedConvolution | Pooling) -> bool:
        """Return True if both lattices are uniform and all steps are whole cells."""
        if not isinstance(work.reads, WindowRead) or work.rows.dim() != 2:
            return False
        if isinstance(work, TransposedConvolution):
            return spread_of(work.reads) is not None
        if isinstance(work, Pooling):
            return work.largest and _dense(work.reads) is not None
        operation = _dense(work.reads)
        if operation is None or not work.is_inference or is_observed():
            return operation is not None
        return not (work.is_product or _has_faster_kernel(work, operation))

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        image, operation, padding = self._pad(work, 0.0)
        assert isinstance(work.reads, WindowRead)
        more = _image_of(work.residual, work.reads.target) if work.residual is not None else None
        stride = (operation.stride, operation.stride)
        return as_rows(convolve(work.weights, image, stride, padding, operation.dilation, more))

    def spread(self, work: TransposedConvolution) -> Tensor:
        """Compute rows (N, O)."""
        window, weights, spread = work.reads.window, work.weights, spread_of(work.reads)
        assert spread is not None
        image, shifts = _image_of(work.rows, work.reads.source), spread.shifts
        for axis, count in zip((2, 3), spread.samples, strict=True):
            if shifts == 1:
                image = image[(slice(None),) * axis + (slice(None, None, spread.step),)]
                continue
            missing = (0, count * spread.step - image.shape[axis])
            image = F.pad(image, (0, 0, *missing) if axis == 2 else missing)
        if shifts > 1:
            own = slice(None, shifts * spread.apart, spread.apart)
            image = image.unflatten(3, (-1, spread.step))[..., own]
            image = image.unflatten(2, (-1, spread.step))[:, :, :, own]
            image = image.permute(0, 3, 5, 1, 2, 4).flatten(0, 2)
        by_input = transpose_weight(weights.weight.to(image.dtype), weights.groups)
        cut = window.padding[::2]
        least = [
            (count - 1) * window.finer - 2 * pad + kernel
            for count, pad, kernel in zip(spread.samples, cut, window.kernel, strict=True)
        ]
        more = [max(want - have, 0) for want, have in zip(spread.wanted, least, strict=True)]
        out = F.conv_transpose2d(
            image, by_input, weights.bias_as(image.dtype), window.finer, cut, more, weights.groups
        )[..., : spread.wanted[0], : spread.wanted[1]]
        if shifts > 1:
            out = out.unflatten(0, (-1, shifts, shifts)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
            height, width = work.reads.target.samples(work.reads.target.uniform_side)
            out = out[..., :height, :width]
        return weights.finish(as_rows(out), work.residual)

    def pool(self, work: Pooling) -> Tensor:
        """Compute the maximum, rows (N, C)."""
        image, operation, padding = self._pad(work, -torch.inf)
        assert isinstance(work.reads, WindowRead)
        kernel = work.reads.window.kernel
        return as_rows(F.max_pool2d(image, kernel, operation.stride, padding, operation.dilation))

    def _pad(self, work: Convolution | Pooling, filled: float) -> tuple[Tensor, _Dense, tuple[int, int]]:
        """Return the map, the operation and the operation's own padding. The map is padded here instead if the value
        is not `filled`, the padding is asymmetric beyond the stride, or it exceeds the operation's limit."""
        assert isinstance(work.reads, WindowRead)
        operation, image = _dense(work.reads), _image_of(work.rows, work.reads.source)
        assert operation is not None
        left, right, top, bottom = operation.padding
        symmetric = 0 <= top - bottom < operation.stride and 0 <= left - right < operation.stride
        kernel = work.reads.window.kernel
        far = isinstance(work, Pooling) and (2 * top > kernel[0] or 2 * left > kernel[1])  # torch's limit
        if min(top, left) < 0 or not symmetric or far or work.outside != filled:
            return F.pad(image, operation.padding, value=work.outside), operation, (0, 0)
        return image, operation, (top, left)


class WholeMap(Backend):
    """A convolution by its definition: convert to a dense fine map, convolve it, and keep the values at the anchors.

    Used in optimised inference, where packed weights are kept, but not while torch traces or counts operations.
    """

    name = "whole map"

    def applies(self, work: Convolution) -> bool:
        """Return True for windows that read all cells of a map, in inference with packed weights."""
        weights, reads = work.weights, work.reads
        if not work.is_inference or weights.packed_cache is None or work.is_product or is_observed():
            return False
        if not isinstance(reads, WindowRead) or work.rows.device.type != "cpu" or work.outside:
            return False
        is_whole = not (reads.source.part or reads.target.part) and _has_whole_map(reads)
        return is_whole and self._costs(work) is not None

    def _costs(self, work: Convolution) -> Costs | None:
        return costs_of(kind_of(work.weights, work.rows.dtype), Native().applies(work))

    def condition(self, work: Convolution) -> Callable[[Convolution], bool]:
        """Return a test that the whole map is cheaper than the next backend, by the table of costs."""
        outputs, group, height, width = work.weights.weight.shape
        groups, work_of_element = work.weights.groups, outputs * group * height * width
        costs = self._costs(work)
        assert costs is not None

        def is_cheaper(work: Convolution) -> bool:
            target = work.reads.target  # type: ignore[union-attr]
            pixels = target.batch * target.size[0] * target.size[1]
            return costs.prefer_dense(work_of_element, target.count, pixels, (group * groups, outputs))

        return is_cheaper

    def convolve(self, work: Convolution) -> Tensor:
        """Compute rows (N, O)."""
        assert isinstance(work.reads, WindowRead)
        _, padding, dilation = _on_samples(work.reads, 1, 1)
        image = F.pad(to_dense(Elements(work.rows, work.reads.source)), padding)
        plain = FusedConv(work.weights.weight, work.weights.bias, work.weights.groups)
        rows = as_rows(convolve(plain, image, (1, 1), (0, 0), dilation))
        return work.weights.finish(rows.index_select(0, work.reads.target.anchors), work.residual)
