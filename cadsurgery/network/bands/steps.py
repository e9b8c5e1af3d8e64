"""The operations of a network on bands of dense maps: which rows each reads, and how it computes some rows.

A map is (1, C, H, W); rows [first, end) of it are (1, C, end - first, W). Padding is added at the border of the picture
only. Everything else is the operation of the network, called on the rows that it reads. What acts on each row alone,
and sums over the image, serve elements as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cadsurgery.elements.backends.onednn import convolve
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.resizing import Scaling, read_at
from cadsurgery.network.bands.schedule import SAME, RowsRead

Fetch = Callable[[fx.Node, int, int], Any]  # rows [first, end) of the map of a node


class BandStep(Protocol):
    """The computation of the map of a node."""

    @property
    def reads(self) -> list[tuple[fx.Node, RowsRead]]:
        """The nodes whose maps it reads, and which rows of them."""
        ...

    @property
    def copies(self) -> list[fx.Node]:
        """Those of them whose rows are copied while it runs."""
        ...

    def compute(self, fetch: Fetch, first: int, end: int) -> Any:
        """Return rows [first, end) of the map."""
        ...


@dataclass
class Pointwise:
    """An operation that acts on each row alone.

    Attributes:
        nodes: the nodes whose maps it reads.
        call: called with the rows of these maps by node.
        others: of maps on other grids, the rows that are read, and the height.
    """

    nodes: Sequence[fx.Node]
    call: Callable[[dict[fx.Node, Any]], Any]
    others: dict[fx.Node, tuple[RowsRead, int]] = field(default_factory=dict)
    copies: list[fx.Node] = field(default_factory=list)

    @property
    def reads(self) -> list[tuple[fx.Node, RowsRead]]:
        """The same rows of each map, but of those on other grids."""
        return [(node, self.others[node][0] if node in self.others else SAME) for node in self.nodes]

    def compute(self, fetch: Fetch, first: int, end: int) -> Any:
        """Return rows [first, end) of the map."""
        places = {node: rows.within(first, end, height) for node, (rows, height) in self.others.items()}
        return self.call({node: fetch(node, *places.get(node, (first, end))) for node in self.nodes})


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


@dataclass
class Windowed:
    """A convolution or pooling.

    Attributes:
        node: the node whose map it reads.
        window: kernel, stride, dilation, padding; see `Window`.
        size: (height, width) of that map.
        width: of the result.
        apply: computes the operation on padded rows; the last argument is padding of the width that is left to it.
        outside: value of the padding.
        residual: node of a map that is added, if any.
        pads: true if `apply` takes padding of the width; otherwise it is given padded rows.
    """

    node: fx.Node
    window: Window
    size: tuple[int, int]
    width: int
    apply: Callable[[Tensor, int, Tensor | None], Tensor]
    outside: float
    residual: fx.Node | None = None
    pads: bool = True

    @property
    def reads(self) -> list[tuple[fx.Node, RowsRead]]:
        """The rows under the window, and those that are added."""
        more = [(self.residual, SAME)] if self.residual is not None else []
        return [(self.node, rows_of_window(self.window, self.size[0])), *more]

    @property
    def copies(self) -> list[fx.Node]:
        """What is read of several bands is copied."""
        return [self.node] if self.window.kernel[0] > 1 else []

    def compute(self, fetch: Fetch, first: int, end: int) -> Tensor:
        """Return rows [first, end) of the map."""
        window, (height, width) = self.window, self.size
        top, _, left, _ = window.padding
        down, across = (step * (taps - 1) for step, taps in zip(window.dilation, window.kernel, strict=True))
        above = max(0, top - first * window.stride)
        below = max(0, (end - 1) * window.stride - top + down + 1 - height)
        right = (self.width - 1) * window.stride + across + 1 - left - width
        begin, stop = rows_of_window(window, height).within(first, end, height)
        x = fetch(self.node, begin, stop)
        more = fetch(self.residual, first, end) if self.residual is not None else None
        is_left = self.pads and window.mode == "zeros" and self.outside == 0.0
        if not is_left or left < 0 or not 0 <= left - right < window.stride:
            x, left = _padded(x, (left, right, above, below), window.mode, self.outside), 0
        elif above or below:
            x = F.pad(x, (0, 0, above, below), value=self.outside)
        start = max(0, (first * window.stride - top + above) - begin)  # rows read for their reflection alone
        x = x[:, :, start : start + (end - 1 - first) * window.stride + down + 1]
        return self.apply(x, left, more)


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


class Mean:
    """An average pooling, as `Windowed`: sums of padded rows, and of ones for the divisor."""

    def __init__(self, windowed: Windowed, divisor: int | None, counts_padding: bool) -> None:
        self.windowed, self.divisor, self.counts_padding = windowed, divisor, counts_padding
        self.reads, self.copies = windowed.reads, windowed.copies

    def compute(self, fetch: Fetch, first: int, end: int) -> Tensor:
        """Return rows [first, end) of the map."""
        sums = self.windowed.compute(fetch, first, end)
        if self.divisor is not None:
            return sums / self.divisor
        window, size = self.windowed.window, self.windowed.size
        along = []
        for axis, places in enumerate((range(first, end), range(self.windowed.width))):
            before, after = window.padding[2 * axis : 2 * axis + 2] if self.counts_padding else (0, 0)
            taps = range(window.kernel[axis])
            starts = [place * window.stride - window.padding[2 * axis] for place in places]
            along.append([sum(-before <= at + tap < size[axis] + after for tap in taps) for at in starts])
        counts = torch.tensor(along[0]).unsqueeze(1) * torch.tensor(along[1])
        return sums / counts.to(sums)


@dataclass
class SpreadRows:
    """A transposed convolution; see `Window.finer`.

    Attributes:
        node: the node whose map it reads.
        window: see `Window`.
        height: of that map.
        width: of the result.
        weight: (C, O / groups, kh, kw), as torch takes it.
        bias: (O,) or None.
        groups: channel groups.
    """

    node: fx.Node
    window: Window
    height: int
    width: int
    weight: Tensor
    bias: Tensor | None
    groups: int

    @property
    def reads(self) -> list[tuple[fx.Node, RowsRead]]:
        """The rows whose taps reach a row of the result."""
        return [(self.node, rows_of_window(self.window, self.height))]

    @property
    def copies(self) -> list[fx.Node]:
        """What is read of several bands is copied."""
        return [self.node]

    def compute(self, fetch: Fetch, first: int, end: int) -> Tensor:
        """Return rows [first, end) of the map."""
        window, rows = self.window, rows_of_window(self.window, self.height)
        begin, stop = rows.within(first, end, self.height)
        start = first + window.padding[0] - window.finer * begin
        taken = slice(start, start + end - first), slice(window.padding[2], window.padding[2] + self.width)
        out = fetch(self.node, begin, stop) if stop > begin else None
        if out is not None:
            out = F.conv_transpose2d(out, self.weight, None, window.finer, 0, 0, self.groups)
            out = F.pad(
                out, (0, max(0, taken[1].stop - out.shape[3]), 0, max(0, taken[0].stop - out.shape[2]))
            )
            out = out[:, :, taken[0], taken[1]]
        else:  # below the last row that is spread
            channels = self.weight.shape[1] * self.groups
            out = self.weight.new_zeros(1, channels, end - first, self.width)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


@dataclass
class Finer:
    """An operation that makes a whole number of rows of each row, such as depth to space.

    Attributes:
        node: the node whose map it reads.
        factor: the number of rows.
        call: called with the rows of this map by node.
    """

    node: fx.Node
    factor: int
    call: Callable[[dict[fx.Node, Any]], Tensor]
    copies: list[fx.Node] = field(default_factory=list)

    @property
    def reads(self) -> list[tuple[fx.Node, RowsRead]]:
        """The row that a row is made of."""
        return [(self.node, RowsRead(lambda row: row // self.factor, lambda row: row // self.factor))]

    def compute(self, fetch: Fetch, first: int, end: int) -> Tensor:
        """Return rows [first, end) of the map."""
        begin, stop = first // self.factor, -(-end // self.factor)
        start = first - begin * self.factor
        return self.call({self.node: fetch(self.node, begin, stop)})[:, :, start : start + end - first]


class Resized:
    """A resize of a map (height, width) by torch's interpolation."""

    def __init__(self, node: fx.Node, size: tuple[int, int], scaling: Scaling, dtype: torch.dtype) -> None:
        self.node, self.height, self.copies = node, size[0], [node]
        self.places = scaling.places(size, 1, dtype, torch.device("cpu"))
        self.reads = [(node, RowsRead(*entries(self.places[0], size[0])))]

    def compute(self, fetch: Fetch, first: int, end: int) -> Tensor:
        """Return rows [first, end) of the map."""
        begin, stop = self.reads[0][1].within(first, end, self.height)
        return read_at(fetch(self.node, begin, stop), [self.places[0][first:end] - begin, self.places[1]])


def entries(places: Tensor, height: int) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """Return the rows of a map that are read at places of it, as functions of the number of the place. Before the
    first, rows above the map, as far above as the scale says."""
    low = places.floor().long()
    high = (low + (places > low)).clamp(max=height - 1)
    first, last = (partial(_entry, table.tolist(), height / len(places)) for table in (low, high))
    return first, last


def _entry(table: list[int], ratio: float, row: int) -> int:
    return table[row] if row >= 0 else math.floor(row * ratio)


class Sum(Protocol):
    """A value of the whole image, made of sums over its rows."""

    def add(self, rows: Any, first: int) -> None:
        """Take in rows of the map from `first` on."""
        ...

    def finish(self) -> Any:
        """Return the value."""
        ...


class OfPermuted:
    """A value of a map with other axes than (1, C, H, W)."""

    def __init__(self, make: Callable[[], Sum], order: tuple[int, ...]) -> None:
        """Take what makes the sums, and the order that gives a map these axes."""
        self.sum, self.order = make(), order

    def add(self, rows: Tensor, first: int) -> None:
        """Take in rows of the map from `first` on."""
        self.sum.add(rows.permute(self.order), first)

    def finish(self) -> Any:
        """Return the value."""
        return self.sum.finish()


def _values(rows: Any) -> Tensor:
    """Return the values (N, C) of rows of a map (1, C, H, W), or of elements."""
    values: Tensor = rows.rows.flatten(1) if isinstance(rows, Elements) else rows.flatten(2)[0].T
    return values


class Moments:
    """Mean and, with `squares`, variance of each channel, or of each of several groups of channels. Elements are
    weighed by the area of their cells."""

    def __init__(self, groups: int = 0, squares: bool = False, are_equal: bool = True) -> None:
        """Take the number of groups, or 0 for channels, and whether all elements weigh the same."""
        self.groups, self.squares, self.are_equal = groups, squares, are_equal
        self.weight, self.sums = 0.0, list[Tensor]()

    def add(self, rows: Any, first: int) -> None:
        """Take in rows of the map."""
        values = _values(rows).double()
        each = [values, values.square()] if self.squares else [values]
        if self.are_equal:
            weight, sums = float(len(values)), [one.sum(0, keepdim=True) for one in each]
        else:
            areas = rows.lattice.areas.double().unsqueeze(0)
            weight, sums = float(areas.sum()), [areas @ one for one in each]
        if self.groups:
            sums = [one.view(1, self.groups, -1).mean(2) for one in sums]
        self.sums = [one + other for one, other in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.weight += weight

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return mean and variance (1, C), float64."""
        mean = self.sums[0] / self.weight
        return mean, self.sums[1] / self.weight - mean.square() if self.squares else None


class Largest:
    """The largest value of each channel (1, C), or the smallest."""

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign
        self.found: Tensor | None = None

    def add(self, rows: Any, first: int) -> None:
        """Take in rows of the map."""
        of_rows = (_values(rows) * self.sign).amax(0, keepdim=True)
        self.found = of_rows if self.found is None else torch.maximum(self.found, of_rows)

    def finish(self) -> Tensor:
        """Return the values."""
        assert self.found is not None
        return self.found * self.sign


class Bins:
    """Adaptive pooling to a small map (1, C, bins, bins): means, or the largest values."""

    def __init__(self, size: tuple[int, int], bins: tuple[int, int], largest: bool) -> None:
        self.bins, self.largest = bins, largest
        self.spans = [
            [(i * n // b, -(-(i + 1) * n // b)) for i in range(b)] for n, b in zip(size, bins, strict=True)
        ]
        self.found: Tensor | None = None

    def add(self, rows: Tensor, first: int) -> None:
        """Take in rows of the map from `first` on."""
        if self.found is None:
            start = -math.inf if self.largest else 0.0
            kind = rows.dtype if self.largest else torch.float64
            self.found = torch.full((*rows.shape[:2], *self.bins), start, dtype=kind)
        for i, (top, bottom) in enumerate(self.spans[0]):
            part = rows[:, :, max(top - first, 0) : max(bottom - first, 0)]
            if not part.shape[2]:
                continue
            for j, (left, right) in enumerate(self.spans[1]):
                of_bin = part[..., left:right]
                if self.largest:
                    self.found[..., i, j] = torch.maximum(self.found[..., i, j], of_bin.amax((2, 3)))
                else:
                    self.found[..., i, j] += of_bin.double().sum((2, 3))

    def finish(self) -> Tensor:
        """Return the small map."""
        assert self.found is not None
        if self.largest:
            return self.found
        heights, widths = (torch.tensor([stop - start for start, stop in axis]) for axis in self.spans)
        return self.found / (heights.unsqueeze(1) * widths)


def affine_of(
    moments: tuple[Tensor, Tensor], channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return factor and shift (channels,), float64, of a group norm from mean and variance (1, groups)."""
    mean, variance = (one[0].repeat_interleave(channels // one.shape[1]) for one in moments)
    scale = (variance.clamp(min=0) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.double()


def scaled(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return rows times a factor plus a shift, in the type of the rows; computed in float32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.addcmul(shift.to(wide), rows.to(wide), scale.to(wide)).to(rows.dtype)
