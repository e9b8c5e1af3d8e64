"""Trace a network into a torch.fx graph whose nodes can be matched by the rules."""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import zip_longest
from traceback import walk_tb
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from cadsurgery.following.arguments import Arguments, Inputs, has_numbers, with_other_values
from cadsurgery.following.example_tracer import Carrier, asking_types, is_argument, symbols_in_python
from cadsurgery.following.graphs import changes_in_place, pads, read_elsewhere, source_line
from cadsurgery.following.guards import line_of
from cadsurgery.following.hooks import is_hooked
from cadsurgery.following.module_state import State
from cadsurgery.following.tracer import (
    CONSTANT,
    Functions,
    NeedsValue,
    Tracer,
    UsesNumpy,
    assign,
    is_constant,
)
from cadsurgery.support.errors import CannotConvert, describe_error
from cadsurgery.support.torch_internals import tree_map_only
from cadsurgery.support.torch_operations import asks, is_kind, name_of


class CannotFollow(CannotConvert):
    """The network cannot be traced: its Python code depends on values, or torch.fx does not support it."""

    @property
    def is_of_any_size(self) -> bool:
        """True if the network cannot be traced on images of other sizes, either."""
        return isinstance(self.__cause__, UsesNumpy)


def _timm_leaves() -> tuple[frozenset[type], Functions]:
    if "timm" not in sys.modules:  # only timm's models need this, and they have imported timm already
        return frozenset(), ()
    from timm.layers import get_notrace_functions, get_notrace_modules

    return frozenset(get_notrace_modules()), tuple(get_notrace_functions())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for the block; then restore the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def drop_cached(model: nn.Module) -> None:
    """Let modules drop values that they computed from their weights and cached, such as timm's attention biases.

    Modules do that in `train`, which is called with the mode that each has.
    """
    modes = {module: module.training for module in model.modules()}
    model.train(model.training)
    for module, training in modes.items():
        module.training = training


def trace(
    model: nn.Module,
    is_operation: Callable[[nn.Module], bool] = lambda module: False,
    is_apart: Callable[[nn.Module], bool] = lambda module: False,
    functions: Functions = (),
    example: Arguments | None = None,
    carries: bool = False,
    is_tracing: bool = True,
) -> fx.Graph:
    """Trace `model` in evaluation mode; the graph has no data-dependent control flow.

    In-place operations are made explicit: nodes that read a value after an in-place change read the changing node
    instead. Functional dropout follows the `training` flag of later calls instead of its state while tracing.

    Args:
        model: the network.
        is_operation: true if a module is to be a single node of the graph; torch's own modules always are.
        is_apart: true if a module is to be a single node because of its hooks, which a call runs with tensors; unless
            the network's code reads what they note: then hooks are code of the network.
        functions: Python functions that are to be single nodes of the graph.
        example: arguments of a call; by default it is one with an image alone.
        carries: the network's Python code may use the values of the example, see `example_tracer`.
        is_tracing: the answer of `torch.jit.is_tracing()`; if it is true, libraries skip checks of the image's size.

    Raises:
        CannotFollow: the forward depends on values or uses Python that torch.fx cannot follow.
    """
    try:
        with evaluating(model), mock.patch.object(torch.jit, "is_tracing", lambda: is_tracing):
            declared, wrapped = _timm_leaves()
            options = (
                lambda module: is_operation(module) or is_apart(module),
                (*functions, *wrapped),
                declared,
            )
            more: dict[str, Any] = {"inputs": Inputs.of(model, example)}
            run = _trace_on_example if carries else _trace_alone
            try:
                graph = _first_that_succeeds(run, model, options, more)
            except ByExample:
                if not any(map(is_apart, model.modules())):
                    raise
                options = (is_operation, *options[1:])
                graph = _first_that_succeeds(run, model, options, more | {"runs_hooks": True})
    except Exception as error:  # tracing runs foreign code, which can raise any error
        raise CannotFollow(
            f"{type(model).__name__} cannot be traced.",
            where=_place_of(error) or _place_of(error.__cause__),
            why=describe_error(error),
            next="convert the part that is a plain CNN and put it back, "
            "or move the data-dependent code into a function marked with torch.fx.wrap.",
        ) from error
    _spell_plainly(model, graph)
    _open_dataclass(graph)
    _make_in_place_explicit(model, graph)
    _read_padded_maps_directly(model, graph)
    _follow_training_flag(graph)
    _write_sizes_of_weights(model, graph)
    for node in reversed(graph.nodes):
        is_answered = asks(node) or node.op == "get_attr" or (is_argument(node) and node.op != "placeholder")
        if is_answered and not node.users:
            graph.erase_node(node)  # answered while the network was traced
    return graph


def _first_that_succeeds(run: Callable[..., fx.Graph], model: nn.Module, options: Any, more: Any) -> fx.Graph:
    """Trace; where that fails, perhaps by control flow that depends on buffers, with buffers as constants; or by sizes
    that legacy classes of tensors get, with other classes in their place."""
    failure: Exception | None = None
    for further in ({}, {"names_buffers": False}):
        try:
            return run(model, options, more | further)
        except (ByExample, UsesNumpy):
            raise
        except Exception as error:  # tracing runs foreign code, which can raise any error
            failure = failure or error
    if run is _trace_on_example:
        with contextlib.suppress(Exception):
            return run(model, options, more, with_legacy=True)
    assert failure is not None
    raise failure


def _trace_alone(model: nn.Module, options: Any, more: dict[str, Any]) -> fx.Graph:
    if has_numbers(more["inputs"].values):
        raise NeedsValue("it takes a number, of which Python code may ask anything")
    with asking_types(model):
        return _trace_with(Tracer(*options, **more), model)


def _trace_on_example(
    model: nn.Module, options: Any, more: dict[str, Any], with_legacy: bool = False
) -> fx.Graph:
    with symbols_in_python(model, with_legacy):
        carrier = Carrier(*options, **more)
        graph = _trace_with(carrier, model)
        if line := carrier.asks_for_gradients:
            other = _trace_with(Carrier(*options, needs_gradients=True, **more), model)
            if str(other) != str(graph):
                raise ByGradients(f"it computes something else where gradients are needed, at {line}")
        if line := carrier.asks_for_layout:
            turned = replace(
                more["inputs"], values=tree_map_only(Tensor, _in_other_layout, more["inputs"].values)
            )
            other_carrier = Carrier(*options, **(more | {"inputs": turned}))
            other = _trace_with(other_carrier, model)
            if str(other) != str(graph) and not _agree(carrier.outputs(), other_carrier.outputs()):
                raise ByLayout(f"it computes something else for an image of another memory layout, at {line}")
        if carrier.may_know_values():
            darker = replace(more["inputs"], values=with_other_values(more["inputs"].values))
            known = set(vars(model))
            other = _trace_with(Carrier(*options, **(more | {"inputs": darker})), model)
            difference = _first_difference(model, graph, other)
            for name in vars(model).keys() - known:
                delattr(model, name)
            if difference:
                raise ByExample(difference)
    return graph


class ByExample(Exception):
    """The graph has a value of the example as a constant, such as one that a hook has noted."""


def _first_difference(model: nn.Module, graph: fx.Graph, other: fx.Graph) -> str:
    """Return what tells two graphs of a network apart, which were traced on two images of one size; "" if they are the
    same."""
    for ours, theirs in zip_longest(graph.nodes, other.nodes):
        if _without_constants(ours) != _without_constants(theirs):
            return f"it decides by values: another image of this size takes another path{_at_line(ours or theirs)}"
        if is_constant(ours):
            values = (getattr(model, str(node.target)) for node in (ours, theirs))
            if not torch.equal(*values):
                return f"it uses what was noted beside the graph in the middle of a call{_at_line(ours)}"
    return ""


def _without_constants(node: fx.Node | None) -> str:
    return "" if node is None else CONSTANT.sub("", node.format_node() or "")


def _at_line(node: fx.Node) -> str:
    lines = [line for line in (node.stack_trace or "").splitlines() if line.strip()]
    return f" at {source_line(node)}: {lines[-1].strip()}" if lines else ""


def _trace_with(tracer: Tracer, model: nn.Module) -> fx.Graph:
    """Trace a network, and put everything back that its forward replaces meanwhile."""
    state = State(model)
    try:
        return tracer.trace(model)
    finally:
        state.restore()


class ByGradients(Exception):
    """The Python code branches on whether gradients are needed, which a graph cannot represent."""


class ByLayout(Exception):
    """The Python code branches on the order of a tensor's numbers in memory, which a graph has no part in, and computes
    other values in the other branch."""


def _in_other_layout(tensor: Tensor) -> Tensor:
    """Return maps with their channels last in memory; those that have them last, with them first."""
    if tensor.dim() != 4:
        return tensor
    is_last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return tensor.contiguous(memory_format=torch.contiguous_format if is_last else torch.channels_last)


def _agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """True if two calls give the same, up to rounding in another order."""
    return [each.shape for each in ours] == [each.shape for each in theirs] and all(
        torch.allclose(a, b, 0, 1e-3 * float(a.abs().max()), equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
        if a.is_floating_point() and a.numel()
    )


def _place_of(error: BaseException | None) -> str:
    """Return the innermost line of the user's code in an error's traceback."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)] if error is not None else []
    return next((place for frame in reversed(frames) if (place := line_of(frame))), "")


# Names of the first argument of torch's functions.
_FIRST = ("input", "tensors", "tensor", "x", "self")


def _spell_plainly(model: nn.Module, graph: fx.Graph) -> None:
    """Put the first argument of calls first where it is passed by name, name fields of tuples by their places and types
    by tensors that have them, so that rules meet one spelling."""
    for node in list(graph.nodes):
        if (name := _name_of_first(model, node)) is not None:
            kwargs = dict(node.kwargs)
            node.args = (kwargs.pop(name),)
            node.kwargs = kwargs
        if node.op == "call_method" and node.target == "type" and len(node.args) == 1 and not node.kwargs:
            _convert_like(node)
        if node.op == "call_method" and node.target in ("expand_as", "view_as", "reshape_as"):
            _shape_like(node)
        if node.target is getattr and isinstance(node.args[0], fx.Node):
            source, field = node.args
            kind = getattr(torch.return_types, name_of(source.target), None)
            names = getattr(kind, "__match_args__", ())
            if source.op != "call_module" and field in names:
                node.target, node.args = operator.getitem, (source, names.index(field))


def _read_padded_maps_directly(model: nn.Module, graph: fx.Graph) -> None:
    """Let what reads a padded map through an operation that hands it on as it is (a norm that is switched off) read the
    padded map: padding becomes part of the window that reads it."""

    def operation(node: fx.Node) -> Any:
        return model.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not (isinstance(source, fx.Node) and pads(operation(source))) or node.kwargs:
            continue
        hands_on = node.op == "call_method" and node.target in ("contiguous", "clone") and len(node.args) == 1
        if node.op == "call_module":
            hands_on = type(operation(node)) is nn.Identity and not is_hooked(operation(node))
        if hands_on:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _convert_like(name: fx.Node) -> None:
    """Replace conversions to the type of a tensor that is named, `g.type(y.type())`, by `g.type_as(y)`."""
    for user in list(name.users):
        if user.op == "call_method" and user.target in ("type", "to") and user.args[1:] == (name,):
            user.target, user.args = "type_as", (user.args[0], name.args[0])
    if not name.users:
        name.graph.erase_node(name)


def _shape_like(node: fx.Node) -> None:
    """Replace shapes of tensors that are named, `g.expand_as(y)`, by their sizes, `g.expand(y.size())`."""
    value, like = (*node.args, *node.kwargs.values())
    with node.graph.inserting_before(node):
        size = node.graph.call_method("size", (like,))
    size.meta.update(node.meta)
    node.target, node.args, node.kwargs = str(node.target).removesuffix("_as"), (value, size), {}


def _name_of_first(model: nn.Module, node: fx.Node) -> str | None:
    """Return the name by which a call of torch passes its first argument; None if it passes it by place."""
    if node.args or not node.kwargs:
        return None
    if node.op == "call_module":
        forward = type(model.get_submodule(str(node.target))).forward
        names = list(inspect.signature(forward).parameters)[1:2]
        return next((name for name in names if name in node.kwargs), None)
    module = getattr(node.target, "__module__", None) or "torch"
    if node.op != "call_function" or module.partition(".")[0] not in ("torch", "_operator"):
        return None
    names = list(node.kwargs)
    return None if "condition" in names else next((name for name in _FIRST if name in names), None)


def _open_dataclass(graph: fx.Graph) -> None:
    """Replace an output that is a dataclass by a dictionary of its fields; the caller rebuilds the dataclass."""
    output = next(node for node in graph.nodes if node.op == "output")
    call = output.args[0]
    if isinstance(call, fx.Node) and isinstance(call.target, type) and is_dataclass(call.target):
        names = [field.name for field in fields(call.target) if field.init]
        output.update_arg(0, {**dict(zip(names, call.args, strict=False)), **call.kwargs})
        graph.erase_node(call)


def _make_in_place_explicit(model: nn.Module, graph: fx.Graph) -> None:
    """Let what follows a change in place read its result. Where something else reads the value that is changed, a copy
    of it is changed instead, since operations are moved and fused."""
    order = {node: position for position, node in enumerate(graph.nodes)}

    def read_instead(value: fx.Node, after: fx.Node, changed: fx.Node) -> None:
        for user in list(value.users):
            if order.get(user, -1) > order[after]:
                user.replace_input_with(value, changed)

    def called(node: fx.Node) -> Any:
        return model.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    for node in list(graph.nodes):
        if changes_in_place(node, called):
            part: Any = node.args[0]
            read_instead(part, node, node)
            if _is_view(part):  # the viewed tensor changes as well
                whole: Any = part.args[0]
                with graph.inserting_after(node):
                    changed = graph.call_function(assign, (whole, part.args[1], node))
                read_instead(whole, node, changed)
                if not changed.users:
                    graph.erase_node(changed)
            others = read_elsewhere(node, called)
            if others and all(order.get(user, -1) < order[node] for user in others):
                with graph.inserting_before(node):
                    node.replace_input_with(part, graph.call_method("clone", (part,)))


def _write_sizes_of_weights(model: nn.Module, graph: fx.Graph) -> None:
    """Write what follows from the shapes of weights alone as numbers, such as half of a filter's side by which a map is
    padded: unlike sizes of the image they are the same in every call."""
    interpreter, known = fx.Interpreter(model, graph=graph), dict[fx.Node, Any]()

    def follows(node: fx.Node) -> bool:
        sources = node.all_input_nodes
        if asks(node) and node.args[0] is sources[0] and sources[0].op == "get_attr":
            known[sources[0]] = interpreter.fetch_attr(str(sources[0].target))
        return node.op in ("call_function", "call_method") and bool(sources) and known.keys() >= set(sources)

    numbers = dict[fx.Node, Any]()
    for node in graph.nodes:
        if follows(node) and (asks(node) or numbers.keys() >= set(node.all_input_nodes)):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            value = getattr(interpreter, node.op)(node.target, args, kwargs)
            if _is_plain_number(value):
                known[node] = numbers[node] = value
    for node, value in numbers.items():
        for user in list(node.users):
            if user not in numbers:
                given: Any = map_aggregate((user.args, user.kwargs), partial(_replaced, node, value))
                user.args, user.kwargs = given
    for node in reversed(numbers):
        graph.erase_node(node)


def _replaced(node: fx.Node, value: Any, part: Any) -> Any:
    return value if part is node else part


def _is_plain_number(value: Any) -> bool:
    several = isinstance(value, (tuple, list))
    return all(map(_is_plain_number, value)) if several else isinstance(value, (int, float))


def _is_view(node: fx.Node) -> bool:
    """True if a node is a view of a tensor, made by indexing with several numbers and slices."""
    index = node.args[1] if node.target is operator.getitem else None
    return isinstance(index, tuple) and all(isinstance(part, (int, slice, type(...))) for part in index)


def _follow_training_flag(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if not is_kind(node.target, "drops", "drops channels"):
            continue
        with graph.inserting_before(node):
            if isinstance(node.kwargs.get("training"), bool):
                node.update_kwarg("training", graph.create_node("get_attr", "training"))
            elif len(node.args) > 2:  # input, p, training
                node.update_arg(2, graph.create_node("get_attr", "training"))
