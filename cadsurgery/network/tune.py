"""Tuning of a network in 8 bits, without labels: its outputs are brought nearer to those of the network in float.

What multiplies bytes is simulated by whole numbers in floating point, on the same grids and in the same order of steps,
and rounding passes gradients on as they are (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). So
the biases are trained on images without labels, end to end, against what the network in float gives for them: what
rounding and the ends of grids shift on average, in all layers together, is put right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.backends.choose import Between, Convolution, compute, extend, select_rows
from cadsurgery.elements.backends.integer import LARGEST_WEIGHT, MOST, Grid
from cadsurgery.elements.backends.integer_layers import (
    IntegerConv,
    IntegerLinear,
    from_bytes,
    max_pool_bytes,
    to_bytes,
)
from cadsurgery.elements.backends.weights import Weights
from cadsurgery.elements.elements import Elements, common_lattice, rows_on
from cadsurgery.elements.kernel_map import Window, read_rows
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.windows import target_of
from cadsurgery.network.fuse import KERNELS
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.network.quantise import Quantisation, Tuning, batches_of, difference_of, outputs_of
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CannotConvert

# Of Adam: its rate, in the units of `SimulatedLayer`, how it remembers, and steps of warming up.
_RATE, _MEMORY, _WARM = 5e-4, (0.9, 0.99), 5
_APART, _MOST_APART = 4, 8  # one of so many images is kept apart, up to so many
_CHECKS = 4  # so often what was tuned is compared on these
_MIXING = (functional.to_dense, functional.max_pool2d)
_PASSING = (functional.to_elements, rows_on, Elements, torch.cat)


class SimulatedLayer(nn.Module):
    """A layer in 8 bits on whole numbers in floating point, with gradients; called on a dense map, see `IntegerConv`.

    Attributes:
        weight: (O, C / groups, kh, kw), whole numbers.
        bias: (O,), what is trained, in units of which small steps of one size suit all: the largest weight times a step
            of what the layer reads.
    """

    def __init__(self, kernel: IntegerConv) -> None:
        """Take the layer."""
        super().__init__()
        known = kernel.weights
        assert known.bias is not None
        self.known, self.kind, self.window = known, type(kernel), kernel.window
        self.scale = known.scale * known.source.scale  # of the sums
        self.unit = self.scale * LARGEST_WEIGHT
        self.weight = known.weight.float()
        self.bias = nn.Parameter(known.bias / self.unit)

    @torch.no_grad()
    def make(self) -> IntegerConv:
        """The layer in 8 bits."""
        return self.kind(replace(self.known, bias=self.bias * self.unit, forms={}), self.window)

    def forward(self, image: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of a dense map (B, C, H, W); of a linear layer values (..., C)."""
        centred = image - self.known.source.zero
        if issubclass(self.kind, IntegerLinear):
            return self._finish(F.linear(centred, self.weight.flatten(1)), residual, (-1,))
        assert self.window is not None
        sums = F.conv2d(centred, self.weight, None, *self.window, self.known.groups)
        return self._finish(sums, residual, (-1, 1, 1))

    def on_elements(
        self,
        x: Elements,
        residual: Elements | None,
        window: Window,
        stage: int | Lattice | None,
        size: Sequence[int] | None = None,
    ) -> Elements:
        """Of elements, see `functional.fused_conv2d`."""
        window, target = target_of(x, window, x.lattice.stage if stage is None else stage, size)
        weights, zero = Weights(self.weight, None, self.known.groups), self.known.source.zero
        if window.is_pointwise and weights.groups == 1:
            work = Convolution(select_rows(x.rows, x.lattice, target) - zero, weights, None)
        else:
            reading = Between(x.lattice, target, window).reading
            rows = _round(extend(x.rows, reading, float(zero)))  # those between elements are mixed
            work = Convolution(rows - zero, weights, read_rows(reading.table))
        product, more = Elements(compute(work), target), None
        if residual is not None:
            target = common_lattice(target.stage if target.part is None else target, product, residual)
            more = rows_on(residual, target)
        return Elements(self._finish(rows_on(product, target), more, (-1,)), target)

    def _finish(self, sums: Tensor, residual: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """What becomes of sums, see `IntegerWeights.finish`."""
        known = self.known
        value = sums * self.scale.view(shape) + (self.bias * self.unit).view(shape)
        if residual is not None:
            value = value + (residual if known.more is None else _values(residual, known.more))
        if known.activation is not None:
            value = known.activation.apply_(value)
        return value if known.out is None else _numbers(value, known.out)


class Simulation(GraphInterpreter):
    """Runs the graph of a copy in 8 bits with simulated layers: what are bytes there are whole numbers here."""

    def __init__(self, program: Program, layers: dict[str, SimulatedLayer]) -> None:
        """Take the copy's program, and its layers by the names of their kernels."""
        super().__init__(program, program.graph)
        self.layers = layers
        self.mixed = {node for node in self._in_bytes(program.graph) if node.target in _MIXING}

    def _in_bytes(self, graph: fx.Graph) -> set[fx.Node]:
        """Nodes whose values are bytes in the copy."""
        found = set[fx.Node]()
        for node in graph.nodes:
            holder: Any = node.args[1] if node.target is functional.fused_conv2d else node
            layer = self._layer(str(holder.target)) if isinstance(holder, fx.Node) else None
            is_made = node.target in (to_bytes, max_pool_bytes)
            if layer is not None:
                is_made = layer.known.out is not None and node.op != "get_attr"
            if is_made or (node.target in (*_MIXING, *_PASSING) and found & set(node.all_input_nodes)):
                found.add(node)
        return found

    def fetch_attr(self, target: str) -> Any:
        """What the graph names, a simulated layer for one in 8 bits."""
        return self._layer(target) or super().fetch_attr(target)

    def _layer(self, path: str) -> SimulatedLayer | None:
        holder, _, name = path.partition(".")
        return self.layers.get(name) if holder == KERNELS else None

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; bytes that were mixed are rounded."""
        value = super().run_node(n)
        if n not in self.mixed:
            return value
        return replace(value, rows=_round(value.rows)) if isinstance(value, Elements) else _round(value)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function gives, of whole numbers for bytes."""
        if target is functional.fused_conv2d and isinstance(args[1], SimulatedLayer):
            return args[1].on_elements(args[0], *args[2:], **kwargs)
        if target is to_bytes:
            return _numbers(args[0], Grid(*args[1:]))
        if target is from_bytes:
            return _values(args[0], Grid(*args[1:]))
        return super().call_function(F.max_pool2d if target is max_pool_bytes else target, args, kwargs)


def simulate(program: Program, layers: dict[str, SimulatedLayer], image: Tensor, lattice: Lattice) -> Any:
    """What a simulated copy gives for an image batch on a lattice."""
    arguments = program.bind(image)
    inputs = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"][1:]
    output, _ = Simulation(program, layers).run(lambda *_: lattice, *(arguments.get(name) for name in inputs))
    return program.contain(output)


def simulated_layers(fast: AdaptiveModel) -> dict[str, SimulatedLayer]:
    """The layers of a copy in 8 bits by the names of their kernels."""
    found = getattr(fast, KERNELS).named_children()
    return {name: SimulatedLayer(kernel) for name, kernel in found if isinstance(kernel, IntegerConv)}


def tune_copy(fast: AdaptiveModel, whole: AdaptiveModel, calibration: Any, steps: int) -> Quantisation:
    """Tune a copy in 8 bits, in place, so that it gives what the copy in float gives.

    Args:
        fast: as `quantise` left it.
        whole: the same in float.
        calibration: image batches (B, C, H, W), of which every fourth image, up to 8, is kept apart: on these the
            copy is compared, and left as it was at the step that came nearest. All are run with the network's own
            mask.
        steps: of Adam, on one of the other images each.

    Returns:
        What is known of the copy, with its error on the images that were kept apart.

    Raises:
        CannotConvert: the outputs have no gradients.
    """
    images = [image for batch in batches_of(calibration) for image in batch.split(1)]
    every = max(_APART, math.ceil(len(images) / _MOST_APART))
    apart = images[::every]
    others = [image for place, image in enumerate(images) if place % every] or images
    layers, kernels = simulated_layers(fast), getattr(fast, KERNELS)

    def install(made: dict[str, IntegerConv]) -> float:
        for name, kernel in made.items():
            setattr(kernels, name, kernel)
        found, expected = (map(partial(outputs_of, net), apart) for net in (fast, whole))
        return difference_of(found, expected)

    best, kept = {name: getattr(kernels, name) for name in layers}, 0
    before = error = install(best)
    for step in _train(fast, whole, layers, others, steps):
        if step % max(1, steps // _CHECKS) and step < steps:
            continue
        made = {name: layer.make() for name, layer in layers.items()}
        found = install(made)
        if found < error:
            best, error, kept = made, found, step
    install(best)
    tuning = Tuning(steps, kept, len(others), before)
    return replace(fast.quantisation, error=error, images=len(apart), tuning=tuning)


def _train(
    fast: AdaptiveModel,
    whole: AdaptiveModel,
    layers: dict[str, SimulatedLayer],
    images: Sequence[Tensor],
    steps: int,
) -> Iterator[int]:
    """Train simulated layers, and tell the number of each step that was done."""
    adam = torch.optim.Adam([layer.bias for layer in layers.values()], betas=_MEMORY)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / _WARM) * math.cos(math.pi * step / steps / 2) ** 2
        adam.zero_grad()
        _learn(fast.program, whole, layers, images[step % len(images)])
        adam.step()
        yield step + 1


def _learn(program: Program, whole: AdaptiveModel, layers: dict[str, SimulatedLayer], image: Tensor) -> None:
    """Add the gradients of how far the outputs for an image are apart, relative to their size."""
    lattice = whole.program.find_lattice(whole.program.masking(whole.mask), image)
    with torch.no_grad():
        expected, _ = whole.program(lambda *_: lattice, whole.program.bind(image))
    try:
        found = simulate(program, layers, image, lattice)
        apart = [
            (less - exact).square().mean() / exact.square().mean().clamp(min=torch.finfo(exact.dtype).tiny)
            for less, exact in zip(tensors_of(found), tensors_of(expected), strict=True)
            if less.is_floating_point()
        ]
        torch.stack(apart).sum().backward()
    except RuntimeError as error:
        raise CannotConvert(
            "the network in 8 bits cannot be tuned.",
            why=f"what it computes has no gradients: {str(error).splitlines()[0]}",
            next="leave tune out.",
        ) from error


def _round(values: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Whole numbers, between two of them, with the gradient of the values."""
    values = values if low is None else values.clamp(low, high)
    return values + (values.detach().round() - values.detach())


def _numbers(values: Tensor, grid: Grid) -> Tensor:
    """The numbers of a grid that stand for values, in floating point."""
    return _round(values / grid.scale + grid.zero, 0, MOST)


def _values(numbers: Tensor, grid: Grid) -> Tensor:
    """What numbers of a grid stand for."""
    return (numbers - grid.zero) * grid.scale
