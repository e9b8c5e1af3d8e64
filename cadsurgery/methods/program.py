"""Programs: a graph as a sequence of steps that methods run one by one.

Steps are plain values instead of torch.fx nodes, so copies of a network can share them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from cadsurgery.elements.backends.packed import PackedConv
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.following.hooks import child, parameter
from cadsurgery.network.program import Names
from cadsurgery.support.counting import MacCounter
from cadsurgery.support.meta_tensors import to_meta
from cadsurgery.support.torch_internals import tree_map
from cadsurgery.surgery.rewrite import pack_graph, pack_target, unpack_graph, unpack_target
from cadsurgery.surgery.spatial import WHOLE, SpatialKind


@dataclass(frozen=True)
class Ref:
    """An argument that is the value of another step."""

    name: str


@dataclass(frozen=True)
class ProgramStep:
    """A node of the graph as a plain value.

    Attributes:
        name: name of the node.
        op: as in torch.fx, like `target`, `args` and `kwargs`, but with `Ref`s instead of nodes.
        reads: names of the steps among the arguments.
        frees: names of values that no later step reads.
        spatial: how the step acts on positions.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[str, ...]
    frees: tuple[str, ...] = ()
    spatial: SpatialKind = WHOLE

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"target": pack_target(self.target)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, target=unpack_target(state["target"]))

    def bind(self, value_of: Callable[[str], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, with `Ref`s replaced by values."""

        def value(part: Any) -> Any:
            return value_of(part.name) if isinstance(part, Ref) else part

        args: Any = map_aggregate(self.args, value)
        kwargs: Any = map_aggregate(self.kwargs, value)
        return args, kwargs


def steps_of(
    nodes: Iterable[fx.Node], kept: Iterable[fx.Node] = (), spatial: Mapping[str, SpatialKind] | None = None
) -> dict[fx.Node, ProgramStep]:
    """Convert nodes to steps.

    Args:
        nodes: in execution order.
        kept: nodes whose values are read after the last step.
        spatial: how nodes act on positions, by name.
    """
    nodes, frees = list(nodes), dict[fx.Node, list[str]]()
    last = {value: node for node in nodes for value in node.all_input_nodes}
    for value, reader in last.items():
        if value not in kept:
            frees.setdefault(reader, []).append(value.name)

    def reference(item: Any) -> Any:
        return Ref(item.name) if isinstance(item, fx.Node) else item

    def step(node: fx.Node) -> ProgramStep:
        args, kwargs = (map_aggregate(part, reference) for part in (node.args, node.kwargs))
        reads, freed = tuple(value.name for value in node.all_input_nodes), tuple(frees.get(node, ()))
        kind = (spatial or {}).get(node.name, WHOLE)
        return ProgramStep(node.name, node.op, node.target, args, kwargs, reads, freed, kind)  # type: ignore[arg-type]

    return {node: step(node) for node in nodes}


@dataclass(frozen=True, eq=False, kw_only=True)
class StepProgram:
    """A graph and the steps that run it.

    Attributes:
        graph: the graph.
        signature: signature of the network's forward.
        container: type of the output if it is a kind of dictionary or a dataclass.
        is_fused: True if the convolutions are fused for inference.
        steps: all steps, in order.
    """

    graph: fx.Graph
    signature: inspect.Signature
    container: type = dict
    is_fused: bool = False
    steps: tuple[ProgramStep, ...] = field(repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepProgram:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": pack_graph(self.graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=unpack_graph(state["graph"]))


def call(
    net: nn.Module, step: ProgramStep, value_of: Callable[[str], Any], arguments: Mapping[str, Any]
) -> Any:
    """Run a step as the graph does.

    Args:
        net: network whose modules and parameters the step names.
        step: the step.
        value_of: returns the values of other steps by name.
        arguments: arguments of the call of the network, by name.
    """
    if step.op == "placeholder":
        return arguments[step.target]
    if step.op == "get_attr":
        return attrgetter(step.target)(Names(net))
    args, kwargs = step.bind(value_of)
    if step.op == "call_module":
        module = child(net, step.target)
        assert module is not None
        return module(*args, **kwargs)
    if step.op == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)


# -- shapes and MACs without running the network ---------------------------------------------------------


class CallWork(NamedTuple):
    """Shapes and multiply-accumulates of a call, known before it is run.

    Attributes:
        macs: multiply-accumulates of each step if everything is computed.
        shapes: shapes of the values that are tensors, by step.
        sizes: height and width of the values that are maps, by step.
        numbers: values that are sizes, by step.
        not_counted: operations missing in `macs`, because no counting rule is known.
    """

    macs: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, tuple[int, int]]
    numbers: dict[str, Any]
    not_counted: tuple[str, ...] = ()


def work_of(steps: Iterable[ProgramStep], meta_copy: nn.Module, arguments: Mapping[str, Any]) -> CallWork:
    """Compute the work of a call on `meta_copy`, a copy of the network on the meta device."""
    work, env, arguments = CallWork({}, {}, {}, {}), dict[str, Any](), tree_map(to_meta, arguments)
    with torch.no_grad(), MacCounter() as counter:
        for step in steps:
            before = counter.macs
            env[step.name] = value = to_meta(call(meta_copy, step, env.__getitem__, arguments))
            work.macs[step.name] = counter.macs - before
            if isinstance(value, Tensor):
                work.shapes[step.name] = tuple(value.shape)
                if value.dim() == 4:
                    work.sizes[step.name] = (value.shape[2], value.shape[3])
            elif _is_number(value):
                work.numbers[step.name] = value
            for name in step.frees:
                del env[name]
    return work._replace(not_counted=tuple(sorted(counter.not_counted)))


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value))
    return isinstance(value, int) and not isinstance(value, bool)


def weights_of(module: Any) -> FusedConv:
    """Return the weights of a convolution or linear layer, fused or not."""
    if isinstance(module, PackedConv):
        return module.weights
    weight = parameter(module, "weight")
    wide = weight if weight.dim() == 4 else weight[:, :, None, None]
    return FusedConv(wide, parameter(module, "bias"), getattr(module, "groups", 1))
