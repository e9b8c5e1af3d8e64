"""torch's tracer with the leaves of surgery: operations with a rule, and modules that torch.fx cannot follow."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

Functions = tuple[Callable[..., Any], ...]


class Tracer(fx.Tracer):
    """torch's tracer, with other leaves: what has a rule, and what timm declares and torch.fx cannot follow."""

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
        self.record_stack_traces = True
        # What is computed from buffers, as by norms with frozen statistics, is computed in every call, not once here.
        self.proxy_buffer_attributes = names_buffers

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace in this thread alone: torch changes `nn.Module` for all threads while it traces."""
        self._thread = threading.get_ident()
        return super().trace(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Modules that other threads call meanwhile are called as they are."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters that other threads read meanwhile are themselves."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """An argument that is None by default and not given is so here: Python asks `is None`, of which no graph
        knows. Named ones of no parameter's own are none, too."""
        function, values = super().create_args_for_root(*args, **kwargs)
        return function, [self._known(value) for value in values]

    def _known(self, value: Any) -> Any:
        """An input, or what it is where it is not given."""
        if self._is_left_out(value):
            return None
        name = str(value.node.target) if isinstance(value, fx.Proxy) else ""
        return {} if name.startswith("**") and name.lstrip("*") not in self._given else value

    def _is_left_out(self, value: Any) -> bool:
        """True if an input is not given and is None by default."""
        is_none = isinstance(value, fx.Proxy) and value.node.args == (None,)
        return is_none and value.node.target not in self._given

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True if a module is one node of the graph."""
        if self._is_operation(m) or (type(m) in self._declared and not self._can_follow(m)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def _can_follow(self, module: nn.Module) -> bool:
        """True if a module that is declared a leaf can be traced all the same: its parts are worth knowing."""
        try:
            Tracer(self._is_operation, self._functions, self._declared).trace(module)
        except Exception:  # tracing runs foreign code, which can raise anything
            return False
        return True


def assign(values: Any, index: Any, part: Any) -> Any:
    """Return the result of `values[index] = part` as a new value; the values stay as they are."""
    changed = values.clone() if isinstance(values, Tensor) else copy.copy(values)
    changed[index] = part
    return changed
