"""Facts about a traced network, observed on an example: shapes and multiply-accumulates per node."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.elements.kernel_map import Window
from cadsurgery.support.counting import MacCounter
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CannotConvert, describe_error, first_line
from cadsurgery.surgery.arguments import AnyLayout, Arguments, image_of, in_order, run_forward, take_image
from cadsurgery.surgery.trace import evaluating

# Odd, non-square and small: what a conversion relies on must not depend on a convenient size.
EXAMPLE_SIZES = ((97, 129), (128, 160), (224, 224), (299, 299))


@dataclass(frozen=True)
class Facts:
    """Facts about every node.

    Attributes:
        model: the traced network.
        graph: its graph.
        example: the image it was observed on, (B, C, H, W).
        shapes: shape of each node that is a tensor.
        floating: the nodes that are tensors of real numbers.
        macs: multiply-accumulates of each node on the example.
        not_counted: operations that are not among them, because no rule says what they multiply.
        container: type of the output if it is a kind of dictionary, or a dataclass, for which a graph has a plain one.
        layouts: axes of each value that is a map. These three are those of a forward pass, see `flow.Flow.facts`.
        images: height and width, on the example, of each such map on its own grid.
        numbers: values of each node that is a number, or several, such as a size, on the example.
        pads: padding that was added to a map and belongs to the window that reads it.
        arguments: of the call it was observed in, by name.
        given: the nodes that are tensors of these arguments, in order of execution.
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
    layouts: dict[fx.Node, str] = field(default_factory=dict)
    images: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    pads: dict[fx.Node, Window] = field(default_factory=dict)
    arguments: Arguments = field(default_factory=dict)
    given: list[fx.Node] = field(default_factory=list)

    def layout(self, value: Any) -> str:
        """Axes of a value that is a map; "" for anything else."""
        return self.layouts.get(value, "") if isinstance(value, fx.Node) else ""

    def number(self, value: Any) -> Any:
        """A number, or several, as on the example where the network computes them; None for anything else."""
        if isinstance(value, (tuple, list)):
            return tuple(self.number(part) for part in value)
        return self.numbers.get(value) if isinstance(value, fx.Node) else value

    def module(self, node: fx.Node) -> nn.Module:
        """The module a `call_module` node calls."""
        return self.model.get_submodule(str(node.target))

    def path(self, node: fx.Node) -> str:
        """Qualified name of the module a node belongs to."""
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        return next((str(path) for path, _ in reversed(stack.values())), "") if stack else ""

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes whose values are returned."""
        return next(node for node in self.graph.nodes if node.op == "output").all_input_nodes

    def is_map(self, node: fx.Node) -> bool:
        """True if a node's value has four dimensions."""
        return len(self.shapes.get(node, ())) == 4

    def is_image(self, node: fx.Node) -> bool:
        """True if a node is the image of the call, or another input of its height and width."""
        shape = self.shapes.get(node, ())
        alike = len(shape) == 4 and shape[0] == len(self.example) and shape[2:] == self.example.shape[2:]
        return alike and node in self.given


class OtherFunction(CannotConvert):
    """A graph that does not compute what its network does."""


class _Observer(fx.Interpreter):
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
            asks = n.op == "placeholder" or n.target is operator.getitem
            if asks and any(value is tensor for tensor in self.tensors):
                self.facts.given.append(n)
        elif isinstance(value, (int, float, tuple, list)) and not tensors_of(value):
            self.facts.numbers[n] = value
        return value


def observe(model: nn.Module, graph: fx.Graph, example: Arguments | None = None) -> Facts:
    """Run the network once, in evaluation mode, and note what every node yields.

    Args:
        model: the traced network.
        graph: its graph.
        example: arguments of a call; by default small random images of several sizes are tried.

    Raises:
        CannotConvert: the network does not run on it.
        OtherFunction: the graph gives something else.
    """
    failure: Exception | None = None
    for arguments in [example] if example is not None else default_examples(model):
        facts = Facts(model, graph, image_of(arguments), arguments=arguments)
        observer = _Observer(facts)
        values = in_order(graph, arguments)
        with torch.no_grad(), evaluating(model):
            try:
                expected = run_forward(model, arguments)
            except Exception as error:  # the network decides which sizes it accepts and how it says so
                failure = failure or error
                continue
            try:
                with observer.counter, AnyLayout():
                    traced = observer.run(*values)
                facts.not_counted.extend(sorted(observer.counter.not_counted))
            except Exception as error:  # on the way that was traced some sizes do not fit
                raise _other_function(model, f"it does not run: {first_line(error)}") from error
        if not same(traced, expected):
            # While torch counts it takes some operations apart, and rounds otherwise: ties of nearest-exact, say.
            with torch.no_grad(), evaluating(model), AnyLayout():
                traced = fx.Interpreter(model, graph=graph).run(*values)
            if not same(traced, expected):
                why = "its forward does what torch.fx does not see, e.g. changes a value behind its back."
                raise _other_function(model, why)
        return replace(facts, container=type(expected) if isinstance(traced, dict) else dict)
    raise CannotConvert(
        f"{type(model).__name__} does not run on an example image.",
        why=describe_error(failure),
        next="pass example_input=, a batch of images the network accepts, or all arguments of a call as a tuple or a "
        "dictionary.",
    ) from failure


def _other_function(model: nn.Module, why: str) -> OtherFunction:
    """The refusal of a graph that is not the network: Python that ran while tracing may have been left out."""
    return OtherFunction(
        f"the graph of {type(model).__name__} computes something else than the network.",
        why=why,
        next="convert the part that is a plain CNN (e.g. model.backbone) and put it back, "
        "or declare the module that does it as one operation with @cadsurgery.rule.",
    )


def same(traced: Any, expected: Any) -> bool:
    """True if two structures hold the same tensors, to rounding."""
    leaves = [tensors_of(value) for value in (traced, expected)]
    return len(leaves[0]) == len(leaves[1]) and all(
        ours.shape == theirs.shape
        and torch.allclose(ours, theirs, 1e-3, 1e-3 * scale(theirs), equal_nan=True)
        for ours, theirs in zip(*leaves, strict=True)
    )


def scale(values: Tensor) -> float:
    """The largest absolute value that is finite: what differences are compared with."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 1.0


def default_examples(model: nn.Module) -> list[Arguments]:
    """Calls with a small random image batch (2, C, H, W), of several sizes, to be tried in order.

    Raises:
        CannotConvert: there is no Conv2d.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise CannotConvert(
            f"{type(model).__name__} has no Conv2d.",
            why="content-adaptive downsampling acts on strided convolutions and pooling.",
            next="choose a convolutional network: cadsurgery list.",
        )
    generator = torch.Generator().manual_seed(0)
    declared = tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", ()))  # as timm has it
    sizes = dict.fromkeys([*EXAMPLE_SIZES, declared[1:]] if len(declared) == 3 else EXAMPLE_SIZES)
    # The first convolution may see rearranged pixels, so that its channels are not the image's.
    channels = dict.fromkeys([*declared[:1], first.in_channels, 3])
    images = (
        torch.randn(2, count, *size, generator=generator).to(first.weight.device, first.weight.dtype)
        for count in channels
        for size in sizes
    )
    return [take_image(model, image) for image in images]
