"""What a sampled network runs, as a value: steps, and segments, each a convolution with all that its gate decides of.

In the graph a gate is a node `reconstruct` behind the operations it decides of, which reads them and the input of the
branch. A segment goes on from there, over what may as well be done before gaps are filled, to the addition.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from cadsurgery.elements.backends.packed import PackedConv, PackedLinear
from cadsurgery.elements.backends.weights import Activation
from cadsurgery.elements.kernel_map import Window
from cadsurgery.methods.sampling.branches import ADDITIONS, CHANNELS_FIRST, CHANNELS_LAST, order_of
from cadsurgery.methods.steps import Step, last_read, step_of
from cadsurgery.network.fuse import activation_of, leaves_values
from cadsurgery.surgery.hooks import child
from cadsurgery.surgery.rewrite import pack_graph, unpack_graph

_PRODUCTS = ("mul", "mul_", "imul")


def reconstruct(value: Tensor, source: Tensor, gate: int) -> Tensor:
    """Where a gate decides of a value: all of it, as it stands here; `run.py` fills where the gate is closed."""
    return value


@dataclass(frozen=True)
class Gated:
    """A convolution with a gate.

    Attributes:
        conv: name of its node.
        path: of its module.
        window: that it reads by.
        stride: of the gate's map relative to the branch's input.
        layout: axes of the value that is filled, `bchw` or `bhwc`.
    """

    conv: str
    path: str
    window: Window
    stride: int
    layout: str


class Block(NamedTuple):
    """A branch: its name, and the numbers of its gates."""

    name: str
    gates: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps that one gate decides of.

    Attributes:
        gate: its number.
        conv: the convolution.
        tail: what follows on each position alone, before the filling.
        fill: the filling.
        end: affine operations on each position behind it, which therefore may come before it.
        layout: axes of what `end` gives.
        add: an addition that follows, if any.
        other: name of its other operand.
        act: an activation that follows that, if any.
        activation: which one.
    """

    gate: int
    conv: Step
    tail: tuple[Step, ...]
    fill: Step
    end: tuple[Step, ...] = ()
    layout: str = CHANNELS_FIRST
    add: Step | None = None
    other: str = ""
    act: Step | None = None
    activation: Activation | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        more = tuple(step for step in (self.add, self.act) if step is not None)
        return (self.conv, *self.tail, self.fill, *self.end, *more)


class Item(NamedTuple):
    """What is run at once, and the values that nothing reads afterwards."""

    run: Step | Segment
    frees: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A graph with gates.

    Attributes:
        graph: with `reconstruct` nodes.
        gates: in order of execution; the keyword `gate` of a node is a place in it.
        blocks: name and gates of each branch.
        signature: of the network's forward.
        container: type of the output if it is a kind of dictionary, or a dataclass.
        is_fused: whether its convolutions are kernels for inference.
        items: what is run.
        output: what is returned.
        at: the gates that read a value, by its name.
    """

    graph: fx.Graph
    gates: tuple[Gated, ...]
    blocks: tuple[Block, ...]
    signature: inspect.Signature
    container: type = dict
    is_fused: bool = False
    items: tuple[Item, ...] = field(init=False, repr=False)
    output: Step = field(init=False, repr=False)
    at: dict[str, tuple[int, ...]] = field(init=False, repr=False)

    def find(self, net: nn.Module) -> Program:
        """Itself, once its items are found in the graph and the modules of a network."""
        *nodes, output = self.graph.nodes
        finder, parts, inside = _Finder(self, net), dict[fx.Node, Segment](), dict[fx.Node, list[fx.Node]]()
        sources = dict[int, str]()
        for node in nodes:
            if node.target is reconstruct:
                segment, some = finder.segment(node)
                parts[some[-1]] = segment
                inside.update(dict.fromkeys(some, some))
                source: Any = node.args[1]
                sources[segment.gate] = source.name
        runs = [node for node in nodes if node in parts or node not in inside]
        groups = [inside.get(node, [node]) for node in runs]
        frees = last_read(groups, set(output.all_input_nodes))
        items = []
        for node, group in zip(runs, groups, strict=True):
            freed = tuple(value.name for one in group for value in frees[one] if value not in group)
            items.append(Item(parts.get(node) or step_of(node), freed))
        at = dict[str, tuple[int, ...]]()
        for gate, source in sorted(sources.items()):
            at[source] = (*at.get(source, ()), gate)
        self.__dict__.update(items=tuple(items), output=step_of(output), at=at)
        return self

    @property
    def steps(self) -> Iterator[Step]:
        """All steps in order, those of a segment where it ends."""
        for item in self.items:
            yield from item.run.steps if isinstance(item.run, Segment) else (item.run,)

    def contain(self, output: Any) -> Any:
        """The output of a graph in the original's type."""
        if not isinstance(output, dict):
            return output
        return self.container(**output) if is_dataclass(self.container) else self.container(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": pack_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=unpack_graph(state["graph"]))


@dataclass
class _Finder:
    """Finds what belongs to a gate in a graph, as it was traced or fused."""

    program: Program
    net: nn.Module
    taken: set[fx.Node] = field(default_factory=set)

    def segment(self, fill: fx.Node) -> tuple[Segment, list[fx.Node]]:
        """The segment of a `reconstruct` node, and its nodes."""
        number: Any = fill.kwargs["gate"]
        gated = self.program.gates[number]
        tail = list[fx.Node]()
        node: Any = fill.args[0]
        while not self.is_conv(node, gated):
            tail.insert(0, node)
            node = next(one for one in node.all_input_nodes if one.op != "get_attr")
        end, layout = self.end(fill, gated.layout)
        last = end[-1] if end else fill
        add, other, act = None, "", None
        kernel = self.module(last)
        if isinstance(kernel, PackedConv) and len(last.all_input_nodes) > 1:
            added: Any = last.args[1]
            other = added.name
        else:
            add, other = self.addition(last, layout)
            act = self.activation(add) if add is not None else None
        nodes = [node, *tail, fill, *end, *(one for one in (add, act) if one is not None)]
        self.taken.update(nodes)
        steps = {one: step_of(one) for one in nodes}
        found = Segment(
            gate=number,
            conv=steps[node],
            tail=tuple(steps[one] for one in tail),
            fill=steps[fill],
            end=tuple(steps[one] for one in end),
            layout=layout,
            add=steps[add] if add is not None else None,
            other=other,
            act=steps[act] if act is not None else None,
            activation=activation_of(act, self.module(act)) if act is not None else None,
        )
        return found, nodes

    def module(self, node: fx.Node) -> nn.Module | None:
        return child(self.net, str(node.target)) if node.op == "call_module" else None

    def is_conv(self, node: fx.Node, gated: Gated) -> bool:
        return node.name == gated.conv or getattr(self.module(node), "origin", None) == gated.conv

    def end(self, fill: fx.Node, layout: str) -> tuple[list[fx.Node], str]:
        """Affine operations on each position alone that nothing else reads the values before, and their layout; none if
        there is no convolution among them, because nothing is saved then."""
        end, before, after = list[fx.Node](), fill, layout
        while len(before.users) == 1:
            node = next(iter(before.users))
            following = self.affine(node, before, after)
            if not following:
                break
            end.append(node)
            before, after = node, following
            if len(node.args) > 1 and isinstance(self.module(node), PackedConv):
                break  # with a residual, which is the addition
        has_work = any(isinstance(self.module(node), (nn.Conv2d, nn.Linear, PackedConv)) for node in end)
        return (end, after) if has_work else ([], layout)

    def affine(self, node: fx.Node, value: Any, layout: str) -> str:
        """The layout after an operation; "" if it is not affine on each position alone, or has a gate."""
        module: Any = self.module(node)
        if node in self.taken or any(self.is_conv(node, gated) for gated in self.program.gates):
            return ""
        if node.op == "call_module":
            if node.args[0] is not value:
                return ""
            if isinstance(module, PackedLinear):
                return layout if layout == CHANNELS_LAST and _is_plain(module, node) else ""
            if isinstance(module, PackedConv):
                point = tuple(module.weight.shape[2:]) == (1, 1) and module.window == ((1, 1), (0, 0), (1, 1))
                return layout if layout == CHANNELS_FIRST and point and _is_plain(module, node) else ""
            if isinstance(module, nn.Conv2d):
                point = module.kernel_size == (1, 1) and module.stride == (1, 1)
                plain = module.padding in ((0, 0), "valid", "same", 0)
                return layout if layout == CHANNELS_FIRST and point and plain else ""
            if isinstance(module, nn.Linear):
                return layout if layout == CHANNELS_LAST else ""
            if type(module) is nn.BatchNorm2d and module.running_mean is not None:
                return layout if layout == CHANNELS_FIRST else ""
            if type(module).__name__ == "Permute":
                return _PERMUTED.get((layout, tuple(module.dims)), "")
            return layout if leaves_values(module) else ""
        name = str(getattr(node.target, "__name__", node.target))
        if "permute" in name:
            return _PERMUTED.get((layout, order_of(node)), "")
        if name in _PRODUCTS and node.op in ("call_function", "call_method"):
            others = [one for one in node.all_input_nodes if one is not value]
            return layout if all(one.op == "get_attr" for one in others) else ""
        return ""

    def addition(self, node: fx.Node, layout: str) -> tuple[fx.Node | None, str]:
        """An addition to another map of its shape, as far as that can be known."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if (
            user is None
            or user.target not in ADDITIONS
            or user.op == "call_module"
            or user.kwargs
            or user in self.taken
        ):
            return None, ""
        others = [one for one in user.all_input_nodes if one is not node]
        if layout != CHANNELS_FIRST or len(others) != 1 or len(user.args) != 2 or others[0].op == "get_attr":
            return None, ""
        return user, others[0].name

    def activation(self, add: fx.Node) -> fx.Node | None:
        user = next(iter(add.users)) if len(add.users) == 1 else None
        if user is None or user.op == "output" or user.args != (add,):
            return None
        return user if activation_of(user, self.module(user)) is not None else None


_PERMUTED: dict[tuple[str, tuple[int, ...]], str] = {
    (CHANNELS_FIRST, (0, 2, 3, 1)): CHANNELS_LAST,
    (CHANNELS_LAST, (0, 3, 1, 2)): CHANNELS_FIRST,
}


def _is_plain(kernel: PackedConv, node: fx.Node) -> bool:
    """Whether a fused convolution is affine: with a residual what comes after that may be anything."""
    return kernel.activation is None or len(node.all_input_nodes) > 1
