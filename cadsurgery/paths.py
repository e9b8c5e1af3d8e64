"""Several uniform paths through the region at once, blended where they leave it: how a learned mask gets a gradient.

The network runs on one lattice per level, everything at that level; where a map leaves the region the paths are
added, weighed by a soft level map (Hesse et al., CVPRW 2023, supplementary; reference code `ad_e2e_resnet.py`).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from cadsurgery import functional
from cadsurgery.functional import Elements
from cadsurgery.layout import NCHW
from cadsurgery.masks.provider import Grid
from cadsurgery.model import AdaptiveModel
from cadsurgery.surgery.rewrite import MASKING, found_lattice

_EXITS = (functional.to_dense, functional.resize_to_dense)
Weigh = Callable[[Tensor, Grid], Tensor]


@dataclass(frozen=True)
class _Paths:
    """A value on each path, the highest resolution first."""

    values: tuple[Any, ...]


def blended(net: AdaptiveModel, inputs: tuple[Any, ...], weigh: Weigh, *, separate: bool = True) -> Any:
    """The network's output with the levels blended instead of mixed.

    Args:
        net: an adaptive network.
        inputs: its arguments.
        weigh: from the features that enter the region (B, C, h, w) and their grid to weights (B, levels, h, w), which
            sum to one over the levels.
        separate: batch norm keeps running statistics of the path with everything low alone, as published, which are
            what the mixed network then uses; otherwise of all paths.
    """
    halved, names = net.halved(), net.names()
    values = halved.before(names, **net.bind(*inputs))
    features = values[halved.cut.features]
    size = (features.shape[2], features.shape[3])
    grid = Grid.of(net.geometry, features.shape[0], size, net.plan.strides[0])
    weights = weigh(features, grid)
    lattices = tuple(
        net.geometry.uniform_like(features, level) for level in range(net.geometry.max_level + 1)
    )
    return _Runner(names, weights, separate).run(halved.cut.after, lattices, values)


@dataclass
class _Runner:
    """Runs a graph with a value for every path where paths differ."""

    names: Any
    weights: Tensor
    separate: bool

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
                found = fx.map_arg(output, env.__getitem__)
                return map_aggregate(found, lambda value: self._joined(value))
            else:
                env[node] = self._value(node, env)
        raise AssertionError("a graph has an output")

    def _value(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The value of a node: one, or one on each path."""
        if node.op == "get_attr":
            return self._named(str(node.target))
        inputs = [env[source] for source in node.all_input_nodes]
        if not any(isinstance(value, _Paths) for value in inputs):
            return self._called(node, env.__getitem__)
        found = []
        for path in range(self.weights.shape[1]):

            def on_path(source: fx.Node, path: int = path) -> Any:
                value = env[source]
                return value.values[path] if isinstance(value, _Paths) else value

            low = path + 1 == self.weights.shape[1]
            with _untracked(node, on_path) if self.separate and not low else contextlib.nullcontext():
                found.append(self._called(node, on_path))
        if node.target in _EXITS:
            return self._blend(
                found, str(node.args[2]) if len(node.args) > 2 and node.target is _EXITS[0] else NCHW
            )
        if node.target is functional.to_elements:  # a view of what all paths read; they may work in place
            found = [Elements(value.rows.clone(), value.lattice) for value in found]
        if not isinstance(found[0], (Tensor, Elements)) and all(_same(value, found[0]) for value in found):
            return found[0]
        return _Paths(tuple(found))

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

    def _blend(self, maps: list[Tensor], layout: str) -> Tensor:
        """Dense maps of the paths, added by the weights at their size; `layout` has h and w, or p for both."""
        flat = "p" in layout
        size = self.weights.shape[-2:] if flat else [maps[0].shape[layout.index(axis)] for axis in "hw"]
        weights = self.weights
        if tuple(weights.shape[-2:]) != tuple(size):
            weights = F.interpolate(weights, size=tuple(size), mode="nearest")
        total: Tensor | None = None
        for found, weight in zip(maps, weights.unbind(1), strict=True):
            lengths = {
                "b": weight.shape[0],
                "h": weight.shape[1],
                "w": weight.shape[2],
                "p": weight[0].numel(),
            }
            part = found * weight.reshape([lengths.get(axis, 1) for axis in layout]).to(found)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _joined(self, value: Any) -> Any:
        """A value that leaves the network on several paths, such as one vector per image, by the mean weights."""
        if not isinstance(value, _Paths):
            return value
        shares = self.weights.mean((2, 3)).unbind(1)
        parts = [
            part * share.view(-1, *(1,) * (part.dim() - 1)).to(part)
            for part, share in zip(value.values, shares, strict=True)
        ]
        return torch.stack(parts).sum(0)


def _same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(operator.eq(first, second))


@contextlib.contextmanager
def _untracked(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Iterator[None]:
    """A batch norm that leaves its running statistics alone, if the node is one."""
    given = node.kwargs.get("norm")
    norm: Any = value_of(given) if isinstance(given, fx.Node) else None
    if not getattr(norm, "track_running_stats", False):
        yield
        return
    norm.track_running_stats = False
    try:
        yield
    finally:
        norm.track_running_stats = True
