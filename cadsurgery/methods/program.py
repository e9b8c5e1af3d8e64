"""A graph as steps that are run one by one, and maps as rows: what several methods are made of.

Steps are plain values, no nodes, so that copies of a network share them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.methods.spatial import WHOLE, SpatialKind
from cadsurgery.network.macs import to_meta
from cadsurgery.support.counting import MacCounter
from cadsurgery.surgery.arguments import bind_all, contain
from cadsurgery.surgery.hooks import child, parameter
from cadsurgery.surgery.rewrite import pack_graph, unpack_graph


class Ref(NamedTuple):
    """An argument: the value of another step."""

    name: str


@dataclass(frozen=True)
class Step:
    """A node as a plain value.

    Attributes:
        name: of the node.
        op: as in torch.fx, and so are target, args and kwargs, with `Ref`s for nodes.
        reads: names of the steps among the arguments.
        frees: names of values that no later step reads.
        spatial: how it acts on positions.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[str, ...]
    frees: tuple[str, ...] = ()
    spatial: SpatialKind = WHOLE

    def bind(self, value_of: Callable[[str], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, with values for steps."""
        return _map(self.args, value_of), _map(self.kwargs, value_of)


def _map(part: Any, value_of: Callable[[str], Any]) -> Any:
    if isinstance(part, Ref):
        return value_of(part.name)
    if isinstance(part, (tuple, list)):
        return type(part)(_map(one, value_of) for one in part)
    if isinstance(part, dict):
        return {key: _map(one, value_of) for key, one in part.items()}
    if isinstance(part, slice):
        return slice(*(_map(one, value_of) for one in (part.start, part.stop, part.step)))
    return part


def steps_of(
    nodes: Iterable[fx.Node], kept: Iterable[fx.Node] = (), spatial: Mapping[str, SpatialKind] | None = None
) -> dict[fx.Node, Step]:
    """Nodes as steps.

    Args:
        nodes: in the order in which they are run.
        kept: values that are read afterwards.
        spatial: how nodes act on positions, by name.
    """
    nodes, frees = list(nodes), dict[fx.Node, list[str]]()
    last = {value: node for node in nodes for value in node.all_input_nodes}
    for value, reader in last.items():
        if value not in kept:
            frees.setdefault(reader, []).append(value.name)

    def step(node: fx.Node) -> Step:
        args, kwargs = (
            map_aggregate(part, lambda one: Ref(one.name) if isinstance(one, fx.Node) else one)
            for part in (node.args, node.kwargs)
        )
        reads, freed = tuple(one.name for one in node.all_input_nodes), tuple(frees.get(node, ()))
        kind = (spatial or {}).get(node.name, WHOLE)
        return Step(node.name, node.op, node.target, args, kwargs, reads, freed, kind)  # type: ignore[arg-type]

    return {node: step(node) for node in nodes}


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """A graph, and the steps it is run in: base of what methods run.

    Attributes:
        graph: the graph.
        signature: of the network's forward.
        container: type of the output if it is a kind of dictionary, or a dataclass.
        is_fused: True if its convolutions are kernels for inference.
        steps: all of them, in order.
    """

    graph: fx.Graph
    signature: inspect.Signature
    container: type = dict
    is_fused: bool = False
    steps: tuple[Step, ...] = field(repr=False)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name, defaults included."""
        return bind_all(self.signature, args, kwargs)

    def contain(self, output: Any) -> Any:
        """The output of a graph in the original's type."""
        return contain(output, self.container)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": pack_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=unpack_graph(state["graph"]))


def ancestors(*ends: fx.Node) -> set[fx.Node]:
    """Some nodes and all they are computed from."""
    found, pending = set[fx.Node](), list(ends)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def call(net: nn.Module, step: Step, value_of: Callable[[str], Any], arguments: Mapping[str, Any]) -> Any:
    """Run a step as it is written in the graph.

    Args:
        net: whose modules and parameters the step names.
        step: one.
        value_of: value by name of a step.
        arguments: of the call of the network, by name.
    """
    if step.op == "placeholder":
        return arguments[step.target]
    if step.op == "get_attr":
        return attribute(net, step.target)
    args, kwargs = step.bind(value_of)
    if step.op == "call_module":
        module = child(net, step.target)
        assert module is not None
        return module(*args, **kwargs)
    if step.op == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)


def attribute(net: nn.Module, path: str) -> Any:
    """A parameter, buffer, module, constant or the training flag, by qualified name."""
    parent, _, name = path.rpartition(".")
    module = child(net, parent)
    assert module is not None
    for values in (module._parameters, module._buffers, module._modules):
        if name in values:
            return values[name]
    constants = getattr(net, "constants", {})
    return constants[path] if path in constants else getattr(module, name)


# -- a run without values --------------------------------------------------------------------------------


class Work(NamedTuple):
    """Shapes and multiply-accumulates of a call, known before it is run.

    Attributes:
        macs: multiply-accumulates of each step where everything is computed.
        shapes: of the values that are tensors, by step.
        numbers: values that are sizes, by step.
        not_counted: operations that are not among the multiply-accumulates, because no rule says how much.
    """

    macs: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    numbers: dict[str, Any]
    not_counted: tuple[str, ...]

    def size(self, name: str) -> tuple[int, int] | None:
        """Height and width of a value; None if it is no map."""
        shape = self.shapes.get(name, ())
        return (shape[2], shape[3]) if len(shape) == 4 else None


def work_of(steps: Iterable[Step], meta_copy: nn.Module, arguments: Mapping[str, Any]) -> Work:
    """The work of a call with such arguments, on a network without values."""
    macs, shapes, numbers, env = (
        dict[str, int](),
        dict[str, tuple[int, ...]](),
        dict[str, Any](),
        dict[str, Any](),
    )
    arguments = tree_map(to_meta, arguments)
    with torch.no_grad(), MacCounter() as counter:
        for step in steps:
            before = counter.macs
            env[step.name] = value = to_meta(call(meta_copy, step, env.__getitem__, arguments))
            macs[step.name] = counter.macs - before
            if isinstance(value, Tensor):
                shapes[step.name] = tuple(value.shape)
            elif _is_number(value):
                numbers[step.name] = value
            for name in step.frees:
                del env[name]
    return Work(macs, shapes, numbers, tuple(sorted(counter.not_counted)))


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value))
    return isinstance(value, int) and not isinstance(value, bool)


# -- maps as rows ----------------------------------------------------------------------------------------


def by_position(value: Tensor, channels_last: bool = False) -> Tensor:
    """A map as (B, H, W, C)."""
    return value if channels_last else value.permute(0, 2, 3, 1)


def as_rows(value: Tensor, channels_last: bool = False) -> Tensor:
    """A map as rows (B*H*W, C), a view if it is so in memory."""
    return by_position(value, channels_last).flatten(0, 2)


def as_map(rows: Tensor, batch: int, size: tuple[int, int], channels_last: bool = False) -> Tensor:
    """Rows of all positions as a map."""
    value = rows.reshape(batch, *size, rows.shape[1])
    return value if channels_last else value.permute(0, 3, 1, 2)


def as_column(rows: Tensor, channels_last: bool = False) -> Tensor:
    """Rows (N, C) as a map of one column, on which operations that act on each position alone are called."""
    return as_map(rows, 1, (rows.shape[0], 1), channels_last)


def weights_of(module: Any) -> FusedConv:
    """The weights of a convolution or a linear layer, fused or not."""
    if isinstance(module, PackedConv):
        return module.weights
    weight = parameter(module, "weight")
    wide = weight if weight.dim() == 4 else weight[:, :, None, None]
    return FusedConv(wide, parameter(module, "bias"), getattr(module, "groups", 1))
