"""The operation that takes the largest share of the time of an optimised network, found by measuring.

python -m benchmarks.slowest resnet50 --mask "edges | budget:fraction=0.34" --size 512x1024
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile

import cadsurgery as cs
from cadsurgery.data.images import normalise, street_scene
from cadsurgery.following.hooks import child
from cadsurgery.kernels import isa
from cadsurgery.network.fuse import KERNELS
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import GraphInterpreter, Program
from cadsurgery.support.timing import now
from cadsurgery.surgery.rewrite import WORK, ask_mask

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


def find_slowest(net: AdaptiveModel, call: Callable[[], object]) -> Slowest:
    """Find the operation that takes the largest share of a call's time, in the best of several rounds.

    Args:
        net: network whose graph is timed node by node.
        call: runs the network once.
    """
    total, taken = _node_times(net, call, _ROUNDS)
    node = max(taken, key=taken.__getitem__)
    seen: list[Any] = []
    with torch.inference_mode(), interpreted_by(net, partial(_Profiled, node, seen)):
        call()
    return Slowest(_layer_of(net, node), _operation_of(seen), taken[node] / total)


def _node_times(
    net: AdaptiveModel, call: Callable[[], object], rounds: int
) -> tuple[float, dict[fx.Node, float]]:
    best: tuple[float, dict[fx.Node, float]] = (float("inf"), {})
    with torch.inference_mode():
        for _ in range(rounds):
            taken: dict[fx.Node, float] = {}
            with interpreted_by(net, partial(_Timed, taken)):
                start = now(time.perf_counter)
                call()
                best = min(best, (now(time.perf_counter) - start, taken), key=lambda pair: pair[0])
    return best


@contextlib.contextmanager
def interpreted_by(net: AdaptiveModel, make: Callable[[Program, fx.Graph], fx.Interpreter]) -> Iterator[None]:
    """Run calls in the block node by node with interpreters from `make`; see `Program.interpreted_by`."""
    part = net.adaptive_part
    program = part.program
    part._program = program.interpreted_by(make)
    try:
        yield
    finally:
        part._program = program


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
    """Return the path of the original module whose work a node does, of a fused convolution that of the convolution; or
    the node's name."""
    if node.target is ask_mask:
        return "the mask and its lattice"
    part = net.adaptive_part
    notes = node.meta.get(WORK)
    for read in (node, *node.all_input_nodes):
        if read.op in ("call_module", "get_attr") and str(read.target).startswith(f"{KERNELS}."):
            kernel: Any = child(part, str(read.target))
            origin = getattr(getattr(kernel, "first", kernel), "origin", "")
            notes = next((n.meta.get(WORK) for n in part.counted.graph.nodes if n.name == origin), notes)
    name, path = notes or (node.name, "")
    return path or name


def main() -> None:
    """Print the operation that takes the largest share of a call's time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("network")
    parser.add_argument("--mask", default="edges")
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = cs.build_model(options.network, "none")
    height, width = map(int, options.size.split("x"))
    image = normalise(street_scene(height, width), model.cad_source)[None]
    net = cs.adaptify(model, options.mask, verify_laws=False).optimize()
    print(find_slowest(net, partial(net, image)))


if __name__ == "__main__":
    main()
