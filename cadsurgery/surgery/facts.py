"""Facts about a traced network, observed on an example: shapes and multiply-accumulates per node."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from cadsurgery.errors import CannotConvert, first_line
from cadsurgery.surgery.trace import evaluating

# Odd, non-square and small: what a conversion relies on must not depend on a convenient size.
EXAMPLE_SIZES = ((97, 129), (128, 160), (224, 224), (299, 299))


@dataclass(frozen=True)
class Facts:
    """What is known of every node.

    Attributes:
        model: the traced network.
        graph: its graph.
        example: the image it was observed on, (B, C, H, W).
        shapes: shape of each node that is a tensor.
        macs: multiply-accumulates of each node on the example, as torch counts them.
        container: type of the output if it is a kind of dictionary, which tracing turns into a plain one.
    """

    model: nn.Module
    graph: fx.Graph
    example: Tensor
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    macs: dict[fx.Node, int] = field(default_factory=dict)
    container: type[dict[str, Any]] = dict

    def module(self, node: fx.Node) -> nn.Module:
        """The module a `call_module` node calls."""
        return self.model.get_submodule(str(node.target))

    def path(self, node: fx.Node) -> str:
        """Qualified name of the module a node belongs to."""
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        return next((str(path) for path, _ in reversed(stack.values())), "") if stack else ""

    def is_map(self, node: fx.Node) -> bool:
        """Whether a node's value has four dimensions."""
        return len(self.shapes.get(node, ())) == 4


class _Observer(fx.Interpreter):
    def __init__(self, facts: Facts) -> None:
        super().__init__(facts.model, garbage_collect_values=True, graph=facts.graph)
        self.facts = facts
        self.counter = FlopCounterMode(display=False)

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.facts.macs[n] = (self.counter.get_total_flops() - before) // 2
        if isinstance(value, Tensor):
            self.facts.shapes[n] = value.shape
        return value


def observe(model: nn.Module, graph: fx.Graph, example: Tensor | None = None) -> Facts:
    """Run the network once, in evaluation mode, and note what every node yields.

    Args:
        model: the traced network.
        graph: its graph.
        example: an image batch (B, C, H, W); by default small random images of several sizes are tried.

    Raises:
        CannotConvert: the network does not run on it.
    """
    failure: Exception | None = None
    for image in [example] if example is not None else _default_examples(model):
        facts = Facts(model, graph, image)
        observer = _Observer(facts)
        try:
            with torch.no_grad(), evaluating(model), observer.counter:
                traced = observer.run(image)
                container = type(model(image)) if isinstance(traced, dict) else dict
            return replace(facts, container=container)
        except Exception as error:  # the network decides which sizes it accepts and how it says so
            failure = failure or error
    raise CannotConvert(
        f"{type(model).__name__} does not run on an example image.",
        why=f"{type(failure).__name__}: {first_line(failure)}",
        next="pass example_input=, a batch of images the network accepts.",
    ) from failure


def _default_examples(model: nn.Module) -> list[Tensor]:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise CannotConvert(
            f"{type(model).__name__} has no Conv2d.",
            why="content-adaptive downsampling acts on strided convolutions and pooling.",
            next="choose a convolutional network: cadsurgery list.",
        )
    generator = torch.Generator().manual_seed(0)
    weight = first.weight
    return [
        torch.randn(2, first.in_channels, *size, generator=generator).to(weight.device, weight.dtype)
        for size in EXAMPLE_SIZES
    ]
