"""Observe a traced network on an example: shapes and multiply-accumulates per node."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.kernel_map import Window
from cadsurgery.following.arguments import AnyLayout, Arguments, image_of, in_order, run_forward, take_image
from cadsurgery.following.equivalence import Pair, are_equal, compare
from cadsurgery.following.graphs import Interpreter, module_of
from cadsurgery.following.module_state import CallCaches
from cadsurgery.following.trace import evaluating
from cadsurgery.support.counting import MacCounter
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CannotConvert, describe_error, first_line

# Odd, non-square and small, so that a conversion does not rely on convenient sizes; then multiples of 32 and of
# 128, and the usual sizes of networks that take a single one.
EXAMPLE_SIZES = ((97, 129), (128, 160), (128, 256), (224, 224), (64, 64), (299, 299))


@dataclass(frozen=True)
class Facts:
    """Facts about every node.

    Attributes:
        model: the traced network.
        graph: graph of the network.
        example: the image of the example, (B, C, H, W).
        shapes: shape of each node that is a tensor.
        floating: the nodes that are floating-point tensors.
        macs: multiply-accumulates of each node on the example.
        not_counted: operations missing from `macs`, because they have no counting rule.
        container: type of the output if it is a dictionary subclass or a dataclass; the graph returns a plain dict.
        numbers: value on the example of each node that is a number or several, such as a size.
        arguments: arguments of the example call, by name.
        given: the nodes that are tensors of these arguments, in order of execution.
        caches: what the network's forward keeps for its next call; it is forgotten where a graph is compared with it.
    """

    model: nn.Module
    graph: fx.Graph
    example: Tensor
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    floating: set[fx.Node] = field(default_factory=set)
    macs: dict[fx.Node, int] = field(default_factory=dict)
    not_counted: list[str] = field(default_factory=list)
    container: type = dict
    numbers: dict[fx.Node, Any] = field(default_factory=dict)
    arguments: Arguments = field(default_factory=dict)
    given: list[fx.Node] = field(default_factory=list)
    caches: CallCaches | None = None

    def number(self, value: Any) -> Any:
        """Return a number or several; for a node its value on the example, or None if it is no number."""
        if isinstance(value, (tuple, list)):
            return tuple(self.number(part) for part in value)
        return self.numbers.get(value) if isinstance(value, fx.Node) else value

    def module(self, node: fx.Node) -> nn.Module:
        """Return the module of a `call_module` node."""
        return self.model.get_submodule(str(node.target))

    def path(self, node: fx.Node) -> str:
        """Return the qualified name of the module that a node belongs to."""
        return str(node.target) if node.op == "call_module" else module_of(node)

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes that the graph returns."""
        return next(node for node in self.graph.nodes if node.op == "output").all_input_nodes

    def forgetting(self) -> AbstractContextManager[None]:
        """Let the network forget for a block what its forward keeps for its next call."""
        return self.caches.forgotten() if self.caches is not None else nullcontext()

    def is_map(self, node: fx.Node) -> bool:
        """True if a node's value has four dimensions."""
        return len(self.shapes.get(node, ())) == 4

    def is_image(self, node: fx.Node) -> bool:
        """True if a node is the image of the call, or another input of its height and width."""
        shape = self.shapes.get(node, ())
        alike = len(shape) == 4 and shape[0] == len(self.example) and shape[2:] == self.example.shape[2:]
        return alike and node in self.given


@dataclass(frozen=True)
class MapFacts(Facts):
    """What a rule is given: facts about every node, and about the maps among the nodes before its own.

    Attributes:
        layouts: axes of each value that is a map.
        images: height and width of each map on its own grid, on the example.
        pads: windows of padding operations, to be taken over by the window that reads the padded map.
    """

    layouts: dict[fx.Node, str] = field(default_factory=dict)
    images: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    pads: dict[fx.Node, Window] = field(default_factory=dict)

    def layout(self, value: Any) -> str:
        """Return the axes of a map, e.g. `bchw`; "" for any other value."""
        return self.layouts.get(value, "") if isinstance(value, fx.Node) else ""


class OtherFunction(CannotConvert):
    """The traced graph computes something else than the network."""


class _Observer(Interpreter):
    def __init__(self, facts: Facts) -> None:
        super().__init__(facts.model, garbage_collect_values=True, graph=facts.graph)
        self.facts = facts
        self.counter = MacCounter()
        self.tensors = tensors_of(facts.arguments)

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.macs
        value = super().run_node(n)
        self.facts.macs[n] = self.counter.macs - before
        if isinstance(value, Tensor):
            self.facts.shapes[n] = value.shape
            self.facts.floating.update([n] if value.is_floating_point() else [])
            is_input = n.op == "placeholder" or n.target is operator.getitem
            if is_input and any(value is tensor for tensor in self.tensors):
                self.facts.given.append(n)
        elif isinstance(value, (int, float, tuple, list)) and not tensors_of(value):
            self.facts.numbers[n] = value
        return value


def observe(model: nn.Module, graph: fx.Graph, example: Arguments | None = None) -> Facts:
    """Run the network once, in evaluation mode, and record facts about every node.

    Args:
        model: the traced network.
        graph: graph of the network.
        example: arguments of a call; by default small random images of several sizes are tried.

    Raises:
        CannotConvert: the network does not run on the example.
        OtherFunction: the outputs of the graph differ from the network's.
    """
    failure: Exception | None = None
    for arguments in [example] if example is not None else default_examples(model):
        facts = Facts(model, graph, image_of(arguments), arguments=arguments)
        observer = _Observer(facts)
        values = in_order(graph, arguments)
        with torch.no_grad(), evaluating(model):
            try:
                expected = run_forward(model, arguments)
            except Exception as error:  # the network may refuse a size with any error
                failure = failure or error
                continue
            if not tensors_of(expected):
                raise _without_tensors(model, expected)
            try:
                with observer.counter, AnyLayout():
                    traced = observer.run(*values)
                facts.not_counted.extend(sorted(observer.counter.not_counted))
            except Exception as error:  # the traced path may not fit this size
                raise _other_function(model, f"it does not run: {first_line(error)}") from error
        # While counting, torch decomposes some operations and rounds differently, e.g. ties of nearest-exact.
        if not are_equal(traced, expected) and not _computes_the_same(Pair(model, graph), arguments):
            why = "its forward does what torch.fx does not see, e.g. changes a value behind its back."
            raise _other_function(model, why)
        return replace(facts, container=type(expected) if isinstance(traced, dict) else dict)
    raise CannotConvert(
        f"{type(model).__name__} does not run on an example image.",
        why=describe_error(failure),
        next="pass example_input=, a batch of images the network accepts, or all arguments of a call as a tuple or a "
        "dictionary.",
    ) from failure


def _without_tensors(model: nn.Module, output: Any) -> OtherFunction:
    """Return the error for a network whose outputs nothing can be compared with, such as numpy arrays."""
    return OtherFunction(
        f"{type(model).__name__} returns no tensors.",
        why=f"its forward returns {type(output).__name__}; a conversion is compared with the network by its tensors.",
        next="convert the part that is a plain CNN and put it back, or let its forward return tensors.",
    )


def _other_function(model: nn.Module, why: str) -> OtherFunction:
    """Return the error for a graph that computes something else than the network, e.g. because code was not traced."""
    return OtherFunction(
        f"the graph of {type(model).__name__} computes something else than the network.",
        why=why,
        next="convert the part that is a plain CNN and put it back, "
        "or declare the module that does it as one operation with @cadsurgery.rule.",
    )


def _computes_the_same(pair: Pair, call: Arguments) -> bool:
    """True if a graph gives what its network gives for a call: bit for bit or, in float64, up to rounding."""
    with contextlib.suppress(Exception):  # e.g. a network that refuses a second call
        if are_equal(pair.run_graph(call), pair.run_network(call)):
            return True
    return compare(pair, call)[-1]


def scale(values: Tensor) -> float:
    """Return the largest finite absolute value, as the scale of differences."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 1.0


def default_examples(model: nn.Module) -> Iterator[Arguments]:
    """Return calls with small random image batches (2, C, H, W) of several sizes, to be tried in order: each is drawn
    when it is asked for, and most networks take the first.

    Raises:
        CannotConvert: the network has no weights of a convolution.
    """
    kernels = (
        (module.weight, module.in_channels) for module in model.modules() if isinstance(module, nn.Conv2d)
    )
    held = ((value, value.shape[1]) for value in (*model.parameters(), *model.buffers()) if value.dim() == 4)
    weight, count = next(kernels, None) or next(
        held, (None, 0)
    )  # a network may call torch's functions itself
    if weight is None:
        raise CannotConvert(
            f"{type(model).__name__} has no Conv2d.",
            why="content-adaptive downsampling acts on strided convolutions and pooling.",
            next="choose a convolutional network: cadsurgery list.",
        )
    generator = torch.Generator().manual_seed(0)
    declared = tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", ()))  # set by timm
    sizes = dict.fromkeys([*EXAMPLE_SIZES, declared[1:]] if len(declared) == 3 else EXAMPLE_SIZES)
    # The first convolution may read rearranged pixels, or gradients of a grey image; then its channels are not those of
    # the image.
    channels = dict.fromkeys([*declared[:1], count, 3, 1])
    images = (
        torch.randn(2, count, *size, generator=generator, dtype=torch.float32, device="cpu").to(
            weight.device, weight.dtype
        )
        for count in channels
        for size in sizes
    )
    return (take_image(model, image) for image in images)
