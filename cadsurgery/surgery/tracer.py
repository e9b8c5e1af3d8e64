"""A torch.fx tracer with additional leaf modules: operations with a rule, and modules that torch.fx cannot trace."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from cadsurgery.support.torch_operations import name_of
from cadsurgery.surgery.guards import stack_of

Functions = tuple[Callable[..., Any], ...]


class OfEarlierCall(Exception):
    """The Python code uses a value that it kept in an earlier trace, at a place that is not put back."""


class Tracer(fx.Tracer):
    """torch.fx's tracer; modules with a rule are leaves, and so are timm's declared leaves if they cannot be traced."""

    def __init__(
        self,
        is_operation: Callable[[nn.Module], bool],
        functions: Functions,
        declared: frozenset[type],
        names_buffers: bool = True,
        given: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(autowrap_functions=functions)
        self._is_operation, self._functions, self._declared = is_operation, functions, declared
        self._given = given
        self.record_stack_traces = False  # see `create_node`
        # Values computed from buffers, as in norms with frozen statistics, are computed in every call, not once here.
        self.proxy_buffer_attributes = names_buffers

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace in this thread only, because torch patches `nn.Module` for all threads while it traces."""
        self._thread = threading.get_ident()
        return super().trace(*args, **kwargs)

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
        return super().call_module(m, forward, args, kwargs)

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

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Create the inputs; arguments that default to None and are not passed stay None, since a graph cannot record
        `is None`. Unpassed `**kwargs` are empty."""
        function, values = super().create_args_for_root(*args, **kwargs)
        return function, [self._or_default(value) for value in values]

    def _or_default(self, value: Any) -> Any:
        """Return an input, or its default if the call does not pass it."""
        if not isinstance(value, fx.Proxy):
            return value
        name = str(value.node.target)
        if value.node.args == (None,) and name not in self._given:
            return None
        return {} if name.startswith("**") and name.lstrip("*") not in self._given else value

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


def assign(values: Any, index: Any, part: Any) -> Any:
    """Return the result of `values[index] = part` as a new value; `values` is not changed."""
    changed = values.clone() if isinstance(values, Tensor) else copy.copy(values)
    changed[index] = part
    return changed
