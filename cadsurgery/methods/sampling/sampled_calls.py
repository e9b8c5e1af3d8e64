"""One call of a sampled network: it runs step by step and computes gated convolutions where their gate is open.

In evaluation the steps that a gate controls are computed for the open positions only, and the map is then filled from
these rows. An affine pointwise operation, such as a bottleneck's last convolution, commutes with filling and is
therefore computed before it. If most of a map is open, all of it is computed, see `WHOLE_FROM`. In training everything
is computed, and each position is weighted by its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from cadsurgery.elements.axes import as_column, as_map, as_rows, by_position
from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.backends.weights import Activation
from cadsurgery.elements.backends.works import Convolution
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.functional import fill_gaps, gaussian_fill
from cadsurgery.following.arguments import contain
from cadsurgery.following.hooks import child
from cadsurgery.methods.positions import Maps, Places
from cadsurgery.methods.program import ProgramStep, call, weights_of
from cadsurgery.methods.sampling.gates import Gate, scores
from cadsurgery.methods.sampling.program import SampledProgram, reconstruct

# From this share of open positions the whole map is computed and filled in place. There both ways took equally long in
# MobileNetV2 (`python -m benchmarks.sides gates`); in ResNet-50 computing open positions was a little faster.
WHOLE_FROM = 0.95


class Rows(NamedTuple):
    """A value at the open positions of a gate, before its gaps are filled.

    Attributes:
        rows: (N, C).
        gate: number of the gate.
        is_last: True if the map that the rows belong to is channels-last.
        is_filled: True after the `reconstruct` node, although the filling itself is still postponed.
        baseline: (C,), value of positions far from all open positions; None for zeros.
    """

    rows: Tensor
    gate: int
    is_last: bool
    is_filled: bool = False
    baseline: Tensor | None = None


@dataclass(eq=False)
class SampledRun:
    """The values of one call of a `SampledModel`.

    Attributes:
        net: the network.
        arguments: arguments of the call, by name.
        shares: share (B, h, w) of each gate.
        open: mean probability of each gate.
    """

    net: Any
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        self.program: SampledProgram = self.net.program
        self.gates: Sequence[Gate] = self.net.gates
        self.is_dense: bool = self.net.is_dense
        self.env: dict[str, Any] = {}
        self.shares: dict[int, Tensor] = {}
        self.open: dict[int, Tensor] = {}
        self.places: dict[int, Places] = {}  # of gates whose open positions are computed separately
        self.maps: dict[int, Maps] = {}  # by batch

    def __call__(self) -> Any:
        """Run all steps and return the output."""
        for step in self.program.steps:
            self.env[step.name] = self._run(step)
            if step.name in self.program.readers and not self.is_dense:
                self._ask(self.program.readers[step.name], self._dense(step.name))
            for name in step.frees:
                del self.env[name]
        (output,), _ = self.program.output.bind(self._dense)
        for values in (self.env, self.places, self.maps):
            values.clear()
        return contain(output, self.program.container)

    def _ask(self, numbers: tuple[int, ...], x: Tensor) -> None:
        gates = [self.gates[number] for number in numbers]
        strides = [self.program.gates[number].stride for number in numbers]
        for number, score in zip(numbers, scores(x, gates, strides), strict=True):
            self.open[number], self.shares[number] = self.net.decide(number, score)
            if not self.net.training and self._is_settled(number):
                self._choose(number, self.shares[number] > 0)

    def _choose(self, number: int, is_open: Tensor) -> None:
        """Store where a gate is open, unless the whole map is to be computed."""
        count = int(is_open.sum())
        if not count:  # compute one position, which has a share of zero
            is_open[0, 0, 0] = True
        if count < WHOLE_FROM * is_open.numel():
            self.places[number] = Places(is_open)
            self.maps.setdefault(len(is_open), Maps(len(is_open), is_open.device))

    def _is_settled(self, number: int) -> bool:
        """Return True if all modules of a chain are in evaluation mode; in training some are not pointwise."""
        steps = (step for step in self.program.chains[number].steps if step.op == "call_module")
        modules = (child(self.net, step.target) for step in steps)
        return not any(module is not None and module.training for module in modules)

    # -- a step ------------------------------------------------------------------------------------

    def _run(self, step: ProgramStep) -> Any:
        source = self.program.follows.get(step.name, "")
        if self.program.convs.get(step.name, -1) in self.places:
            return self._convolve(step, self.program.convs[step.name])
        if isinstance(self.env.get(source), Rows):
            return self._on_rows(step, source, self.env[source])
        value = call(self.net, step, self._dense, self.arguments)
        if step.target is reconstruct and not self.is_dense:
            number = step.kwargs["gate"]
            share, is_last = self.shares[number], self.program.chains[number].is_channels_last
            if self.net.training or not bool((share == 1).all()):
                image = value.permute(0, 3, 1, 2) if is_last else value
                image = gaussian_fill(image, share, self.gates[number].width, normalised=True)
                value = image.permute(0, 2, 3, 1) if is_last else image
        return value

    def _convolve(self, step: ProgramStep, number: int) -> Rows:
        gated, places = self.program.gates[number], self.places[number]
        x = by_position(self._dense(step.reads[0]), gated.is_linear)
        reads = self.maps[len(x)].reading((x.shape[1], x.shape[2]), None, gated.window, places)
        weights = weights_of(child(self.net, step.target))
        return Rows(compute(Convolution(x.flatten(0, 2), weights, reads)), number, gated.is_linear)

    def _on_rows(self, step: ProgramStep, source: str, x: Rows) -> Any:
        """Run a pointwise step on rows; a fused residual and activation are applied after the filling."""
        if step.target is reconstruct:
            return x._replace(is_filled=True)
        if step.spatial.kind == "permute":
            return x._replace(is_last=not x.is_last)
        kernel = child(self.net, step.target) if step.op == "call_module" else None

        def apply(rows: Tensor) -> Tensor:
            if isinstance(kernel, PackedConv):
                return compute(Convolution(rows, kernel.weights.without_activation, None))
            column = as_column(rows, x.is_last)

            def value_of(name: str) -> Any:
                return column if name == source else self._dense(name)

            value = call(self.net, step, value_of, self.arguments)
            return as_rows(value, x.is_last)

        y = x._replace(rows=apply(x.rows))
        if x.is_filled:
            baseline = x.rows.new_zeros(1, x.rows.shape[1]) if x.baseline is None else x.baseline.unsqueeze(0)
            y = y._replace(baseline=apply(baseline).squeeze(0))
        if not isinstance(kernel, PackedConv) or (len(step.reads) < 2 and kernel.activation is None):
            return y
        more = self._dense(step.reads[1]) if len(step.reads) > 1 else None
        if more is None or (more.dim() == 4 and more.dtype == y.rows.dtype):
            return self._fill(y, more, kernel.activation)
        value = self._fill(y) + more
        return value if kernel.activation is None else kernel.activation.apply_(value)

    def _fill(self, x: Rows, more: Tensor | None = None, activation: Activation | None = None) -> Tensor:
        """Return the whole map with gaps filled from the open positions."""
        places, share = self.places[x.gate], self.shares[x.gate]
        if more is not None:
            more = by_position(more, x.is_last).expand(*share.shape, x.rows.shape[1]).flatten(0, 2)
        maps, some = self.maps[len(share)], share.flatten()[places.pixels]
        filled = fill_gaps(
            Elements(x.rows, maps.lattice(places.size, places)),
            maps.lattice(places.size),
            self.gates[x.gate].width,
            normalised=True,
            baseline=x.baseline,
            shares=some if bool((some < 1).any()) else None,
            residual=more,
            activation=activation,
        )
        return as_map(filled.rows, len(share), places.size, x.is_last)

    def _dense(self, name: str) -> Any:
        value = self.env[name]
        if isinstance(value, Rows):
            self.env[name] = value = self._fill(value)
        return value
