"""Read a network: its graph and what is known of every node, by the first front end that can follow it.

torch.fx follows most networks without an image. Where Python asks a size for its number, the network is traced on an
example (`carry`), and what it decided there is guarded. A guard whose other answer changes nothing, such as whether to
resize a map to a size that it may have already, is found by experiment at other sizes and dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.support.errors import CannotConvert
from cadsurgery.surgery.arguments import (
    AnyLayout,
    Arguments,
    change_images,
    crop,
    image_of,
    in_order,
    run_forward,
)
from cadsurgery.surgery.facts import Facts, OtherFunction, default_examples, observe, same
from cadsurgery.surgery.guards import GuardFailed, drop_dead_code, is_guard
from cadsurgery.surgery.hooks import is_apart
from cadsurgery.surgery.rules import has_rule, ruled_functions
from cadsurgery.surgery.shuffles import write_without_batch
from cadsurgery.surgery.trace import CannotFollow, evaluating, trace

# Larger images are not tried: what one size costs, several cost several times.
_MOST_PIXELS = 320 * 320


def read(model: nn.Module, example: Arguments | None, exactly: bool = False) -> Facts:
    """Graph and facts of a network: its nodes are operations with rules, and modules that are called as a whole.

    Args:
        model: the network.
        example: arguments of a call; by default small random images of several sizes are tried.
        exactly: trace on the example itself, not on parts of it that may serve more sizes.

    Raises:
        CannotConvert: no front end can follow it, or it does not run on the example.
    """

    def is_operation(module: nn.Module) -> bool:
        return has_rule(module) or is_apart(module, model)

    facts: Facts | None = None
    trace_on = partial(trace, model, is_operation, ruled_functions())
    with contextlib.suppress(CannotFollow, OtherFunction):
        facts = observe(model, trace_on(given=frozenset(example or ())), example)
    if facts is None:
        facts = _read_on_example(model, example, trace_on, exactly)
    if write_without_batch(facts):
        facts = observe(model, facts.graph, facts.arguments)
    return facts


def _read_on_example(
    model: nn.Module, example: Arguments | None, trace_on: Callable[[Arguments], fx.Graph], exactly: bool
) -> Facts:
    """Facts of the graph that serves most sizes, of those that several sizes of an example give."""
    refusal: CannotConvert | None = None
    for call in [example] if example is not None else default_examples(model):
        try:
            best = observe(model, trace_on(call), call)
        except CannotConvert as error:
            refusal = refusal or error
            continue
        unserved = _drop_moot_guards(best)
        for other in _with_rests(call) if unserved and not exactly else ():
            with contextlib.suppress(CannotConvert):
                facts = observe(model, trace_on(other), other)
                if (fewer := _drop_moot_guards(facts)) < unserved:
                    best, unserved = facts, fewer
        return best
    assert refusal is not None
    raise refusal


def _with_rests(call: Arguments) -> Iterator[Arguments]:
    """A call with parts of its image of which every halving leaves a rest, rounded down and rounded up."""
    height, width = (length // 32 * 32 for length in image_of(call).shape[2:])
    if min(height, width) >= 64 and height * width <= _MOST_PIXELS:
        for rest in (1, 31):
            yield change_images(call, partial(crop, height=height - rest, width=width - rest))


def _drop_moot_guards(facts: Facts) -> int:
    """Drop guards whose other answer gives the network's outputs all the same; at how many sizes it gives others."""
    model, graph = facts.model, facts.graph
    if not any(map(is_guard, graph.nodes)):
        return 0
    unserved, moot = 0, set[fx.Node]()
    with torch.no_grad(), evaluating(model), AnyLayout():
        for call in _of_other_sizes(facts.arguments):
            run, outputs = _Unguarded(model, graph=graph), None
            with contextlib.suppress(Exception):  # on this way some sizes do not fit
                outputs = run.run(*in_order(graph, call))
                if not run.otherwise:
                    continue
            try:
                expected = run_forward(model, call)
            except Exception:  # the network says in its own way which sizes it takes
                continue
            if outputs is not None and same(outputs, expected):
                moot |= run.otherwise
            else:
                unserved += 1
    for node in moot:
        graph.erase_node(node)
    drop_dead_code(graph)
    return unserved


def _of_other_sizes(call: Arguments) -> Iterator[Arguments]:
    """A call with its image a little larger: by a few pixels, up to multiples of the usual strides, and in one axis."""
    height, width = image_of(call).shape[2:]
    sizes = {(height + by, width + by) for by in (1, 2, 3)} | {(height + 32, width)}
    sizes |= {(-(-height // step) * step, -(-width // step) * step) for step in (4, 8, 16, 32)}
    for tall, wide in sorted(sizes - {(height, width)}):
        if tall * wide <= _MOST_PIXELS:
            yield change_images(call, partial(_pad, by=(0, wide - width, 0, tall - height)))


def _pad(image: Tensor, by: tuple[int, ...]) -> Tensor:
    return nn.functional.pad(image, by, mode="replicate" if image.is_floating_point() else "constant")


class _Unguarded(fx.Interpreter):
    """Runs a graph on another image, whatever its guards say, and notes which would have refused."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.otherwise: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except GuardFailed:
            self.otherwise.add(n)
            return None
