"""Where a network can be sampled: residual branches, which lie between a fork and the addition that ends it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from cadsurgery.elements.kernel_map import Window
from cadsurgery.support.errors import CannotConvert, InvalidInput, UnknownName
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.rules import (
    arithmetic,
    batch_norm,
    batch_norm_act,
    convolution,
    convolution_same,
    dropout_per_image,
    layer_norm,
    linear,
    permutation,
    pointwise,
)
from cadsurgery.surgery.treatment import rule_of

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
CHANNELS_FIRST, CHANNELS_LAST = "bchw", "bhwc"
_TO: dict[tuple[int, ...], str] = {(0, 2, 3, 1): CHANNELS_LAST, (0, 3, 1, 2): CHANNELS_FIRST}
_CONVOLUTIONS = (convolution, convolution_same)
_POINTWISE = (pointwise, arithmetic, batch_norm, batch_norm_act, dropout_per_image)


@dataclass(frozen=True)
class Place:
    """A convolution, or a linear layer on channels, that gets a gate.

    Attributes:
        node: the convolution.
        tail: the last of the operations behind it that act on each position alone, after which gaps are filled.
        window: that it reads by.
        stride: positions of the gate's map for each position of the convolution's output, along an axis.
        layout: axes of the tail's value, `bchw` or `bhwc`.
    """

    node: fx.Node
    tail: fx.Node
    window: Window
    stride: int
    layout: str


@dataclass(frozen=True)
class Branch:
    """What gates decide of, and what they read.

    Attributes:
        name: of the module, or of the addition.
        source: node that its gates read: where the branch forks off.
        places: with gates, in order of execution.
        apart: convolutions of it that have none though they could save work, and why.
    """

    name: str
    source: fx.Node
    places: tuple[Place, ...]
    apart: tuple[tuple[str, str], ...] = ()


def find_branches(facts: Facts, where: str | Sequence[str] = "auto") -> list[Branch]:
    """The branches asked for, in order of execution.

    Args:
        facts: of the network.
        where: `"auto"`, all residual branches; or names: of modules, for the residual branches within, or of
            convolutions, for these alone, which may lie in no residual branch: their gate reads what they read.

    Raises:
        CannotConvert: `auto` finds none.
        UnknownName: no such module.
        InvalidInput: a module without residual branches, or a convolution whose positions cannot be chosen.
    """
    found = _residual_branches(facts)
    if where == "auto":
        if not found:
            raise CannotConvert(
                f"{type(facts.model).__name__} has no residual branches.",
                why="a gate chooses positions of what is added to a map, and no map is added to one it is made from.",
                next="name the convolutions to be sampled, where=[...], which then read what they are gated by; or "
                "convert it with cs.adaptify, which needs no such branches.",
            )
        return found
    names = [where] if isinstance(where, str) else list(where)
    if not names or len(set(names)) < len(names):
        raise InvalidInput(f"where={where!r} names nothing, or something twice.", next='use where="auto".')
    chosen: dict[str, Branch] = {}
    for name in names:
        for branch in _named(name, facts, found):
            known = chosen.get(branch.source.name + branch.name)
            places = {place.node: place for place in (*(known.places if known else ()), *branch.places)}
            chosen[branch.source.name + branch.name] = replace(branch, places=tuple(places.values()))
    order = {node: number for number, node in enumerate(facts.graph.nodes)}
    ordered = [
        replace(branch, places=tuple(sorted(branch.places, key=lambda place: order[place.node])))
        for branch in chosen.values()
    ]
    return sorted(ordered, key=lambda branch: order[branch.places[0].node])


def _named(name: str, facts: Facts, found: Iterable[Branch]) -> list[Branch]:
    """What a name stands for: branches within a module, or one convolution."""
    if name not in {path for path, _ in facts.model.named_modules() if path}:
        known = {path for path, _ in facts.model.named_modules() if path}
        raise UnknownName("module", name, known)
    within = [branch for branch in found if f"{branch.name}.".startswith(f"{name}.")]
    if within:
        return within
    nodes = [node for node in facts.graph.nodes if node.op == "call_module" and node.target == name]
    for branch in found:
        if places := tuple(place for place in branch.places if place.node in nodes):
            return [replace(branch, places=places)]
    why = "it is neither a convolution nor a module with residual branches."
    if len(nodes) == 1 and (source := _spatial_inputs(nodes[0], facts)):
        walk = _Walk(facts, source[0])
        walk.step(nodes[0])
        if walk.places:
            place = replace(walk.places[0], tail=_tail(nodes[0], None, facts)[0])
            return [Branch(name, source[0], (place,))]
        why = walk.apart[0][1] if walk.apart else why
    raise InvalidInput(
        f"{name} cannot be sampled.",
        where=type(facts.model).__name__,
        why=why,
        next="name convolutions with the padding that keeps the size of their map, or modules with residual "
        "branches; cs.sample(model).plan tells those.",
    )


def _residual_branches(facts: Facts) -> list[Branch]:
    branches, taken = list[Branch](), set[fx.Node]()
    for node in facts.graph.nodes:
        ends = _spatial_inputs(node, facts)
        if node.target not in ADDITIONS or node.kwargs or len(ends) != 2 or len(node.args) != 2:
            continue
        if facts.shapes[ends[0]] != facts.shapes[ends[1]]:
            continue
        one, other = (_chain(end, facts) for end in ends)
        fork = next((value for value in one if value in other), None)
        if fork is None:
            continue
        sides = [list(reversed(side[: side.index(fork)])) for side in (one, other)]
        side = max(sides, key=lambda nodes: sum(facts.macs.get(value, 0) for value in nodes))
        if taken.isdisjoint(side) and (branch := _branch(node, fork, side, facts)):
            branches.append(branch)
            taken.update(side)
    return branches


def _chain(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """A node and what it is computed from, as long as that is one map; the last is made from none or several."""
    chain = [node]
    while len(inputs := _spatial_inputs(chain[-1], facts)) == 1:
        chain.append(inputs[0])
    return chain


def _spatial_inputs(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """The maps of several positions among what a node reads."""

    def is_spatial(one: fx.Node) -> bool:
        shape = facts.shapes.get(one, ())
        return len(shape) == 4 and one.op != "get_attr" and sum(length == 1 for length in shape[1:]) < 2

    return [one for one in node.all_input_nodes if is_spatial(one)]


def _branch(end: fx.Node, fork: fx.Node, side: list[fx.Node], facts: Facts) -> Branch | None:
    """The branch of some nodes between a fork and an addition; None if no convolution in it can have a gate."""
    walk = _Walk(facts, fork)
    for node in side:
        walk.step(node)
    places = walk.places
    last = walk.weighted[-1] if walk.weighted else None
    if last is not None and len(walk.weighted) > 1:
        # What a last pointwise layer gives can be filled as well as what it reads: it follows the gate before it.
        places = [place for place in places if place.node is not last or not place.window.is_pointwise]
    elif last is not None:
        places = [place for place in places if not place.window.is_pointwise]
    if not places:
        return None
    name = facts.path(end) or end.name
    kept = tuple(replace(place, tail=_tail(place.node, end, facts)[0]) for place in places)
    kept = tuple(replace(place, layout=walk.layouts.get(place.tail, place.layout)) for place in kept)
    return Branch(name, fork, kept, tuple(walk.apart))


@dataclass
class _Walk:
    """Along a branch, node after node: its convolutions, and on which part of the fork's grid they are."""

    facts: Facts
    fork: fx.Node
    layout: str = CHANNELS_FIRST
    stride: int = 1
    lost: str = ""
    weighted: list[fx.Node] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    apart: list[tuple[str, str]] = field(default_factory=list)
    layouts: dict[fx.Node, str] = field(default_factory=dict)

    def step(self, node: fx.Node) -> None:
        """Take in the next node."""
        rule = rule_of(node, self.facts)
        if rule in _CONVOLUTIONS:
            self.convolution(node, rule(node, self.facts))
        elif rule is linear and self.layout == CHANNELS_LAST:
            self.weighted.append(node)
            if not self.lost:
                self.places.append(Place(node, node, Window((1, 1)), self.stride, self.layout))
        elif rule is permutation or _is_permute_module(node, self.facts):
            self.layout = _TO.get(_order(node, self.facts), "")
            self.lost = self.lost or ("" if self.layout else "its axes change places.")
        elif not is_pointwise(node, self.facts, self.layout):
            before, after = (
                self.facts.shapes.get(one, ()) for one in (*_spatial_inputs(node, self.facts)[:1], node)
            )
            if tuple(before) != tuple(after):
                self.lost = self.lost or f"{node.name} before it changes the grid of the map."
        self.layouts[node] = self.layout

    def convolution(self, node: fx.Node, treatment: Any) -> None:
        """A convolution: whether its output lies on every so many-th position of the fork's map."""
        self.weighted.append(node)
        window, why = treatment.window, treatment.why if treatment.window is None else self.lost
        if window is not None and not why and not _keeps_size(window):
            why = "its padding does not keep the size of the map."
        if why or window is None:
            self.lost = self.lost or why
            self.apart.append((str(node.target), why))
            return
        self.stride *= window.stride
        fork, out = (self.facts.shapes[one] for one in (self.fork, node))
        if tuple(out[2:]) != tuple(-(-length // self.stride) for length in fork[2:]):
            self.lost = "its map is no grid of what its branch reads."
            self.apart.append((str(node.target), self.lost))
            return
        self.places.append(Place(node, node, window, self.stride, self.layout))


def _keeps_size(window: Window) -> bool:
    """Whether n positions give ceil(n / stride), for every n."""
    if window.mode != "zeros" or window.finer != 1 or window.spacing != 1:
        return False
    pads = (sum(window.padding[:2]), sum(window.padding[2:]))
    spans = (d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True))
    return window.same or all(pad == span for pad, span in zip(pads, spans, strict=True))


def _tail(node: fx.Node, end: fx.Node | None, facts: Facts) -> tuple[fx.Node, str]:
    """The last of the operations after a convolution that act on each position alone and that nothing else reads."""
    layout = CHANNELS_LAST if rule_of(node, facts) is linear else CHANNELS_FIRST
    while len(node.users) == 1 and (user := next(iter(node.users))) is not end:
        if _spatial_inputs(user, facts) != [node]:
            break
        if rule_of(user, facts) is permutation or _is_permute_module(user, facts):
            layout = _TO.get(_order(user, facts), "")
            if not layout:
                break
        elif not is_pointwise(user, facts, layout):
            break
        node = user
    return node, layout


def is_pointwise(node: fx.Node, facts: Facts, layout: str) -> bool:
    """Whether an operation acts on each position alone, in evaluation mode, and reads no other map."""
    rule = rule_of(node, facts)
    if rule is layer_norm:
        module: Any = facts.module(node) if node.op == "call_module" else None
        shape = module.normalized_shape if module is not None else node.args[1]
        return layout == CHANNELS_LAST and isinstance(shape, (tuple, list)) and len(shape) == 1
    if rule not in _POINTWISE:
        return False
    module = facts.module(node) if node.op == "call_module" else None
    if hasattr(module, "running_mean") and (module.running_mean is None or layout != CHANNELS_FIRST):
        return False
    # What else it reads, such as a factor of each channel, has to be a parameter: one of each image is none.
    others = [one for one in node.all_input_nodes if one not in _spatial_inputs(node, facts)]
    return all(one.op == "get_attr" for one in others) and len(node.all_input_nodes) - len(others) == 1


def _is_permute_module(node: fx.Node, facts: Facts) -> bool:
    return node.op == "call_module" and type(facts.module(node)).__name__ == "Permute"


def _order(node: fx.Node, facts: Facts) -> tuple[int, ...]:
    """The axes in their new order; () if they are not written out."""
    if node.op == "call_module":
        return tuple(getattr(facts.module(node), "dims", ()))
    return order_of(node)


def order_of(node: fx.Node) -> tuple[int, ...]:
    """Of a permutation that is a function or a method; () if its axes are not written out."""
    if "permute" not in str(getattr(node.target, "__name__", node.target)):
        return ()
    given: Any = node.kwargs.get("dims", node.args[1:])
    order = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return tuple(order) if all(isinstance(axis, int) for axis in order) else ()
