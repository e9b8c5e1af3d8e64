"""Convolutions and pooling on the dense maps of uniform lattices."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_map, as_rows
from cadsurgery.elements.backends.choose import Backend
from cadsurgery.elements.backends.native import Native
from cadsurgery.elements.backends.onednn import convolve
from cadsurgery.elements.backends.weights import transpose_weight
from cadsurgery.elements.backends.works import Convolution, Pooling, TransposedConvolution, WindowRead
from cadsurgery.elements.lattice import Lattice
from cadsurgery.kernels import isa
from cadsurgery.support.running import running


class _Grouped(NamedTuple):
    """Grouped convolutions of uniform maps, for which oneDNN may be preferred to a kernel for elements.

    Attributes:
        dtype: type of the rows.
        isa: instruction set that the processor has.
        group: channels of a group, or fewer than it has; 1, depthwise, is a kind of its own.
        taps: the fewest taps.
        dilation: the largest dilation up to which the dense convolution is at least as fast; 0 if it never is.
    """

    dtype: torch.dtype
    isa: str
    group: int
    taps: int
    dilation: int

    def includes(self, dtype: torch.dtype, group: int, taps: int) -> bool:
        """Return True for convolutions of this kind on this processor."""
        has_group = group >= self.group > 1 or group == self.group
        return dtype == self.dtype and self.isa in isa.allowed() and has_group and taps >= self.taps


_F32, _BF16, _ALWAYS = torch.float32, torch.bfloat16, 1 << 30
# Measured with each instruction set on an Intel processor (docs/data/notes.md, "Dense maps or elements"). The first
# row that fits counts, so that a program has the same bits on all processors with the same instruction sets. For
# dilated windows oneDNN takes up to eighty times as long as the kernels of depthwise convolutions.
_PREFERRED = (
    _Grouped(_F32, "avx512", 1, 25, 1),
    _Grouped(_F32, "avx2", 1, 49, 1),
    _Grouped(_F32, "avx2", 1, 1, 0),
    _Grouped(_F32, "sse4", 1, 4, 1),
    _Grouped(_F32, "avx512", 16, 4, _ALWAYS),
    _Grouped(_F32, "avx512", 8, 4, 0),
    _Grouped(_F32, "avx512", 2, 1, 0),
    _Grouped(_F32, "avx2", 8, 4, _ALWAYS),
    _Grouped(_BF16, "amx", 1, 25, 1),
    _Grouped(_BF16, "amx", 8, 4, _ALWAYS),
)


def largest_dense_dilation(dtype: torch.dtype, group: int, taps: int) -> int:
    """Return the dilation up to which a dense grouped convolution is preferred to a kernel; 0 for none."""
    return next((row.dilation for row in _PREFERRED if row.includes(dtype, group, taps)), 0)


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
    before, after = sides
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
    geometry, (before, after) = reads.source.geometry, (reads.source.uniform_side, reads.target.uniform_side)
    plain = geometry.anchor == "corner" and reads.window.mode == "zeros" and not reads.drop
    return (before, after) if geometry.dense_shortcut and plain and before and after else None


def _image_of(rows: Tensor, lattice: Lattice) -> Tensor:
    """View rows on a uniform lattice as a dense channels_last map."""
    return as_map(rows, lattice.batch, lattice.samples(lattice.uniform_side))


def _has_faster_kernel(work: Convolution, operation: _Dense) -> bool:
    """Return True if a kernel for elements is preferred to a grouped convolution of a dense map."""
    weights = work.weights
    if weights.groups == 1 or weights.packed_cache is None or not Native().applies(work):
        return False
    group, taps = weights.weight.shape[1], weights.weight[0, 0].numel()
    return max(operation.dilation) > largest_dense_dilation(work.rows.dtype, group, taps)


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
        if operation is None or not work.is_inference or running.is_observed:
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
