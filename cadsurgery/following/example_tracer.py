"""A tracer whose proxies carry values of an example: Python code may use sizes as numbers, and branches become guards.

torch.fx cannot trace `if x.shape[2] != skip.shape[2]:`, `int(x.size(2) / 2)` or `torch.zeros(n, c, h, w)`, because its
proxies have no values. This tracer runs the graph so far on an example as soon as a value is needed. Computations with
sizes stay operations of the graph. Only where Python needs a plain number or truth value, the value of the example is
used, and the graph gets a guard (`guards.check_branch`). Branches on pixel values are refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from cadsurgery.following.arguments import AnyLayout, Inputs
from cadsurgery.following.graphs import Interpreter, follows_from, upwards
from cadsurgery.following.guards import check_branch, compared, user_line
from cadsurgery.following.hooks import child, is_hooked, prepare_weights
from cadsurgery.following.tracer import (
    HOOKS,
    Tracer,
    Unknown,
    UsesNumpy,
    Value,
    assign,
    cuts_channels,
    is_constant,
)
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.torch_internals import tree_map_only
from cadsurgery.support.torch_operations import asks, is_kind, name_of

# Functions whose result size depends on values.
_SELECTIONS = frozenset(
    ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "nms", "batched_nms")
)
# Torch functions that create tensors, or describe types; torch.fx does not record them, since no argument is a tensor.
_FACTORIES = (
    *("zeros", "ones", "full", "empty", "rand", "randn", "arange", "linspace", "eye", "tensor", "as_tensor"),
    *("finfo", "iinfo"),
)


# Methods of a tensor that may be a plain attribute of the network, which take a type or numbers that are symbols.
_TAKE_NUMBERS = (
    *("to", "type", "expand", "expand_as", "repeat", "tile", "view", "view_as", "reshape", "reshape_as"),
    *(
        "narrow",
        "roll",
        "repeat_interleave",
        "unflatten",
        "split",
        "chunk",
        "select",
        "unfold",
        "index_select",
    ),
    *("new_zeros", "new_ones", "new_full", "new_empty", "clamp", "flip", "type_as"),
)


# Facts of a tensor that neither pixels nor sizes decide: attributes, and methods or functions of the tensor alone.
_FACTS = frozenset(
    (
        *("is_quantized", "is_sparse", "is_sparse_csr", "is_mkldnn", "is_meta", "is_nested", "is_vulkan"),
        *("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "is_shared"),
        *("is_pinned", "is_distributed", "storage_offset", "retains_grad"),
        *("dense_dim", "sparse_dim", "volatile"),
    )
)
_OF_LAYOUT = ("stride", "is_contiguous", "dim_order")
_OF_TYPE = ("is_floating_point", "is_complex", "is_signed")
# Attributes that follow from the device, of which elements have the type alone.
_IS_ON_DEVICE = frozenset(
    f"is_{device}" for device in ("cpu", "cuda", "mps", "xpu", "xla", "mtia", "maia", "ipu", "hpu")
)


# Values that a guard compares as they are.
_PLAIN = (bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)


class ByValues(Exception):
    """The Python code branches on pixel values, which a graph cannot represent."""


def _decided(take: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda symbol: symbol.tracer.decide(symbol, take)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda symbol, *args: symbol.tracer.call(function, symbol, *args)


def _own(value: Any) -> Any:
    return value


class Symbol(Value):
    """A proxy that knows its value on the example."""

    tracer: Carrier

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # libraries probe objects for such attributes
            raise AttributeError(name)
        if name in _IS_ON_DEVICE:
            return self.device.type == name.removeprefix("is_")
        if name in _FACTS and isinstance(value := self.tracer.value(self), Tensor):
            self.tracer.check_types_behind(self, name)
            return getattr(value, name)
        if not hasattr(Tensor, name) or is_argument(self.node):
            getattr(self.tracer.value(self), name)  # raises the error that `hasattr` asks for
        return _Lookup(self, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer for facts of a tensor at once; record all other functions."""
        if getattr(function, "__name__", "") in _FACTS and len(args) == 1 and not kwargs:
            args[0].tracer.check_types_behind(args[0], function.__name__)
            return function(args[0].tracer.value(args[0]))
        return super().__torch_function__(function, types, args, kwargs)

    @property
    def type(self) -> Any:
        """The method `type` of a tensor; the attribute of anything else, such as a device."""
        return self._type_of if isinstance(self.tracer.value(self), Tensor) else _Lookup(self, "type")

    def _type_of(self, dtype: Any = None, **options: Any) -> Any:
        """Return the name of the type, or convert to a type given by name, class or dtype."""
        given = () if dtype is None else (_dtype_of(dtype),)
        return self.tracer.create_proxy("call_method", "type", (self, *given), options)

    def __setitem__(self, index: Any, part: Any) -> None:
        """Rebind this symbol to the value after the assignment."""
        self.tracer.write_part(self, index, part)

    # What Python needs as a plain number becomes a guard, what it computes becomes a node.
    __len__, __int__, __float__ = _decided(len), _decided(int), _decided(float)
    __index__ = _decided(operator.index)
    __round__, __trunc__ = _recorded(round), _recorded(int)
    __floor__, __ceil__ = _recorded(math.floor), _recorded(math.ceil)

    def __format__(self, how: str) -> str:
        return format(self.tracer.decide(self, _own), how)

    def __str__(self) -> str:
        return str(self.tracer.decide(self, _own))

    def __repr__(self) -> str:
        """Return the text of a number; of a tensor, which is in errors alone, that of its node."""
        is_plain = isinstance(self.tracer.value(self), _PLAIN)
        return repr(self.tracer.decide(self, _own)) if is_plain else super().__repr__()

    def __eq__(self, other: Any) -> Any:
        """Compare; the name of a type is a text at once."""
        return str(self) == other if _names_type(self.node) else super().__eq__(other)

    def __ne__(self, other: Any) -> Any:
        return not self == other if _names_type(self.node) else super().__ne__(other)

    def __contains__(self, part: Any) -> bool:
        """True if a text contains another, or one of several parts equals a value."""
        if isinstance(self.tracer.value(self), str):
            return part in self.tracer.decide(self, _own)
        return any(part is one or part == one for one in self)

    def __hash__(self) -> int:
        """Return the hash of a number, which may be a key; tensors are keys as objects."""
        value = self.tracer.value(self)
        return hash(self.node if isinstance(value, Tensor) else self.tracer.decide(self, _own))

    def __array__(self, *args: Any, **kwargs: Any) -> numpy.ndarray:
        """Return a number as numpy has it, e.g. for `numpy.ceil(height / 2)`."""
        self.tracer.value(self)  # and so those of all that it is computed from
        if self.tracer.is_of_image(self.node):
            raise UsesNumpy(f"it computes with numpy arrays at {user_line()}")
        return numpy.asarray(self.tracer.decide(self, _own), *args, **kwargs)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


class _Lookup(fx.proxy.Attribute, Symbol):
    """An attribute of a symbol; its node is created only when its value is needed, since it may be a method."""


class _OnExample(Interpreter):
    """Runs a graph without the hooks that are operations of the graph themselves, on the tensors that the network held
    at first: its code may have set an attribute to what it computed from it.

    Args:
        model: the network.
        graph: its graph.
        attributes: names of tensors that are attributes, and no parameters or buffers.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, attributes: Mapping[Any, str]) -> None:
        super().__init__(model, graph=graph)
        self.attributes = {name: value for value, name in attributes.items()}

    def fetch_attr(self, target: str) -> Any:
        """Return a parameter, buffer or attribute."""
        path, _, name = target.rpartition(".")
        owner = child(self.module, path)
        held = {**owner._parameters, **owner._buffers} if owner is not None else {}
        if name in held:
            return held[name]
        return self.attributes[target] if target in self.attributes else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module" or HOOKS not in n.meta:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return prepare_weights(self.fetch_attr(str(n.target))).forward(*args, **kwargs)


class Carrier(Tracer):
    """Traces a network on an example."""

    _inputs: Inputs

    def __init__(self, *options: Any, needs_gradients: bool = False, **named: Any) -> None:
        """Take the options of `Tracer`, with inputs of which all is known, and the answer to whether tensors need
        gradients."""
        super().__init__(*options, **named)
        self._needs_gradients, self._foreign = needs_gradients, False
        self.asks_for_gradients = ""  # the line of the network's code that asks
        self.asks_for_layout = ""  # the same, for the order of a tensor's numbers in memory
        self.values: dict[fx.Node, Any] = {}
        self._run_so_far = 0
        self._is_running = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a symbol for a node."""
        return Symbol(node, self)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Record a function call as a node."""
        return self.create_proxy("call_function", function, args, kwargs)

    def is_array(self, node: fx.Node) -> bool:
        """True if a node is a numpy array of values that depend on the image, and not on its size alone."""
        if not super().is_array(node):
            return False
        with contextlib.suppress(Exception):  # what comes behind the array may not run
            self._run()
        return self.is_of_image(node)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a module call as torch does; modules created in forward, e.g. by `layers[:4](x)`, are traced into."""
        if self._is_running or m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        self._foreign |= is_hooked(m)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return parameters and buffers as nodes, except while operations run on the example."""
        return attr_val if self._is_running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def may_know_values(self) -> bool:
        """True if values of the example may be constants of the graph: it has tensors that are none of the network's,
        or hooks ran on the example."""
        return self._foreign or any(map(is_constant, self.graph.nodes))

    def is_tracing(self) -> bool:
        """True if the code that runs is traced, and not an operation that runs on the example."""
        return not self._is_running and super().is_tracing()

    # -- values ------------------------------------------------------------------------------------

    def value(self, symbol: fx.Proxy) -> Any:
        """Return the value of a symbol on the example."""
        node = symbol.node
        if node not in self.values:
            self._run()
        return self.values[node]

    def _run(self) -> None:
        """Run the new nodes in order, so that in-place operations take effect."""
        interpreter = _OnExample(self.root, self.graph, self.tensor_attrs)
        interpreter.env = self.values
        self._is_running = True
        try:
            with torch.no_grad(), AnyLayout():
                for node in list(self.graph.nodes)[self._run_so_far :]:
                    if node.op == "placeholder":
                        value = self._inputs.values.get(str(node.target))
                        self.values[node] = tree_map_only(Tensor, Tensor.clone, value)
                    else:
                        self.values[node] = interpreter.run_node(node)
                    self._run_so_far += 1
        finally:
            self._is_running = False

    def decide(self, symbol: fx.Proxy, take: Callable[[Any], Any]) -> Any:
        """Return the number or truth value that Python needs, and add a guard that checks it in every later call."""
        node = symbol.node
        if node.target is operator.eq and len({_as_key(part) for part in node.args}) == 1:
            return True  # the same size, as the key of a dictionary
        value = self.value(symbol)
        if self.is_done:
            return take(value)
        if _names_type(node):
            source: Any = node.args[0]
            self.decide(self.proxy(source).dtype, _own)
            return take(value)
        if node.target is getattr and node.args[1] == "requires_grad":
            self.asks_for_gradients = user_line()
            return self._needs_gradients
        if any(name_of(part.target) in _OF_LAYOUT for part in upwards(node, _of_asked)):
            self.asks_for_layout = user_line()
        outcome = take(value)
        if take is len and isinstance(value, (tuple, list, dict)) and not self._varies(node):
            return outcome
        if take is not len and self.is_of_image(node):
            raise ByValues(f"it decides by values of the image at {user_line()}")
        checked: Any = node
        if take is len:
            checked = self.create_node("call_function", len, (node,), {})
        if not _is_of_rank(node):
            operands = compared(node)
            before = tuple(self.values[part] if isinstance(part, fx.Node) else part for part in operands)
            before = tuple(tuple(part) if isinstance(part, torch.Size) else part for part in before)
            plain = all(isinstance(part, (int, float, tuple)) for part in before)
            shown = (operands, before) if plain else ((), ())
            self.create_node("call_function", check_branch, (checked, outcome, user_line(), *shown), {})
        return outcome

    def check_types_behind(self, symbol: fx.Proxy, fact: str) -> None:
        """Add guards on the arguments that a tensor is computed from, where their type decides about a fact of it."""
        if fact not in _OF_TYPE or self.is_done:
            return
        self.value(symbol)  # and so those of all that it is computed from
        for node in upwards(symbol.node):
            if is_argument(node) and isinstance(value := self.values[node], Tensor):
                asked = self.create_node("call_method", fact, (node,), {})
                outcome = getattr(value, fact)()
                self.create_node("call_function", check_branch, (asked, outcome, user_line()), {})

    def outputs(self) -> list[Tensor]:
        """Return the tensors that the traced graph gives on the example."""
        self._run()
        return tensors_of(next(self.values[node] for node in self.graph.nodes if node.op == "output"))

    def _varies(self, node: fx.Node) -> bool:
        """True if a value may have another number of parts in another call: a tensor that is cut into pieces of a size,
        along an axis whose length no weight fixes, or a slice of these."""
        while node.target is operator.getitem and isinstance(self.values[node], (tuple, list)):
            node = node.args[0]  # type: ignore[assignment]
        is_cut = is_kind(node.target, "splits") or name_of(node.target) == "unbind"
        return is_cut and not cuts_channels(node, self.root)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return the truth value of a symbol."""
        return bool(self.decide(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over the parts of a symbol as symbols; their number is that of the example."""
        value = self.value(obj)
        if isinstance(value, dict):
            return iter(value)
        return iter([obj[index] for index in range(len(obj))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        """Return the keys of a symbol that is a dictionary."""
        return list(self.value(obj).keys())

    def is_of_image(self, node: fx.Node) -> bool:
        """True if a value depends on pixel values, and not only on sizes and weights."""
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
                pending.extend(part for part in upwards(source, _giving_size) if _selects(part))
            elif is_argument(node):
                if tensors_of(self.values.get(node)):
                    return True
            else:
                pending.extend(node.all_input_nodes)
        return False


def _is_of_rank(node: fx.Node) -> bool:
    """True if a value depends only on numbers of dimensions, which no image changes, or on memory layouts, which change
    no result: tracing compares the results of two, see `asks_for_layout`."""
    asked = upwards(node, lambda one: [] if asks(one) else one.all_input_nodes)
    return follows_from(node, asks) and all(asks(one, of_rank=True) for one in asked if asks(one))


def is_argument(node: fx.Node) -> bool:
    """True if a node is an argument of the call, or a part of one."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "placeholder"


def _of_asked(node: fx.Node) -> list[fx.Node]:
    """Return the values that a number is computed from; none of what is asked of a tensor."""
    return [] if asks(node) else node.all_input_nodes


def _as_key(part: Any) -> Any:
    """Return what is equal for two nodes that compute the same from sizes; the node itself for any other."""
    if isinstance(part, (tuple, list)):
        return tuple(map(_as_key, part))
    if isinstance(part, slice):
        return ("slice", _as_key((part.start, part.stop, part.step)))
    if not isinstance(part, fx.Node) or not _gives_number(part):
        return part
    return (part.target, _as_key(part.args), _as_key(tuple(part.kwargs.items())))


def _selects(node: fx.Node) -> bool:
    """True if the size of a node's result depends on values."""
    name = name_of(node.target)
    if name in _SELECTIONS or (name == "where" and len(node.args) == 1):
        return True
    if node.target is not operator.getitem or len(node.args) < 2:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(part, fx.Node) and not _gives_number(part) for part in index)


def _giving_size(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node that its size may depend on: what is assigned to a part of a tensor is none."""
    if node.target is not assign:
        return node.all_input_nodes
    return [part for part in node.args[:1] if isinstance(part, fx.Node)]


def _names_type(node: fx.Node) -> bool:
    """True if a node is the name of a tensor's type: `x.type()`, where `x.type(dtype)` converts."""
    return node.op == "call_method" and node.target == "type" and len(node.args) == 1 and not node.kwargs


def _gives_number(node: fx.Node) -> bool:
    """True if a node is computed from sizes only."""
    return follows_from(node, asks)


# -- Python's built-in functions with symbols ----------------------------------------------------------


def _is_instance(value: Any, kinds: Any) -> bool:
    """Replacement of `isinstance` that tests the example's value of a symbol."""
    return isinstance(value.tracer.value(value) if issubclass(type(value), Symbol) else value, kinds)


def _plain_function(value: Any) -> Callable[..., Any] | None:
    """Return the Python function of a torch.jit.ScriptFunction, or of a function that keeps its results, which would
    keep symbols; None for anything else."""
    if isinstance(value, functools._lru_cache_wrapper):
        return value.__wrapped__
    is_script = isinstance(value, torch.jit.ScriptFunction)
    return getattr(value, "_torchdynamo_inline", None) if is_script else None


def _symbol_among(*values: Any) -> Symbol | None:
    symbols: list[Symbol] = []

    def note(value: Any) -> Any:
        if issubclass(type(value), Symbol):
            symbols.append(value)
        return value

    map_aggregate(values, note)
    return symbols[0] if symbols else None


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that a call with a symbol is recorded as a node."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        symbol = _symbol_among(args, kwargs)
        if symbol is None:
            return function(*args, **kwargs)
        return symbol.tracer.call(function, *args, **kwargs)

    return call


def _checking(check: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of torch that asserts a condition on sizes: that of a symbol is a branch."""

    @functools.wraps(check)
    def call(condition: Any, message: Any = None) -> Any:
        return check(bool(condition) if _symbol_among(condition) is not None else condition, message)

    return call


def _dtype_of(kind: Any) -> Any:
    """Return the dtype of a legacy type, such as `torch.FloatTensor` or its name; anything else as it is."""
    if isinstance(kind, str):
        kind = operator.attrgetter(kind.removeprefix("torch."))(torch)
    return kind.dtype if isinstance(kind, type(torch.FloatTensor)) else kind


def _recording_method(name: str) -> Callable[..., Any]:
    """Wrap a method of tensors so that a call with a symbol as argument is recorded as a node."""
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        symbol = _symbol_among(args, kwargs)
        if symbol is None:
            return method(tensor, *args, **kwargs)
        return symbol.tracer.create_proxy("call_method", name, (tensor, *args), kwargs)

    return call


class _Indexing(TorchFunctionMode):
    """Records `tensor[index]` with a symbol in the index. The method itself is never replaced: with it, Python would
    take tensors for sequences from then on, and `torch.tensor([loss])` would fail in the user's process."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        symbol = _symbol_among(args[1:], {}) if function is Tensor.__getitem__ else None
        if symbol is None:
            return function(*args, **(kwargs or {}))
        return symbol.tracer.create_proxy("call_method", "__getitem__", args, {})


class _NumberType(type):
    """Metaclass of replacements of `int`, `float` and `type`: equal to these for isinstance, called with a symbol they
    return `of(symbol)`."""

    number: type
    of: Callable[[Symbol], Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and issubclass(type(args[0]), fx.Proxy) and not args[1:]:
            return cls.of(args[0])
        return cls.number(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.number)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.number)

    def __eq__(cls, other: object) -> bool:
        return other is cls.number or cls is other

    def __hash__(cls) -> int:
        return hash(cls.number)


class _SizeType(_NumberType):
    """Metaclass of the replacement of `torch.Size`, which would ask symbols for their numbers."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        symbol = _symbol_among(args)
        if symbol is None:
            return cls.number(*args, **kwargs)
        return args[0] if args[0] is symbol else tuple(args[0])


class _LegacyType(_NumberType):
    """Metaclass of replacements of `torch.Tensor`, `torch.FloatTensor` and the like in the network's own code."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        symbol = _symbol_among(args)
        if symbol is None or isinstance(symbol.tracer.value(symbol), Tensor):
            return cls.number(*args, **kwargs)
        sizes = args[0] if len(args) == 1 and _is_instance(args[0], (tuple, list)) else args
        kind: Any = cls.number
        if kind is not torch.Tensor:  # which has the default type of the call
            kwargs["dtype"] = kind.dtype
        return torch.empty(sizes, **kwargs)  # which records itself, see `symbols_in_python`

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.number, name)


class _TorchOfNetwork(ModuleType):
    """Stands for the module torch in the network's own code: its legacy classes take sizes that are symbols."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        is_legacy = value is torch.Tensor or isinstance(value, type(torch.FloatTensor))
        if not is_legacy:
            return value
        made = _LegacyType(f"_{name}", (), {"number": value})
        setattr(self, name, made)
        return made


_PYTHON = {*sys.stdlib_module_names, "builtins", "torch", "numpy", "cadsurgery"}


def is_of_python(name: str) -> bool:
    """True if a Python module is one of Python, torch, numpy or this package, whose code is not the network's."""
    return name != "__main__" and name.partition(".")[0] in _PYTHON


def name_spaces(model: nn.Module) -> list[dict[str, Any]]:
    """Return the namespaces of the Python modules that define a network's classes, and of those they import from."""
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
            # A decorator's wrapper has the globals of the decorator.
            other = getattr(inspect.unwrap(function), "__globals__", space)  # built-in functions have none
            if id(other) not in spaces and not is_of_python(str(other.get("__name__"))):
                spaces[id(other)] = other
                waiting.append(other)
    return list(spaces.values())


@contextmanager
def symbols_in_python(model: nn.Module, with_legacy: bool = False) -> Iterator[None]:
    """Patch Python for tracing on an example: torch's factories and the built-ins isinstance, type, int, float, max and
    min accept symbols in the Python modules of the network and in modules that they import functions from.

    Args:
        model: the network.
        with_legacy: let legacy classes of tensors take sizes that are symbols, `torch.Tensor(n, 1, h, w)`; the class is
            another one in the network's code then, which `type(x) is torch.Tensor` would notice.
    """
    numbers: dict[type, Any] = {
        int: _NumberType("_Int", (), {"number": int, "of": _recorded(int)}),
        float: _NumberType("_Float", (), {"number": float, "of": _recorded(float)}),
    }

    def type_of(symbol: Symbol) -> Any:
        kind = type(symbol.tracer.value(symbol))
        return numbers.get(kind, kind)  # the class that the name stands for meanwhile

    def is_callable(value: Any) -> bool:
        return callable(value.tracer.value(value) if issubclass(type(value), Symbol) else value)

    shadows = {
        "isinstance": _is_instance,
        "callable": is_callable,
        "type": _NumberType("_Type", (), {"number": type, "of": type_of}),
        "int": numbers[int],
        "float": numbers[float],
        "max": _recording(max),
        "min": _recording(min),
    }
    spaces = name_spaces(model)
    with ExitStack() as stack:
        is_tensor = functools.partial(_is_instance, kinds=Tensor)
        factories: Any = {name: _recording(getattr(torch, name)) for name in _FACTORIES}
        size = _SizeType("_Size", (), {"number": torch.Size})
        stack.enter_context(mock.patch.multiple(torch, is_tensor=is_tensor, Size=size, **factories))
        stack.enter_context(mock.patch.object(torch.jit, "isinstance", _is_instance))
        for name in ("_check", "_check_index", "_check_value", "_check_type", "_check_is_size"):
            if hasattr(torch, name):
                stack.enter_context(mock.patch.object(torch, name, _checking(getattr(torch, name))))
        of_network = _TorchOfNetwork("torch")
        for name in _TAKE_NUMBERS:
            stack.enter_context(mock.patch.object(Tensor, name, _recording_method(name)))
        stack.enter_context(_Indexing())
        for space in spaces:
            free = {name: value for name, value in shadows.items() if name not in space}
            free |= {name: plain for name, value in space.items() if (plain := _plain_function(value))}
            if with_legacy:
                free |= {name: of_network for name, value in space.items() if value is torch}
            stack.enter_context(_replaced(space, free))
        for kind in {kind for module in model.modules() for kind in type(module).__mro__}:
            for name, value in list(vars(kind).items()):
                if (plain := _plain_function(value)) is not None:
                    stack.enter_context(mock.patch.object(kind, name, plain))
        yield


@contextmanager
def asking_types(model: nn.Module) -> Iterator[None]:
    """Patch Python for tracing without an example: who asks for the type of a proxy raises `NeedsValue`, see
    `tracer.Unknown`, since it would be told that of the proxy."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def call(value: Any, *kinds: Any) -> Any:
            if issubclass(type(value), Unknown):
                value.refuse()
            return function(value, *kinds)

        return call

    def of(value: Any) -> Any:
        return value.refuse() if issubclass(type(value), Unknown) else type(value)

    kind = _NumberType("_Type", (), {"number": type, "of": of})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "is_tensor", refusing(torch.is_tensor)))
        stack.enter_context(mock.patch.object(torch.jit, "isinstance", refusing(torch.jit.isinstance)))
        for space in name_spaces(model):
            shadows = {"isinstance": refusing(isinstance), "type": kind}
            free = {name: value for name, value in shadows.items() if name not in space}
            stack.enter_context(_replaced(space, free))
        yield


@contextmanager
def _replaced(space: dict[str, Any], values: Mapping[str, Any]) -> Iterator[None]:
    """Replace entries of a module's namespace for a while. All others stay in place, those that the network's own code
    writes in the meantime, too: other threads may run that code."""
    before = {name: space[name] for name in values if name in space}
    space.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del space[name]
        space.update(before)
