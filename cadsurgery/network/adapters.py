"""Insert adapters into a rewritten graph: small modules beside the weights, without effect at full resolution. They are
shifts of what is made of a mean over the image, and refinements of the region's output maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements import functional
from cadsurgery.elements.mean_shift import MeanShift
from cadsurgery.elements.refinement import Refinement
from cadsurgery.following.arguments import example_of, in_order
from cadsurgery.following.equivalence import meta_copy
from cadsurgery.following.graphs import copy_graph, downstream, gives, upwards
from cadsurgery.following.hooks import acts_as
from cadsurgery.network.observing import observe
from cadsurgery.network.program import Program
from cadsurgery.surgery.rewrite import WORK, ask_mask

# Name of the submodule with the adapters of a network. Like the mask, they are not part of its state dict.
ADAPTERS = "_adapters"
# The kinds of adapters: prefixes of their names.
MEANS, REFINEMENTS = "mean__", "refinement__"


@dataclass(frozen=True)
class _MeanReader:
    """A layer that reads a mean over the image: its node, its weight (C, ...), and the node of the image's elements."""

    layer: fx.Node
    weight: Tensor
    image: fx.Node


def make_mean_shifts(program: Program) -> nn.ModuleDict:
    """Create a shift, initially without effect, for each layer of a program that reads a mean, by name."""
    levels = program.geometry.max_level
    shifts = {
        name: MeanShift(levels, len(reader.weight), reader.weight) for name, reader in _named(program).items()
    }
    return nn.ModuleDict(shifts)


def make_refinements(program: Program, hidden: int) -> nn.ModuleDict:
    """Create a refinement, initially without effect, for each map of a program that can have one."""
    like = next(program.net.parameters())
    refinements = {
        name: Refinement(refined.features, refined.channels, hidden, like)
        for name, refined in _refined(program).items()
    }
    return nn.ModuleDict(refinements)


def can_shift_means(program: Program) -> bool:
    """Return True if a layer of a program reads a mean over the image."""
    return next(_mean_readers(program), None) is not None


def with_adapters(program: Program, names: set[str]) -> Program:
    """Return the program with calls of the named adapters; for another path through the network, those that it has."""
    graph, copies = copy_graph(program.graph)
    kinds = {adapter_kind(name) for name in names}
    for name, reader in _named(program).items() if MEANS in kinds else ():
        if name in names:
            image = copies[reader.image]
            _insert(graph, name, copies[reader.layer], functional.shift_vector, before=(image,))
    for name, found in _refined(program).items() if REFINEMENTS in kinds else ():
        if name in names:
            masking = next(node for node in graph.nodes if node.target is ask_mask)
            behind, inputs = copies[found.behind], (masking.args[2], masking)
            if found.behind.target is functional.resize_to_dense:
                inputs = (*behind.args, *inputs)
                refined = _insert(
                    graph, name, behind, functional.refine_resized, (), inputs, dict(behind.kwargs)
                )
            else:
                refined = _insert(graph, name, behind, functional.refine, (), inputs)
            refined.meta[WORK] = next(node.meta[WORK] for node in upwards(found.behind) if WORK in node.meta)
    graph.lint()
    return replace(program, graph=graph)


def adapter_kind(name: str) -> str | None:
    """Return the kind of an adapter, given its name; None if there is no such kind."""
    return next((kind for kind in (MEANS, REFINEMENTS) if name.startswith(kind)), None)


def _insert(
    graph: fx.Graph,
    name: str,
    behind: fx.Node,
    call: Any,
    before: tuple[Any, ...] = (),
    after: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
) -> fx.Node:
    """Replace the value of the node `behind` by a call on `before`, the value, `after` and an adapter."""
    users = list(behind.users)
    with graph.inserting_before(behind.next):
        adapter = graph.get_attr(f"{ADAPTERS}.{name}")
        adapted = graph.call_function(call, (*before, behind, *after, adapter), options)
    for user in users:
        user.replace_input_with(behind, adapted)
    return adapted


@dataclass(frozen=True)
class _Map:
    """A map to be refined: its node, its channels, and the channels of the features that enter the region."""

    behind: fx.Node
    channels: int
    features: int


def _refined(program: Program) -> dict[str, _Map]:
    """Return the last maps of the fine size that depend on the region, and resizes that leave the region at another
    size, by refinement name."""
    plan = program.plan
    dtype = next((p.dtype for p in program.net.parameters()), torch.float32)
    arguments = (
        example_of(plan.call) if plan.call else program.bind(torch.zeros(plan.example_shape, dtype=dtype))
    )
    inputs = in_order(program.graph, arguments, program.uniform(0))
    seen = observe(program.bind_to(meta_copy(program.net)), program.graph, inputs).values
    nodes = list(program.graph.nodes)
    masking = next(node for node in nodes if node.target is ask_mask)
    features = seen[masking.args[2]]

    def is_fine_map(node: fx.Node) -> bool:
        own = seen[node]
        is_map = isinstance(own, Tensor) and own.dim() == 4 and own.is_floating_point()
        return is_map and own.shape[2:] == features.shape[2:] and len(own) == len(features)

    behind = downstream(nodes, lambda node: gives(node, "dense"))
    fine = [
        node
        for node in nodes
        if (node in behind and node.op != "output" and is_fine_map(node))
        or node.target is functional.resize_to_dense
    ]
    before = {source for node in fine for source in upwards(node) if source is not node}
    last = [node for node in fine if node not in before]
    return {
        f"{REFINEMENTS}{number}": _Map(node, seen[node].shape[1], features.shape[1])
        for number, node in enumerate(last)
    }


def _named(program: Program) -> dict[str, _MeanReader]:
    """Return the layers that read a mean, by names; a layer that is used several times gets several names."""
    named: dict[str, _MeanReader] = {}
    for reader in _mean_readers(program):
        stem = f"{MEANS}{str(reader.layer.target).replace('.', '_')}"
        number = sum(name == stem or name.startswith(f"{stem}__") for name in named)
        named[f"{stem}__{number}" if number else stem] = reader
    return named


def _mean_readers(program: Program) -> Iterator[_MeanReader]:
    """Yield the convolutions and linear layers that read a mean over the elements of an image."""
    for node in program.graph.nodes:
        if node.op == "call_module" and node.args and isinstance(source := node.args[0], fx.Node):
            module = program.net.get_submodule(str(node.target))
            if acts_as(module, nn.Conv2d, nn.Linear) and gives(source, "vector"):
                image: Any = source.args[0]
                yield _MeanReader(node, module.weight, image)
