"""Carry out a plan: build a graph whose region runs on elements."""

from __future__ import annotations

import importlib
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_aggregate

from cadsurgery.elements import functional
from cadsurgery.elements.axes import NCHW
from cadsurgery.following.graphs import copy_graph, downstream, upwards
from cadsurgery.following.guards import check_branch, drop_dead_code, is_whole
from cadsurgery.following.hooks import parameter, prepare_weights
from cadsurgery.support.errors import CannotConvert
from cadsurgery.support.torch_operations import asks
from cadsurgery.surgery.flow import Flow, is_filled
from cadsurgery.surgery.plan import Decision, Plan
from cadsurgery.surgery.refusals import place_of
from cadsurgery.surgery.rule_arguments import arguments_of
from cadsurgery.surgery.rules import treat
from cadsurgery.surgery.treatment import Attribute, Call, Treatment, maps_may_grow

# Extra input of a rewritten graph: a callable (image, fine map) -> Lattice.
MASKING = "masking"
# Metadata keys of rewritten nodes: the original node with the same value, the (name, module path) of the original node
# whose work it does, the stage of elements, and how the node acts on dense maps (see `acts_of`).
ORIGIN, WORK, STAGE, ACTS = "origin", "work", "stage", "acts"


_SIZES = (
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    getattr,
    len,
)  # size queries that elements answer for their map


_NORMS = (F.group_norm, torch.group_norm)


def _is_of_batch(node: fx.Node) -> bool:
    """Return True for a functional batch norm that uses the statistics of the batch."""
    if node.target is not F.batch_norm:
        return False
    given = arguments_of(node, "input", "running_mean", "running_var", "weight", "bias", training=False)
    return given["training"] is not False or given["running_mean"] is None


def _sums_map(module: nn.Module) -> bool:
    """Return True for a norm whose sums over the image or batch torch computes in the layout of its input."""
    is_of_batch = isinstance(module, nn.BatchNorm2d) and (module.training or module.running_mean is None)
    return isinstance(module, nn.GroupNorm) or is_of_batch


@dataclass
class Rewriter:
    """Copies a graph node by node, replacing the nodes of the region.

    A value may exist as a dense map, as elements, or both; the second form is created when it is first needed.
    """

    flow: Flow
    plan: Plan
    graph: fx.Graph = field(default_factory=fx.Graph)
    dense: dict[fx.Node, fx.Node] = field(default_factory=dict)
    elements: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sources: dict[fx.Node, fx.Node] = field(default_factory=dict)  # broadcast node -> the vector it repeats
    working: dict[fx.Node, fx.Node] = field(default_factory=dict)  # node -> the wrapped call
    lattice: fx.Node | None = None
    guided: bool = False  # maps that leave at the fine size are upsampled with the fine map as a guide

    def run(self) -> fx.Graph:
        """Build the rewritten graph; it has the extra input `masking` and also returns the lattice."""
        decisions = {decision.node: decision for decision in self.plan.decisions}
        nodes = list(self.flow.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        for node in sorted(
            inputs, key=lambda node: len(node.args)
        ):  # in Python's order: those with defaults last
            self.dense[node] = self.graph.node_copy(node)
            self.dense[node].meta[ACTS] = acts_of(node, self.flow)
        with self.graph.inserting_before():
            self.masking = self.graph.placeholder(MASKING)
        for node in nodes:
            if node in self.dense:
                continue
            decision, treatment = decisions[node.name], self.flow.treatments[node]
            if node.op == "output":
                copied = self.graph.node_copy(node, self.as_dense)
                value = copied.args[0]
                self.graph.erase_node(copied)
                self.graph.output((value, self.lattice))
                break
            if decision.on_elements:
                self.emit(node, decision, treatment)
            elif decision.leaves == "resized":
                self.dense[node] = self.resize_to_dense(node, treatment)
            else:
                self.copy(node, treatment)
            result = self.elements.get(node) or self.dense[node]
            result.meta.setdefault(ORIGIN, node.name)  # a pad may return its input
            if node in self.elements:
                result.meta.setdefault(STAGE, decision.stages[1])
            working = self.working.get(node, result)
            working.meta[WORK] = (node.name, decision.path)
            working.meta.setdefault(ACTS, acts_of(node, self.flow))
            if "nn_module_stack" not in working.meta:  # where errors of the new node are placed
                working.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                working.stack_trace = node.stack_trace
        drop_dead_code(self.graph)
        for node in self.graph.nodes:  # what the region needs beside the network's own operations
            layouts = [source.meta[ACTS].layout for source in node.all_input_nodes[:1]]
            node.meta.setdefault(ACTS, Treatment("pointwise", layout="".join(layouts)))
        self.graph.lint()
        return self.graph

    # -- dense maps and elements -------------------------------------------------------------------

    def as_dense(self, node: fx.Node) -> fx.Node:
        """Return a value as a dense tensor, at the size with which it leaves the region."""
        if node not in self.dense:
            decision, leaves_by = self.plan[node.name], self.flow.treatments[node].leaves_by
            if leaves_by is not None:
                self.dense[node] = self.call(leaves_by, self.elements[node], decision.spacing)
                return self.dense[node]
            spacing = 1 if decision.leaves == "fine" else decision.spacing
            options = () if decision.layout == NCHW else (decision.layout,)
            guide = {"guide": self.fine_map()} if self.guided and spacing == 1 else {}
            self.dense[node] = self.call(functional.to_dense, self.elements[node], spacing, *options, **guide)
        return self.dense[node]

    def as_elements(self, node: fx.Node) -> fx.Node:
        """Return a value as elements; dense maps at the high output stride enter the region here."""
        if node not in self.elements:
            layout, features = self.flow.layouts[node], self.dense[node]
            options = () if layout == NCHW else (layout,)
            if self.lattice is None:
                self.lattice = self.call(ask_mask, self.masking, self.image(), self.fine_map())
            self.elements[node] = self.call(functional.to_elements, features, self.lattice, *options)
        return self.elements[node]

    def image(self) -> fx.Node:
        """Return the node of the image, or of the images that the network joins along the batch before the region.

        Raises:
            CannotConvert: the batch that enters the region is not made of whole images.
        """
        shapes, like = self.flow.shapes, self.flow.example.shape
        images = [node for node in self.flow.given if self.flow.is_image(node) and node in self.dense]
        image = next((node for node in images if shapes[node] == like), images[0])
        entering = self.entering()
        batch = shapes[entering][self.flow.layouts[entering].index("b")]
        if batch == shapes[image][0]:
            return self.dense[image]
        before = set(upwards(entering)) & self.dense.keys()
        joined = (batch, *shapes[image][1:])
        for node in self.flow.graph.nodes:
            if node in before and shapes.get(node) == joined:
                return self.dense[node]
        grows = (
            n for n in self.flow.graph.nodes if n in before and tuple(shapes.get(n, like))[:1] == (batch,)
        )
        raise CannotConvert(
            f"{batch} maps enter the region for {shapes[image][0]} image(s), and which image each is of is not known.",
            where=place_of(next(grows, entering), self.flow),
            why="a mask is computed from the image, and the batch is changed where the image is no more one.",
            next="join the images before the first operation (torch.cat([a, b])), or convert the part that sees one "
            "batch and call it for each.",
        )

    def entering(self) -> fx.Node:
        """Return the first map that enters the region."""
        entering = self.plan.chosen("enter")[0].node
        return next(node for node in self.flow.graph.nodes if node.name == entering)

    def fine_map(self) -> fx.Node:
        """Return the features that the mask reads: the first map that enters the region, as (B, C, h, w)."""
        node = self.entering()
        layout = self.flow.layouts[node]
        return (
            self.dense[node] if layout == NCHW else self.call(functional.fine_map, self.dense[node], layout)
        )

    # -- emitting ----------------------------------------------------------------------------------

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a function call to the new graph."""
        return self.graph.call_function(function, args, kwargs)

    def arguments(self, treatment: Treatment) -> dict[str, Any]:
        """Return the arguments of a treatment in the new graph."""
        modules: dict[str, fx.Node] = {}  # a module is prepared once for all its parameters, as in a call
        return {name: self.argument(value, modules) for name, value in treatment.arguments}

    def argument(self, value: Any, modules: dict[str, fx.Node]) -> Any:
        """Return an argument of a treatment in the new graph; `modules` holds the modules prepared so far."""
        if isinstance(value, Call):
            return self.call(value.target, *(self.argument(part, modules) for part in value.args))
        if isinstance(value, fx.Node) and self.flow.layout(value):
            return self.as_elements(value)
        if not isinstance(value, Attribute):
            return fx.map_arg(value, self.as_dense)
        holder, _, name = value.path.rpartition(".")
        is_module = isinstance(getattr(self.flow.model.get_submodule(holder), name), nn.Module)
        path = value.path if is_module else holder
        if not path:  # an attribute of the network itself
            return self.graph.get_attr(name)
        if path not in modules:
            modules[path] = self.call(prepare_weights, self.graph.get_attr(path))
        return modules[path] if is_module else self.call(parameter, modules[path], name)

    def copy(self, node: fx.Node, treatment: Treatment) -> None:
        """Copy a node that stays dense; a query for the size of elements gives the size in the original network."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            source = None
        if treatment.kind == "shape" and source in self.elements and node.target in _SIZES:
            self.dense[node] = self.shape_of(node, source)
            return
        if treatment.kind == "shape" and any(part in self.elements for part in node.all_input_nodes):
            # A query for the type and device of a map.
            self.dense[node] = self.graph.node_copy(node, self.as_rows)
            return
        if treatment.kind == "broadcast" and source is not None:
            self.sources[node] = source  # a vector per image, or a small map
        self.dense[node] = copied = self.graph.node_copy(node, self.as_dense)
        _view_in_any_layout(copied)
        module = self.flow.module(node) if node.op == "call_module" else None
        parts = list(module.modules()) if module is not None else []
        if any(map(_sums_map, parts)) or node.target in _NORMS or _is_of_batch(node):
            read: Any = copied.args[0] if copied.args else copied.kwargs["input"]
            with self.graph.inserting_before(copied):
                copied.replace_input_with(read, self.call(functional.exact_layout, read))
        if any(isinstance(part, nn.InstanceNorm2d) for part in parts) or node.target in (
            F.instance_norm,
            torch.instance_norm,
        ):
            self.working[node] = self.dense[node]
            self.dense[node] = self.call(functional.contiguous_gradient, self.dense[node])

    def as_rows(self, node: fx.Node) -> fx.Node:
        """Return the rows of a value that exists as elements, else its dense tensor."""
        return (
            self.call(getattr, self.elements[node], "rows") if node in self.elements else self.as_dense(node)
        )

    def shape_of(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """Add a size, dtype or device query on elements."""
        elements = self.elements[source]
        if source not in self.flow.shapes:  # how many parts a map was split into
            return self.call(len, self.call(getattr, elements, "rows"))
        if node.target is getattr and node.args[1] not in ("shape", "ndim"):
            return self.call(getattr, self.call(getattr, elements, "rows"), node.args[1])
        decision = self.plan[source.name]
        options = () if decision.layout == NCHW else (decision.layout,)
        size = self.call(functional.native_shape, elements, decision.spacing, *options)
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if node.target == "size" and axis is not None:
            return self.call(operator.getitem, size, axis)
        if node.target in ("numel", "nelement"):
            return self.call(math.prod, size)
        if node.target is len:
            return self.call(operator.getitem, size, 0)
        if node.target in ("dim", "ndimension") or node.args[1:] == ("ndim",):
            return self.call(len, size)
        return size

    def emit(self, node: fx.Node, decision: Decision, treatment: Treatment) -> None:
        """Add a node of the region."""
        stage: int = decision.stages[1]
        source: Any = treatment.reads or (node.args[0] if node.args else None)
        if treatment.kind == "global":
            self.dense[node] = self.emit_global(node, source, treatment)
            return
        arguments = self.arguments(treatment)
        if treatment.spaced:
            arguments["spacing"] = self.plan[source.name].spacing
        if treatment.kind == "pad":  # the windows that read it apply the padding
            x = self.as_elements(source)
            self.elements[node] = self.call(treatment.call, x, **arguments) if treatment.call else x
            return
        if not treatment.call:
            self.elements[node] = self.emit_on_rows(node, stage, treatment)
            return
        function = treatment.call
        if treatment.window is not None:
            x = self.as_elements(source)
            leading = [arguments.pop(name) for name in ("mix", "weight", "bias") if name in arguments]
            out = self.call(function, x, *leading, window=decision.window, stage=stage, **arguments)
        elif treatment.kind == "resize":
            x = self.as_elements(source)
            spacing, scale = self.plan[source.name].spacing, treatment.scale
            if spacing % scale:  # finer than the high output stride
                self.dense[node] = self.resize_to_dense(node, treatment)
                return
            inside = {
                name: arguments[name] for name in ("mode", "align_corners", "size") if name in arguments
            }
            out = self.call(
                function, x, stage=stage, spacings=(spacing, spacing // scale), scale=scale, **inside
            )
        else:
            x = self.on_stage(source, stage)
            out = self.working[node] = self.call(function, x, **arguments)
            for path in treatment.then:
                out = self.call(functional.OnRows(None), self.graph.get_attr(path), out)
        self.elements[node] = out

    def resize_to_dense(self, node: fx.Node, treatment: Treatment) -> fx.Node:
        """Add a resize at the end of the region, which returns a dense map."""
        source: Any = node.args[0] if node.args else node.kwargs["input"]
        arguments = self.arguments(treatment)
        if self.guided:
            arguments["guide"] = self.fine_map()
        assert treatment.operation is not None
        return self.call(
            treatment.operation.at_exit, self.as_elements(source), self.plan[source.name].spacing, **arguments
        )

    def emit_global(self, node: fx.Node, source: fx.Node, treatment: Treatment) -> fx.Node:
        """Add a global operation: one vector per image from one or two maps."""
        maps = [source, *(value for _, value in treatment.arguments if self.flow.layout(value))]
        stage = max(self.plan[value.name].stages[1] for value in maps)
        arguments = {
            name: self.on_stage(value, stage) if value in maps else self.argument(value, {})
            for name, value in treatment.arguments
        }
        if treatment.spaced:
            arguments["spacing"] = self.plan[source.name].spacing
        if self.flow.layouts[source] != NCHW:
            arguments["layout"] = self.flow.layouts[source]
        if treatment.covers is not None:
            size = self.call(
                functional.native_shape, self.as_elements(source), self.plan[source.name].spacing
            )
            covers = self.call(is_whole, self.argument(treatment.covers, {}), size, treatment.or_more)
            self.call(check_branch, covers, True, f"{node.name}, whose window was the whole map")
        return self.call(treatment.call, self.on_stage(source, stage), **arguments)

    def on_stage(self, node: fx.Node, stage: int) -> fx.Node:
        """Return a value as elements of a stage."""
        x = self.as_elements(node)
        if self.plan[node.name].stages[1] == stage:
            return x
        return self.call(functional.OnRows(functional.keep), x, stage=stage)

    def emit_on_rows(self, node: fx.Node, stage: int, treatment: Treatment) -> fx.Node:
        """Add an operation that acts on rows as it does on maps, apart from its axes."""
        maps = [source for source in node.all_input_nodes if self.flow.layout(source)]
        # Coarse maps that exist only as dense maps were computed outside the region; their samples are read again.
        back = {
            source for source in maps if source not in self.elements and self.plan[source.name].spacing > 1
        }
        maps = [source for source in maps if source not in back]
        values, spacing = [self.as_elements(source) for source in maps], self.plan[maps[0].name].spacing
        is_alone = len(values) == 1 and self.plan[maps[0].name].stages[1] == stage
        layout = self.flow.layouts[maps[0]]

        def operand(source: fx.Node) -> fx.Node:
            if source in maps:
                return self.elements[source]
            value, how = self.as_dense(self.sources.get(source, source)), self.flow.treatments[source]
            if treatment.kind != "join" or not self.flow.shapes.get(source):
                return value
            if source in back or (how.kind == "broadcast" and how.arguments):
                resize = {} if source in back else self.arguments(how)
                return self.call(functional.small_map, value, spacing, **resize, name=node.name)
            if layout == NCHW and is_filled(source) and len(self.flow.shapes[source]) > 1:
                return self.call(functional.one_sample, value, values[0], spacing, node.name)
            return value

        call = treatment.rows or Call(node.target, node.args, node.kwargs)
        args, kwargs = fx.map_arg(call.args, operand), fx.map_arg(call.kwargs, operand)
        target: Any = functional.keep if call.target is None else call.target
        if treatment.rows is None and node.op == "call_module":
            target, args = None, (self.graph.get_attr(str(node.target)), *args)
        function = functional.OnRows(
            target,
            layout if treatment.kind == "join" else "",
            (spacing, node.name) if len(values) > 1 else None,
        )
        return self.call(function, *args, **kwargs, **({} if is_alone else {"stage": stage}))


def ask_mask(masking: Callable[[Any, Any], Any], image: Any, features: Any) -> Any:
    """Call `masking` in a rewritten graph; a function of its own, since compilers cannot trace a call of an input."""
    return masking(image, features)


def rewrite(flow: Flow, plan: Plan, *, guided: bool = False) -> fx.Graph:
    """Build the graph of the adaptive network; the model and its own graph are not changed."""
    return Rewriter(flow, plan, guided=guided).run()


class Operand(NamedTuple):
    """A value that a node reads, by its number among these: copies of the node keep it."""

    number: int


def acts_of(node: fx.Node, flow: Flow) -> Treatment:
    """Return how a node acts on dense maps by its rule, where windows may make maps grow and padding is a step of its
    own. The layout is that of its value; among the arguments an `Operand` stands for each node."""
    with maps_may_grow():
        treatment = treat(node, replace(flow, pads={}))
    operands = {source: Operand(index) for index, source in enumerate(node.all_input_nodes)}

    def with_operands(value: Any) -> Any:
        if isinstance(value, Call):
            return replace(value, args=with_operands(value.args), kwargs={})
        return fx.map_arg(value, lambda read: operands.get(read, Operand(-1)))

    arguments = tuple((name, with_operands(value)) for name, value in treatment.arguments)
    return Treatment(
        *(treatment.kind, treatment.why, treatment.call, arguments, treatment.window, treatment.then),
        layout=flow.layout(node) or (NCHW if treatment.kind == "broadcast" and flow.is_map(node) else ""),
        scale=treatment.scale,
        covers=with_operands(treatment.covers),
        or_more=treatment.or_more,
    )


class Halves(NamedTuple):
    """A rewritten graph, cut in two where the mask is computed.

    Attributes:
        before: the first half; takes the network's inputs and returns a tuple of all values that the second half needs.
        after: the second half; takes `masking` and these values.
        image: index of the value that the mask gets as the image.
        features: index of the value that the mask gets as the fine map.
    """

    before: fx.Graph
    after: fx.Graph
    image: int
    features: int


def halves(graph: fx.Graph) -> Halves:
    """Cut a rewritten graph at its mask, so that masks are known before the shapes of the second half are fixed."""
    nodes = list(graph.nodes)
    cut = next(index for index, node in enumerate(nodes) if node.target is ask_mask)
    masking, *mask_inputs = nodes[cut].args
    # Weights, sizes, types and what is computed from them alone are computed in both halves instead of passed on.
    duplicated = downstream(nodes[:cut], lambda node: asks(node) or node.op == "get_attr", only=True)
    rest = {*nodes[cut:], *duplicated}
    needed = [
        node
        for node in nodes[:cut]
        if node is not masking and node not in duplicated and rest & node.users.keys()
    ]
    before, after = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:cut]:
        if node is not masking:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in needed))
    copies = {masking: after.placeholder(MASKING)}
    copies |= {node: after.placeholder(node.name) for node in needed}
    for node in (*(node for node in nodes[:cut] if node in duplicated), *nodes[cut:]):
        copies[node] = after.node_copy(node, copies.__getitem__)
    drop_dead_code(after)
    image, features = (needed.index(value) for value in mask_inputs)
    return Halves(before, after, image, features)


def _view_in_any_layout(node: fx.Node) -> None:
    """Let a node reshape where it views: our maps, and those of inference copies, may have another memory layout."""
    is_view = node.op == "call_method" and node.target == "view"
    if is_view and not any(isinstance(part, torch.dtype) for part in node.args):
        node.target = "reshape"


def unchanged_graph(flow: Flow, plan: Plan) -> fx.Graph:
    """Return the original graph with the fine map as a second output, for uniform masks at the network's own grid."""
    graph, copies = copy_graph(flow.graph)
    entering, output = plan.chosen("enter")[0].node, graph.output_node()
    for node, copied in copies.items():
        _view_in_any_layout(copied)
        copied.meta[ACTS] = acts_of(node, flow)
    fine = next(copy for node, copy in copies.items() if node.name == entering)
    output.args = ((output.args[0], fine),)
    return graph


@dataclass(frozen=True)
class _NodeIndex:
    """A reference to a node by its index in the order of execution."""

    index: int


@dataclass(frozen=True)
class _FunctionName:
    """A reference to a function of torch that does not know its own place, such as `max_pool2d`: pickle finds functions
    by the names that they know."""

    module: str
    name: str


def pack_target(target: Any) -> Any:
    """Return what a node calls, or a reference to it that can be pickled."""
    module, name = (getattr(target, name, "") for name in ("__module__", "__name__"))
    is_found = getattr(sys.modules.get(module), name, None) is target
    return _FunctionName(module, name) if is_found and isinstance(target, FunctionType) else target


def unpack_target(target: Any) -> Any:
    """Return what a node calls from the result of `pack_target`."""
    if isinstance(target, _FunctionName):
        return getattr(importlib.import_module(target.module), target.name)
    return target


def pack_graph(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Convert a graph to a flat list that can be pickled at any length; each pickled node would nest a level deeper."""
    references: dict[Any, Any] = {node: _NodeIndex(index) for index, node in enumerate(graph.nodes)}

    def by_index(part: Any) -> Any:
        return map_aggregate(
            part, lambda value: references.get(value, value) if isinstance(value, fx.Node) else value
        )

    return [
        (
            *(node.op, pack_target(node.target), node.name, by_index(node.args), by_index(node.kwargs)),
            {key: node.meta[key] for key in (ORIGIN, WORK, STAGE, ACTS) if key in node.meta},
        )
        for node in graph.nodes
    ]


def unpack_graph(rows: list[tuple[Any, ...]]) -> fx.Graph:
    """Rebuild a graph from the list of `pack_graph`."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, target, name, args, kwargs, meta in rows:
        args, kwargs = (
            map_aggregate(part, lambda value: nodes[value.index] if isinstance(value, _NodeIndex) else value)
            for part in (args, kwargs)
        )
        nodes.append(graph.create_node(op, unpack_target(target), args, kwargs, name))
        nodes[-1].meta.update(meta)
    return graph
