"""The operations of a network on bands of dense maps: which rows each reads, and how it computes some rows.

A map is (1, C, H, W); rows [first, end) of it are (1, C, end - first, W). Padding is added at the border of the picture
only. Everything else is the operation of the network, called on the rows that it reads. What acts on each row alone,
and sums over the image, serve elements as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cadsurgery.elements.backends.onednn import convolve
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.resizing import Scaling, read_at
from cadsurgery.network.bands.walk import SAME, RowsRead, Stream


def pointwise(
    nodes: Sequence[fx.Node], call: Callable[..., Any], others: dict[fx.Node, RowsRead] | None = None
) -> Stream:
    """An operation that acts on each row alone, called with the rows of maps by node; `others` tells what is read of
    maps on other grids."""
    reads = [(node, (others or {}).get(node, SAME)) for node in nodes]
    return Stream(reads, lambda rows, *_: call(dict(zip(nodes, rows, strict=True))))


def rows_of_window(window: Window, height: int) -> RowsRead:
    """Return the rows that a window reads of a map of a height; those outside it are padding."""
    span, (top, bottom) = window.dilation[0] * (window.kernel[0] - 1), window.padding[:2]
    if window.finer > 1:  # row r of the result is made of rows i with 0 <= r + top - i finer <= span
        return RowsRead(
            lambda row: -(-(row + top - span) // window.finer), lambda row: (row + top) // window.finer
        )
    rows = RowsRead(lambda row: row * window.stride - top, lambda row: row * window.stride - top + span)
    if window.mode == "zeros":
        return rows.with_rows(height - 1, 0)
    return rows.with_rows(height - 1 - bottom, top)  # what is reflected at a border lies in front of it


def windowed(
    node: fx.Node,
    window: Window,
    size: tuple[int, int],
    width: int,
    apply: Callable[[Tensor, int, Tensor | None], Tensor],
    residual: fx.Node | None = None,
    pads: bool = True,
) -> Stream:
    """A convolution, or the padding of a map.

    Args:
        node: the node whose map it reads.
        window: kernel, stride, dilation, padding; see `Window`.
        size: (height, width) of that map.
        width: of the result.
        apply: computes the operation on padded rows; the last arguments are padding of the width that is left to it,
            and rows that are added.
        residual: node of a map that is added, if any.
        pads: true if `apply` takes padding of the width; otherwise it is given padded rows.
    """
    (height, length), outside, (top, _, pad, _) = size, window.outside or 0.0, window.padding
    down, across = (step * (taps - 1) for step, taps in zip(window.dilation, window.kernel, strict=True))
    right = (width - 1) * window.stride + across + 1 - pad - length
    is_left = (
        pads and window.mode == "zeros" and outside == 0.0 and pad >= 0 and 0 <= pad - right < window.stride
    )

    def compute(rows: list[Tensor], first: int, end: int, begin: int) -> Tensor:
        more, x = rows[1] if residual is not None else None, rows.pop(0)  # which is freed once it is padded
        above = max(0, top - first * window.stride)
        below = max(0, (end - 1) * window.stride - top + down + 1 - height)
        if not is_left:
            x = _padded(x, (pad, right, above, below), window.mode, outside)
        elif above or below:
            x = F.pad(x, (0, 0, above, below), value=outside)
        start = max(0, (first * window.stride - top + above) - begin)  # rows read for their reflection alone
        x = x[:, :, start : start + (end - 1 - first) * window.stride + down + 1]
        return apply(x, pad if is_left else 0, more)

    reads = [(node, rows_of_window(window, height))] + ([(residual, SAME)] if residual is not None else [])
    return Stream(reads, compute)


def _padded(x: Tensor, pads: tuple[int, int, int, int], mode: str, value: float) -> Tensor:
    if mode == "zeros":
        return F.pad(x, pads, value=value)
    cut = tuple(min(pad, 0) for pad in pads)
    return F.pad(F.pad(x, cut), tuple(max(pad, 0) for pad in pads), mode=mode)


def convolution_by(module: PackedConv, window: Window) -> Callable[[Tensor, int, Tensor | None], Tensor]:
    """Return the function that computes a fused convolution of padded rows."""

    def apply(x: Tensor, left: int, residual: Tensor | None) -> Tensor:
        stride = (window.stride, window.stride)
        return convolve(module.weights, x, stride, (0, left), window.dilation, residual, any_height=True)

    return apply


def called(node: fx.Node, window: Window, height: int, call: Callable[..., Tensor]) -> Stream:
    """Any operation with a window, called as it is with the rows under the window by node. It pads them by itself, also
    where the map does not end; the rows of the result that lie there are computed in vain, and cut off.

    Args:
        node: the node whose map it reads.
        window: kernel, stride, dilation and padding; see `Window`.
        height: of the map.
        call: the operation.
    """
    window, is_same = window.fit((height, height)), window.same
    rows, stride, finer = rows_of_window(window, height), window.stride, window.finer
    (top, bottom), span = window.padding[:2], window.dilation[0] * (window.kernel[0] - 1)
    most = (height - 1 - max(0, bottom)) // stride * stride

    def first(row: int) -> int:
        if finer > 1:
            return min(rows.first(row), row // finer)
        return min((row - max(0, -(-top // stride))) * stride, most)

    def last(row: int) -> int:
        if finer > 1:
            return max(rows.last(row), -(-(row + top + bottom - span) // finer))
        end = rows.last(row) + max(0, -bottom)
        return end + (height - 1 - end) % stride if is_same else end  # what it pads depends on the rest

    def compute(found: list[Tensor], first: int, end: int, begin: int) -> Tensor:
        start = first - begin * finer // stride
        return call({node: found[0]})[:, :, start : start + end - first]

    return Stream([(node, RowsRead(first, last))], compute)


def resized(node: fx.Node, size: tuple[int, int], scaling: Scaling, dtype: torch.dtype) -> Stream:
    """A resize of a map (height, width) by torch's interpolation."""
    down, across = scaling.places(size, 1, dtype, torch.device("cpu"))

    def compute(rows: list[Tensor], first: int, end: int, begin: int) -> Tensor:
        return read_at(rows[0], [down[first:end] - begin, across])

    step = Stream([(node, RowsRead(*entries(down, size[0])))], compute)
    step.places = lambda first, end: down[first:end].double()
    return step


def entries(places: Tensor, height: int) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """Return the rows of a map that are read at places of it, as functions of the number of the place. Before the
    first, rows above the map, as far above as the scale says."""
    low = places.floor().long()
    high = (low + (places > low)).clamp(max=height - 1)
    first, last = (partial(_entry, table.tolist(), height / len(places)) for table in (low, high))
    return first, last


def _entry(table: list[int], ratio: float, row: int) -> int:
    return table[row] if row >= 0 else math.floor(row * ratio)


class WholeImage(NamedTuple):
    """A value of the whole image, made of what bands of a map give.

    Attributes:
        source: node of the map that it is of.
        measure: returns tensors from rows of the map and the number of the first of them.
        finish: makes the value from these, joined over all bands.
        join: what joins two of them.
    """

    source: fx.Node
    measure: Callable[[Any, int], list[Tensor]]
    finish: Callable[..., Any]
    join: Callable[[Tensor, Tensor], Tensor] = torch.add


def _values(rows: Any) -> Tensor:
    """Return the values (N, C) of rows of a map (1, C, H, W), or of elements."""
    values: Tensor = rows.rows.flatten(1) if isinstance(rows, Elements) else rows.flatten(2)[0].T
    return values


def sums(rows: Any, _: int, groups: int = 0, squares: bool = False, are_equal: bool = True) -> list[Tensor]:
    """Return the weight of rows, the sum of each channel or, if they are so many, group of channels (1, C), and with
    `squares` the sum of squares, float64. Elements are weighed by the area of their cells unless these are equal."""
    values = _values(rows).double()
    each = [values, values.square()] if squares else [values]
    if are_equal:
        weight, found = values.new_tensor(len(values)), [one.sum(0, keepdim=True) for one in each]
    else:
        areas = rows.lattice.areas.double().unsqueeze(0)
        weight, found = areas.sum(), [areas @ one for one in each]
    return [weight, *(one.view(1, groups, -1).mean(2) if groups else one for one in found)]


def moments(weight: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (1, C) from `sums`."""
    mean = total / weight
    return mean, squares / weight - mean.square()


def reduced(weight: Tensor, *found: Tensor, how: str, samples: int, correction: int) -> Tensor:
    """Return what a reduction over the image gives from `sums`."""
    if how in ("mean", "sum"):
        return found[0] / weight * (samples if how == "sum" else 1)
    mean, variance = moments(weight, *found)
    if how == "norm":
        return ((variance + mean.square()) * samples).sqrt()
    variance = variance.clamp(min=0) * (samples / max(samples - correction, 1))
    return variance.sqrt() if how == "std" else variance


def largest(rows: Any, _: int, sign: int = 1) -> list[Tensor]:
    """Return the largest value of each channel (1, C), or the smallest with its sign changed."""
    return [(_values(rows) * sign).amax(0, keepdim=True)]


def bins_of_rows(
    rows: Tensor, first: int, size: tuple[int, int], bins: tuple[int, int], is_largest: bool
) -> list[Tensor]:
    """Return sums and areas of the bins of adaptive pooling (1, C, *bins) in rows of a map, or the largest values."""
    kind, start = (rows.dtype, -math.inf) if is_largest else (torch.float64, 0.0)
    found, areas = (torch.full((*shape, *bins), start, dtype=kind) for shape in (rows.shape[:2], ()))
    spans = [[(i * n // b, -(-(i + 1) * n // b)) for i in range(b)] for n, b in zip(size, bins, strict=True)]
    for i, (top, bottom) in enumerate(spans[0]):
        part = rows[:, :, max(top - first, 0) : max(bottom - first, 0)]
        for j, (left, right) in enumerate(spans[1]) if part.shape[2] else ():
            of_bin = part[..., left:right]
            found[..., i, j] = of_bin.amax((2, 3)) if is_largest else of_bin.double().sum((2, 3))
            areas[i, j] = of_bin.shape[2] * of_bin.shape[3]
    return [found] if is_largest else [found, areas]


def affine_of(
    *found: Tensor, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return factor and shift (channels,), float64, of a group norm from `sums` of its groups."""
    mean, variance = (one[0].repeat_interleave(channels // one.shape[1]) for one in moments(*found))
    scale = (variance.clamp(min=0) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.double()


def scaled(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return rows times a factor plus a shift, in the type of the rows; computed in float32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.addcmul(shift.to(wide), rows.to(wide), scale.to(wide)).to(rows.dtype)
