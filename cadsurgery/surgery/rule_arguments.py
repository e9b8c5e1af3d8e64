"""Read the arguments of an operation by name, however they are spelled; for rules."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from cadsurgery.following.facts import MapFacts
from cadsurgery.following.hooks import acts_as
from cadsurgery.surgery.treatment import Attribute, Call

# Names of the argument that tells axes.
DIM_NAMES = ("dim", "dims", "axis")


def arguments_of(node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any]:
    """Return positional and keyword arguments by name."""
    return {**defaults, **dict(zip((*names, *defaults), node.args, strict=False)), **node.kwargs}


def options_of(node: fx.Node, facts: MapFacts, *names: str, **defaults: Any) -> dict[str, Any]:
    """Return the options of an operation by name: attributes of a module, or arguments of the equivalent function."""
    if node.op != "call_module":
        return arguments_of(node, *names, **defaults)
    module = facts.module(node)
    held = {name: getattr(module, name) for name in ("weight", "bias") if hasattr(module, name)}
    weights = {name: Attribute(f"{node.target}.{name}") for name in held if held[name] is not None}
    return {**defaults, **vars(module), **dict.fromkeys(held), **weights}


def axes_of(dim: Any, layout: str) -> tuple[int, ...] | None:
    """Return the numbers of axes, counted from the left and in order; None if they are not numbers."""
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not dims or not all(isinstance(d, int) for d in dims):
        return None
    return tuple(sorted(d % len(layout) for d in dims))


def first_map(node: fx.Node, facts: MapFacts) -> fx.Node:
    """Return the first map that a node reads."""
    return next(source for source in node.all_input_nodes if facts.layout(source))


def redirect(node: fx.Node, index: int, dim: Any) -> Call:
    """Return the node's own call with another `dim`, one of the rows; `index` is its index among the arguments."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if len(args) > index:
        args[index] = dim
    else:
        kwargs[next((name for name in DIM_NAMES if name in kwargs), "dim")] = dim
    return Call(node.target, tuple(args), kwargs)


def pooling_options(node: fx.Node, facts: MapFacts) -> dict[str, Any]:
    """Return the options of a pooling, with the stride that it has by default."""
    usual: dict[str, Any] = {"stride": None, "padding": 0}
    of_mean = {"ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    of_max = {"dilation": 1, "ceil_mode": False, "return_indices": False}
    in_order = of_mean if node.target is F.avg_pool2d else of_max
    options = {**of_mean, **of_max, **options_of(node, facts, "input", "kernel_size", **usual, **in_order)}
    options["return_indices"] = options["return_indices"] or node.target is F.max_pool2d_with_indices
    options["stride"] = options["kernel_size"] if options["stride"] in (None, []) else options["stride"]
    return options


def pools_with_indices(node: Any, facts: MapFacts) -> bool:
    """True if a node is a max pooling that returns values and indices."""
    if not isinstance(node, fx.Node):
        return False
    by_module = node.op == "call_module" and acts_as(facts.module(node), nn.MaxPool2d)
    return node.target is F.max_pool2d_with_indices or (
        by_module and pooling_options(node, facts)["return_indices"]
    )
