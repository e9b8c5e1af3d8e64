"""Run uniform levels through the region in parallel and blend the results, so that a learned mask gets a gradient.

The network runs on one uniform lattice per level (a path). Where a map leaves the region, the results of the paths are
summed with the weights of a soft level map (Hesse et al., CVPRW 2023, supplementary; `ad_e2e_resnet.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.axes import NCHW
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.resizing import read_as_resized
from cadsurgery.following.graphs import gives
from cadsurgery.masks.provider import FineMapSpec
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.torch_internals import BatchNorm
from cadsurgery.surgery.rewrite import ask_mask

_PLAIN = (int, float, str, torch.Size, torch.dtype, torch.device, type(None))
Weigh = Callable[[Tensor, FineMapSpec], Tensor]


@dataclass(frozen=True)
class _Paths:
    """The values of a node on all paths, the highest resolution first."""

    values: tuple[Any, ...]


def blend(net: AdaptiveModel, inputs: tuple[Any, ...], weigh: Weigh, *, separate: bool = True) -> Any:
    """Return the network's output with blended levels.

    If the weights are one for a level and zero for the others, the output is `net(*inputs, mask=level everywhere)`.

    Args:
        net: an adaptive network.
        inputs: arguments of the call.
        weigh: function from the features that enter the region (B, C, h, w) and their grid to weights
            (B, levels, h, w) that sum to one over the levels.
        separate: True updates batch norm's running statistics only on the lowest path (as published), whose statistics
            the adaptive network then uses; False updates them on all paths, one after another.

    Raises:
        InvalidInput: the weights have another shape.
    """
    program = net.program
    values = program.before(program.bind(*inputs))
    features = values[program.halves.features]
    grid = program.masking(net.mask).grid(features)
    weights = weigh(features, grid)
    levels = range(net.geometry.max_level + 1)
    expected = (grid.batch, len(levels), *grid.size)
    if tuple(weights.shape) != expected:
        raise InvalidInput(
            f"the weights of the levels have shape {tuple(weights.shape)}.", next=f"give {expected}."
        )
    lattices = tuple(program.geometry.uniform_like(features, level) for level in levels)
    output = _Runner(program, weights, lattices, separate).run(None, *values)
    return program.contain(output)


class _Runner(GraphInterpreter):
    """Runs the second half of a rewritten graph, with one value per path where the paths differ."""

    def __init__(
        self, program: Program, weights: Tensor, lattices: tuple[Lattice, ...], separate: bool
    ) -> None:
        super().__init__(program, program.halves.after)
        self.weights, self.lattices, self.separate = weights, lattices, separate
        self.rows: set[fx.Node] = set()  # values with one row per element
        self.left: set[fx.Node] = set()  # maps that left the region, and values computed from them

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node, or its values on all paths."""
        if n.target is ask_mask:
            return _Paths(self.lattices)
        if n.op == "output":
            return self._plain(n.args[0][0])  # type: ignore[index]
        if n.op in ("placeholder", "get_attr"):
            return super().run_node(n)
        self._mark(n)
        inputs = {source: self.env[source] for source in n.all_input_nodes}
        if self.left & inputs.keys() and not any(map(self._in_region, inputs, inputs.values())):
            # Vectors of several paths are combined with a map that has left the region.
            inputs = {source: self._join(value) for source, value in inputs.items()}
        if not any(isinstance(value, _Paths) for value in inputs.values()):
            return self._call(n, inputs.__getitem__)
        norms = self._norms(n, inputs.values()) if self.separate else []
        results = []
        for path in range(self.weights.shape[1]):

            def on_path(source: fx.Node, path: int = path) -> Any:
                value = inputs[source]
                return value.values[path] if isinstance(value, _Paths) else value

            low = path + 1 == self.weights.shape[1]
            with _untrack([] if low else norms):
                results.append(self._call(n, on_path))
        if gives(n, "dense"):
            arguments = fx.map_arg(n.kwargs, lambda source: on_path(source, 0))
            return self._blend(n, inputs[n.args[0]].values, results, arguments)  # type: ignore[index]
        if n.target is functional.to_elements:  # a view shared by all paths, which may change it in place
            results = [Elements(value.rows.clone(), value.lattice) for value in results]
        same = isinstance(results[0], _PLAIN) and all(value == results[0] for value in results)
        return results[0] if same else _Paths(tuple(results))

    def _mark(self, node: fx.Node) -> None:
        """Record if the value of a node has one row per element, and if it has left the region."""
        inputs = set(node.all_input_nodes)
        if (node.target is getattr and node.args[1] == "rows") or self.rows & inputs:
            self.rows.add(node)
        behind = self.left & inputs
        if gives(node, "dense") or (behind and not any(isinstance(self.env[n], _Paths) for n in behind)):
            self.left.add(node)

    def _in_region(self, node: fx.Node, value: Any) -> bool:
        """True if a value has elements or rows on several paths."""
        return isinstance(value, _Paths) and (node in self.rows or not isinstance(value.values[0], Tensor))

    def _norms(self, node: fx.Node, inputs: Iterable[Any]) -> list[BatchNorm]:
        """Return the batch norms that a node runs or gets as inputs."""
        run = [self.fetch_attr(str(node.target))] if node.op == "call_module" else []
        modules = [module for module in (*run, *inputs) if isinstance(module, nn.Module)]
        return [norm for module in modules for norm in module.modules() if isinstance(norm, BatchNorm)]

    def _call(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
        return getattr(self, node.op)(node.target, args, kwargs)

    def _blend(
        self, node: fx.Node, values: tuple[Elements, ...], maps: list[Tensor], arguments: dict[str, Any]
    ) -> Tensor:
        """Sum the dense maps of the paths, with the weights of the fine pixels at their samples."""
        options: tuple[Any, ...] = node.args[1:]
        spacing, layout = options[0], options[1] if len(options) > 1 else NCHW
        resized = node.target is functional.resize_to_dense
        weights = self.weights
        for axis, length in zip((2, 3), values[0].lattice.size, strict=True):
            pixels = torch.arange(0, length, 1 if resized else spacing, device=weights.device)
            weights = weights.index_select(axis, pixels.clamp(max=weights.shape[axis] - 1))
        if resized:
            scaling = {name: value for name, value in arguments.items() if name != "guide"}
            weights = read_as_resized(weights, spacing, **scaling)
        total: Tensor | None = None
        for dense, weight in zip(maps, weights.unbind(1), strict=True):
            lengths = dict(zip("bhwp", (*weight.shape, weight[0].numel()), strict=True))
            part = dense * weight.reshape([lengths.get(axis, 1) for axis in layout]).to(dense)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _plain(self, output: Any) -> Any:
        """Return the graph's outputs in ordinary Python containers."""
        if isinstance(output, fx.Node):
            return self._join(self.env[output])
        if isinstance(output, dict):
            return {key: self._plain(value) for key, value in output.items()}
        if isinstance(output, (list, tuple)):
            parts = [self._plain(value) for value in output]
            return parts if isinstance(output, list) else tuple(parts)
        return output

    def _join(self, value: Any) -> Any:
        """Sum a value of several paths by the mean weights, for values without positions such as vectors per image."""
        if not isinstance(value, _Paths):
            return value
        shares = self.weights.mean((2, 3)).unbind(1)
        parts = [
            part * share.view(-1, *(1,) * (part.dim() - 1)).to(part)
            for part, share in zip(value.values, shares, strict=True)
        ]
        return torch.stack(parts).sum(0)


@contextlib.contextmanager
def _untrack(norms: list[BatchNorm]) -> Iterator[None]:
    """Keep batch norms from updating their running statistics in the block."""
    tracking = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
