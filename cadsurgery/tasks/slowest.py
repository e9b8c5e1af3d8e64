"""The operation that takes the time of a copy which is slower than it should be: measured, and by its name.

Reports name no cause that was not measured. A copy is profiled only if it turned out slow.
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

SLOWER = 1.03  # a side counts as slower than another from this multiple of its time on
_ROUNDS = 3
# Events of `choose.compute`, a task and the backend that carries it out; and the backends that are compiled kernels.
_TASK = re.compile(r"(\w+) \(([\w ]+)\)")
_COMPILED = ("native", "integers")


@dataclass(frozen=True)
class Slowest:
    """The operation that takes the largest share of the time of a call.

    Attributes:
        layer: path of the module it belongs to, or its name in the graph.
        operation: name in a profile, as "convolve (native, avx2)"; empty if the profile shows none.
        share: of the time of the call.
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
    """A sentence that says by how much a side is slower than others, and which operation takes its time.

    Args:
        name: of the side.
        milliseconds: that it takes.
        others: milliseconds of the sides that it should not be slower than, by their names.
        net: the network that the side calls.
        call: runs the side once.

    Returns:
        The sentence; empty if the side is not slower than any of the others, and then nothing is run.
    """
    slower = [
        f"{other} ({milliseconds / of_other:.2f} times as long)"
        for other, of_other in others.items()
        if milliseconds > SLOWER * of_other
    ]
    return f"{name} is slower than {' and '.join(slower)}: {find_slowest(net, call)}." if slower else ""


def find_slowest(net: AdaptiveModel, call: Callable[[], object]) -> Slowest:
    """The operation of a network that takes the largest share of the time of a call, the best of some rounds.

    Args:
        net: whose graph is timed node by node.
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
    """Seconds of a call, the best of some rounds, and of each layer in it, by path, or name in the graph.

    Args:
        net: whose graph is timed node by node.
        call: runs the network once.
        rounds: how often.
    """
    total, taken = _node_times(net, call, rounds)
    of_layers: dict[str, float] = {}
    for node, seconds in taken.items():
        layer = _layer_of(net, node)
        of_layers[layer] = of_layers.get(layer, 0.0) + seconds
    return total, of_layers


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
    """Notes the seconds that each node takes."""

    def __init__(self, taken: dict[fx.Node, float], program: Program, graph: fx.Graph) -> None:
        super().__init__(program, graph)
        self.taken = taken

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note its time."""
        start = now(time.perf_counter)
        value = super().run_node(n)
        self.taken[n] = self.taken.get(n, 0.0) + now(time.perf_counter) - start
        return value


class _Profiled(GraphInterpreter):
    """Notes the events of one node."""

    def __init__(self, node: fx.Node, seen: list[Any], program: Program, graph: fx.Graph) -> None:
        super().__init__(program, graph)
        self.node, self.seen = node, seen

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, the chosen one under a profile."""
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
    told = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if told is None:
            del os.environ[name]


def _operation_of(events: list[Any]) -> str:
    """The task that takes most of the events' time, with its backend; without a task the operation of torch."""
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
    """The path of the module whose work a node does, or its name; of a fused convolution that of the convolution."""
    if node.target is ask_mask:
        return "the mask and its lattice"
    part = net.adaptive_part
    return path_of(part, part.counted.graph, node)
