"""Read a network: find its graph and facts about every node, with the first tracer that succeeds.

torch.fx can trace most networks without an image. Where Python code needs a size as a number, the network is traced on
an example (`example_tracer`), and its branches become guards. A guard whose outcome does not matter, such as whether to
resize a map that may already have the right size, is found by experiments at other sizes and dropped.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from cadsurgery.following.arguments import Arguments, change_images, crop, image_of, part_of
from cadsurgery.following.batch_reshapes import write_without_batch
from cadsurgery.following.call_caches import CallCaches, find_caches
from cadsurgery.following.equivalence import Pair, are_same, compare, meta_copy, no_dead_branches
from cadsurgery.following.facts import Facts, OtherFunction, default_examples, observe
from cadsurgery.following.graphs import Interpreter
from cadsurgery.following.guards import GuardFailed, drop_dead_code, is_guard
from cadsurgery.following.hooks import is_apart
from cadsurgery.following.slices import join_slices
from cadsurgery.following.trace import CannotFollow, trace
from cadsurgery.support import meta_tensors
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CannotConvert
from cadsurgery.support.meta_tensors import to_meta
from cadsurgery.support.torch_internals import TorchDispatchMode, tree_map_only

# Larger images are not tried, because each size costs a run of the network.
_MOST_PIXELS = 320 * 320

# Pixels by which images are larger where guards are tried: one to three; one patch of 4, 7, 8, 14 or 16 pixels; and one
# pixel or one patch less than multiples of the strides of a patch embedding with the stages behind it.
_RESTS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 27, 28, 31)
_MOST_RUNS = 8  # of a network that does not run on shapes alone

# Tolerance where both take the same path but for what a guard decides, in float32: the rounding of the type.
_ROUNDING = 1e-6


class Known(NamedTuple):
    """What stays one node of the graph, since whoever reads the graph knows what it does."""

    is_known: Callable[[nn.Module], bool]  # a module, called as a whole
    functions: Callable[[], tuple[Callable[..., Any], ...]]  # of Python, now


def read(model: nn.Module, example: Arguments | None, known: Known, exactly: bool = False) -> Facts:
    """Return graph and facts of a network; its nodes are operations that are known, and modules called as a whole.

    Args:
        model: the network.
        example: arguments of a call; by default small random images of several sizes are tried.
        known: the modules and functions that stay one node.
        exactly: trace on the example itself, for calls of its sizes alone: all branches are checked in each call.

    Raises:
        CannotConvert: the network cannot be traced, or does not run on the example.
    """
    caches = find_caches(model, [example] if example is not None else default_examples(model))
    with caches.forgotten():
        try:
            facts = _read(model, example, known, exactly, caches)
        except (OtherFunction, CannotFollow) as refusal:
            try:  # perhaps it asks whether torch traces it, and then computes something else, or with sizes as tensors
                facts = _read(model, example, known, exactly, caches, is_tracing=False)
            except CannotConvert:
                raise refusal from refusal.__cause__
        for rewrite in (write_without_batch, join_slices):
            if rewrite(facts):
                facts = observe(model, facts.graph, facts.arguments)
    return replace(facts, caches=caches)


def _read(
    model: nn.Module,
    example: Arguments | None,
    known: Known,
    exactly: bool,
    caches: CallCaches,
    is_tracing: bool = True,
) -> Facts:
    functions = known.functions()

    def trace_on(call: Arguments | None, carries: bool = True) -> fx.Graph:
        caches.forget()
        apart = partial(is_apart, model=model)
        return trace(model, known.is_known, apart, functions, call, carries, is_tracing)

    with contextlib.suppress(CannotFollow, OtherFunction):
        return observe(model, trace_on(example, carries=False), example)
    return _read_on_example(model, example, trace_on, exactly)


def _read_on_example(
    model: nn.Module, example: Arguments | None, trace_on: Callable[[Arguments], fx.Graph], exactly: bool
) -> Facts:
    """Trace several sizes of an example and return the facts of the graph that works for most sizes."""
    refusal: CannotConvert | None = None
    for call in [example] if example is not None else default_examples(model):
        try:
            best = observe(model, trace_on(call), call)
        except CannotConvert as error:
            if isinstance(error, CannotFollow) and error.is_of_any_size:
                raise
            refusal = refusal or error
            continue
        unserved = 0 if exactly else _drop_moot_guards(best)
        for other in _with_rests(call) if unserved else ():
            with contextlib.suppress(CannotConvert):
                facts = observe(model, trace_on(other), other)
                fewer = _drop_moot_guards(facts)
                if fewer < unserved:  # and if it serves the example as well, on which the plan is made
                    best, unserved = observe(model, facts.graph, call), fewer
        return best
    assert refusal is not None
    raise refusal


def _with_rests(call: Arguments) -> Iterator[Arguments]:
    """Yield a call with crops of its image that are odd at every halving, rounded down and rounded up."""
    height, width = (length // 32 * 32 for length in image_of(call).shape[2:])
    if min(height, width) >= 64 and height * width <= _MOST_PIXELS:
        for rest in (1, 31):
            yield change_images(call, partial(crop, height=height - rest, width=width - rest))


def _drop_moot_guards(facts: Facts) -> int:
    """Drop guards that may fail without changing the outputs; return at how many sizes a failure changes them.

    A guard that failed at any of these is kept, since no experiment tells which of several failures did it; and so is
    one that failed without a change only together with one that is kept, which refuses such a call in any case.
    """
    graph = facts.graph
    if not any(map(is_guard, graph.nodes)):
        return 0
    pair, base = _smaller_call(facts)
    unserved, moot, harmful = 0, list[set[fx.Node]](), set[fx.Node]()
    for call in _most_telling(pair, base):
        run, outputs = _Unguarded(pair), None
        with no_dead_branches(pair.model):
            with contextlib.suppress(Exception):  # this path may not fit the size
                outputs = pair.run_graph(call, run)
                if not run.failed_guards:
                    continue
            try:
                expected = pair.run_network(call)
            except Exception:  # the network may refuse a size with any error
                continue
        if outputs is not None and are_same(outputs, expected, _ROUNDING):
            moot.append(run.failed_guards)
        else:
            harmful |= run.failed_guards
            unserved += 1
    while mixed := [failed for failed in moot if failed & harmful]:
        moot = [failed for failed in moot if not failed & harmful]
        dropped = set[fx.Node]().union(*moot)
        harmful |= {node for failed in mixed for node in failed if node not in dropped}
    for node in set[fx.Node]().union(*moot):
        graph.erase_node(node)
    drop_dead_code(graph)
    return unserved


def _most_telling(pair: Pair, base: Arguments) -> list[Arguments]:
    """Return calls of other sizes that show whether a guard matters, few of many, because each costs two runs.

    Where a later stride drops the additional row of a map, its guard seems not to matter. So the graph and its network
    run on shapes alone first. Of the calls at which the same guards fail, the smallest and the one are returned at
    which most results have other shapes than those of the network.
    """
    calls = list(_of_other_sizes(base))
    with contextlib.suppress(Exception):  # perhaps it needs values, or foreign objects cannot be copied
        on_meta = Pair(meta_copy(pair.model), pair.graph)
        if _difference_in_shapes(on_meta, base) is None:
            return calls[:_MOST_RUNS]
        failing: dict[frozenset[fx.Node], list[tuple[int, int]]] = {}
        for index, call in enumerate(calls):
            with contextlib.suppress(Exception):  # the network may refuse a size with any error
                failed, difference = _difference_in_shapes(on_meta, call) or (frozenset(), 0)
                if failed:
                    failing.setdefault(failed, []).append((-difference, index))
        chosen = {index for found in failing.values() for index in (min(found)[1], found[0][1])}
        return [calls[index] for index in sorted(chosen)]
    return calls[:_MOST_RUNS]


def _difference_in_shapes(pair: Pair, call: Arguments) -> tuple[frozenset[fx.Node], int] | None:
    """Return the guards that fail in a call, and how many results of the network on the meta device have shapes that
    none of its graph has; all of them if the graph does not run."""
    run, own, expected = _Unguarded(pair), _ResultShapes(), _ResultShapes()
    arguments = dict(tree_map_only(Tensor, to_meta, call))
    with expected, torch.device("meta"):
        pair.run_network(arguments)
    with contextlib.suppress(Exception), own, torch.device("meta"):  # this path may not fit the size
        pair.run_graph(arguments, run)
    return frozenset(run.failed_guards), (expected.count - own.count).total()


class _ResultShapes(TorchDispatchMode):
    """Counts the shapes of the results of operations on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[tuple[Any, torch.Size]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = meta_tensors.call(func, args, kwargs or {})
        self.count.update((func, part.shape) for part in tensors_of(value))
        return value


def _smaller_call(facts: Facts) -> tuple[Pair, Arguments]:
    """Return the network with its graph, and a call with one image of about half the height and width of the example's,
    with the same rests at every halving; the example's itself if the graph does not give there what the network gives.
    Both are in float64 where that can be."""
    height, width = (length - length // 64 * 32 for length in facts.example.shape[2:])
    part, own = part_of(facts.arguments, height, width), Pair(facts.model, facts.graph)
    pair, call, holds = compare(own, part)
    return (pair, call) if holds else compare(own, facts.arguments)[:2]


def _of_other_sizes(call: Arguments) -> Iterator[Arguments]:
    """Yield a call with larger images, the smallest first: by every few pixels, up to multiples of common strides and
    just below, along one axis."""
    height, width = image_of(call).shape[2:]
    sizes = {(height + by, width + by) for by in _RESTS} | {(height + 32, width)}
    for step in (4, 8, 16, 32):
        tall, wide = (-(-length // step) * step for length in (height, width))
        sizes |= {(tall - less, wide - less) for less in (0, 1, 4)}
    sizes |= {((-(-height // 4) | 1) * 4, (-(-width // 4) | 1) * 4)}  # which later strides do not divide
    for tall, wide in sorted(sizes - {(height, width)}):
        if tall >= height and wide >= width and tall * wide <= _MOST_PIXELS:
            yield change_images(call, partial(_pad, by=(0, wide - width, 0, tall - height)))


def _pad(image: Tensor, by: tuple[int, ...]) -> Tensor:
    return nn.functional.pad(image, by, mode="replicate" if image.is_floating_point() else "constant")


class _Unguarded(Interpreter):
    """Runs a graph without stopping at guards, and records the guards that failed."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair.model, graph=pair.graph)
        self.failed_guards: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except GuardFailed:
            self.failed_guards.add(n)
            return None
