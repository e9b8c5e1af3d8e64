"""Several uniform paths through the region at once, blended where they leave it: how a learned mask gets a gradient.

The network runs on one lattice per level, everything at that level; where a map leaves the region the paths are
added, weighed by a soft level map (Hesse et al., CVPRW 2023, supplementary; reference code `ad_e2e_resnet.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cadsurgery.elements import functional
from cadsurgery.elements.axes import NCHW
from cadsurgery.elements.functional import Elements
from cadsurgery.elements.operations import operation_of
from cadsurgery.elements.resizing import read_as_resized
from cadsurgery.masks.provider import Grid
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.rewrite import MASKING, found_lattice

_PLAIN = (int, float, str, torch.Size, torch.dtype, torch.device, type(None))
Weigh = Callable[[Tensor, Grid], Tensor]


@dataclass(frozen=True)
class _Paths:
    """A value on each path, the highest resolution first."""

    values: tuple[Any, ...]


def blended(net: AdaptiveModel, inputs: tuple[Any, ...], weigh: Weigh, *, separate: bool = True) -> Any:
    """The network's output with the levels blended instead of mixed.

    With weights that are one for a level and zero for the others it is `net(*inputs, mask=level everywhere)`.

    Args:
        net: an adaptive network.
        inputs: its arguments.
        weigh: from the features that enter the region (B, C, h, w) and their grid to weights (B, levels, h, w), which
            sum to one over the levels.
        separate: batch norm keeps running statistics of the path with everything low alone, as published, which are
            what the mixed network then uses; otherwise of all paths, one after another.

    Raises:
        InvalidInput: weights of another shape.
    """
    halved, names = net.halved(), net.names()
    values = halved.before(names, **net.bind(*inputs))
    features = values[halved.cut.features]
    grid = net.masking(net.mask).grid(features)
    weights = weigh(features, grid)
    levels = range(net.geometry.max_level + 1)
    expected = (grid.batch, len(levels), *grid.size)
    if tuple(weights.shape) != expected:
        raise InvalidInput(
            f"the weights of the levels have shape {tuple(weights.shape)}.", next=f"give {expected}."
        )
    lattices = tuple(net.geometry.uniform_like(features, level) for level in levels)
    output = _Runner(names, weights, separate).run(halved.cut.after, lattices, values)
    return net.contained(output)


@dataclass
class _Runner:
    """Runs a graph with a value for every path where paths differ."""

    names: Any
    weights: Tensor
    separate: bool
    rows: set[fx.Node] = field(default_factory=set)  # values with a row per element, not one per image
    left: set[fx.Node] = field(default_factory=set)  # what left the region, and what follows from it

    def run(self, graph: fx.Graph, lattices: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
        """The output of the second half of a rewritten graph."""
        env: dict[fx.Node, Any] = {}
        given = iter(values)
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = None if node.target == MASKING else next(given)
            elif node.target is found_lattice:
                env[node] = _Paths(lattices)
            elif node.op == "output":
                output, _ = node.args[0]
                return self._plain(output, env)
            else:
                env[node] = self._value(node, env)
        raise AssertionError("a graph has an output")

    def _value(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The value of a node: one, or one on each path."""
        if node.op == "get_attr":
            return self._named(str(node.target))
        self._note(node, env)
        given = {source: env[source] for source in node.all_input_nodes}
        if self.left & given.keys() and not any(map(self._in_region, given, given.values())):
            # Vectors of the paths meet a map that has left the region.
            given = {source: self._joined(value) for source, value in given.items()}
        if not any(isinstance(value, _Paths) for value in given.values()):
            return self._called(node, given.__getitem__)
        norms = [] if not self.separate else self._norms(node, given.values())
        found = []
        for path in range(self.weights.shape[1]):

            def on_path(source: fx.Node, path: int = path) -> Any:
                value = given[source]
                return value.values[path] if isinstance(value, _Paths) else value

            low = path + 1 == self.weights.shape[1]
            with contextlib.nullcontext() if low or not self.separate else _untracked(norms):
                found.append(self._called(node, on_path))
        if _leaves(node):
            arguments = fx.map_arg(node.kwargs, lambda source: on_path(source, 0))
            return self._blend(node, given[node.args[0]].values, found, arguments)  # type: ignore[index]
        if node.target is functional.to_elements:  # a view of what all paths read; they may work in place
            found = [Elements(value.rows.clone(), value.lattice) for value in found]
        same = isinstance(found[0], _PLAIN) and all(value == found[0] for value in found)
        return found[0] if same else _Paths(tuple(found))

    def _note(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """Where the value of a node stands: on rows, or behind the region."""
        inputs = set(node.all_input_nodes)
        of_elements = node.target is getattr and node.args[1] == "rows"
        if of_elements or node.target is functional.rows_on or self.rows & inputs:
            self.rows.add(node)
        if node.target is functional.Elements:
            self.rows.discard(node)
        behind = self.left & inputs
        if _leaves(node) or (behind and not any(isinstance(env[n], _Paths) for n in behind)):
            self.left.add(node)

    def _in_region(self, node: fx.Node, value: Any) -> bool:
        """Whether a value has elements."""
        return isinstance(value, _Paths) and (node in self.rows or not isinstance(value.values[0], Tensor))

    def _norms(self, node: fx.Node, given: Iterable[Any]) -> list[_BatchNorm]:
        """The batch norms that a node runs, on these values."""
        run = [self._named(str(node.target))] if node.op == "call_module" else []
        modules = [module for module in (*run, *given) if isinstance(module, nn.Module)]
        return [norm for module in modules for norm in module.modules() if isinstance(norm, _BatchNorm)]

    def _called(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
        if node.op == "call_module":
            return self._named(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _named(self, path: str) -> Any:
        value = self.names
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def _blend(
        self, node: fx.Node, values: tuple[Elements, ...], maps: list[Tensor], arguments: dict[str, Any]
    ) -> Tensor:
        """Dense maps of the paths, added by the weights of the fine pixels their samples lie on."""
        given: tuple[Any, ...] = node.args[1:]
        spacing, layout = given[0], given[1] if len(given) > 1 else NCHW
        resized = node.target is functional.resize_to_dense
        weights = self.weights
        for axis, length in zip((2, 3), values[0].lattice.size, strict=True):
            pixels = torch.arange(0, length, 1 if resized else spacing, device=weights.device)
            weights = weights.index_select(axis, pixels.clamp(max=weights.shape[axis] - 1))
        if resized:
            scaling = {name: value for name, value in arguments.items() if name != "guide"}
            weights = read_as_resized(weights, spacing, **scaling)
        total: Tensor | None = None
        for found, weight in zip(maps, weights.unbind(1), strict=True):
            lengths = dict(zip("bhwp", (*weight.shape, weight[0].numel()), strict=True))
            part = found * weight.reshape([lengths.get(axis, 1) for axis in layout]).to(found)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _plain(self, output: Any, env: dict[fx.Node, Any]) -> Any:
        """What the graph returns, in containers of Python, not those of graphs."""
        if isinstance(output, fx.Node):
            return self._joined(env[output])
        if isinstance(output, dict):
            return {key: self._plain(value, env) for key, value in output.items()}
        if isinstance(output, (list, tuple)):
            found = [self._plain(value, env) for value in output]
            return found if isinstance(output, list) else tuple(found)
        return output

    def _joined(self, value: Any) -> Any:
        """A value on several paths that no map of weights fits, such as one vector per image, by the mean weights."""
        if not isinstance(value, _Paths):
            return value
        shares = self.weights.mean((2, 3)).unbind(1)
        parts = [
            part * share.view(-1, *(1,) * (part.dim() - 1)).to(part)
            for part, share in zip(value.values, shares, strict=True)
        ]
        return torch.stack(parts).sum(0)


def _leaves(node: fx.Node) -> bool:
    """Whether the region is left here."""
    operation = operation_of(node.target)
    return operation is not None and operation.gives == "dense"


@contextlib.contextmanager
def _untracked(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms leave their running statistics alone."""
    tracking = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
