"""Places for exits: the stages of a network's backbone and the maps at their ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import fx, nn

from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import upstream
from cadsurgery.support.errors import CannotConvert, InvalidInput, UnknownName
from cadsurgery.surgery.refusals import BACKBONE_NAMES
from cadsurgery.surgery.rules import resizing
from cadsurgery.surgery.treatment import rule_of

# A child with this share of the work is searched for stages itself.
_NEARLY_ALL = 0.8
# Smallest share of the work between two exits.
_LEAST_WORK = 0.01
# Image pixels per sample of the first exit: output stride 4, less at odd sizes.
_FIRST_AREA = 12


class Outlet(NamedTuple):
    """The outputs of a network, which all exits precede.

    Attributes:
        ends: node of the class scores before they are resized, or those of the maps that a backbone returns.
        final: node of the output computed from the class scores; None for a backbone.
    """

    ends: tuple[fx.Node, ...]
    final: fx.Node | None


class Exit(NamedTuple):
    """A place where a prediction can be made.

    Attributes:
        name: name of the module or node.
        branches: nodes of its maps, the finest first, the others in execution order.
    """

    name: str
    branches: tuple[fx.Node, ...]


def find_outlet(facts: Facts) -> Outlet:
    """Find the outputs of a network: a map, entry `out` of a dictionary, or several maps.

    Raises:
        CannotConvert: the network returns no map.
    """
    returned: Any = next(node for node in facts.graph.nodes if node.op == "output").args[0]
    value = returned.get("out", returned) if isinstance(returned, Mapping) else returned
    if isinstance(value, fx.Node) and facts.is_map(value):
        scores = value
        while (
            rule_of(scores, facts) is resizing and (read := scores.all_input_nodes) and facts.is_map(read[0])
        ):
            scores = read[0]
        return Outlet((scores,), value)
    parts = list(value.values()) if isinstance(value, Mapping) else value
    several = parts if isinstance(parts, (list, tuple)) else ()
    if several and all(isinstance(part, fx.Node) and facts.is_map(part) for part in several):
        return Outlet(tuple(several), None)
    raise CannotConvert(
        f"{type(facts.model).__name__} returns no map.",
        why="an exit predicts a class for each position; this network gives one answer for each image.",
        next="pass a segmentation network, or a backbone that returns its maps, with classes=.",
    )


def find_exits(facts: Facts, outlet: Outlet, asked: str | Sequence[str]) -> list[Exit]:
    """Find the requested exits, in execution order.

    Args:
        facts: facts of the network.
        outlet: outputs of the network.
        asked: `"auto"`, or names of modules or nodes.

    Raises:
        CannotConvert: `auto` finds no stages, or there are other images at an exit than at the end.
        UnknownName: there is no such module or node.
        InvalidInput: the exit has no map, or the head is not computed from it.
    """
    before = upstream(*outlet.ends)
    if asked == "auto":
        listed = _stages(facts, outlet, before)
    else:
        names = [asked] if isinstance(asked, str) else list(asked)
        if not names or len(set(names)) < len(names):
            raise InvalidInput(f"exits={asked!r} names no exits, or one twice.", next='use exits="auto".')
        listed = [_named(name, facts, outlet, before) for name in names]
    images = facts.shapes[outlet.ends[0]][0]
    for exit in listed:
        if (others := facts.shapes[exit.branches[0]][0]) != images:
            raise CannotConvert(
                f"there can be no exit after {exit.name}.",
                why=f"its map is of {others} images and the output of {images}: the network joins or splits images.",
                next="name exits where there is a map for each image: exits=[...].",
            )
    return sorted(listed, key=lambda exit: max(exit.branches))


def _named(name: str, facts: Facts, outlet: Outlet, before: set[fx.Node]) -> Exit:
    nodes = {node.name: node for node in facts.graph.nodes}
    modules = {path for path, _ in facts.model.named_modules() if path}
    if name in modules:
        leaving = _outputs(name, facts)
        maps = [node for node in leaving if node in before] or leaving
    elif name in nodes:
        maps = [nodes[name]] if facts.is_map(nodes[name]) else []
    else:
        raise UnknownName("module or node", name, modules | nodes.keys())
    behind = [node for node in maps if node not in before or node is max(outlet.ends)]
    if not maps or behind:
        inside = [node for node in before if _is_in(facts.path(node), name) or node.name == name]
        why = "no map of it is read by what follows." if inside else "its head does not read it."
        raise InvalidInput(
            f"there can be no exit after {name}.",
            where=type(facts.model).__name__,
            why="it is part of the network's head or lies behind it, and that is the last exit anyway."
            if behind
            else why,
            next="name modules that come before the head: print(net.plan) of exits='auto' shows some.",
        )
    return Exit(name, by_resolution(maps, facts))


def _outputs(path: str, facts: Facts) -> list[fx.Node]:
    """Return the maps computed in a module that are read outside it."""

    def leaves(node: fx.Node) -> bool:
        return any(user.op == "output" or not _is_in(facts.path(user), path) for user in node.users)

    made = [node for node in facts.graph.nodes if _is_in(facts.path(node), path) and facts.is_map(node)]
    return [node for node in made if leaves(node)]


def by_resolution(maps: Sequence[fx.Node], facts: Facts) -> tuple[fx.Node, ...]:
    """Return maps, the finest first."""
    finest = max(maps, key=lambda node: _area(node, facts))
    return (finest, *(node for node in maps if node is not finest))


def _area(node: fx.Node, facts: Facts) -> int:
    return facts.shapes[node][2] * facts.shapes[node][3]


def _is_in(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(f"{parent}.")


def _stages(facts: Facts, outlet: Outlet, before: set[fx.Node]) -> list[Exit]:
    """Return an exit after each child of the backbone that is a group of blocks or halves the map, but the last."""
    root = next((name for name in BACKBONE_NAMES if name in facts.model._modules), "")
    while True:
        work = _work_of_children(root, facts, before)
        heaviest = max(work, key=lambda name: work[name], default="")
        module = facts.model.get_submodule(heaviest) if heaviest else None
        if module is None or not module._modules or work[heaviest] < _NEARLY_ALL * sum(work.values()):
            break
        root = heaviest
    children = list(work)
    image = facts.example.shape[2] * facts.example.shape[3]
    total = sum(facts.macs.get(node, 0) for node in before)
    groups = [name for name in children if _is_group(facts.model.get_submodule(name))]
    last = groups[-1] if groups else ""
    listed: list[Exit] = []
    passed = 0
    for place, (name, following) in enumerate(pairwise(children)):
        maps = [node for node in _outputs(name, facts) if node in before]
        if not maps or max(outlet.ends) in maps or name == last:
            continue
        finest = max(_area(node, facts) for node in maps)
        after = [_area(node, facts) for node in _outputs(following, facts) if node in before]
        ends = name in groups or (after and 3 * max(after) <= finest)
        left = sum(work[child] for child in children[place + 1 :])
        done = sum(facts.macs.get(node, 0) for node in upstream(*maps))
        enough = min(done - passed, left) >= _LEAST_WORK * total
        if ends and enough and _FIRST_AREA * finest <= image:
            listed.append(Exit(name, by_resolution(maps, facts)))
            passed = done
    if not listed:
        raise CannotConvert(
            f"no stages were found in {type(facts.model).__name__}.",
            why="none of its parts is a group of blocks, or halves the map, before its head.",
            next="name the exits: exits=[...] takes names of modules or nodes.",
        )
    return listed


def _work_of_children(root: str, facts: Facts, before: set[fx.Node]) -> dict[str, int]:
    """Return the MACs of a module's children, in execution order."""
    work: dict[str, int] = {}
    for node in facts.graph.nodes:
        path = facts.path(node)
        if node in before and path and path != root and _is_in(path, root):
            rest = path[len(root) + 1 :] if root else path
            name = f"{root}.{rest.partition('.')[0]}".removeprefix(".")
            work[name] = work.get(name, 0) + facts.macs.get(node, 0)
    return work


def _is_group(module: nn.Module) -> bool:
    """True if a module contains blocks, each with several convolutions or linear layers."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    kinds = (nn.Conv2d, nn.Linear)
    return any(
        sum(isinstance(part, kinds) for part in block.modules()) > 1
        for block in module.children()
        if block._modules
    )
