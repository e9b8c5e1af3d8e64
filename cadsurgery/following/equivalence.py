"""Decide whether a graph gives what its network gives: in float64 and near rounding, every channel at its own scale.

Points in pixels beside scores in 0..1, in one tensor, would hide any error of the scores at the scale of the points.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from cadsurgery.following.arguments import AnyLayout, Arguments, in_order, run_forward, widen
from cadsurgery.following.graphs import Interpreter
from cadsurgery.following.hooks import child, copying
from cadsurgery.following.trace import evaluating
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.torch_internals import tree_map_only

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# The scale of a channel is at least this share of the tensor's largest value: smaller values are rounded by what they
# were computed from.
_LEAST_SHARE = 1e-3

M = TypeVar("M", bound=nn.Module)


def wide_copy(model: nn.Module, graphs: Iterable[fx.Graph]) -> nn.Module:
    """Return a network in float64, with the tensors that graphs read from it, which may be no buffers."""
    wide = copy.deepcopy(model, copying(model)).double()
    for path in {str(node.target) for graph in graphs for node in graph.nodes if node.op == "get_attr"}:
        owner, _, name = path.rpartition(".")
        module = child(wide, owner) if owner else wide
        value = getattr(module, name, None)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            setattr(module, name, value.double())
    return wide


def meta_copy(net: M) -> M:
    """Copy a network to the meta device (shapes without values), in evaluation mode."""
    memo = copying(net)
    memo |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in net.parameters()}
    memo |= {id(b): b.to("meta") for b in net.buffers()}
    return copy.deepcopy(net, memo).eval()


def scales(values: Tensor, fewest: int = 1) -> Tensor:
    """Return the scale of every value, by which differences are judged: the largest finite absolute value at its place
    along an axis, the smallest of all axes behind the batch.

    Args:
        values: floating-point tensor.
        fewest: an axis counts if a place on it has so many values.
    """
    sizes = torch.where(values.isfinite(), values, 0).abs()
    most = sizes.max() if sizes.numel() else sizes.sum()
    result = torch.where(most > 0, most, 1.0).expand(values.shape)
    for axis in range(1, values.dim()):
        if values.numel() // max(1, values.shape[axis]) >= fewest:
            others = [other for other in range(values.dim()) if other != axis]
            result = torch.minimum(result, sizes.amax(others, keepdim=True).clamp(min=_LEAST_SHARE * most))
    return torch.where(most > 0, result, 1.0)


def are_same(ours: Any, theirs: Any, most: float = math.inf) -> bool:
    """True if two structures hold the same tensors: values as near as the type rounds, each channel at its own scale,
    and the same whole numbers. The relative difference may be `most`, for whichever type."""
    pairs = [tensors_of(value) for value in (ours, theirs)]
    return len(pairs[0]) == len(pairs[1]) and all(map(partial(_is_near, most=most), *pairs))


def are_equal(ours: Any, theirs: Any) -> bool:
    """True if two structures hold the same tensors, bit for bit."""
    pairs = [tensors_of(value) for value in (ours, theirs)]
    return len(pairs[0]) == len(pairs[1]) and all(
        a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(*pairs, strict=True)
    )


def _is_near(ours: Tensor, theirs: Tensor, most: float) -> bool:
    if ours.shape != theirs.shape:
        return False
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs.to(ours.dtype))
    if not theirs.numel():
        return True
    ours, wide = ours.double(), theirs.double()
    allowed = min(TOLERANCE.get(theirs.dtype, 1e-4), most) * scales(wide)
    alike = (ours == wide) | (ours.isnan() & wide.isnan()) | ((ours - wide).abs() <= allowed)
    return bool(alike.all())


@dataclass(frozen=True)
class Pair:
    """A network and a graph of it.

    Attributes:
        model: the network.
        graph: its graph, which uses its modules and parameters.
    """

    model: nn.Module
    graph: fx.Graph

    def wide(self) -> Pair | None:
        """Return the pair in float64; None if the network cannot be copied."""
        with contextlib.suppress(Exception):  # foreign objects may raise any error
            return Pair(wide_copy(self.model, [self.graph]), self.graph)
        return None

    def run_network(self, call: Arguments) -> Any:
        """Return what the network gives, with the same random numbers as any other run of the pair."""
        with _alike(self.model):
            return run_forward(self.model, call)

    def run_graph(self, call: Arguments, interpreter: fx.Interpreter | None = None) -> Any:
        """Return what the graph gives; another interpreter may run it."""
        own = tree_map_only(Tensor, Tensor.clone, in_order(self.graph, call))
        with _alike(self.model), AnyLayout():
            return (interpreter or Interpreter(self.model, graph=self.graph)).run(*own)

    def holds_for(self, call: Arguments) -> bool:
        """True if the graph gives what the network gives for a call, in the type of this pair."""
        with contextlib.suppress(Exception):  # the network or its graph may refuse the call with any error
            return are_same(self.run_graph(call), self.run_network(call))
        return False


def compare(pair: Pair, call: Arguments) -> tuple[Pair, Arguments, bool]:
    """Compare a graph with its network on a call, in float64; in their own type if one of them does not run in float64.

    Returns:
        The pair and the call in the type in which they were compared, and whether both give the same.
    """
    wide, widened = pair.wide(), widen(call)
    if wide is not None:
        with contextlib.suppress(
            Exception
        ):  # it may make values of float32 itself, which no float64 weight takes
            return wide, widened, are_same(wide.run_graph(widened), wide.run_network(widened))
    return pair, call, pair.holds_for(call)


@contextlib.contextmanager
def no_dead_branches(model: nn.Module) -> Iterator[None]:
    """Set parameters that are (nearly) zero everywhere to one half for a while: branches with a zero-initialised norm
    or a small layer scale would hide errors."""
    dead = {p: p.detach().clone() for p in model.parameters() if p.numel() and p.abs().max() < 1e-3}
    for parameter in dead:
        parameter.data.fill_(0.5)
    try:
        yield
    finally:
        for parameter, value in dead.items():
            parameter.data.copy_(value)


@contextlib.contextmanager
def _alike(model: nn.Module) -> Any:
    """Evaluate a network in a block, without gradients and with random numbers that are the same in every block."""
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
