"""Find the operation that makes a copy slower than it should be, by measurement.

Reports name no cause that was not measured. A copy is profiled only if it turned out to be slow.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile

from cadsurgery.kernels import isa
from cadsurgery.network.fuse import path_of
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.support.timing import now
from cadsurgery.surgery.rewrite import ask_mask

SLOWER = 1.03  # a side counts as slower than another from this ratio of times on
_ROUNDS = 3
# Profiler events of `choose.compute`: a task and the backend that runs it. Then the backends of compiled kernels.
_TASK = re.compile(r"(\w+) \(([\w ]+)\)")
_COMPILED = ("native", "integers")


@dataclass(frozen=True)
class Slowest:
    """The operation that takes the largest share of a call's time.

    Attributes:
        layer: path of the module it belongs to, or its name in the graph.
        operation: name in a profile, e.g. "convolve (native, avx2)"; empty if the profile shows none.
        share: share of the call's time.
    """

    layer: str
    operation: str
    share: float

    def __str__(self) -> str:
        return f"{self.share:.0%} of the time is in {', '.join(filter(None, (self.layer, self.operation)))}"


def explain_slowness(
    name: str,
    milliseconds: float,
    others: Mapping[str, float],
    net: AdaptiveModel,
    call: Callable[[], object],
) -> str:
    """Explain in a sentence how much slower a side is than others, and which operation takes its time.

    Args:
        name: name of the side.
        milliseconds: its time.
        others: times in milliseconds, by name, of the sides that it should not be slower than.
        net: the network that the side calls.
        call: runs the side once.

    Returns:
        The sentence; empty, without running anything, if the side is not slower than any of the others.
    """
    slower = [
        f"{other} ({milliseconds / other_milliseconds:.2f} times as long)"
        for other, other_milliseconds in others.items()
        if milliseconds > SLOWER * other_milliseconds
    ]
    return f"{name} is slower than {' and '.join(slower)}: {find_slowest(net, call)}." if slower else ""


def find_slowest(net: AdaptiveModel, call: Callable[[], object]) -> Slowest:
    """Find the operation that takes the largest share of a call's time, in the best of several rounds.

    Args:
        net: network whose graph is timed node by node.
        call: runs the network once.
    """
    total, taken = _node_times(net, call, _ROUNDS)
    node = max(taken, key=taken.__getitem__)
    seen: list[Any] = []
    with torch.inference_mode(), net.interpreted_by(partial(_Profiled, node, seen)):
        call()
    return Slowest(_layer_of(net, node), _operation_of(seen), taken[node] / total)


def layer_times(
    net: AdaptiveModel, call: Callable[[], object], rounds: int = _ROUNDS
) -> tuple[float, dict[str, float]]:
    """Return the seconds of a call, the best of several rounds, and of each layer, by path or name in the graph.

    Args:
        net: network whose graph is timed node by node.
        call: runs the network once.
        rounds: number of rounds.
    """
    total, taken = _node_times(net, call, rounds)
    layers: dict[str, float] = {}
    for node, seconds in taken.items():
        layer = _layer_of(net, node)
        layers[layer] = layers.get(layer, 0.0) + seconds
    return total, layers


def _node_times(
    net: AdaptiveModel, call: Callable[[], object], rounds: int
) -> tuple[float, dict[fx.Node, float]]:
    best: tuple[float, dict[fx.Node, float]] = (float("inf"), {})
    with torch.inference_mode():
        for _ in range(rounds):
            taken: dict[fx.Node, float] = {}
            with net.interpreted_by(partial(_Timed, taken)):
                start = now(time.perf_counter)
                call()
                best = min(best, (now(time.perf_counter) - start, taken), key=lambda pair: pair[0])
    return best


class _Timed(GraphInterpreter):
    """Records the seconds that each node takes."""

    def __init__(self, taken: dict[fx.Node, float], program: Program, graph: fx.Graph) -> None:
        super().__init__(program, graph)
        self.taken = taken

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and record its time."""
        start = now(time.perf_counter)
        value = super().run_node(n)
        self.taken[n] = self.taken.get(n, 0.0) + now(time.perf_counter) - start
        return value


class _Profiled(GraphInterpreter):
    """Records the profiler events of one node."""

    def __init__(self, node: fx.Node, seen: list[Any], program: Program, graph: fx.Graph) -> None:
        super().__init__(program, graph)
        self.node, self.seen = node, seen

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; the chosen node is profiled."""
        if n is not self.node:
            return super().run_node(n)
        with _quiet(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            value = super().run_node(n)
        self.seen += profiled.events() or ()
        return value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's profiler from writing lines of its own to the error stream."""
    name = "KINETO_LOG_LEVEL"
    level = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if level is None:
            del os.environ[name]


def _operation_of(events: list[Any]) -> str:
    """Return the task that takes most of the events' time, with its backend; without a task, torch's operation."""
    tasks = [event for event in events if _TASK.fullmatch(event.name)]
    if not tasks:
        slowest = max(events, key=lambda event: event.self_cpu_time_total, default=None)
        return slowest.name if slowest is not None else ""
    found = _TASK.fullmatch(max(tasks, key=lambda event: event.cpu_time_total).name)
    assert found is not None
    task, backend = found.groups()
    compiled_for = isa.used() if backend in _COMPILED else ""
    return f"{task} ({', '.join(filter(None, (backend, compiled_for)))})"


def _layer_of(net: AdaptiveModel, node: fx.Node) -> str:
    """Return the path of the module that a node belongs to, or the node's name."""
    if node.target is ask_mask:
        return "the mask and its lattice"
    part = net.adaptive_part
    return path_of(part, part.counted.graph, node)
