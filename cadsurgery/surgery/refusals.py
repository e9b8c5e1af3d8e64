"""Explain why a network, or a part of it, is not converted: the requested region, and the error messages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import source_line
from cadsurgery.support.errors import CannotConvert, InvalidInput, UnknownName
from cadsurgery.surgery.barriers import Refusal
from cadsurgery.surgery.flow import Flow, position_mixers
from cadsurgery.surgery.treatment import Barrier, Cause, operation_name, why_whole

RegionOption = str | Sequence[str]

# Attribute names of the backbone in common libraries.
BACKBONE_NAMES = ("backbone", "encoder", "features", "body", "trunk")


def asked_region(facts: Facts, region: RegionOption) -> Refusal:
    """Return a function that tells why the requested region leaves out a node.

    Raises:
        CannotConvert: the network's backbone is not known.
        UnknownName: no such region, node or module.
        InvalidInput: `region` has the wrong type.
    """
    if region in ("auto", "heads"):
        return lambda node, maps: None
    modules = dict(facts.model.named_modules())
    if region == "backbone":
        backbones = [name for name in BACKBONE_NAMES if name in modules]
        if not backbones:
            raise CannotConvert(
                'region="backbone" is not possible: the network does not say which part is its backbone.',
                where=type(facts.model).__name__,
                next=f'use region="auto", or name modules: region=[...] of '
                f"{', '.join(name for name in modules if name and '.' not in name)}.",
            )
        region = backbones[:1]
    elif isinstance(region, str):
        raise UnknownName(
            "region", region, ["auto", "heads", "backbone"], next="or a list of node or module names."
        )
    if not isinstance(region, (list, tuple)) or not all(isinstance(name, str) for name in region):
        raise InvalidInput(
            f"region={region!r} is not a region.",
            next='give "auto", "heads", "backbone" or a list of node or module names.',
        )
    names = tuple(region)
    known = {node.name for node in facts.graph.nodes} | set(modules)
    for name in names:
        if name not in known:
            raise UnknownName(
                "node or module", name, known | {"auto", "backbone"}, next="see print(cs.plan(model))."
            )

    def refused(node: fx.Node, maps: Sequence[fx.Node]) -> Barrier | None:
        path = facts.path(node)
        if any(node.name == name or path == name or path.startswith(f"{name}.") for name in names):
            return None
        return Barrier(f"outside the region {', '.join(names)}", Cause.ASKED)

    return refused


def nothing_to_convert(flow: Flow) -> CannotConvert:
    """Return the error for a network without any region that can be made adaptive."""
    model = type(flow.model).__name__
    what = f"{model} has nothing that can be made adaptive."
    next_step = "convert another part of the network with region=[...], or teach the operation: see docs/extending.md."
    whole = next((node for node in flow.graph.nodes if why_whole(node, flow)), None)
    if whole is not None and whole in flow.barriers:
        return CannotConvert(
            what,
            where=place_of(whole, flow),
            why=_first_barrier(flow),
            next="take that off before the conversion (a hook: handle.remove()), or convert another part of the "
            "network with region=[...].",
        )
    mixers = position_mixers(flow)
    if mixers and not any(barrier.cause is Cause.ASKED for barrier in flow.barriers.values()):
        first, strided = mixers[0], [node for node in flow.grid if _downsamples(node, flow)]
        before = "its patch embedding" if len(strided) < 2 else f"{len(strided)} strided operations"
        return CannotConvert(
            f"{what} It joins all positions of the image.",
            where=place_of(first, flow),
            why=f"it has {len(mixers)} operations such as {operation_name(first, flow)} that join all positions of "
            f"the map, which then must all have one resolution; between {before} and them no convolution works on a "
            "downsampled map.",
            next="choose a convolutional network (cadsurgery list), or convert the convolutional part of this one: "
            "region=[...].",
        )
    if not any(flow.is_image(node) for node in flow.given):
        inputs = [node for node in flow.graph.nodes if node.op == "placeholder" and node.users]
        reader = next(iter(inputs[0].users)) if inputs else None
        return CannotConvert(
            what + " No operation reads one of the images of the call.",
            where=place_of(reader, flow) if reader is not None else "",
            why="they are read as a whole, a list or a dictionary, so that it is not known which image is where.",
            next="let the network read them one by one, e.g. torch.cat([images[0], images[1]]), or take each as an "
            "argument of its own.",
        )
    if not any(_downsamples(node, flow) for node in flow.grid):
        return CannotConvert(
            f"{what} It is a network without strides.",
            why="it has no strided convolution or pooling that a rule knows, and no dilation that stands for one"
            + (f"; {_first_barrier(flow)}" if flow.barriers else "."),
            next="content-adaptive downsampling needs a network that downsamples.",
        )
    where = next(iter(flow.barriers), None)
    return CannotConvert(
        what,
        where=place_of(where, flow) if where else "",
        why=_first_barrier(flow) if where else "nothing but pointwise operations follows its strides.",
        next=next_step,
    )


def _downsamples(node: fx.Node, flow: Flow) -> bool:
    return any(flow.restored[source] < flow.restored[node] for source in flow.maps(node))


def _first_barrier(flow: Flow) -> str:
    node, barrier = next(iter(flow.barriers.items()))
    macs = flow.macs
    total = sum(macs.values()) or 1
    return f"{barrier.why}; it holds {macs[node] / total:.0%} of the MACs, and all after it stays dense."


def place_of(node: fx.Node, facts: Facts) -> str:
    """Return module, operation and source line of a node, for messages."""
    parts = (operation_name(node, facts), source_line(node))
    return f"{facts.path(node) or node.name} ({', '.join(part for part in parts if part)})"
