"""A tracer whose symbols carry values: Python may ask a size for its number, and each decision becomes a guard.

torch.fx cannot follow `if x.shape[2] != skip.shape[2]:`, `int(x.size(2) / 2)` or `torch.zeros(n, c, h, w)`: its symbols
have no values. Here the graph so far is run on an example as soon as a value is asked for. What is computed from sizes
stays an operation of the graph; only where Python needs a plain number or a truth is it taken from the example, and the
graph gets a guard (`guards.check_branch`). Decisions by the values of pixels are refused.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map_only

from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.torch_operations import asks, name_of
from cadsurgery.surgery.arguments import AnyLayout, Arguments
from cadsurgery.surgery.graphs import upwards
from cadsurgery.surgery.guards import check_branch, compared, user_line
from cadsurgery.surgery.tracer import Tracer, assign

# Results whose very size depends on values.
_SELECTIONS = frozenset(
    ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nms", "batched_nms")
)
# Functions of torch that make tensors of a size, and therefore see no symbol among their arguments.
_FACTORIES = (
    *("zeros", "ones", "full", "empty", "rand", "randn", "arange", "linspace", "eye", "tensor", "as_tensor"),
)


class ByValues(Exception):
    """Python decides by the values of an image, for which a graph has no place."""


class Symbol(fx.Proxy):
    """A value of the graph that knows what it is on the example."""

    tracer: Carrier

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # what libraries ask of objects in general
            raise AttributeError(name)
        if name == "is_cuda":  # which no dense twin of elements has
            return self.device.type == "cuda"
        return _Attribute(self, name)

    def __setitem__(self, index: Any, part: Any) -> None:
        """From here on the Python value is the one with the part assigned."""
        self.node = self.tracer.call(assign, self, index, part).node

    def __len__(self) -> int:
        return self.tracer.decide(self, len)

    def __int__(self) -> int:
        return self.tracer.decide(self, int)

    def __index__(self) -> int:
        return self.tracer.decide(self, operator.index)

    def __float__(self) -> float:
        return self.tracer.decide(self, float)

    def __format__(self, how: str) -> str:  # a text, such as a message, decides nothing
        return format(self.tracer.value(self), how)

    def __str__(self) -> str:
        return str(self.tracer.value(self))

    def __hash__(self) -> int:
        return id(self)

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.call(round, self, *digits)

    def __trunc__(self) -> Any:
        return self.tracer.call(int, self)

    def __floor__(self) -> Any:
        return self.tracer.call(sys.modules["math"].floor, self)

    def __ceil__(self) -> Any:
        return self.tracer.call(sys.modules["math"].ceil, self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


class _Attribute(fx.proxy.Attribute, Symbol):
    """An attribute of a symbol: its node is made when its value is needed, for it may be a method."""


class Carrier(Tracer):
    """Traces a network on an example."""

    def __init__(self, *options: Any, example: Arguments, **named: Any) -> None:
        super().__init__(*options, **named)
        self.example = example
        self.values: dict[fx.Node, Any] = {}
        self._run_so_far = 0
        self._is_running = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A symbol for each node."""
        return Symbol(node, self)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function of symbols as a node."""
        return self.create_proxy("call_function", function, args, kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As torch does; a module made in forward, as by `layers[:4](x)`, is looked into."""
        if self._is_running or m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers as nodes, but for operations that run on the example."""
        return attr_val if self._is_running else super().getattr(attr, attr_val, parameter_proxy_cache)

    # -- values ------------------------------------------------------------------------------------

    def value(self, symbol: fx.Proxy) -> Any:
        """Return the value of a symbol on the example."""
        node = symbol.node
        if node not in self.values:
            self._run()
        return self.values[node]

    def _run(self) -> None:
        """Run the nodes that are new, in order, so that what works in place has its effect."""
        interpreter = fx.Interpreter(self.root, graph=self.graph)
        interpreter.env = self.values
        self._is_running = True
        try:
            with torch.no_grad(), AnyLayout():
                for node in list(self.graph.nodes)[self._run_so_far :]:
                    if node.op == "placeholder":
                        default = node.args[0] if node.args else None
                        value = self.example.get(str(node.target).lstrip("*"), default)
                        self.values[node] = tree_map_only(Tensor, Tensor.clone, value)
                    else:
                        self.values[node] = interpreter.run_node(node)
                    self._run_so_far += 1
        finally:
            self._is_running = False

    def decide(self, symbol: fx.Proxy, take: Callable[[Any], Any]) -> Any:
        """The number or truth that Python asks for, which a guard holds in every later call."""
        node = symbol.node
        value = self.value(symbol)
        outcome = take(value)
        if take is len and isinstance(value, (tuple, list, dict)):
            return outcome  # as many as there are dimensions or parts
        if self._reads_values(node):
            raise ByValues(f"it decides by values of the image at {user_line()}")
        asked: Any = node
        if take is len:
            asked = self.create_node("call_function", len, (node,), {})
        if not self._is_of_rank(node):
            operands = compared(node)
            before = tuple(self.values[part] if isinstance(part, fx.Node) else part for part in operands)
            before = tuple(tuple(part) if isinstance(part, torch.Size) else part for part in before)
            plain = all(isinstance(part, (int, float, tuple)) for part in before)
            shown = (operands, before) if plain else ((), ())
            self.create_node("call_function", check_branch, (asked, outcome, user_line(), *shown), {})
        return outcome

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth of a symbol."""
        return bool(self.decide(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a symbol, each a symbol, as many as there are on the example."""
        value = self.value(obj)
        if isinstance(value, dict):
            return iter(value)
        return iter([obj[place] for place in range(len(obj))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        """Names of the parts of a symbol."""
        return list(self.value(obj).keys())

    def _reads_values(self, node: fx.Node) -> bool:
        """True if a value is computed from pixels, rather than from sizes and weights."""
        seen, pending = set(), [node]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if _selects(node):
                return True
            if asks(node):
                source: Any = node.args[0]
                pending.extend(part for part in upwards(source) if _selects(part))
            elif node.op == "placeholder" and tensors_of(self.values.get(node)):
                return True
            else:
                pending.extend(node.all_input_nodes)
        return False

    def _is_of_rank(self, node: fx.Node) -> bool:
        """True if a value depends on numbers of dimensions alone, which no image changes, or on what changes no value,
        such as how a map lies in memory."""
        if asks(node):
            return asks(node, of_rank=True)
        sources = node.all_input_nodes
        return bool(sources) and all(self._is_of_rank(source) for source in sources)


def _selects(node: fx.Node) -> bool:
    """True if the size of a result depends on values."""
    name = name_of(node.target)
    if name in _SELECTIONS or (name == "where" and len(node.args) == 1):
        return True
    if node.target is not operator.getitem or len(node.args) < 2:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(part, fx.Node) and not _gives_number(part) for part in index)


def _gives_number(node: fx.Node) -> bool:
    """True if a node is computed from sizes alone."""
    if asks(node):
        return True
    sources = node.all_input_nodes
    return bool(sources) and node.op != "placeholder" and all(map(_gives_number, sources))


# -- what Python's own functions do with symbols -------------------------------------------------------


def _is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance`, for symbols of what they are on the example."""
    return isinstance(value.tracer.value(value) if issubclass(type(value), Symbol) else value, kinds)


def _unscripted(value: Any) -> Callable[..., Any] | None:
    """The Python function that torch.jit.script was given; None for anything else."""
    return (
        getattr(value, "_torchdynamo_inline", None) if isinstance(value, torch.jit.ScriptFunction) else None
    )


def _symbol_among(*values: Any) -> Symbol | None:
    symbols: list[Symbol] = []

    def note(value: Any) -> Any:
        if issubclass(type(value), Symbol):
            symbols.append(value)
        return value

    map_aggregate(values, note)
    return symbols[0] if symbols else None


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which becomes a node where it is given a symbol."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        symbol = _symbol_among(args, kwargs)
        if symbol is None:
            return function(*args, **kwargs)
        return symbol.tracer.call(function, *args, **kwargs)

    return call


class _NumberType(type):
    """`int` and `float` of a module that is traced: the same for isinstance, and a node where they convert a symbol."""

    number: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and issubclass(type(args[0]), Symbol) and not args[1:]:
            return args[0].tracer.call(cls.number, args[0])
        return cls.number(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.number)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.number)

    def __eq__(cls, other: object) -> bool:
        return other is cls.number or cls is other

    def __hash__(cls) -> int:
        return hash(cls.number)


class _TypeOf(_NumberType):
    """`type` of a module that is traced: of a symbol, that of what it is on the example."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and issubclass(type(args[0]), Symbol) and not args[1:]:
            return type(args[0].tracer.value(args[0]))
        return type(*args, **kwargs)


class _Type(metaclass=_TypeOf):
    number = type


class _Int(metaclass=_NumberType):
    number = int


class _Float(metaclass=_NumberType):
    number = float


_PYTHON = {*sys.stdlib_module_names, "builtins", "torch", "numpy", "cadsurgery"}


def _name_spaces(model: nn.Module) -> list[dict[str, Any]]:
    """Those of the modules of Python that a network's classes are written in, and that these import functions from."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    waiting = [
        vars(sys.modules[kind.__module__])
        for kind in kinds
        if kind.__module__ in sys.modules and kind.__module__.partition(".")[0] not in ("torch", "builtins")
    ]
    spaces = {id(space): space for space in waiting}
    for space in waiting:
        functions = [value for value in space.values() if isinstance(value, FunctionType)]
        for function in functions:
            other, package = function.__globals__, str(function.__module__).partition(".")[0]
            if id(other) not in spaces and package not in _PYTHON:
                spaces[id(other)] = other
                waiting.append(other)
    return list(spaces.values())


@contextmanager
def symbols_in_python(model: nn.Module) -> Iterator[None]:
    """While a network is traced on an example: factories of torch, and isinstance, type, int, float, max and min as the
    modules of the network call them, and functions that they import, become nodes where they are given symbols."""
    shadows = {
        "isinstance": _is_instance,
        "type": _Type,
        "int": _Int,
        "float": _Float,
        "max": _recording(max),
        "min": _recording(min),
    }
    spaces = _name_spaces(model)
    with ExitStack() as stack:
        is_tensor = functools.partial(_is_instance, kinds=Tensor)
        factories: Any = {name: _recording(getattr(torch, name)) for name in _FACTORIES}
        stack.enter_context(mock.patch.multiple(torch, is_tensor=is_tensor, **factories))
        stack.enter_context(mock.patch.object(torch.jit, "isinstance", _is_instance))
        for space in spaces:
            free = {name: value for name, value in shadows.items() if name not in space}
            free |= {name: unscripted for name, value in space.items() if (unscripted := _unscripted(value))}
            stack.enter_context(mock.patch.dict(space, free))
        yield
