"""Put an exported program into the operations that have an ONNX translation, without running it again.

`ExportedProgram.run_decompositions` runs the network twice more on symbolic tensors, which took more than a third of
the time of an export. Few operations of our programs have no translation: changes of shape, which are views, and others
that are traced alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cadsurgery.network.export.unsupported import LINE
from cadsurgery.support.torch_internals import OpOverload, decomposed_always, tree_leaves

_ATEN = torch.ops.aten


class _CannotReplace(Exception):
    """A node that this module cannot replace."""


def decompose(program: torch.export.ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> bool:
    """Replace the operations of a program that are in a table, and those that change a tensor in place.

    Args:
        program: the program; its graph is replaced.
        table: operations that have to be replaced, and torch's functions for them.

    Returns:
        False, and leave the program as it is, if a tensor that is changed in place is read through another view of it,
        or an operation cannot be traced alone: torch's own decomposition of the whole program is needed.
    """
    old = program.graph_module.graph
    try:
        rewriting = _Rewriting(old, table)
        for node in old.nodes:
            rewriting.visit(node)
    except _CannotReplace:
        return False
    for node in old.output_node().all_input_nodes:
        if (now := rewriting.now[node]).name != node.name:
            program.graph_signature.replace_all_uses(node.name, now.name)
    program.graph_module.graph = rewriting.new
    return True


class _Rewriting:
    """A graph that is written anew node by node.

    Attributes:
        new: the new graph.
        now: for each node of the old graph, the node of the new graph with its value at this point of the program.
    """

    def __init__(self, old: fx.Graph, table: Mapping[Any, Callable[..., Any]]) -> None:
        self.new = fx.Graph(tracer_cls=old._tracer_cls)
        self.new._codegen = old._codegen
        self.now: dict[fx.Node, Any] = {}
        self._table = table
        self._numbers = {node: number for number, node in enumerate(old.nodes)}
        self._views: dict[fx.Node, set[fx.Node]] = {}  # nodes that may share memory, one set for all of them
        self._same: dict[fx.Node, list[fx.Node]] = {}  # nodes that are the same tensor, changed in place
        self._sizes: dict[Any, fx.Node] = {}  # nodes with a symbolic size

    def visit(self, node: fx.Node) -> None:
        """Write a node, or what stands for it.

        Raises:
            _Unknown: see `decompose`.
        """
        self._join_views(node)
        if _changes_in_place(node.target):
            self._visit_in_place(node)
        elif node.op == "call_function" and (node.target in self._table or _is_composite_view(node.target)):
            self._replace(node, node.target)
        elif node.target is operator.getitem and isinstance(self.now[node.args[0]], tuple):  # type: ignore[index]
            self.now[node] = self.now[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            self.now[node] = self.new.node_copy(node, self.now.__getitem__)
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self._sizes.setdefault(value.node.expr, self.now[node])

    def _join_views(self, node: fx.Node) -> None:
        """Record with which nodes a node may share memory."""
        group = {node}
        schema = getattr(node.target, "_schema", None)
        if schema is not None and any(result.alias_info is not None for result in schema.returns):
            for argument, value in zip(schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and isinstance(value, fx.Node):
                    group |= self._views[value]
        elif (
            node.op == "call_function" and schema is None and node.all_input_nodes
        ):  # an item of several outputs
            group = group.union(*(self._views[source] for source in node.all_input_nodes))
        for member in group:
            self._views[member] = group

    def _visit_in_place(self, node: fx.Node) -> None:
        """Replace an operation that changes its first argument, and let later nodes read the new value."""
        changed = node.args[0]
        name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname  # type: ignore[union-attr]
        if not isinstance(changed, fx.Node) or not name.endswith("_"):
            raise _CannotReplace
        same = self._same.setdefault(changed, [changed])
        here = self._numbers[node]
        for one in self._views[changed] - {node}:
            is_late = any(self._numbers[user] > here for user in one.users)
            if one.op != "call_function" or (one not in same and is_late):
                raise _CannotReplace
        packet = getattr(_ATEN, name.removesuffix("_"), None)
        target = getattr(packet, overload, None)
        if target is None:
            raise _CannotReplace
        if target in self._table or target is _ATEN.detach.default:
            self._replace(node, target)
        else:
            self.now[node] = self._call(target, self._mapped(node.args), self._mapped(node.kwargs), node)
        same.append(node)
        self._same[node] = same
        for one in same:
            self.now[one] = self.now[node]

    def _replace(self, node: fx.Node, target: Any) -> None:
        self.now[node] = self._view(node) if target in _VIEWS else self._trace(node, target)

    def _trace(self, node: fx.Node, target: Any) -> Any:
        """Write the operations that torch makes of an operation on the values of its arguments."""
        inputs = node.all_input_nodes
        values = [value.meta["val"] for value in inputs]
        modes = {leaf.fake_mode for leaf in tree_leaves(values) if hasattr(leaf, "fake_mode")}
        if len(modes) != 1:
            raise _CannotReplace

        def run(*given: Any) -> Any:
            value_of = dict(zip(inputs, given, strict=True)).__getitem__
            return target(*fx.map_arg(node.args, value_of), **fx.map_arg(node.kwargs, value_of))

        with modes.pop():
            traced = make_fx(run, dict(self._table), _allow_non_fake_inputs=True)(*values)
        return self._insert(traced.graph, [self.now[value] for value in inputs], node)

    def _insert(self, graph: fx.Graph, inputs: list[fx.Node], whole: fx.Node) -> Any:
        """Write a graph with these nodes as its inputs in place of an old node; return the node or the tuple of nodes
        that it returns."""
        given = iter(inputs)
        written: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                written[node] = next(given)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], written.__getitem__)
                return tuple(outputs) if isinstance(outputs, list | tuple) else outputs
            elif node.op != "call_function" or _changes_in_place(node.target):
                raise _CannotReplace
            else:
                written[node] = self.new.node_copy(node, written.__getitem__)
                written[node].meta[LINE] = whole.meta.get(LINE)

    def _mapped(self, value: Any) -> Any:
        return fx.map_arg(value, self.now.__getitem__)

    def _call(self, target: Any, args: Any, kwargs: Any, like: fx.Node, value: Any = None) -> fx.Node:
        """Add an operation with the metadata of a node, and its value or another one."""
        call = self.new.create_node("call_function", target, tuple(args), kwargs, like.name)
        call.meta = dict(like.meta)
        if value is not None:
            call.meta["val"] = value
        return call

    def _size(self, node: fx.Node, axis: int, like: fx.Node) -> int | fx.Node:
        """Return the length of an axis of an old node: a number, or a node of the new graph."""
        length = node.meta["val"].shape[axis]
        if isinstance(length, int):
            return length
        if length.node.expr not in self._sizes:
            call = self._call(_ATEN.sym_size.int, (self.now[node], axis), {}, like, length)
            self._sizes[length.node.expr] = call
        return self._sizes[length.node.expr]

    def _view(self, node: fx.Node) -> fx.Node:
        """Write a flatten, unflatten or reshape as a view."""
        source, shape = node.args[0], node.meta["val"].shape
        assert isinstance(source, fx.Node)
        axes = {
            length.node.expr: axis
            for axis, length in enumerate(source.meta["val"].shape)
            if isinstance(length, torch.SymInt)
        }
        sides: list[Any] = []
        for length in shape:
            if isinstance(length, int):
                sides.append(length)
            elif length.node.expr in self._sizes:
                sides.append(self._sizes[length.node.expr])
            elif length.node.expr in axes:
                sides.append(self._size(source, axes[length.node.expr], node))
            else:
                sides.append(-1)
        if sides.count(-1) > 1:
            raise _CannotReplace
        # Torch copies where the values cannot be viewed; the copy is contiguous.
        if _is_contiguous(source.meta["val"]) or not _is_contiguous(node.meta["val"]):
            return self._call(_ATEN.view.default, (self.now[source], sides), {}, node)
        options = {"memory_format": torch.contiguous_format}
        whole = source.meta["val"].clone(**options)
        copy = self._call(_ATEN.clone.default, (self.now[source],), options, node, whole)
        return self._call(_ATEN._unsafe_view.default, (copy, sides), {}, node)


def _is_contiguous(value: torch.Tensor) -> bool:
    """True if a tensor is known to be contiguous; a size that depends on data may leave that open."""
    try:
        return value.is_contiguous()
    except GuardOnDataDependentSymNode:
        return False


def _changes_in_place(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_composite_view(target: Any) -> bool:
    """True for an operation that torch always decomposes: it may return its input, and is made of other operations."""
    return (
        isinstance(target, OpOverload)
        and any(result.alias_info is not None for result in target._schema.returns)
        and target.has_kernel_for_dispatch_key(decomposed_always)
    )


_VIEWS = (
    _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
    _ATEN.reshape.default,
    _ATEN.reshape_as.default,
    _ATEN.view_as.default,
)
