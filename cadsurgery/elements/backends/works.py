"""The works of the table on elements: what is computed, from which rows, for which lattice; see `choose.py`.

One verb for each way to rows: a reading says by number which rows are read (`read_points`, `read_own_rows`,
`row_numbers`). `gather` copies those of all taps, `pick` those of one tap, with halo rows; `select_rows` those that a
later lattice still has; `mix` sums rows; `extend` appends padding and halo rows.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import CHOICES, Choice, Misfit, Work, check_channels, compute
from cadsurgery.elements.kernel_map import (
    Reading,
    Window,
    every_pixel,
    kernel_map,
    read_rows,
    row_numbers,
)
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.neighbours import find_near
from cadsurgery.elements.sizes import is_statically_true

if TYPE_CHECKING:
    from cadsurgery.elements.backends.weights import Activation, FusedConv, Pair


def check_rows(rows: Tensor, lattice: Lattice) -> None:
    """Refuse rows that are not those of a lattice: its tables name other rows then.

    Raises:
        Misfit: there are more or fewer.
    """
    if lattice.has_known_counts and len(rows) != lattice.count:
        raise Misfit(
            f"a layer is given {len(rows)} elements, and its lattice has {lattice.count}.",
            next="give Elements whose rows belong to their lattice.",
        )


@dataclass(frozen=True, eq=False)
class WindowRead:
    """The lattices that a window reads from and writes to, and the window with its padding resolved.

    With `drop`, cells that are not downsampled here read only themselves, see `kernel_map`.
    """

    source: Lattice
    target: Lattice
    window: Window
    drop: bool = False

    @property
    def case(self) -> tuple[Hashable, ...]:
        """Facts about lattices and window that backends need: all except the number and positions of elements."""
        return self.source.derive(("case", self.target.key, self.window, self.drop), self._make_case)

    def _make_case(self) -> tuple[Hashable, ...]:
        source, target = self.source, self.target
        geometry, levels = source.geometry, (source.uniform_level, target.uniform_level)
        parts = (source.part is None, target.part is None, source.has_known_counts, target.has_known_counts)
        stages = (source.stage, target.stage) if geometry.floors else ()
        return self.window, self.drop, levels, parts, geometry, self.window.is_pointwise, stages

    @property
    def reading(self) -> Reading:
        """The kernel map or, for one tap at the element itself, the selected rows."""
        if self.window.is_pointwise:
            rows = row_numbers(self.source, self.target)
            if rows is None:
                return read_own_rows(self.target.count, self.target.levels.device)
            return read_rows(rows.unsqueeze(1))
        return kernel_map(self.source, self.target, self.window, drop=self.drop)


@dataclass(frozen=True, eq=False)
class Convolution(Work):
    """A convolution act(sum_t W_t X[table[n, t]] + bias + residual) with result rows (N_target, O).

    Attributes:
        rows: (N, C); with one tap at the element itself also with more channel axes before the last.
        weights: weight, bias, groups and activation.
        reads: the lattices and the window; or only a reading; or None for a product of the unchanged rows.
        outside: value that taps outside the map read.
        residual: rows of the result's shape, or None.
    """

    weights: FusedConv
    reads: WindowRead | Reading | None
    outside: float = 0.0
    residual: Tensor | None = None
    task: ClassVar[str] = "convolve"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.weights.weight, self.weights.bias

    def check(self) -> None:
        """Refuse rows of other channels than the weight's, or of another lattice; see `Work.check`."""
        check_channels(self.rows.shape[-1], self.weights.weight.shape[1] * self.weights.groups)
        if isinstance(self.reads, WindowRead):
            check_rows(self.rows, self.reads.source)

    @property
    def reading(self) -> Reading:
        """The reading of the input rows."""
        return (
            read_own_rows(self.rows.shape[0], self.rows.device) if self.reads is None else self.reads.reading
        )

    @property
    def is_product(self) -> bool:
        """True if the only tap is at the element itself, ungrouped: a product of rows with a matrix."""
        at_element = isinstance(self.reads, WindowRead) and self.reads.window.is_pointwise
        return self.reads is None or (at_element and self.weights.groups == 1)

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The case of the lattices and the window, with the weight's shape unless the layer stores its own choices."""
        weights, reads, rows = self.weights, self.reads, self.rows
        where: Hashable = reads.case if isinstance(reads, WindowRead) else reads is None
        case: tuple[Hashable, ...] = (
            self.task,
            rows.dtype,
            rows.device.type,
            rows.dim(),
            not self.outside,
            where,
        )
        if weights.packed_cache is None:
            return *case, weights.weight.dtype, weights.weight.shape, weights.groups
        return case

    @property
    def choices(self) -> dict[Hashable, Choice]:
        """The choices of the layer if it stores them, otherwise the global ones."""
        return CHOICES if self.weights.packed_cache is None else self.weights.choices

    def on_shapes(self) -> Tensor:
        """Return the product of as many rows as the result has, which counts as the convolution does."""
        read, reads = self.weights.weight[0].numel(), self.reads
        count = _count_of(reads) if reads is not None else self.rows.shape[0]
        gathered = self.rows.new_empty((count, *self.rows.shape[1:-1], read))
        return gathered @ self.weights.weight.to("meta").flatten(1).transpose(0, 1)

    @property
    def of_target(self) -> Tensor:
        """The input rows of a product, restricted to the target lattice."""
        if not isinstance(self.reads, WindowRead):
            return self.rows
        return select_rows(self.rows, self.reads.source, self.reads.target)


@dataclass(frozen=True, eq=False)
class TransposedConvolution(Convolution):
    """A transposed convolution: each element uses the taps of its own phase, see `kernel_map`."""

    reads: WindowRead
    task: ClassVar[str] = "spread"


@dataclass(frozen=True, eq=False)
class MapConvolution(Work):
    """An ordinary convolution of a dense map: act(conv(map) + bias + residual), (B, O, H', W').

    Attributes:
        rows: the map (B, C, H, W).
        weights: weight, bias, groups and activation.
        window: stride, padding and dilation.
        residual: a map of the result's shape, or None.
        any_height: one packed weight is to serve maps of all heights, as those of the bands of a picture.
    """

    weights: FusedConv
    window: tuple[Pair, Pair, Pair]
    residual: Tensor | None = None
    any_height: bool = False
    task: ClassVar[str] = "convolve_map"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.weights.weight, self.weights.bias

    def check(self) -> None:
        """Refuse a map of other channels than the weight's; see `Work.check`."""
        check_channels(self.rows.shape[1], self.weights.weight.shape[1] * self.weights.groups)

    @property
    def is_product(self) -> bool:
        """True for a layer's product of each position with a matrix."""
        weights, (stride, padding, _) = self.weights, self.window
        is_point = (*weights.weight.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0)
        return weights.dense and weights.groups == 1 and is_point

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        axes = zip(self.rows.shape[2:], self.weights.weight.shape[2:], *self.window, strict=True)
        sizes = ((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in axes)
        return self.rows.shape[0], self.weights.weight.shape[0], *sizes

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The map's kind and the window, with the weight's shape unless the layer stores its own choices."""
        weights, rows = self.weights, self.rows
        case = (self.task, rows.dtype, rows.device.type, self.window, not rows.numel())
        if weights.packed_cache is None:
            return *case, weights.weight.dtype, weights.weight.shape, weights.groups, weights.dense
        return case

    @property
    def choices(self) -> dict[Hashable, Choice]:
        """The choices of the layer if it stores them, otherwise the global ones."""
        return CHOICES if self.weights.packed_cache is None else self.weights.choices


@dataclass(frozen=True, eq=False)
class MapResizing(Work):
    """Bilinear resizing of a dense map as by `F.interpolate`, (B, C, H', W') in contiguous memory.

    Attributes:
        rows: the map (B, C, H, W).
        size: samples (height, width) of the result.
        factors: ratios of the sizes that the network names, which then say where samples lie; or None.
        aligned: the first and last samples of both maps lie in the same places.
    """

    size: tuple[int, int]
    factors: tuple[float, float] | None
    aligned: bool
    task: ClassVar[str] = "resize_map"

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The map's kind, and whether there are any samples."""
        return *super().case, self.rows.dim(), self.rows.numel() > 0


@dataclass(frozen=True, eq=False)
class Pooling(Work):
    """The largest value, or the sum, over the taps of each element: rows (N_target, C)."""

    reads: WindowRead | Reading
    outside: float
    largest: bool
    task: ClassVar[str] = "pool"

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The operands' kind, the lattices and the window."""
        where = self.reads.case if isinstance(self.reads, WindowRead) else Reading
        return self.task, self.rows.dtype, self.rows.device.type, self.rows.dim(), self.largest, where

    @property
    def reading(self) -> Reading:
        """The reading of the input rows."""
        return self.reads.reading

    def check(self) -> None:
        """Refuse rows of another lattice; see `Work.check`."""
        if isinstance(self.reads, WindowRead):
            check_rows(self.rows, self.reads.source)

    def on_shapes(self) -> Tensor:
        """Return rows without values."""
        return self.rows.new_empty((_count_of(self.reads), *self.rows.shape[1:]))


@dataclass(frozen=True, eq=False)
class Mixing(Work):
    """Weighted sums of rows: (M, C) from `sources` (M, k) and their `shares` (M, k)."""

    sources: Tensor
    shares: Tensor
    task: ClassVar[str] = "mix"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.shares

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The rows' kind, and whether the shares have a gradient, which not every backend computes."""
        return *super().case, self.shares.requires_grad

    def on_shapes(self) -> Tensor:
        """Return rows without values."""
        return self.rows.new_empty((self.sources.shape[0], *self.rows.shape[1:]))


@dataclass(frozen=True, eq=False)
class Weighing(Work):
    """The weighted sum of all rows of each image: (B, C) from `shares` (B, N), in the type of these."""

    shares: Tensor
    task: ClassVar[str] = "weigh"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.shares

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The rows' kind, and the type of the sum."""
        return *super().case, self.shares.dtype


@dataclass(frozen=True, eq=False)
class Normalising(Work):
    """Rows (N, C) normalised by their weighted mean and variance; these are returned, too: (C,), without gradient.

    Attributes:
        shares: (N,), the weights, which sum to one; 0 for padding, which counts as zeros.
        weight: (C,), the factor; or None.
        bias: (C,), the shift; or None.
        eps: added to the variance.
        real: (N,) bool: rows that are no padding; None if there is none.
    """

    shares: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    real: Tensor | None
    task: ClassVar[str] = "normalise"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.weight, self.bias

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The rows' kind, and whether there are any."""
        return *super().case, self.rows.dim(), self.rows.numel() > 0


@dataclass(frozen=True, eq=False)
class MixingLines(Work):
    """Linear interpolation along the lines of a map (L, W, C): (L, M, C), between `first` and `second` (M,)."""

    first: Tensor
    second: Tensor
    share: Tensor
    task: ClassVar[str] = "mix_lines"


@dataclass(frozen=True, eq=False)
class Picking(Work):
    """Selection of the rows in a reading's table of any shape: (entries, C). Each row is read about once."""

    reading: Reading
    task: ClassVar[str] = "pick"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.reading.mix


@dataclass(frozen=True, eq=False)
class PixelReading(Work):
    """Every `spacing`-th fine pixel (B, h, w, C) of a lattice, with its fill."""

    lattice: Lattice
    spacing: int
    task: ClassVar[str] = "read_pixels"

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The rows' kind, and what is known of the cells."""
        lattice = self.lattice
        return *super().case, lattice.part is None, lattice.capacity is None, lattice.levels.device.type

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return self.lattice.batch, *self.lattice.samples(self.spacing), self.rows.shape[1]

    @property
    def picking(self) -> Picking:
        """The same work as a `Picking` whose halo rows are the interpolated pixels."""
        return Picking(self.rows, every_pixel(self.lattice, self.spacing))

    def check(self) -> None:
        """Refuse rows of another lattice; see `Work.check`."""
        check_rows(self.rows, self.lattice)

    def on_shapes(self) -> Tensor:
        """Return pixels without values."""
        return self.rows.new_empty(self.shape)


@dataclass(frozen=True, eq=False)
class Filling(Work):
    """act(fill + residual): rows (T, C) of single-resolution maps. Positions that were not computed are weighted sums
    of computed neighbours, see `gaps.py`.

    Attributes:
        rows: (N, C), the computed rows.
        source: positions of the computed rows.
        target: positions of the result.
        weights: (k, k), weights of the sums.
        least: added to the sum of the neighbours' weights, by which the result is divided; 0 for no division.
        baseline: (C,), gets the remaining weight (1 minus the sum of the weights); default zero.
        shares: (N,) in 0..1, the computed share of each row; default 1.
        residual: (T, C) or None.
        activation: applied last.
    """

    source: Lattice
    target: Lattice
    weights: Tensor
    least: float = 0.0
    baseline: Tensor | None = None
    shares: Tensor | None = None
    residual: Tensor | None = None
    activation: Activation | None = None
    task: ClassVar[str] = "fill"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.weights, self.baseline, self.shares, self.residual

    @property
    def case(self) -> tuple[Hashable, ...]:
        """Facts about the lattices: whether every position is a cell, and whether their number is known."""
        lattices = (self.source, self.target)
        kinds = tuple((lattice.geometry.strides == (), lattice.has_known_counts) for lattice in lattices)
        return self.task, self.rows.dtype, self.rows.device.type, kinds

    @property
    def picking(self) -> Picking:
        """The same work as a `Picking` whose halo rows are the filled positions."""
        rows, near = self.rows, find_near(self.source, self.target, self.weights.shape[0] // 2, self.shares)
        mass = self.weights.flatten() * near.there
        if self.shares is not None:
            mass = mass * self.shares.to(mass)[near.sources.long()]
        if self.least:
            mass = mass / (mass.sum(1, keepdim=True) + self.least)
        if self.shares is not None:  # fill the missing share; the centre holds the computed share
            mass = (1 - near.share.unsqueeze(1)) * mass
            own = torch.zeros_like(mass)
            own[:, mass.shape[1] // 2] = near.share
            mass = mass + own
        sources, table, has_outside = near.sources, near.table, near.has_far
        if self.baseline is not None:  # append the baseline as one more row
            count = self.source.count
            rows = torch.cat((rows, self.baseline.to(rows).unsqueeze(0)))
            table = torch.where(table > count, table + 1, table)
            sources = torch.cat((sources, torch.full_like(sources[:, :1], count)), 1)
            mass, has_outside = torch.cat((mass, 1 - mass.sum(1, keepdim=True)), 1), True
        return Picking(rows, Reading(table.unsqueeze(1), sources, mass, has_outside))


def _count_of(reads: WindowRead | Reading) -> int:
    """Return the number of rows that a window's operation computes."""
    return reads.target.count if isinstance(reads, WindowRead) else reads.table.shape[0]


def mix(rows: Tensor, sources: Tensor, shares: Tensor) -> Tensor:
    """Compute weighted sums of rows, (M, C)."""
    return compute(Mixing(rows, sources, shares))


def pick(rows: Tensor, reading: Reading) -> Tensor:
    """Return the rows (entries, C) that a reading's table names; its halo rows are mixed."""
    out: Tensor = compute(Picking(rows, reading))
    return out


def extend(rows: Tensor, reading: Reading, outside: float) -> Tensor:
    """Return the rows that a reading's table indexes: the elements, one padding row, and the halo rows."""
    no_halo = is_statically_true(reading.sources.shape[0] == 0)
    if no_halo and not reading.has_outside:
        return rows
    parts = [rows, rows.new_full((1, rows.shape[1]), outside)]
    if not no_halo:
        parts.append(mix(rows, reading.sources, reading.mix))
    return torch.cat(parts)


def read_own_rows(count: int, device: torch.device) -> Reading:
    """Return a reading with one tap in which each row reads itself."""
    return read_rows(torch.arange(count, dtype=torch.int32, device=device).unsqueeze(1))


def select_rows(rows: Tensor, source: Lattice, target: Lattice) -> Tensor:
    """Return the rows (N, ...) of a lattice that the same or a later stage still has."""
    if source is target:
        return rows
    if rows.is_meta:
        return rows.new_empty((target.count, *rows.shape[1:]))
    numbers = row_numbers(source, target)
    return rows if numbers is None else rows.index_select(0, numbers.to(rows.device))
