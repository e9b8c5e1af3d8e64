"""Choose the backend of each work: the first of the table that applies, or, where several can do a kind of work equally
well, the fastest of them by measurement on this machine.

A work is a value: operands, where they are read, what is asked of the result. A backend has a method for each task it
carries out, and says of a work whether it applies. The table (`table.py`) is asked in its order; torch is last, takes
every work, and is what the others are held against (`tests/laws/test_backend_laws.py`).

The choice is made once for each layer and each kind of lattices that it reads, see `Work.case`, and kept with the
layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cadsurgery.elements.backends import costs
from cadsurgery.elements.kernel_map import Reading, Window, kernel_map, read_rows, rows_of
from cadsurgery.elements.lattice import Lattice, is_exporting
from cadsurgery.elements.near import find_near
from cadsurgery.elements.sizes import is_statically_true
from cadsurgery.kernels.load import is_observed, setting

if TYPE_CHECKING:
    from cadsurgery.elements.backends.weights import Activation, FusedConv


_SAMPLE_WORK = 1 << 23  # multiply-accumulates of a sample
_SAMPLE_CELLS = 48  # height and width of one that is a map


def size_class(size: int, least: int = 16, most: int = 512) -> int:
    """The power of two that a size is rounded up to, within bounds: sizes of a class are taken for alike."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


@dataclass(frozen=True, eq=False)
class WindowRead:
    """From where to where a window reads: the lattices before and after, the window with its padding known.

    With `drop`, cells that are not downsampled here read only themselves, see `kernel_map`.
    """

    source: Lattice
    target: Lattice
    window: Window
    drop: bool = False

    @property
    def case(self) -> tuple[Hashable, ...]:
        """Facts about the lattices and the window that backends ask for: all but the numbers and places of elements."""
        return self.source.derive(("case", self.target.key, self.window, self.drop), self._make_case)

    def _make_case(self) -> tuple[Hashable, ...]:
        source, target = self.source, self.target
        geometry, levels = source.geometry, (source.uniform_level, target.uniform_level)
        parts = (source.part is None, target.part is None, source.has_known_counts, target.has_known_counts)
        return self.window, self.drop, levels, parts, geometry, self.window.is_pointwise

    @property
    def reading(self) -> Reading:
        """The kernel map, or for one tap at the element itself the rows as they are."""
        if self.window.is_pointwise:
            rows = rows_of(self.source, self.target)
            if rows is None:
                return every_row(self.target.count, self.target.levels.device)
            return read_rows(rows.unsqueeze(1))
        return kernel_map(self.source, self.target, self.window, drop=self.drop)

    def smaller(self, cells: int) -> WindowRead:
        """The same between maps that are uniform, of so many cells in height and width."""
        side, level = self.source.uniform_side, self.source.uniform_level
        assert level is not None
        size = (cells * side, cells * side)
        source = self.source.geometry.uniform(level, 1, size).at(self.source.stage)
        target = source.at(self.target.stage, self.window.output_size(size))
        return WindowRead(source, target, self.window, self.drop)


@dataclass(frozen=True, eq=False)
class Work:
    """Something to compute from rows (N, C); `task` is the method of a backend that computes it."""

    rows: Tensor
    task: ClassVar[str]

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return (self.rows,)

    @property
    def gradient(self) -> bool:
        """True if a gradient with respect to an operand will be asked for."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.operands)

    @property
    def graph(self) -> Literal["", "compiled", "exported"]:
        """Which graph torch makes of what is called now: none, one to compile, one to export."""
        if not torch.compiler.is_compiling():
            return ""
        return "exported" if is_exporting() else "compiled"

    @property
    def is_inference(self) -> bool:
        """Neither gradients nor graphs: values alone."""
        return not (self.gradient or self.graph)

    @property
    def case(self) -> tuple[Hashable, ...]:
        """All that the choice of a backend may depend on, but for what `Backend.condition` asks of a single work."""
        return self.task, self.rows.dtype, self.rows.device.type

    @property
    def choices(self) -> dict[Hashable, tuple[Choice, ...]]:
        """Where the choice is kept."""
        return _CHOICES

    @property
    def kind(self) -> tuple[Hashable, ...] | None:
        """All that the time of a backend depends on, in classes; None if backends are not measured for this work.

        They are not for mixing and pooling, so that a row has the same bits whichever work reads it.
        """
        return None

    def sample(self) -> Work:
        """A work of this kind that is the same for all of it, to measure backends by."""
        raise NotImplementedError

    def shortened(self, rows: int) -> Work:
        """A sample with so many rows less, if some backend makes code for each number of rows; else itself."""
        return self


@dataclass(frozen=True, eq=False)
class Convolution(Work):
    """act(sum_t W_t X[table[n, t]] + bias + residual): rows (N_target, O).

    Attributes:
        rows: (N, C); with one tap at the element itself also with more channel axes before the last.
        weights: weight, bias, groups and activation.
        reads: the lattices and the window; a reading if no more is known; None for a product of the rows as they are.
        outside: what taps outside the map read.
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

    @property
    def reading(self) -> Reading:
        """Where it reads."""
        return every_row(self.rows.shape[0], self.rows.device) if self.reads is None else self.reads.reading

    @property
    def is_product(self) -> bool:
        """One tap at the element itself, ungrouped: a product of rows with a matrix."""
        at_element = isinstance(self.reads, WindowRead) and self.reads.window.is_pointwise
        return self.reads is None or (at_element and self.weights.groups == 1)

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The lattices and the window and, unless the layer keeps its choices, the weight."""
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
        return *case, self.is_recurring

    @property
    def is_recurring(self) -> bool:
        """True for a product whose number of rows follows from the image's size alone, of one of the first sizes."""
        reads, weights = self.reads, self.weights
        if reads is None:
            return weights.dense and weights.is_recurring_row_count(len(self.rows))
        if not isinstance(reads, WindowRead) or weights.groups > 1 or not reads.window.is_pointwise:
            return False
        return reads.target.uniform_level is not None and weights.is_recurring_row_count(reads.target.count)

    @property
    def choices(self) -> dict[Hashable, tuple[Choice, ...]]:
        """Those of the layer, if it is one that keeps them."""
        return _CHOICES if self.weights.packed_cache is None else self.weights.choices

    @property
    def kind(self) -> tuple[Hashable, ...] | None:
        """Groups, taps, channels and type, where packed weights are kept: in inference in earnest. Rows of dense maps
        are not measured: there may be a single one."""
        weights, uniform = self.weights, self._of_uniform
        if (
            weights.packed_cache is None
            or self.reads is None
            or (uniform and weights.groups == 1 and not self.is_product)
        ):
            return None  # of ordinary convolutions of uniform maps none is faster than a dense one
        outputs, group, height, width = weights.weight.shape
        taps = 0 if self.is_product else height * width
        if weights.groups == 1:
            return "convolve", "plain", taps, size_class(group), size_class(outputs), self.rows.dtype
        of_group = "depthwise" if group == 1 else f"groups of {group}"
        where = tuple(f"{name} {value}" for name, value in (uniform or {}).items())
        return "convolve", of_group, taps, size_class(outputs), self.rows.dtype, *where

    @property
    def _of_uniform(self) -> dict[str, object] | None:
        """Where a window reads if both maps have one level each: steps and sides of cells in fine pixels; else None."""
        if not isinstance(self.reads, WindowRead):
            return None
        source, target, window = self.reads.source, self.reads.target, self.reads.window
        if source.uniform_level is None or target.uniform_level is None:
            return None
        steps = tuple(step * window.spacing for step in window.dilation)
        return {
            "kernel": window.kernel,
            "steps": steps,
            "cells": source.uniform_side,
            "to": target.uniform_side,
        }

    def sample(self) -> Convolution:
        """A convolution of ordinary rows, or of a small uniform map, with as many channels as the class has at most."""
        weight = self.weights.weight
        outputs, group, groups = size_class(weight.shape[0]), weight.shape[1], 1
        if self.weights.groups == 1:
            group = size_class(group)
        else:
            groups = max(1, outputs // group)
            outputs = groups * group
        kernel = weight.new_ones(outputs, group, *weight.shape[2:])
        weights = self.weights.changed(
            weight=kernel, bias=weight.new_zeros(outputs), groups=groups, levels=None
        )
        if self.weights.groups > 1 and self._of_uniform is not None:
            assert isinstance(self.reads, WindowRead)
            reads = self.reads.smaller(_SAMPLE_CELLS)
            return Convolution(self.rows.new_ones(reads.source.count, group * groups), weights, reads)
        number = max(512, min(4096, _SAMPLE_WORK // kernel.numel()))
        rows = self.rows.new_ones(number, group * groups)
        reading = None if self.is_product else _sample_reading(number, weight[0, 0].numel())
        return Convolution(rows, weights, reading)

    def shortened(self, rows: int) -> Convolution:
        """A mask keeps another number of elements of every image: a product has other rows in every call."""
        return replace(self, rows=self.rows[: len(self.rows) - rows]) if self.reads is None else self

    @property
    def of_target(self) -> Tensor:
        """The rows of a product, those of the target alone."""
        if not isinstance(self.reads, WindowRead):
            return self.rows
        return select_rows(self.rows, self.reads.source, self.reads.target)


@dataclass(frozen=True, eq=False)
class TransposedConvolution(Convolution):
    """A transposed convolution: with the taps of each element's own phase, see `kernel_map`."""

    reads: WindowRead
    task: ClassVar[str] = "spread"


@dataclass(frozen=True, eq=False)
class Pooling(Work):
    """The largest value, or the sum, over the taps of each element: rows (N_target, C)."""

    reads: WindowRead | Reading
    outside: float
    largest: bool
    task: ClassVar[str] = "pool"

    @property
    def case(self) -> tuple[Hashable, ...]:
        """The lattices and the window."""
        where = self.reads.case if isinstance(self.reads, WindowRead) else Reading
        return self.task, self.rows.dtype, self.rows.device.type, self.rows.dim(), self.largest, where

    @property
    def reading(self) -> Reading:
        """Where it reads."""
        return self.reads.reading


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


@dataclass(frozen=True, eq=False)
class MixingLines(Work):
    """Weighted sums along the lines of a map (L, W, C): (L, M, C), between `first` and `second` (M,) by `share`."""

    first: Tensor
    second: Tensor
    share: Tensor
    task: ClassVar[str] = "mix_lines"


@dataclass(frozen=True, eq=False)
class Picking(Work):
    """The rows that a reading's table, of any shape, names, each about once: (entries, C)."""

    reading: Reading
    task: ClassVar[str] = "pick"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.reading.mix


@dataclass(frozen=True, eq=False)
class Filling(Work):
    """act(fill + residual): rows (T, C) of maps of one resolution, some of whose positions were computed; the others
    are sums of those around, see `gaps.py`.

    Attributes:
        rows: (N, C), what was computed.
        source: its positions.
        target: those that are wanted.
        weights: (k, k) of the sums.
        least: what is added to the sum of the weights of what is there, which divides them; 0: nothing divides them.
        floor: (C,), what counts with what the weights lack of 1; default zero.
        shares: (N,) in 0..1, how much of each row was computed; default all.
        residual: (T, C) or None.
        activation: applied last.
    """

    source: Lattice
    target: Lattice
    weights: Tensor
    least: float = 0.0
    floor: Tensor | None = None
    shares: Tensor | None = None
    residual: Tensor | None = None
    activation: Activation | None = None
    task: ClassVar[str] = "fill"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Tensors that a gradient may be asked for."""
        return self.rows, self.weights, self.floor, self.shares, self.residual

    @property
    def case(self) -> tuple[Hashable, ...]:
        """Facts about the lattices: if every position is a cell of its own, and if their numbers are known."""
        lattices = (self.source, self.target)
        kinds = tuple((one.geometry.strides == (), one.has_known_counts) for one in lattices)
        return self.task, self.rows.dtype, self.rows.device.type, kinds

    @property
    def picking(self) -> Picking:
        """The same as rows that are picked, those filled as mixed ones."""
        rows, near = self.rows, find_near(self.source, self.target, self.weights.shape[0] // 2, self.shares)
        mass = self.weights.flatten() * near.there
        if self.shares is not None:
            mass = mass * self.shares.to(mass)[near.sources.long()]
        if self.least:
            mass = mass / (mass.sum(1, keepdim=True) + self.least)
        if self.shares is not None:  # what was not computed of a position is filled, the centre is what was
            mass = (1 - near.share.unsqueeze(1)) * mass
            own = torch.zeros_like(mass)
            own[:, mass.shape[1] // 2] = near.share
            mass = mass + own
        sources, table, has_outside = near.sources, near.table, near.has_far
        if self.floor is not None:  # one more row
            count = self.source.count
            rows = torch.cat((rows, self.floor.to(rows).unsqueeze(0)))
            table = torch.where(table > count, table + 1, table)
            sources = torch.cat((sources, torch.full_like(sources[:, :1], count)), 1)
            mass, has_outside = torch.cat((mass, 1 - mass.sum(1, keepdim=True)), 1), True
        return Picking(rows, Reading(table.unsqueeze(1), sources, mass, has_outside))


@dataclass(frozen=True, eq=False)
class Gathering(Work):
    """A function that writes the rows of entries of a reading's table side by side into memory it is given."""

    reading: Reading
    outside: float
    task: ClassVar[str] = "gather"


class Backend:
    """A way to compute works: a method named by the task of each kind that it carries out."""

    name: str

    def applies(self, work: Any) -> bool:
        """Return True if it computes works of this case (`Work.case`), of a task it has.

        By device, type, groups, gradient, graph and the kind of lattices; it is asked once for each case.
        """
        raise NotImplementedError

    def is_measured(self, work: Any) -> bool:
        """Return True if it does this work only where it is faster than others that are measured for it."""
        return False

    def condition(self, work: Any) -> Callable[[Any], bool] | None:
        """Return what must hold of a single work of this case, too, such as that it is large enough; or None."""
        return None

    def prepare(self, work: Any) -> Callable[[Any], Any]:
        """Return the function of works of this case; what follows from the case alone is done here, once."""
        run: Callable[[Any], Any] = getattr(self, work.task)
        return run


class Choice(NamedTuple):
    """A backend that computes works of a case, where a condition holds of them."""

    backend: Backend
    run: Callable[[Any], Any]
    condition: Callable[[Any], bool] | None = None


# The table, see `table.py`. A backend of a user's own is put into it as into any list.
BACKENDS: list[Backend] = []

# Choices for works of no layer that keeps them.
_CHOICES: dict[Hashable, tuple[Choice, ...]] = {}
_MOST_CHOICES = 1024


def choose(work: Work) -> Choice:
    """Return the first choice for a work: the first backend that applies and whose condition holds.

    If that is a measured one, and others that are measured apply too, it is the fastest of them for this kind of work.
    """
    if torch.compiler.is_compiling():
        return next(choice for choice in _choices(work) if choice.condition is None or choice.condition(work))
    gradient, is_counted = torch.is_grad_enabled() and work.gradient, _get_current_dispatch_mode() is not None
    key = (work.case, gradient, is_counted, setting(), costs.pins, *BACKENDS)
    choices = work.choices
    able = choices.get(key)
    if able is None:
        if len(choices) >= _MOST_CHOICES:
            choices.clear()
        able = choices[key] = _choices(work)
    for choice in able:
        if choice.condition is None or choice.condition(work):
            return choice
    raise AssertionError("torch, the last of the table, takes every work")


def choose_after(work: Work, backend: Backend) -> Choice:
    """Return the choice for a work among the backends behind one, in the table's order."""
    able = _choices(work, after=backend)
    return next(choice for choice in able if choice.condition is None or choice.condition(work))


def _choices(work: Work, after: Backend | None = None) -> tuple[Choice, ...]:
    """The backends that apply to works of a case, up to the first one without a condition."""
    found: list[Choice] = []
    first = 0 if after is None else BACKENDS.index(after) + 1
    for at, backend in enumerate(BACKENDS[first:], first):
        if not _can(backend, work):
            continue
        kind = _kind_to_measure(work) if backend.is_measured(work) else None
        chosen = backend if kind is None else _fastest(kind, work, [backend, *BACKENDS[at + 1 :]])
        found.append(Choice(chosen, chosen.prepare(work), chosen.condition(work)))
        if found[-1].condition is None:
            break
    return tuple(found)


def _can(backend: Backend, work: Work) -> bool:
    return hasattr(backend, work.task) and backend.applies(work)


def _kind_to_measure(work: Work) -> tuple[Hashable, ...] | None:
    """The kind of a work for which backends are measured: of values alone, on the CPU; else None."""
    if work.rows.device.type != "cpu" or not work.is_inference or is_observed():
        return None
    return work.kind


def _fastest(kind: tuple[Hashable, ...], work: Work, backends: Sequence[Backend]) -> Backend:
    """The fastest of those backends that are measured and can do a work, of which the first is one."""
    first, *others = backends
    able = [backend for backend in others if backend.is_measured(work) and _can(backend, work)]
    if not able:
        return first
    by_name = {backend.name: backend for backend in (first, *able)}
    sample, calls = cache(work.sample), count()  # made only where something has to be measured
    runs = {
        name: lambda backend=backend: getattr(backend, work.task)(sample().shortened(next(calls)))
        for name, backend in by_name.items()
    }
    return by_name[costs.fastest(kind, runs)]


def compute(work: Work, choice: Choice | None = None) -> Any:
    """Compute a work by the backend of the choice, or by one chosen before; a profile shows the backend's name."""
    chosen = choice or choose(work)
    if not work.graph and torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"{work.task} ({chosen.backend.name})"):
            return chosen.run(work)
    return chosen.run(work)


def mix(rows: Tensor, sources: Tensor, shares: Tensor) -> Tensor:
    """Weighted sums of rows: (M, C)."""
    return compute(Mixing(rows, sources, shares))


def outside_of(dtype: torch.dtype, outside: float) -> float:
    """Value of rows outside the map: zero for minus infinity in bytes, which have no lower value."""
    return max(outside, 0.0) if dtype == torch.uint8 else outside


def extend(rows: Tensor, reading: Reading, outside: float) -> Tensor:
    """The rows a reading's table points into: the elements, one row of what is outside, the halo."""
    no_halo = is_statically_true(reading.sources.shape[0] == 0)
    if no_halo and not reading.has_outside:
        return rows
    parts = [rows, rows.new_full((1, rows.shape[1]), outside_of(rows.dtype, outside))]
    if not no_halo:
        parts.append(mix(rows, reading.sources, reading.mix))
    return torch.cat(parts)


def _sample_reading(count: int, taps: int) -> Reading:
    """Rows that each read their next ones, as those of a line do."""
    first = torch.arange(count, dtype=torch.int32).unsqueeze(1)
    return read_rows(((first + torch.arange(taps, dtype=torch.int32)) % count).contiguous())


def every_row(count: int, device: torch.device) -> Reading:
    """A reading of one tap: the rows as they are."""
    return read_rows(torch.arange(count, dtype=torch.int32, device=device).unsqueeze(1))


def select_rows(rows: Tensor, source: Lattice, target: Lattice) -> Tensor:
    """The rows (N, ...) of a lattice that the same or a later stage still has."""
    places = rows_of(source, target)
    return rows if places is None else rows.index_select(0, places.to(rows.device))
