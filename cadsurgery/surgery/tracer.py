"""A torch.fx tracer with additional leaf modules: operations with a rule, and modules that torch.fx cannot trace."""

from __future__ import annotations

import copy
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor, fx, nn

from cadsurgery.support.torch_operations import is_kind, name_of
from cadsurgery.surgery.arguments import Inputs
from cadsurgery.surgery.guards import is_of_library, stack_of, user_line
from cadsurgery.surgery.hooks import noting_hooks

_ITERATORS = ("parameters", "named_parameters", "buffers", "named_buffers")
HOOKS = "hooks"  # in the metadata of a node whose module's hooks are operations of the graph

Functions = tuple[Callable[..., Any], ...]


class OfEarlierCall(Exception):
    """The Python code uses a value that it kept in an earlier trace, at a place that is not put back."""


class NeedsValue(Exception):
    """The Python code asks a proxy for something that only its value tells."""


class Unknown(fx.Proxy):
    """A proxy without a value. What Python code would learn of it (its text, its type, its hash) would be
    a fact of the proxy and not of the value, so it may not ask."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # libraries probe objects for such attributes
            raise AttributeError(name)
        return _UnknownAttribute(self, name)

    def refuse(self, *_: Any) -> NoReturn:
        """Refuse a question."""
        raise NeedsValue(f"it asks for a value at {user_line()}")

    __str__ = __repr__ = __format__ = __hash__ = refuse


class _UnknownAttribute(fx.proxy.Attribute, Unknown):
    """An attribute of a proxy without a value."""


# Modules whose weights fix the number of channels of their results, by the axis of the channels.
_WEIGHTED: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm),
    -1: (nn.Linear, nn.LayerNorm),
}


def cuts_channels(node: fx.Node, root: nn.Module) -> bool:
    """True if a node cuts a tensor into parts along channels whose number the weights of a layer fix."""
    place = 1 if name_of(node.target) == "unbind" else 2
    axis = node.kwargs.get("dim", node.args[place] if len(node.args) > place else 0)
    sizes = [part for part in (*node.args[1:], *node.kwargs.values()) if isinstance(part, fx.Node)]
    return axis in _WEIGHTED and not sizes and _has_fixed_channels(node.args[0], axis, root)


def _has_fixed_channels(node: Any, axis: Any, root: nn.Module) -> bool:
    """True if a value comes from layers with weights, through operations that keep all axes."""
    if node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), _WEIGHTED[axis]):
        return True
    keeps_axes = node.op == "call_module" or is_kind(node.target, "value", "values", "copies", "splits")
    sources = node.all_input_nodes if keeps_axes or node.target in (operator.getitem, torch.cat) else []
    return bool(sources) and all(_has_fixed_channels(source, axis, root) for source in sources)


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
        self.record_stack_traces = False  # see `create_node`
        # Values computed from buffers, as in norms with frozen statistics, are computed in every call, not once here.
        self.proxy_buffer_attributes = names_buffers

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace in this thread only, because torch patches `nn.Module` for all threads while it traces."""
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            for name in _ITERATORS:
                listed = self._as_nodes(getattr(nn.Module, name))
                stack.enter_context(mock.patch.object(nn.Module, name, listed))
            return super().trace(*args, **kwargs)

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
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a node; a value that another graph computes cannot be one."""
        if isinstance(a, fx.Proxy) and a.node.graph is not self.graph:
            module = self.scope.module_path or type(self.root).__name__
            raise OfEarlierCall(f"{module} uses the result of {name_of(a.node.target)} in an earlier call")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy for a node."""
        return Unknown(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Create the inputs, and return the function that calls the network with them.

        Containers are containers for the network's Python code, too, and what is no number and no tensor is the value
        itself: `Inputs.kinds` are compared in every call, so that the code may ask for them.
        """
        inputs = self._inputs or Inputs.of(self.root)
        proxies = {
            name: self.create_proxy("placeholder", name, default, {})
            for name, default in inputs.placeholders()
        }

        def run(root: nn.Module) -> Any:
            args, kwargs = inputs.call({name: inputs.open(name, proxy) for name, proxy in proxies.items()})
            return root.forward(*args, **kwargs)

        return run, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True if a module becomes a single node of the graph."""
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
