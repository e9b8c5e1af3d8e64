"""One call of an anytime network: segment after segment, each at the positions that are left.

Where an exit is confident nothing is computed any more. A convolution of a later segment is evaluated at the positions
that are left, from a map that is whole: others are filled from those, as published. No map is ever made whole for that:
what is kept of a value are rows at the positions that something left to compute reads, and only these are filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cadsurgery.elements.backends.choose import Convolution, WindowRead, compute
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.functional import fill_gaps, gaussian_fill
from cadsurgery.elements.kernel_map import Reading
from cadsurgery.methods.anytime.heads import resize, resize_like
from cadsurgery.methods.anytime.places import Places, Sites, Size
from cadsurgery.methods.anytime.program import Program, Step
from cadsurgery.methods.anytime.shapes import Shapes
from cadsurgery.methods.steps import call
from cadsurgery.surgery.hooks import child

_TAPS = 49  # of the Gaussian, as the reference code counts filling
Needs = Mapping[str, Places | None]  # where the value of a step is needed; None: everywhere


class Value(NamedTuple):
    """What a step gave: of a map all (B, C, H, W), or the rows (N, C) at some places."""

    value: Any
    places: Places | None = None


@dataclass(eq=False)
class Run:
    """The values of one call.

    Attributes:
        net: whose modules the program names.
        program: what is run.
        arguments: of the call, by name.
        shapes: what is known of the sizes; None where all is computed and filled as a whole, as in training.
        is_normalised: gaps are filled by the weights of what is there rather than over a constant.
        macs: multiply-accumulates of each segment that ran, and what the reference code counts.
    """

    net: nn.Module
    program: Program
    arguments: dict[str, Any]
    shapes: Shapes | None
    is_normalised: bool = False

    def __post_init__(self) -> None:
        self.env: dict[str, Value] = {}
        self._computed: dict[str, Places] = {}  # of convolutions, where they are
        self.macs: list[tuple[int, int]] = []

    def segment(self, number: int, sites: Sites | None) -> None:
        """Run the steps of a segment, at the positions that are left; None for all."""
        needs: Needs | None = None
        if sites is not None and sites.is_everything and self.shapes is not None:
            sites = None  # in training widths take part all the same, so that they always have a gradient
        if sites is not None and self.shapes is not None:
            needs = self._needs(number, sites, self.shapes)
        numbers = self.shapes.numbers if self.shapes is not None else {}
        self.macs.append((0, 0))
        for step in self.program.segments[number]:
            if (
                needs is None or step.name in needs or step.name in numbers
            ):  # others are read for their size alone
                self.env[step.name] = self._run(step, sites, needs)
                self._count(step, sites if needs is not None else None)
            for name in step.frees:
                self.env.pop(name, None)

    def prediction(self, logits: Tensor) -> Tensor:
        """What the network returns of some class scores."""
        last, env = self.program.logits[-1], dict[str, Any]()

        def value_of(name: str) -> Any:
            return logits if name == last else env[name] if name in env else self.env[name].value

        for step in self.program.tail:
            env[step.name] = call(self.net, step, value_of, self.arguments)
        return value_of(self.program.final)

    def logits(self, number: int, sites: Sites | None, before: Tensor | None) -> Tensor:
        """The aggregated class scores of an exit: its own where it was asked, those before it elsewhere; on the finest
        grid there was. Without sites it was asked everywhere, and they are its own."""
        value, places = self.env[self.program.logits[number]]
        if before is None or sites is None:
            return value
        if places is not None and places.size == tuple(before.shape[2:]):
            own, last = sites.at(places.size), before.permute(0, 2, 3, 1)
            rows = last.reshape(-1, last.shape[3]).index_copy(0, own.pixels, self._pick(value, places, own))
            return rows.view(last.shape).permute(0, 3, 1, 2)
        value = self._dense(self.program.logits[number])
        size = finest(tuple(value.shape[2:]), tuple(before.shape[2:]))
        mask = sites.at(size).mask.unsqueeze(1)
        return torch.where(mask, resize(value, size), resize(before, size))

    # -- what is needed where ----------------------------------------------------------------------

    def _needs(self, number: int, sites: Sites, shapes: Shapes) -> dict[str, Places | None]:
        """Where the values of this segment and all that follow are needed, if no later exit leaves more."""
        needs: dict[str, Places | None] = {}

        def add(name: str, places: Places | None) -> None:
            if name in shapes.numbers:
                return
            if places is None or name not in shapes.sizes:
                needs[name] = None
            elif needs.get(name, places) is not None:
                known = needs.get(name, places)
                needs[name] = sites.union(known, places) if known is not None else None

        segments = self.program.segments[number:]
        grid = shapes.sizes[self.program.logits[0]]
        for place, name in enumerate(self.program.logits):
            size = shapes.sizes[name]
            grid = finest(size, grid)
            if place >= number:
                add(name, sites.read_by_resize(sites.at(grid), size))
        for step in reversed([step for segment in segments for step in segment]):
            if step.name not in needs:
                continue
            places = needs[step.name]
            manner, maps = step.manner, [name for name in step.reads if name in shapes.sizes]
            if manner.kind == "conv":
                assert manner.window is not None
                computed = sites.computed(shapes.sizes[step.name], places)
                self._computed[step.name] = computed
                source, *residual = step.reads
                add(source, sites.read_by_window(computed, manner.window, shapes.sizes[source]))
                for name in residual:
                    add(name, None if places is None else sites.union(computed, places))
            elif manner.kind == "whole" or places is None:
                for name in step.reads:
                    add(name, None)
            elif manner.kind == "point":
                for name in step.reads:
                    add(name, places if name in maps and shapes.sizes[name] == places.size else None)
            else:
                size = shapes.sizes[maps[0]]
                window = manner.window
                if manner.kind == "pool" and window is not None:
                    add(maps[0], sites.read_by_window(places, window, size))
                else:
                    add(maps[0], sites.read_by_resize(places, size))
        return needs

    def _count(self, step: Step, sites: Sites | None) -> None:
        """Add the work of a step; of a convolution at the positions that are left their share of it."""
        work = self.shapes.macs[step.name] if self.shapes is not None else 0
        if not work:
            return
        assert self.shapes is not None
        published = work
        if sites is not None and step.manner.kind == "conv":
            size = self.shapes.sizes[step.name]
            count, every = self._computed[step.name].count, sites.batch * size[0] * size[1]
            filling = self.shapes.channels[step.name] * _TAPS * (every - count) * count // every
            work = work * count // every
            published = work + filling
        known = self.macs[-1]
        self.macs[-1] = (known[0] + work, known[1] + published)

    # -- running a step ----------------------------------------------------------------------------

    def _run(self, step: Step, sites: Sites | None, needs: Needs | None) -> Value:
        if self.shapes is not None and step.name in self.shapes.numbers:
            return Value(self.shapes.numbers[step.name])
        if needs is None or sites is None:
            if step.manner.kind == "conv" and sites is not None:
                return Value(self._fill_whole(step, sites))
            return Value(call(self.net, step, lambda name: self.env[name].value, self.arguments))
        places = needs.get(step.name)
        if step.manner.kind == "conv":
            return self._convolve(step, sites, places)
        if step.manner.kind == "point" and places is not None:
            value = call(self.net, step, lambda name: self._column(name, places), self.arguments)
            return Value(_as_rows(value), places)
        if step.target is resize_like:
            assert self.shapes is not None
            return Value(resize(self._dense(step.reads[0]), self.shapes.sizes[step.name]))
        return Value(call(self.net, step, self._dense, self.arguments))

    def _fill_whole(self, step: Step, sites: Sites) -> Tensor:
        """A convolution of a whole map, with all but the positions that are left filled: in training."""
        y = call(self.net, step, lambda name: self.env[name].value, self.arguments)
        mask = sites.computed((y.shape[2], y.shape[3])).mask
        width = getattr(child(self.net, step.manner.origin), "width", None)
        return y * mask.unsqueeze(1) if width is None else gaussian_fill(y, mask, width, self.is_normalised)

    def _convolve(self, step: Step, sites: Sites, needed: Places | None) -> Value:
        """A convolution at the positions that are left, and filled where else it is needed."""
        assert self.shapes is not None and step.manner.window is not None
        size, source = self.shapes.sizes[step.name], step.reads[0]
        computed = self._computed[step.name]
        every = needed if needed is None else sites.union(computed, needed)
        module: Any = child(self.net, step.target)
        before, places = self.env[source]
        of_source = self.shapes.sizes[source]
        kernel = module if isinstance(module, PackedConv) else None
        weights = FusedConv(module.weight, module.bias, module.groups) if kernel is None else kernel.weights
        reads: WindowRead | Reading
        if step.manner.window.is_pointwise and of_source == size and weights.groups == 1:
            rows = _as_rows(before) if places is None else before  # a product, of rows where they lie
            reads = (places or sites.everywhere(size)).reading_of(computed)
        else:
            wanted = None if places is None else sites.read_by_window(computed, step.manner.window, of_source)
            rows = _as_rows(before) if wanted is None else self._pick(before, places, wanted)
            reads = sites.between(of_source, wanted, step.manner.window, computed)
        residual = None if len(step.reads) < 2 else self._at(step.reads[1], every)
        if every is computed:
            return Value(compute(Convolution(rows, weights, reads, residual=residual)), every)
        out = compute(Convolution(rows, weights.without_activation, reads))
        width = getattr(kernel or module, "width", None)
        floor: Any = getattr(kernel, "floor", None)
        some = Elements(out, sites.lattice(size, computed))
        if width is not None:
            options: Any = {"residual": residual, "activation": weights.activation}
            whole = sites.lattice(size, every)
            out = fill_gaps(some, whole, width, self.is_normalised, floor, **options).rows
        else:
            out = weights.finish(self._leave_zero(some, sites, computed, every, floor), residual)
        return Value(out, every) if every is not None else Value(_as_map(out, sites.batch, size))

    def _leave_zero(
        self, x: Elements, sites: Sites, computed: Places, every: Places | None, floor: Tensor | None
    ) -> Tensor:
        """The rows of all positions wanted, the floor where nothing was computed."""
        whole = every if every is not None else sites.everywhere(x.lattice.size)
        out = x.rows.new_zeros(whole.count, x.rows.shape[1])
        out = out if floor is None else out + floor
        return out.index_copy(0, whole.rows[computed.pixels], x.rows)

    # -- values in the form that is wanted ---------------------------------------------------------

    def _pick(self, rows: Tensor, have: Places | None, want: Places) -> Tensor:
        """The rows at some places, of a value at more of them or everywhere."""
        if have is want:
            return rows
        if have is None:
            return _as_rows(rows).index_select(0, want.pixels)
        return rows.index_select(0, have.places_of(want))

    def _at(self, name: str, places: Places | None) -> Tensor:
        """The rows of a value at some places, or all."""
        value, have = self.env[name]
        if places is None:
            return _as_rows(self._dense(name))
        return self._pick(value, have, places)

    def _column(self, name: str, places: Places) -> Any:
        """A value at some places as a map (1, C, N, 1), on which what acts on each position alone is called."""
        value, have = self.env[name]
        if have is None and not (isinstance(value, Tensor) and value.dim() == 4):
            return value
        if have is None and tuple(value.shape[2:]) != places.size:  # a vector for each image
            rows = value.flatten(1)
            rows = rows.expand(len(places.images), -1) if len(rows) == 1 else rows[places.images]
            return rows.view(1, len(rows), 1, rows.shape[1]).permute(0, 3, 1, 2)
        rows = self._pick(value, have, places)
        return rows.view(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2)

    def _dense(self, name: str) -> Any:
        """A value as a map; where it is known at some places alone, zero elsewhere, which nothing needed reads."""
        value, places = self.env[name]
        if places is None:
            return value
        batch, (height, width) = places.mask.shape[0], places.size
        out = value.new_zeros(batch * height * width, value.shape[1]).index_copy(0, places.pixels, value)
        return _as_map(out, batch, places.size)


def finest(one: tuple[int, ...], other: tuple[int, ...]) -> Size:
    """The size of more positions; of as many the first."""
    height, width = other if other[0] * other[1] > one[0] * one[1] else one
    return height, width


def _as_rows(image: Tensor) -> Tensor:
    """The rows (B*H*W, C) of a map, a view if it is channels_last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _as_map(rows: Tensor, batch: int, size: Size) -> Tensor:
    """Rows of all positions as a map (B, C, H, W)."""
    return rows.view(batch, *size, rows.shape[1]).permute(0, 3, 1, 2)
