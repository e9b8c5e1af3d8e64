"""A torch.fx tracer with additional leaf modules: operations with a rule, and modules that torch.fx cannot trace."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn
from unittest import mock

import numpy
import torch
from torch import Tensor, fx, nn

from cadsurgery.following.arguments import Inputs
from cadsurgery.following.call_entry import own_call, traced_name, without_hooks
from cadsurgery.following.graphs import follows_from, upwards
from cadsurgery.following.guards import is_of_library, stack_of, user_line
from cadsurgery.following.hooks import noting_hooks
from cadsurgery.support.torch_operations import is_in_place, is_kind, name_of

_ITERATORS = ("parameters", "named_parameters", "buffers", "named_buffers")
HOOKS = "hooks"  # in the metadata of a node whose module's hooks are operations of the graph

Functions = tuple[Callable[..., Any], ...]


class OfEarlierCall(Exception):
    """The Python code uses a value that it kept in an earlier trace, at a place that is not put back."""


class NeedsValue(Exception):
    """The Python code asks a proxy for something that only its value tells."""


class NotRegistered(Exception):
    """The network computes with a parameter that none of its modules has."""


class UsesNumpy(Exception):
    """The Python code computes with numpy arrays what depends on the image."""


class Value(fx.Proxy):
    """A proxy whose `data` can be assigned, as blocks do that merge their branches into one weight in forward."""

    tracer: Tracer
    __array_priority__ = Tensor.__array_priority__  # `numpy.float32(2) * x` is an operation of the tensor

    @property
    def data(self) -> Any:
        """The tensor without its history."""
        return self.__getattr__("data")

    @data.setter
    def data(self, value: Any) -> None:
        self.tracer.write(self, value)


class Unknown(Value):
    """A proxy without a value. What Python code would learn of it (its text, its type, its hash) would be
    a fact of the proxy and not of the value, so it may not ask."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # libraries probe objects for such attributes
            raise AttributeError(name)
        return _UnknownAttribute(self, name)

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse a question."""
        raise NeedsValue(f"it asks for a value at {user_line()}")

    __str__ = __repr__ = __format__ = __hash__ = __array__ = refuse


class _UnknownAttribute(fx.proxy.Attribute, Unknown):
    """An attribute of a proxy without a value."""


# Modules whose weights fix the number of channels of their results, by the axis of the channels.
_WEIGHTED: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm),
    -1: (nn.Linear, nn.LayerNorm),
}


CONSTANT = re.compile(
    r"_tensor_constant\d+"
)  # attributes that torch.fx makes of tensors that are none of the network's


def is_constant(node: fx.Node) -> bool:
    """True if a node is a tensor that Python code made or found beside the network's own while it was traced."""
    return node.op == "get_attr" and CONSTANT.fullmatch(str(node.target)) is not None


def cuts_channels(node: fx.Node, root: nn.Module) -> bool:
    """True if a node cuts a tensor into parts along channels whose number the weights of a layer fix."""
    index = 1 if name_of(node.target) == "unbind" else 2
    axis: Any = node.kwargs.get("dim", node.args[index] if len(node.args) > index else 0)
    sizes = [part for part in (*node.args[1:], *node.kwargs.values()) if isinstance(part, fx.Node)]
    if axis not in _WEIGHTED or not all(is_number_of_channels(size, root) for size in sizes):
        return False
    return _has_fixed_channels(node.args[0], axis, root)


def is_number_of_channels(node: fx.Node, root: nn.Module) -> bool:
    """True if a number is computed from numbers of channels alone that the weights of layers fix."""

    def is_first(one: fx.Node) -> bool:
        source, axes = _axes_asked(one)
        return isinstance(axes, int) and axes in _WEIGHTED and _has_fixed_channels(source, axes, root)

    return follows_from(node, is_first)


def _axes_asked(node: fx.Node) -> tuple[Any, Any]:
    """Return a map of four axes, and the axis or the axes whose lengths a node asks of it; else None and None."""
    if node.op == "call_method" and node.target == "size":
        return node.args[0], node.args[1] if len(node.args) > 1 else [0, 1, 2, 3]
    if node.target is getattr and node.args[1] == "shape":
        return node.args[0], [0, 1, 2, 3]
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source, axes = _axes_asked(node.args[0])
        if isinstance(axes, list) and isinstance(node.args[1], (int, slice)):
            with contextlib.suppress(IndexError):
                return source, axes[node.args[1]]
    return None, None


def _has_fixed_channels(node: Any, axis: int, root: nn.Module) -> bool:
    """True if a value comes from layers with weights, through operations that keep all axes."""

    def is_first(one: fx.Node) -> bool:
        return one.op == "call_module" and isinstance(root.get_submodule(str(one.target)), _WEIGHTED[axis])

    def keeps_axes(one: fx.Node) -> bool:
        has_axes = one.op == "call_module" or is_kind(one.target, "value", "values", "copies", "splits")
        return has_axes or one.target in (operator.getitem, torch.cat)

    above = upwards(node, lambda one: [] if is_first(one) else one.all_input_nodes)
    return all(is_first(one) or (keeps_axes(one) and one.all_input_nodes) for one in above)


class Tracer(fx.Tracer):
    """torch.fx's tracer; modules with a rule are leaves, and so are timm's declared leaves if they cannot be traced."""

    def __init__(
        self,
        is_operation: Callable[[nn.Module], bool],
        functions: Functions,
        declared: frozenset[type],
        names_buffers: bool = True,
        inputs: Inputs | None = None,
        runs_hooks: bool = False,
    ) -> None:
        """Take what is a single node of the graph (modules, functions, and classes declared by libraries), whether
        buffers are nodes or constants, the inputs of the network as far as they are known, and whether hooks of
        modules that are nodes are code of the network."""
        super().__init__(autowrap_functions=functions)
        self._is_operation, self._functions, self._declared = is_operation, functions, declared
        self._inputs, self._runs_hooks = inputs, runs_hooks
        self.is_done = (
            False  # then what is asked of proxies that the network has kept is no part of the graph
        )
        self.record_stack_traces = False  # see `create_node`
        # Values computed from buffers, as in norms with frozen statistics, are computed in every call, not once here.
        self.proxy_buffer_attributes = names_buffers

    def trace(self, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace what a call of a network runs, in this thread only, because torch patches `nn.Module` for all threads
        while it traces."""
        self._thread = threading.get_ident()
        self._written = dict[int, fx.Proxy]()  # by the identity of a parameter or buffer
        self._written_by = dict[fx.Node, Tensor]()
        of_torch = (part for part in root.modules() if type(part).__module__.startswith("torch."))
        buffers = (buffer for part in of_torch for buffer in part._buffers.values() if buffer is not None)
        self._buffers_of_torch = set(map(id, buffers))
        hooks = nullcontext() if own_call(type(root)) is None else without_hooks(root)
        if own_call(type(root)) is not None:
            self.traced_func_name = traced_name(type(root))
        try:
            with self._patched(root), hooks:
                return super().trace(root, *args, **kwargs)
        except Exception as error:  # tracing runs foreign code, which can raise any error
            arrays = (node for node in self.graph.nodes if self.is_array(node))
            if first := next(arrays, None):
                line = (first.stack_trace or "").strip().rpartition("\n")[2].strip()
                raise UsesNumpy(f"it computes with numpy arrays from `{line}` on") from error
            raise
        finally:
            self.is_done = True

    def is_array(self, node: fx.Node) -> bool:
        """True if a node is a numpy array of values that depend on the image."""
        return node.op == "call_method" and node.target == "numpy"

    @contextmanager
    def _patched(self, root: nn.Module) -> Iterator[None]:
        """Record calls of leaf modules whose class has its own `__call__` as a whole: torch.fx sees only what that
        calls in its turn, and the module would run it again. And let modules hold proxies in place of weights."""
        kinds = {type(part) for part in root.modules() if part is not root}
        with ExitStack() as stack:
            for name in _ITERATORS:
                stack.enter_context(
                    mock.patch.object(nn.Module, name, self._as_nodes(getattr(nn.Module, name)))
                )
            stack.enter_context(mock.patch.object(nn.Module, "__setattr__", self._keeping_proxies(stack)))
            for kind in kinds:
                if (call := own_call(kind)) is not None and kind.__call__ is call:
                    stack.enter_context(mock.patch.object(kind, "__call__", self._recording(call)))
            yield

    def _keeping_proxies(self, stack: ExitStack) -> Callable[..., None]:
        """Return a replacement of `nn.Module.__setattr__` that takes a proxy in place of a parameter or buffer, which
        the module holds again when `stack` ends."""
        set_attribute = nn.Module.__setattr__

        def assign_weight(module: nn.Module, name: str, value: Any) -> None:
            held = {**vars(module).get("_parameters", {}), **vars(module).get("_buffers", {})}
            if isinstance(value, fx.Proxy) and name in held:
                vars(module)[name] = value
                stack.callback(vars(module).pop, name, None)
            else:
                set_attribute(module, name, value)

        return assign_weight

    def _recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = (self.submodule_paths or {}).get(module, "")
            if path and self.is_tracing() and self.is_leaf_module(module, path):
                return self.create_proxy("call_module", path, args, kwargs)
            return function(module, *args, **kwargs)

        return call

    def is_tracing(self) -> bool:
        """True if the code that runs is traced, and not that of another thread."""
        return threading.get_ident() == self._thread

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy of a node."""
        return Unknown(node, self)

    def _as_nodes(self, listing: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return a method that lists parameters or buffers as nodes to the network's code, as its attributes are: their
        type and device are no facts of the conversion."""
        nodes: dict[str, Any] = {}

        @functools.wraps(listing)
        def listed(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
            found = listing(module, *args, **kwargs)
            asked_by = sys._getframe(1).f_code.co_filename
            if threading.get_ident() != self._thread or is_of_library(asked_by):
                return found
            return map(node_of, found)

        def node_of(found: Any) -> Any:
            if isinstance(found, tuple):
                return found[0], self.getattr(found[0], found[1], nodes)
            return self.getattr("", found, nodes)

        return listed

    # -- weights that forward writes ---------------------------------------------------------------

    def write(self, target: fx.Proxy, value: Any) -> None:
        """Let all that reads a tensor from now on read another value; modules that hold it are no leaves any more."""
        if not isinstance(value, fx.Proxy):
            raise TypeError(
                f"{target.node} is assigned a {type(value).__name__} that no image and no weight gives"
            )
        held = self._held_behind(target)
        if held is None:  # a value of this call
            target.node = value.node
        else:
            self._hold(held, super().create_proxy("call_method", "detach", (value,), {}))

    def write_part(self, target: fx.Proxy, index: Any, part: Any) -> None:
        """Record `target[index] = part`."""
        held = self._held_behind(target)
        before = target if held is None else self._written.get(id(held), target)
        changed = self.create_proxy("call_function", assign, (before, index, part), {})
        if isinstance(target, fx.proxy.Attribute):
            target._node = changed.node
        else:
            target.node = changed.node
        if held is not None:
            self._hold(held, changed)

    def _hold(self, held: Tensor, value: fx.Proxy) -> None:
        self._written[id(held)] = value
        self._written_by[value.node] = held

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> Any:
        """Record an operation; one that changes a weight in place is recorded as one that gives another weight."""
        held = None
        if (
            kind == "call_method"
            and args
            and target != "requires_grad_"
            and is_in_place(target, args, kwargs)
        ):
            held = self._held_behind(args[0], is_same=target == "set_")
        if held is None:
            return super().create_proxy(kind, target, args, kwargs, *more, **options)
        before = self._written.get(id(held), args[0])
        value = super().create_proxy("call_method", "detach", (before,), {})
        value = super().create_proxy("call_method", "clone", (value,), {})
        value = super().create_proxy(kind, target, (value, *args[1:]), kwargs, *more, **options)
        self._hold(held, value)
        return value

    def _held_behind(self, value: Any, is_same: bool = False) -> Tensor | None:
        """Return the parameter, or the buffer of one of torch's modules, whose memory a value is, or with `is_same`
        that it is itself: `weight.data.set_(...)` leaves the weight."""
        node: Any = value.node if isinstance(value, fx.Proxy) else None
        while node is not None and node not in self._written_by and not is_same:
            if node.target != "detach" and node.args[1:] != ("data",):
                break
            node = node.args[0]
        held = value
        if node in self._written_by:
            held = self._written_by[node]
        elif node is not None:
            path, _, name = str(node.target).rpartition(".")
            holder = vars(self.root.get_submodule(path)) if node.op == "get_attr" else {}
            tensors = {**holder.get("_parameters", {}), **holder.get("_buffers", {})}
            held = tensors.get(name)
        return held if isinstance(held, nn.Parameter) or id(held) in self._buffers_of_torch else None

    def _is_written(self, module: nn.Module) -> bool:
        """True if forward wrote a tensor that a module holds."""
        return any(
            isinstance(value, fx.Proxy) or id(value) in self._written
            for part in module.modules()
            for held in (vars(part), part._parameters, part._buffers)
            for value in held.values()
        )

    # ----------------------------------------------------------------------------------------------

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node with the lines of the network that it comes from.

        Torch's own record reads the source of every frame of the process, which takes most of the time of a trace.
        """
        node = super().create_node(*args, **kwargs)
        if lines := stack_of(sys._getframe(1), until=Tracer.trace.__code__):
            node.stack_trace = lines
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call; modules that other threads call meanwhile run normally."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        hooks = noting_hooks(m, self.root, self._runs_hooks)
        if not any(hooks) or not self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            _run_hooks(m, hooks, args, kwargs, output)
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy of an attribute; other threads get the attribute itself. A buffer without elements has no
        values that a call could change."""
        is_empty = isinstance(attr_val, Tensor) and not attr_val.numel()
        if threading.get_ident() != self._thread or (is_empty and not isinstance(attr_val, nn.Parameter)):
            return attr_val
        if id(attr_val) in self._written:
            return self._written[id(attr_val)]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a node; a value that another graph computes cannot be one. A number of numpy becomes a
        number of Python, as torch takes it."""
        if isinstance(a, fx.Proxy) and a.node.graph is not self.graph:
            module = self.scope.module_path or type(self.root).__name__
            raise OfEarlierCall(f"{module} uses the result of {name_of(a.node.target)} in an earlier call")
        try:
            return super().create_arg(a.item() if isinstance(a, numpy.generic) else a)
        except NameError as error:  # by torch.fx, of a parameter
            raise NotRegistered(
                "it has a weight that torch does not know as its own, such as one of a module in a plain list or "
                "dictionary; nn.ModuleList and nn.ModuleDict hold modules"
            ) from error

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Create the inputs, and return the function that calls the network with them.

        Containers are containers for the network's Python code, too, and what is no number and no tensor is the value
        itself: `Inputs.kinds` are compared in every call, so that the code may ask for them.
        """
        inputs, call = self._inputs or Inputs.of(self.root), own_call(type(self.root))
        proxies = {
            name: self.create_proxy("placeholder", name, default, {})
            for name, default in inputs.placeholders()
        }

        def run(root: nn.Module) -> Any:
            args, kwargs = inputs.call({name: inputs.open(name, proxy) for name, proxy in proxies.items()})
            return (call.__get__(root) if call is not None else root.forward)(*args, **kwargs)

        return run, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True if a module becomes a single node of the graph."""
        if self._is_written(m):
            return False
        if self._is_operation(m) or (type(m) in self._declared and not self._can_follow(m)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def _can_follow(self, module: nn.Module) -> bool:
        """True if a declared leaf module can be traced; the graph then shows its parts."""
        try:
            Tracer(self._is_operation, self._functions, self._declared).trace(module)
        except Exception:  # tracing runs foreign code, which can raise any error
            return False
        return True


def _run_hooks(module: nn.Module, hooks: Any, args: Any, kwargs: Any, output: fx.Proxy) -> None:
    """Run hooks of a module that is a node on the proxies of its call.

    Raises:
        NeedsValue: a hook changes what the module gets or returns; calls of the module run it, too.
    """
    before, after = hooks
    changes = [hook(module, args, kwargs) if named else hook(module, args) for hook, named in before]
    changes += [
        hook(module, args, kwargs, output) if named else hook(module, args, output) for hook, named in after
    ]
    if any(change is not None for change in changes):
        raise NeedsValue(
            f"a hook of {type(module).__name__} changes a value that the network's code also reads"
        )
    output.node.meta[HOOKS] = True


def assign(values: Any, index: Any, part: Any) -> Any:
    """Return the result of `values[index] = part` as a new value; `values` is not changed."""
    changed = values.clone() if isinstance(values, Tensor) else copy.copy(values)
    changed[index] = part
    return changed
