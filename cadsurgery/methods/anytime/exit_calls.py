"""One call of an anytime network: segment after segment, each at the undecided positions.

Nothing is computed at positions where an exit is confident. A convolution of a later segment is evaluated at the
undecided positions only; other positions of its output are filled from these, as published. No whole map is built for
that: a value is kept as rows at the positions that later computation reads, and only these are filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadsurgery.elements.axes import as_column, as_map, as_rows
from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.works import Convolution
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.functional import fill_gaps, gaussian_fill
from cadsurgery.following.hooks import child
from cadsurgery.methods.anytime.heads import resize_like
from cadsurgery.methods.anytime.program import AnytimeProgram
from cadsurgery.methods.positions import Places, Sites, Size
from cadsurgery.methods.program import CallWork, ProgramStep, call, weights_of
from cadsurgery.support.divergence import resize

Needs = Mapping[str, Places | None]  # positions at which the value of a step is needed; None for everywhere


class StepValue(NamedTuple):
    """The value of a step: a whole map (B, C, H, W), or the rows (N, C) at some places."""

    value: Any
    places: Places | None = None


@dataclass(eq=False)
class AnytimeRun:
    """The state of one call of an `AnytimeModel`.

    Attributes:
        net: the network.
        arguments: arguments of the call, by name.
        work: shapes and MACs of the call; empty in training, where whole maps are computed and filled.
        macs: for each segment that ran, its multiply-accumulates and the reference code's count.
    """

    net: Any
    arguments: dict[str, Any]
    work: CallWork

    def __post_init__(self) -> None:
        self.program: AnytimeProgram = self.net.program
        self.env: dict[str, StepValue] = {}
        self._computed: dict[str, Places] = {}  # positions at which convolutions are computed
        self.macs: list[int] = []

    def segment(self, number: int, sites: Sites | None) -> None:
        """Run the steps of a segment at the undecided positions; None for all positions."""
        needs: Needs | None = None
        if sites is not None and self.work.shapes:  # in training all widths get gradients
            sites = None if bool(sites.undecided.all()) else sites
            needs = self._needs(number, sites) if sites is not None else None
        self.macs.append(0)
        for step in self.program.segments[number]:
            # A value that is not needed can still be read for its size.
            if needs is None or step.name in needs or step.name in self.work.numbers:
                self.env[step.name] = self._run(step, sites, needs)
                self.macs[-1] += self._macs(step, is_whole=needs is None)
            for name in step.frees:
                self.env.pop(name, None)

    def prediction(self, logits: Tensor) -> Tensor:
        """Return the network's output for class scores."""
        last, env = self.program.logits[-1], dict[str, Any]()

        def value_of(name: str) -> Any:
            return logits if name == last else env[name] if name in env else self.env[name].value

        for step in self.program.tail:
            env[step.name] = call(self.net, step, value_of, self.arguments)
        return value_of(self.program.final)

    def logits(self, number: int, sites: Sites | None, before: Tensor | None) -> Tensor:
        """Return the aggregated class scores of an exit, on the finest grid so far.

        They are the exit's own scores at its undecided positions and the scores `before` elsewhere. Without sites all
        scores are its own.
        """
        value, places = self.env[self.program.logits[number]]
        if before is None or sites is None:
            return value
        if places is not None and places.size == tuple(before.shape[2:]):
            own = sites.at(places.size)
            rows = as_rows(before).index_copy(0, own.pixels, _select_rows(value, places, own))
            return as_map(rows, len(before), places.size)
        value = self._dense(self.program.logits[number])
        size = finest(tuple(value.shape[2:]), tuple(before.shape[2:]))
        mask = sites.at(size).mask.unsqueeze(1)
        return torch.where(mask, resize(value, size), resize(before, size))

    # -- which positions are needed -----------------------------------------------------------------

    def _needs(self, number: int, sites: Sites) -> dict[str, Places | None]:
        """Return where values of this and all later segments are needed, if no exit adds undecided positions."""
        work, needs = self.work, dict[str, Places | None]()

        def add(name: str, places: Places | None) -> None:
            if name in work.numbers:
                return
            needed = needs.get(name, places)
            if places is None or needed is None or name not in work.sizes:
                needs[name] = None
            else:
                needs[name] = sites.union(needed, places)

        logits = [(place, name, work.sizes[name]) for place, name in enumerate(self.program.logits)]
        grid = logits[0][2]
        for place, name, size in logits:
            grid = finest(size, grid)
            if place >= number:
                add(name, sites.read_by_resize(sites.at(grid), size))
        for step in reversed([step for segment in self.program.segments[number:] for step in segment]):
            if step.name not in needs:
                continue
            places, kind, window = needs[step.name], *step.spatial
            if kind == "conv" and window is not None:
                source, *residual = step.reads
                computed = self._computed[step.name] = sites.computed(work.sizes[step.name], places)
                add(source, sites.read_by_window(computed, window, work.sizes[source]))
                for name in residual:
                    add(name, None if places is None else sites.union(computed, places))
                continue
            map_name = next((name for name in step.reads if name in work.sizes), "")
            for name in step.reads:
                if kind == "whole" or places is None:
                    add(name, None)
                elif kind == "point":
                    add(name, places if work.sizes.get(name) == places.size else None)
                elif name != map_name:
                    add(name, None)
                elif window is not None:
                    add(name, sites.read_by_window(places, window, work.sizes[name]))
                else:
                    add(name, sites.read_by_resize(places, work.sizes[name]))
        return needs

    def _macs(self, step: ProgramStep, is_whole: bool) -> int:
        """Return the MACs of a step; of a convolution, the share of its computed positions."""
        work = self.work.macs.get(step.name, 0)
        if is_whole or step.spatial.kind != "conv":
            return work
        computed = self._computed[step.name]
        return work * computed.count // computed.mask.numel()

    # -- running a step ----------------------------------------------------------------------------

    def _run(self, step: ProgramStep, sites: Sites | None, needs: Needs | None) -> StepValue:
        if step.name in self.work.numbers:
            return StepValue(self.work.numbers[step.name])
        kind = step.spatial.kind
        if needs is None or sites is None:
            y = call(self.net, step, lambda name: self.env[name].value, self.arguments)
            return StepValue(y if kind != "conv" or sites is None else self._fill_whole(step, y, sites))
        places = needs.get(step.name)
        if kind == "conv":
            return self._convolve(step, sites, places)
        if kind == "point" and places is not None:
            value = call(self.net, step, lambda name: self._column(name, places), self.arguments)
            return StepValue(as_rows(value), places)
        if step.target is resize_like:
            return StepValue(resize(self._dense(step.reads[0]), self.work.sizes[step.name]))
        return StepValue(call(self.net, step, self._dense, self.arguments))

    def _fill_whole(self, step: ProgramStep, y: Tensor, sites: Sites) -> Tensor:
        """Fill all but the computed positions of a whole map, in training."""
        mask = sites.computed((y.shape[2], y.shape[3])).mask
        width = getattr(child(self.net, step.target), "width", None)
        return y * mask.unsqueeze(1) if width is None else gaussian_fill(y, mask, width, sites.grid > 0)

    def _convolve(self, step: ProgramStep, sites: Sites, needed: Places | None) -> StepValue:
        """Compute a convolution at the undecided positions and fill the other needed positions."""
        assert step.spatial.window is not None
        size, source_size = self.work.sizes[step.name], self.work.sizes[step.reads[0]]
        computed, window = self._computed[step.name], step.spatial.window
        every = needed if needed is None else sites.union(computed, needed)
        module: Any = child(self.net, step.target)
        weights, (before, places) = weights_of(module), self.env[step.reads[0]]
        is_product = window.is_pointwise and source_size == size and weights.groups == 1
        source = places  # a product is on the stored rows
        if places is not None and not is_product:
            source = sites.read_by_window(computed, window, source_size)
        rows = as_rows(before) if source is None else _select_rows(before, places, source)
        reads = sites.reading(source_size, source, window, computed)
        residual = None if len(step.reads) < 2 else self._at(step.reads[1], every)
        if every is computed:
            return StepValue(compute(Convolution(rows, weights, reads, residual=residual)), every)
        some = Elements(
            compute(Convolution(rows, weights.without_activation, reads)), sites.lattice(size, computed)
        )
        width, baseline = getattr(module, "width", None), getattr(module, "baseline", None)
        if width is not None:
            options: Any = {"residual": residual, "activation": weights.activation}
            whole = sites.lattice(size, every)
            out = fill_gaps(some, whole, width, sites.grid > 0, baseline, **options).rows
        else:  # zero, or `baseline`, where nothing is computed
            filled = every or sites.everywhere(size)
            out = some.rows.new_zeros(filled.count, some.rows.shape[1])
            out = out if baseline is None else out + baseline
            out = weights.finish(out.index_copy(0, filled.rows[computed.pixels], some.rows), residual)
        return StepValue(out, every) if every is not None else StepValue(as_map(out, sites.batch, size))

    # -- values in another form ----------------------------------------------------------------------

    def _at(self, name: str, places: Places | None) -> Tensor:
        value, available = self.env[name]
        return as_rows(self._dense(name)) if places is None else _select_rows(value, available, places)

    def _column(self, name: str, places: Places) -> Any:
        """Return a value at some places as a map (1, C, N, 1), for operations that act on each position alone."""
        value, available = self.env[name]
        if available is None and not (isinstance(value, Tensor) and value.dim() == 4):
            return value
        if available is None and tuple(value.shape[2:]) != places.size:  # a vector for each image
            rows = value.flatten(1)
            return as_column(rows.expand(places.count, -1) if len(rows) == 1 else rows[places.images])
        return as_column(_select_rows(value, available, places))

    def _dense(self, name: str) -> Any:
        """Return a value as a map; positions where it is not known are zero and are not read."""
        value, places = self.env[name]
        if places is None:
            return value
        rows = value.new_zeros(places.mask.numel(), value.shape[1]).index_copy(0, places.pixels, value)
        return as_map(rows, len(places.mask), places.size)


def finest(one: tuple[int, ...], other: tuple[int, ...]) -> Size:
    """Return the size with more positions; the first one if they have the same number."""
    height, width = other if other[0] * other[1] > one[0] * one[1] else one
    return height, width


def _select_rows(rows: Tensor, available: Places | None, places: Places) -> Tensor:
    """Return the rows at `places` of a value that is known at `available` places, or everywhere (None)."""
    if available is places:
        return rows
    if available is None:
        return as_rows(rows).index_select(0, places.pixels)
    return rows.index_select(0, available.places_of(places))
