"""Find where a network can be sampled: residual branches, each between a fork and the addition that ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import fx, nn

from cadsurgery.elements.kernel_map import Window
from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import only_user
from cadsurgery.methods.sampling.program import Gated
from cadsurgery.network.fuse import leaves_values
from cadsurgery.support.errors import CannotConvert, InvalidInput, UnknownName
from cadsurgery.support.torch_operations import operation_of
from cadsurgery.surgery.spatial import CHANNELS_FIRST, CHANNELS_LAST, Spatial


@dataclass(frozen=True)
class Branch:
    """A residual branch, or a convolution, with gates.

    Attributes:
        name: name of the module or of the addition.
        source: node that the gates read, at which the branch forks off.
        places: convolutions with gates, in order of execution.
        apart: convolutions without a gate although they could save work, and the reasons.
    """

    name: str
    source: fx.Node
    places: tuple[Gated, ...]
    apart: tuple[tuple[str, str], ...] = ()


def find_branches(spatial: Spatial, where: str | Sequence[str] = "auto") -> list[Branch]:
    """Find the requested branches, in order of execution.

    Args:
        spatial: how each operation of the network acts on positions.
        where: `"auto"` for all residual branches; or names of modules, for the residual branches inside, or of single
            convolutions. A convolution outside any residual branch is possible: its gate reads the same input.

    Raises:
        CannotConvert: `auto` finds no residual branches.
        UnknownName: there is no such module.
        InvalidInput: a module has no residual branches, or a convolution cannot be computed at chosen positions.
    """
    facts = spatial.facts
    chosen = branches = _residual_branches(spatial)
    if where == "auto" and not branches:
        raise CannotConvert(
            f"{type(facts.model).__name__} has no residual branches.",
            why="a gate chooses positions of what is added to a map, and no map is added to one it is made from.",
            next="name the convolutions to be sampled, where=[...], which then read what they are gated by; or "
            "convert it with cs.adaptify, which needs no such branches.",
        )
    if where != "auto":
        names = [where] if isinstance(where, str) else list(where)
        if not names or len(set(names)) < len(names):
            raise InvalidInput(
                f"where={where!r} names nothing, or something twice.", next='use where="auto".'
            )
        chosen = [branch for name in names for branch in _named(name, spatial, branches)]
    nodes = {node.name: node for node in facts.graph.nodes}
    joined = dict[tuple[str, str], Branch]()
    for branch in chosen:
        key = branch.source.name, branch.name
        before = joined[key].places if key in joined else ()
        joined[key] = replace(branch, places=(*before, *branch.places))
    gated, ended = {place.conv for branch in joined.values() for place in branch.places}, list[Branch]()
    for branch in joined.values():
        places = {
            place.conv: place._replace(end=_end(nodes[place.tail], gated, spatial)) for place in branch.places
        }
        in_order = sorted(places.values(), key=lambda place: nodes[place.conv])
        ended.append(replace(branch, places=tuple(in_order)))
    return sorted(ended, key=lambda branch: nodes[branch.places[0].conv])


def _named(name: str, spatial: Spatial, branches: Iterable[Branch]) -> list[Branch]:
    facts = spatial.facts
    modules = {path for path, _ in facts.model.named_modules() if path}
    if name not in modules:
        raise UnknownName("module", name, modules)
    if within := [branch for branch in branches if f"{branch.name}.".startswith(f"{name}.")]:
        return within
    nodes = [node for node in facts.graph.nodes if node.op == "call_module" and node.target == name]
    for branch in branches:
        if places := tuple(place for place in branch.places if place.path == name):
            return [replace(branch, places=places)]
    why = "it is neither a convolution nor a module with residual branches."
    source = _maps(nodes[0], facts) if len(nodes) == 1 else []
    if source and facts.layout(source[0]) == CHANNELS_FIRST:
        layers, apart, _ = _layers(nodes, source[0], spatial)
        if layers:
            return [Branch(name, source[0], (layers[0]._replace(tail=_tail(nodes[0], None, spatial)),))]
        why = apart[0][1] if apart else why
    raise InvalidInput(
        f"{name} cannot be sampled.",
        where=type(facts.model).__name__,
        why=why,
        next="name convolutions with the padding that keeps the size of their map, or modules with residual "
        "branches; cs.sample(model).plan tells those.",
    )


def _residual_branches(spatial: Spatial) -> list[Branch]:
    facts, branches, taken = spatial.facts, list[Branch](), set[fx.Node]()
    for node in facts.graph.nodes:
        ends, operation = _maps(node, facts), operation_of(node.target)
        if operation is None or not operation.adds or node.kwargs or len(ends) != 2 or len(node.args) != 2:
            continue
        if facts.shapes[ends[0]] != facts.shapes[ends[1]]:
            continue
        first, second = (_chain(end, facts) for end in ends)
        fork = next((value for value in first if value in second), None)
        if fork is None or facts.layout(fork) != CHANNELS_FIRST:  # gates read (B, C, H, W)
            continue
        sides = [list(reversed(side[: side.index(fork)])) for side in (first, second)]
        side = max(sides, key=lambda nodes: sum(facts.macs.get(value, 0) for value in nodes))
        if taken.isdisjoint(side) and (branch := _branch(node, fork, side, spatial)):
            branches.append(branch)
            taken.update(side)
    return branches


def _chain(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """Return a node and its inputs back through the graph, as long as each has a single map as its input."""
    chain = [node]
    while len(inputs := _maps(chain[-1], facts)) == 1:
        chain.append(inputs[0])
    return chain


def _maps(node: fx.Node, facts: Facts) -> list[fx.Node]:
    """Return the inputs of a node that are maps with several positions."""

    def is_spatial(source: fx.Node) -> bool:
        shape = facts.shapes.get(source, ())
        return len(shape) == 4 and source.op != "get_attr" and sum(length == 1 for length in shape[1:]) < 2

    return [source for source in node.all_input_nodes if is_spatial(source)]


def _branch(end: fx.Node, fork: fx.Node, side: list[fx.Node], spatial: Spatial) -> Branch | None:
    """Return the branch of the nodes between a fork and an addition; None if none of its convolutions can be gated."""
    places, apart, last = _layers(side, fork, spatial)
    # A last pointwise layer needs no gate: it commutes with filling and follows the gate before it.
    places = [place for place in places if place.conv != last or not place.window.is_pointwise]
    if not places:
        return None
    name, nodes = spatial.facts.path(end) or end.name, {node.name: node for node in side}
    kept = tuple(place._replace(tail=_tail(nodes[place.conv], end, spatial)) for place in places)
    return Branch(name, fork, kept, tuple(apart))


def _layers(
    nodes: Iterable[fx.Node], fork: fx.Node, spatial: Spatial
) -> tuple[list[Gated], list[tuple[str, str]], str]:
    """Return the layers among the nodes of a branch that can have a gate, the convolutions that cannot, with the
    reasons, and the name of the last layer. The map of a gate lies on a strided grid of the fork's map."""
    facts, stride, lost, last = spatial.facts, 1, "", ""
    places, apart = list[Gated](), list[tuple[str, str]]()
    for node in nodes:
        kind, window = spatial.kind(node)
        module = facts.module(node) if node.op == "call_module" else None
        is_conv = isinstance(module, nn.Conv2d)
        is_linear = isinstance(module, nn.Linear) and kind == "point" and facts.layout(node) == CHANNELS_LAST
        if not (is_conv or is_linear):
            if kind not in ("point", "permute"):
                before, after = (tuple(facts.shapes.get(one, ())) for one in (*_maps(node, facts)[:1], node))
                lost = lost or (
                    f"{node.name} before it changes the grid of the map." if before != after else ""
                )
            continue
        last, why = node.name, lost
        if is_linear:
            window = Window((1, 1))
        elif window is None:
            why = spatial.treatments[node].why
        elif not why:
            why = "" if _keeps_size(window) else "its padding does not keep the size of the map."
            stride *= window.stride if not why else 1
            grid = tuple(-(-length // stride) for length in facts.shapes[fork][2:])
            if not why and tuple(facts.shapes[node][2:]) != grid:
                why = "its map is no grid of what its branch reads."
        if window is not None and not why:
            places.append(Gated(node.name, str(node.target), window, stride, node.name, is_linear=is_linear))
        elif is_conv:
            lost = lost or why
            apart.append((str(node.target), why))
    return places, apart, last


def _keeps_size(window: Window) -> bool:
    """Return True if n positions give ceil(n / stride) outputs for every n."""
    if window.mode != "zeros" or window.finer != 1 or window.spacing != 1:
        return False
    pads = (sum(window.padding[:2]), sum(window.padding[2:]))
    spans = (d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True))
    return window.same or all(pad == span for pad, span in zip(pads, spans, strict=True))


def _tail(node: fx.Node, end: fx.Node | None, spatial: Spatial) -> str:
    """Return the name of the last of the pointwise operations after a convolution that have a single reader each."""
    while (user := only_user(node)) is not None and user is not end and _follows(user, node, spatial):
        module = spatial.facts.module(user) if user.op == "call_module" else None
        if isinstance(module, nn.Linear) or user.target is F.linear:
            break
        node = user
    return node.name


def _end(tail: fx.Node, gated: set[str], spatial: Spatial) -> tuple[str, ...]:
    """Return the names of the affine pointwise operations after the tail of a gate whose inputs have no other reader;
    empty if they include no convolution or linear layer, because then no work is saved."""
    facts, end, node = spatial.facts, list[fx.Node](), tail
    while (user := only_user(node)) is not None and user.name not in gated:
        module = facts.module(user) if user.op == "call_module" else None
        kind, window = spatial.kind(user)
        is_point = window is not None and window.is_pointwise and window.stride == 1
        is_affine = isinstance(module, nn.Linear) or type(module) is nn.BatchNorm2d or leaves_values(module)
        operation = operation_of(user.target)
        is_affine = is_affine or kind == "permute" or (operation is not None and operation.multiplies)
        if not (kind == "conv" and is_point) and not (is_affine and _follows(user, node, spatial)):
            break
        end.append(user)
        node = user
    modules = (facts.module(step) for step in end if step.op == "call_module")
    saves = any(isinstance(module, (nn.Conv2d, nn.Linear)) for module in modules)
    return tuple(step.name for step in end) if saves else ()


def _follows(node: fx.Node, source: fx.Node, spatial: Spatial) -> bool:
    """Return True if an operation is pointwise in evaluation mode and otherwise reads only parameters."""
    # A factor per image or a second map is not a parameter.
    others = [constant for constant in node.all_input_nodes if constant is not source]
    return spatial.kind(node).kind in ("point", "permute") and all(
        constant.op == "get_attr" for constant in others
    )
