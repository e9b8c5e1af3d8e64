"""One call of a sampled network: step after step, convolutions with a gate where it is open.

In evaluation what a gate decides of is computed for the rows of the positions that are open, and the map that follows
is filled from those: an affine operation on each position alone, such as a bottleneck's last convolution, commutes with
filling, so it comes before. Where most of a map is open, all of it is computed: see `WHOLE_FROM`. In training all is
computed, and each position counts by its share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.elements.backends.choose import Convolution, compute
from cadsurgery.elements.backends.packed import PackedConv, PackedLinear
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.functional import fill_gaps, gaussian_fill
from cadsurgery.elements.gaps import resolution
from cadsurgery.elements.kernel_map import Reading, Window, read_rows
from cadsurgery.elements.lattice import Lattice
from cadsurgery.methods.sampling.branches import CHANNELS_FIRST, CHANNELS_LAST
from cadsurgery.methods.sampling.gates import Gate, decided, scores, shares, uniform
from cadsurgery.methods.sampling.program import Program, Segment
from cadsurgery.methods.steps import Step, call
from cadsurgery.surgery.hooks import child, parameter

# From this share of open positions on the whole map is computed, and filled in place: where both took as long
# (`python benchmarks/sampling.py --choice`) in MobileNetV2; in ResNet-50 chosen positions were a little faster there.
WHOLE_FROM = 0.95


@dataclass(frozen=True)
class Deciding:
    """How gates decide in a call.

    Attributes:
        temperature: None: each gate's own, as in training.
        noise: numbers that it depends on, such as seed and step; None for no noise.
        grid: distance of the positions that are always computed; 0 for none.
        instead: what stands for the score (B, h, w) of a gate, by its number; None: nothing does.
    """

    temperature: float | None
    noise: tuple[int, ...] | None
    grid: int
    instead: Callable[[int, Tensor], Tensor] | None = None


@dataclass(eq=False)
class Run:
    """The values of one call.

    Attributes:
        net: whose modules the program names.
        gates: of the program.
        program: what is run.
        arguments: of the call, by name.
        deciding: how its gates decide; None: they are not asked, and everything is computed.
        tables: kernel maps of whole maps, by size; they are remembered.
        shares: (B, h, w) of each gate.
        open: the mean probability of each gate.
    """

    net: nn.Module
    gates: tuple[Gate, ...]
    program: Program
    arguments: dict[str, Any]
    deciding: Deciding | None
    tables: Callable[[Any, Callable[[], Tensor]], Tensor]

    def __post_init__(self) -> None:
        self.env: dict[str, Any] = {}
        self.shares: dict[int, Tensor] = {}
        self.open: dict[int, Tensor] = {}

    def __call__(self) -> Any:
        """What the network returns."""
        for run, frees in self.program.items:
            last = run.steps[-1].name if isinstance(run, Segment) else run.name
            self.env[last] = self._segment(run) if isinstance(run, Segment) else self._step(run)
            if last in self.program.at and self.deciding is not None:
                self._ask(self.program.at[last], self.env[last], self.deciding)
            for name in frees:
                del self.env[name]
        (output,), _ = self.program.output.bind(self.env.__getitem__)
        return self.program.contain(output)

    def _step(self, step: Step, **known: Any) -> Any:
        return call(
            self.net, step, lambda name: known[name] if name in known else self.env[name], self.arguments
        )

    def _ask(self, numbers: tuple[int, ...], x: Tensor, deciding: Deciding) -> None:
        """Let the gates that read a value decide."""
        gates = [self.gates[number] for number in numbers]
        strides = [self.program.gates[number].stride for number in numbers]
        for number, gate, score in zip(numbers, gates, scores(x, gates, strides), strict=True):
            score = score if deciding.instead is None else deciding.instead(number, score)
            noise = uniform((*deciding.noise, number), score) if deciding.noise is not None else None
            temperature = gate.temperature.clone() if deciding.temperature is None else deciding.temperature
            share = shares(score, temperature, noise, deciding.grid)
            self.open[number] = score.sigmoid().mean()
            self.shares[number] = share if self.net.training else decided(share)

    # -- a segment ---------------------------------------------------------------------------------

    def _segment(self, segment: Segment) -> Any:
        if self.deciding is None:
            return self._whole(segment, lambda value: value)
        share = self.shares[segment.gate]
        width, layout = self.gates[segment.gate].width, self.program.gates[segment.gate].layout
        if self.net.training or not self._is_settled(segment):
            return self._whole(segment, lambda value: _fill_map(value, share, width, layout))
        is_open = share > 0
        count, every = int(is_open.sum()), share.numel()
        if count == every and not bool((share < 1).any()):
            return self._whole(segment, lambda value: value)
        lattice = resolution(share.shape[0], share.shape[1], share.shape[2], share.device)
        if count >= WHOLE_FROM * every:
            return self._whole(
                segment, lambda value: _fill_whole(value, lattice, share.flatten(), width, layout)
            )
        if not count:  # one position counts with a share of zero
            is_open = torch.zeros_like(is_open)
            is_open[0, 0, 0] = True
        part = lattice.choose(is_open)
        some = share.flatten()[part.anchors]
        return self._at(segment, part, some if bool((some < 1).any()) else None, width)

    def _is_settled(self, segment: Segment) -> bool:
        """Whether all its modules are in evaluation mode: else they do not act on each position alone."""
        modules = (child(self.net, step.target) for step in segment.steps if step.op == "call_module")
        return not any(module is not None and module.training for module in modules)

    def _whole(self, segment: Segment, fill: Callable[[Tensor], Tensor]) -> Any:
        """All steps on whole maps."""
        value: Any = None
        known: dict[str, Any] = {}
        for step in segment.steps:
            value = fill(value) if step is segment.fill else self._step(step, **known)
            known = {step.name: value}
        return value

    def _at(self, segment: Segment, part: Lattice, some: Tensor | None, width: Tensor) -> Any:
        """All steps at the positions that are open; the map that follows is filled."""
        layout = self.program.gates[segment.gate].layout
        rows = self._convolve(segment.conv, self.program.gates[segment.gate].window, part)
        first = CHANNELS_LAST if self._is_linear(segment.conv) else CHANNELS_FIRST
        rows = self._along(rows, segment.tail, segment.conv, (first, layout))
        floor, activation = None, segment.activation
        if segment.end:
            ends = (segment.end, segment.fill, (layout, segment.layout))
            floor = self._along(rows.new_zeros(1, rows.shape[1]), *ends).flatten()
            rows = self._along(rows, *ends)
            kernel = child(self.net, segment.end[-1].target) if segment.end[-1].op == "call_module" else None
            activation = kernel.activation if isinstance(kernel, PackedConv) else activation
        more: Any = self.env[segment.other] if segment.other else None
        image = (part.batch, *part.size, rows.shape[1])
        is_map = isinstance(more, Tensor) and more.dim() == 4 and more.dtype == rows.dtype
        folds = is_map and tuple(_by_position(more, segment.layout).shape) == image
        filled = fill_gaps(
            Elements(rows, part),
            part.whole,
            width,
            normalised=True,
            floor=floor,
            shares=some,
            residual=_rows(more, segment.layout) if folds else None,
            activation=activation if folds or not segment.other else None,
        )
        value = filled.rows.view(image)
        value = value.permute(0, 3, 1, 2) if segment.layout == CHANNELS_FIRST else value
        if folds or not segment.other:
            return value
        if segment.add is None:  # within the last kernel
            value = value + more
            return value if activation is None else activation.apply_(value)
        value = self._step(segment.add, **{(segment.end or (segment.fill,))[-1].name: value})
        return value if segment.act is None else self._step(segment.act, **{segment.add.name: value})

    def _along(self, rows: Tensor, steps: tuple[Step, ...], before: Step, layouts: tuple[str, str]) -> Tensor:
        """Rows after operations that act on each position alone, from one layout to another; a residual that the last
        one adds is left to the filling."""
        value = _column(rows, layouts[0])
        for step in steps:
            kernel = child(self.net, step.target) if step.op == "call_module" else None
            if isinstance(kernel, PackedConv) and len(step.reads) > 1:
                layout = CHANNELS_LAST if isinstance(kernel, PackedLinear) else CHANNELS_FIRST
                product = Convolution(_rows(value, layout), kernel.weights.without_activation, None)
                value = _column(compute(product), layout)
            else:
                value = self._step(step, **{before.name: value})
            before = step
        return _rows(value, layouts[1])

    def _convolve(self, step: Step, window: Window, part: Lattice) -> Tensor:
        """Rows (N, O) of a convolution or linear layer at some positions of its output."""
        module: Any = child(self.net, step.target)
        x = _by_position(self.env[step.reads[0]], CHANNELS_LAST if self._is_linear(step) else CHANNELS_FIRST)
        reading = self._reading(window.fit((x.shape[1], x.shape[2])), (x.shape[1], x.shape[2]), part)
        if isinstance(module, PackedConv):
            weights = module.weights
        else:
            weight, bias = parameter(module, "weight"), parameter(module, "bias")
            wide = weight if weight.dim() == 4 else weight[:, :, None, None]
            weights = FusedConv(wide, bias, getattr(module, "groups", 1))
        return compute(Convolution(x.flatten(0, 2), weights, reading))

    def _is_linear(self, step: Step) -> bool:
        return isinstance(child(self.net, step.target), (nn.Linear, PackedLinear))

    def _reading(self, window: Window, size: tuple[int, int], part: Lattice) -> Reading:
        """Where some positions of a convolution's output read a map of a size."""
        if window.is_pointwise and size == part.size:
            return read_rows(part.anchors.int().unsqueeze(1))
        key = (part.batch, size, part.size, window, part.anchors.device)
        table = self.tables(key, lambda: _table(window, part.batch, size, part.size, part.anchors.device))
        return read_rows(table.index_select(0, part.anchors), has_outside=True)


def _table(
    window: Window, batch: int, before: tuple[int, int], after: tuple[int, int], device: torch.device
) -> Tensor:
    """(B*h*w, taps) int32: the positions of maps of a size that a window reads for each position of its output; their
    number where that lies outside."""
    ends = []
    for axis, (length, count) in enumerate(zip(before, after, strict=True)):
        taps = torch.arange(window.kernel[axis], device=device) * window.dilation[axis]
        first = torch.arange(count, device=device) * window.stride - window.padding[2 * axis]
        at = first.unsqueeze(1) + taps
        ends.append((at, (at >= 0) & (at < length)))
    (y, in_y), (x, in_x) = ends
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * before[0]
    places = (image + y[:, None, :, None]) * before[1] + x[None, :, None, :]
    inside = in_y[:, None, :, None] & in_x[None, :, None, :]
    return torch.where(inside, places, batch * before[0] * before[1]).int().flatten(3).flatten(0, 2)


def _by_position(value: Tensor, layout: str) -> Tensor:
    """A map as (B, H, W, C)."""
    return value.permute(0, 2, 3, 1) if layout == CHANNELS_FIRST else value


def _rows(value: Tensor, layout: str) -> Tensor:
    """A map as rows (B*H*W, C), a view if it is so in memory."""
    return _by_position(value, layout).flatten(0, 2)


def _column(rows: Tensor, layout: str) -> Tensor:
    """Rows (N, C) as a map of one column, on which what acts on each position alone is called."""
    by_position = rows.reshape(1, rows.shape[0], 1, rows.shape[1])
    return by_position.permute(0, 3, 1, 2) if layout == CHANNELS_FIRST else by_position


def _fill_map(value: Tensor, share: Tensor, width: Tensor, layout: str) -> Tensor:
    """A map that was computed as a whole, filled by the share of each position."""
    if layout == CHANNELS_FIRST:
        return gaussian_fill(value, share, width, normalised=True)
    filled = gaussian_fill(value.permute(0, 3, 1, 2), share, width, normalised=True)
    return filled.permute(0, 2, 3, 1)


def _fill_whole(value: Tensor, lattice: Lattice, share: Tensor, width: Tensor, layout: str) -> Tensor:
    """The same where most of it is open: nothing is gathered before."""
    x = Elements(_rows(value, layout), lattice)
    rows = fill_gaps(x, lattice, width, normalised=True, shares=share).rows
    image = rows.view(lattice.batch, *lattice.size, rows.shape[1])
    return image.permute(0, 3, 1, 2) if layout == CHANNELS_FIRST else image
