"""Values that a network's forward reads beside its arguments: plain attributes of modules and classes, global values.

    gain = 2.0                       # a global value

    class Block(nn.Module):
        slope = 0.1                  # an attribute of the class
        def __init__(self): self.mode = "sum"
        def forward(self, x):
            return F.leaky_relu(x, self.slope) * gain if self.mode == "sum" else x

A graph has such values as constants. Those that the code loads are noted with the network, and compared before a call:
where one is another value now, the network is read anew. Tensors, parameters and modules are no constants of a graph.
What the code loads is read from its instructions: `self.n` loads an attribute `n`, and no global value of that name.
The code is that of the classes, of what their objects hold (functions, partial functions, methods of other objects, by
themselves or in containers) and of all functions that it names.
"""

from __future__ import annotations

import dis
import math
import os
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, cached_property, partial, partialmethod
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from cadsurgery.following.example_tracer import is_of_python
from cadsurgery.following.hooks import child

_GONE = "nothing"  # stands for an attribute that is not there
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum)
_PLAIN_TYPES = frozenset(kind for kind in _PLAIN if kind is not Enum)
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_CALLED = (FunctionType, BuiltinFunctionType, MethodType, type)
_OPAQUE = "something"  # stands for what is not compared: tensors, modules, objects of other libraries
# Methods that no forward calls.
_NOT_CALLED = frozenset(
    ("__init__", "__repr__", "__deepcopy__", "__getstate__", "__setstate__", "extra_repr")
)
_BY_NAME = frozenset(("getattr", "hasattr", "vars", "__dict__"))  # who calls these may read any attribute
_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that every module has
_DEEPEST = 4  # containers in containers, and objects in objects, that are looked into
_ENVIRONMENT = ("os.environ",)  # stands for the variables of the environment
# Methods of objects that code calls without their name.
_UNNAMED = frozenset(
    ("__call__", "__getattr__", "__getitem__", "__bool__", "__len__", "__iter__", "__contains__", "__eq__")
)
_MADE = frozenset(("__init__", "__new__", "__post_init__"))  # what runs where a class is called
_HOLDING = (type, dict, list, tuple, set, frozenset, deque)  # what is no function and holds functions
_INSTALLED = frozenset(("site-packages", "dist-packages"))  # folders of libraries
_MOST = 256  # items of a container; a longer one is a table or a cache and is not looked into


class Enclosed:
    """The variables that a function takes from the functions around it. A copy is of the same function; a process that
    gets one has none."""

    def __init__(self, function: FunctionType | None) -> None:
        """Take the function."""
        self.function = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Enclosed) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __deepcopy__(self, memo: dict[int, Any]) -> Enclosed:
        return self

    def __reduce__(self) -> Any:
        return Enclosed, (None,)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a variable's value; the default if it has none."""
        function = self.function
        names = function.__code__.co_freevars if function is not None else ()
        cells = (function.__closure__ or ()) if function is not None else ()
        return next(
            (_content(cell) for each, cell in zip(names, cells, strict=True) if each == name), default
        )

    def __contains__(self, name: object) -> bool:
        return self.function is not None and name in self.function.__code__.co_freevars


class Place(NamedTuple):
    """Where a value is: the path of a module, a class, the name of a Python module or a function that encloses it, and
    a name there."""

    holder: str | type | tuple[str] | Enclosed
    name: str

    def __str__(self) -> str:
        holder = self.holder
        if isinstance(holder, tuple):
            holder = holder[0]
        elif isinstance(holder, Enclosed):
            holder = getattr(holder.function, "__qualname__", "")
        elif isinstance(holder, type):
            holder = holder.__name__
        return f"{holder}.{self.name}" if holder else self.name


@dataclass(frozen=True)
class Outside:
    """The values that a network's code reads, when it was traced.

    Attributes:
        values: a copy of each value by its place, see `_copied`.
        names: names in the network's code; attributes of objects of other names are not read. Names of variables that
            functions enclose are in angle brackets.
        with_tensors: true if the graph has constants that may have been computed from tensors among the attributes.
    """

    values: Mapping[Place, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    with_tensors: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        whole: Collection[str] = (),
        written: Collection[tuple[int, Any]] = (),
        with_tensors: bool = False,
    ) -> Outside:
        """Note the values that the code of a network reads.

        Args:
            model: the network.
            whole: paths of modules that the graph calls; they read their attributes themselves.
            written: attributes and containers that calls change, see `State.written`; they are no settings.
            with_tensors: compare small tensors that are plain attributes, too.
        """
        code = _Code.of(model)
        values: dict[Place, Any] = {}
        containers = {holder for holder, _ in written}
        for path, module in model.named_modules():
            if not _is_inside(path, whole):
                for name in code.attributes_of(module, with_tensors):
                    if (id(vars(module)), name) not in written:
                        values[Place(path, name)] = vars(module).get(name, _GONE)
        for kind in code.kinds:
            values |= {Place(kind, name): value for name, value in vars(kind).items() if name in code.names}
        values |= {
            place: value
            for place, (owner, value) in code.loaded.items()
            if (owner, place.name) not in written
        }
        read = {place: value for place, value in values.items() if id(value) not in containers}
        enclosed = {f"<{place.name}>" for place in read if isinstance(place.holder, Enclosed)}
        kept = {f"<{place.name}>" for place in values if place not in read}
        names = code.names | (enclosed - kept)
        copies = dict[tuple[int, int], Any]()
        known = {place: _copied(value, names, with_tensors, copies) for place, value in read.items()}
        return cls({place: value for place, value in known.items() if value != _OPAQUE}, names, with_tensors)

    def has(self, name: str) -> bool:
        """True if an attribute of the network itself is among the values."""
        return Place("", name) in self.values


def _is_inside(path: str, others: Collection[str]) -> bool:
    """True if a module is one of the others, or part of one."""
    parts = path.split(".")
    return any(".".join(parts[:count]) in others for count in range(1, len(parts) + 1))


class Changed(Exception):
    """A value is another one than when the network was traced."""


class OutsideWatch:
    """Compares the values that a network's code reads with those at the conversion. That takes 10 microseconds to 2
    milliseconds, by how many values and functions the code names."""

    def __init__(self, net: nn.Module, outside: Outside) -> None:
        """Take the network whose modules are looked at."""
        self._net, self._outside = net, outside

    @cached_property
    def _holders(self) -> list[tuple[Place, Any]]:
        """The namespace of each place. An inference copy has other modules, and of the attributes of the original none
        or a few; what it does not have is left out."""
        found = ((place, _space_of(place.holder, self._net)) for place in self._outside.values)
        known = [(place, space) for place, space in found if space is not None]
        is_whole = isinstance(_original_of(self._net), nn.Module)
        return (
            known
            if is_whole
            else [
                (place, space)
                for place, space in known
                if place.name in space or place.holder == _ENVIRONMENT
            ]
        )

    def _now(self) -> list[Any]:
        names, with_tensors, copies = (
            self._outside.names,
            self._outside.with_tensors,
            dict[tuple[int, int], Any](),
        )
        return [
            value if type(value) in _PLAIN else _copied(value, names, with_tensors, copies)
            for value in [space.get(place.name, _GONE) for place, space in self._holders]
        ]

    @cached_property
    def _before(self) -> list[Any]:
        return [self._outside.values[place] for place, _ in self._holders]

    def __call__(self) -> None:
        """Compare all values.

        Raises:
            Changed: one is another; the message says which.
        """
        now = self._now()
        if now == self._before and list(map(type, now)) == list(map(type, self._before)):
            return
        for (place, _), value, before in zip(self._holders, now, self._before, strict=True):
            if value != before or type(value) is not type(before):
                raise Changed(f"{place} is {_in_words(value)} and was {_in_words(before)}")

    def state(self) -> str:
        """Return a text that is the same for the same values."""
        return repr(self._now())


def _in_words(value: Any) -> str:
    return value if value is _GONE else f"{value!r:.60}"


def _original_of(net: Any) -> Any:
    """Return the network that a converted one was made from, or what an inference copy keeps of it."""
    while "_original" in vars(net):
        net = vars(net)["_original"][0]
    return net


def _space_of(holder: str | type | tuple[str] | Enclosed, net: nn.Module) -> Any:
    if isinstance(holder, Enclosed):
        return holder if holder.function is not None else None
    if isinstance(holder, type):
        return vars(holder)
    if holder == _ENVIRONMENT:
        return os.environ
    if isinstance(holder, tuple):
        module = sys.modules.get(holder[0])
        return vars(module) if module is not None else None
    if not holder:  # a converted network has those of the original beside its own, an inference copy none
        original = _original_of(net)
        return vars(original) if isinstance(original, nn.Module) else None
    part = child(net, holder)
    return vars(part) if part is not None else None


def _copied(
    value: Any,
    names: Collection[str],
    with_tensors: bool,
    copies: dict[tuple[int, int], Any],
    depth: int = 0,
) -> Any:
    """Return what of a value is compared: plain values as they are, functions by name and what they enclose, arrays by
    their numbers, containers and objects of the network's own code as tuples of their parts; `_OPAQUE` for any other.

    Args:
        value: the value.
        names: attributes of objects that are compared, and in angle brackets variables that functions enclose.
        with_tensors: compare small tensors by their numbers, too.
        copies: results by object and depth, for objects that many modules hold.
        depth: number of containers and objects around it.
    """
    if isinstance(value, (*_PLAIN, *_PLAIN_OF_TORCH)):
        return value
    if isinstance(value, _CALLED) and (depth == _DEEPEST or not _brings(value)):
        return _named(value)
    if isinstance(value, numpy.ndarray) or (with_tensors and isinstance(value, Tensor)):
        is_small = math.prod(value.shape) <= _MOST
        return (str(value.dtype), tuple(value.shape), repr(value.tolist())) if is_small else _OPAQUE
    if isinstance(value, (Tensor, nn.Module, ModuleType)) or depth == _DEEPEST:
        return _OPAQUE
    key = id(value), depth  # deeper ones are looked into less
    if key not in copies:
        copy = partial(_copied, names=names, with_tensors=with_tensors, copies=copies, depth=depth + 1)
        copies[key] = _parts_of(value, names, copy)
    return copies[key]


def _brings(value: Any) -> bool:
    """True if a function computes with values of its own: defaults, enclosed variables, or the object of a method."""
    if isinstance(value, MethodType):
        return not isinstance(value.__self__, (type, nn.Module))
    return isinstance(value, FunctionType) and bool(
        value.__defaults__ or value.__kwdefaults__ or value.__closure__
    )


def _parts_of(value: Any, names: Collection[str], copy: Callable[[Any], Any]) -> Any:
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        enclosed = tuple(_content(cell) for name, cell in cells if f"<{name}>" in names)
        brought = (enclosed, value.__defaults__ or (), tuple((value.__kwdefaults__ or {}).values()))
        return _named(value), *(
            part if _PLAIN_TYPES.issuperset(map(type, part)) else copy(part) for part in brought
        )
    if isinstance(value, MethodType):
        return _named(value), copy(value.__self__)
    kind = _named(type(value))
    if isinstance(value, partial):
        return kind, *map(copy, (value.func, value.args, value.keywords))
    if isinstance(value, (list, tuple, set, frozenset, deque)) and len(value) <= _MOST:
        return kind, *map(copy, sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)
    if isinstance(value, dict) and len(value) <= _MOST:
        return kind, *((str(key), copy(part)) for key, part in dict.items(value))
    attributes = None if _is_of_library(type(value)) else _attributes_of(value)
    if attributes is None:
        return _OPAQUE
    return kind, *((name, copy(part)) for name, part in attributes.items() if name in names)


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """Return what an object holds as attributes or in slots; None if it has neither."""
    slots = [slot for kind in type(value).__mro__ for slot in vars(kind).values()]
    slots = [slot for slot in slots if isinstance(slot, MemberDescriptorType)]
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict:
        return {slot.__name__: _in_slot(slot, value) for slot in slots} if slots else None
    return attributes | {slot.__name__: _in_slot(slot, value) for slot in slots} if slots else attributes


def _in_slot(slot: MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # it is empty
        return _GONE


def _named(value: Any) -> str:
    """Return the name of a class or function, with the place of its code: the same in every process."""
    code = getattr(value, "__code__", None)
    place = ""
    if isinstance(code, CodeType):
        place = _place_of(code) if code.co_name == "<lambda>" else f":{code.co_firstlineno}"
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}{place}"


@cache
def _place_of(code: CodeType) -> str:
    """Return where code begins and ends: several functions may be in one line."""
    ends = [(line or 0, column or 0) for _, line, _, column in code.co_positions()]
    return ":".join(map(str, (code.co_firstlineno, *max(ends, default=()))))


def _is_of_library(kind: type) -> bool:
    """True if a class is torch's or Python's own, and no namespace for settings."""
    return is_of_python(kind.__module__) and kind not in (SimpleNamespace, Namespace)


# -- what the code of a network loads ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loads:
    """What the instructions of a piece of code load.

    Attributes:
        paths: names of global values, each with the attributes that are read from it at once: `config.size.height`.
        enclosed: variables of the functions around it.
        attributes: attributes of any object.
        texts: texts that may be names of attributes.
        written: global values and variables of other functions that the code itself sets: they are no settings.
        imports: modules that it imports, each with the number of dots before its name.
    """

    paths: frozenset[tuple[str, ...]]
    enclosed: frozenset[str]
    attributes: frozenset[str]
    texts: frozenset[str]
    written: frozenset[str]
    imports: frozenset[tuple[int, str]]

    @cached_property
    def globals(self) -> frozenset[str]:
        """Names of global values."""
        return frozenset(path[0] for path in self.paths)

    @cached_property
    def named(self) -> frozenset[str]:
        """Names that the code may read from an object."""
        return self.attributes | self.texts


@cache
def _loads_of(code: CodeType) -> _Loads:
    """Read the instructions of a piece of code, without the functions in it."""
    paths = list[tuple[str, ...]]()
    enclosed, attributes, written = set[str](), set[str](), set[str]()
    imports = set[tuple[int, str]]()
    is_path = False  # the last instruction loaded a global value, or an attribute of one
    constants = deque[Any](maxlen=2)
    for one in dis.get_instructions(code):
        kind, name = one.opname, one.argval
        if kind == "EXTENDED_ARG":
            continue
        if kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            attributes.add(name)
            if is_path:
                paths[-1] = (*paths[-1], name)
            continue
        if kind == "IMPORT_NAME":
            imports.add((constants[0], name))
        constants.append(name)
        is_path = kind in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
        if is_path:
            paths.append((name,))
        elif kind in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"):
            enclosed.add(name)
        elif kind in ("STORE_GLOBAL", "STORE_DEREF"):
            written.add(name)
    parts = [text.split(".") for text in code.co_consts if isinstance(text, str)]
    texts = frozenset(part for path in parts if all(map(str.isidentifier, path)) for part in path)
    if any(path[0] == "globals" for path in paths):
        paths += [(text,) for text in texts]
    return _Loads(
        frozenset(paths),
        frozenset(enclosed),
        frozenset(attributes),
        texts,
        frozenset(written),
        frozenset(imports),
    )


@dataclass(frozen=True)
class _Code:
    """The code that forwards of a network reach: methods of its classes, functions that these name, and methods of
    objects that they read.

    Attributes:
        kinds: the classes of modules.
        names: attributes that the code reads, and texts that may be names.
        by_name: classes whose code asks for attributes by name, so that it may read any, with the texts in it.
        loaded: values that the code loads from elsewhere, each with the identity of the namespace that holds it.
    """

    kinds: tuple[type, ...]
    names: frozenset[str]
    by_name: Mapping[type, frozenset[str]]
    loaded: Mapping[Place, tuple[int, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> _Code:
        """Read the code of a network's classes."""
        found = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
        held: dict[type, list[Any]] = {kind: [] for kind in found if not _is_of_library(kind)}
        for module in model.modules() if held else ():
            own = vars(module).items()
            values = held.get(type(module), next(iter(held.values())))
            values += [value for name, value in own if name not in _OF_MODULES]
        reading = _Reading()
        count = -1
        while count < len(reading.seen):  # each name may be that of a method of what was met before
            count = len(reading.seen)
            for kind, values in held.items():
                values += reading.read(kind, (*reading.called(kind), *values), _named_by)
        # Methods of which nobody tells whether they are called, such as those of a library's mixins.
        for kind in held:
            values = [
                value
                for name, value in vars(kind).items()
                if name not in _NOT_CALLED and not isinstance(value, _HOLDING) and not _own_kinds(value)
            ]
            while values := reading.read(kind, values, _functions_named_by):
                pass
        return cls(tuple(held), reading.names, reading.by_name, _loaded(reading.reached, reading.names))

    def attributes_of(self, module: nn.Module, with_tensors: bool) -> Iterator[str]:
        """Yield the attributes of a module that the code may read; also those of its class, or asked for by name, which
        it may get later."""
        kinds = type(module).__mro__
        of_class = {name for kind in kinds if kind in self.kinds for name in vars(kind)}
        of_library = _own_of_library(type(module))
        asking = [kind for kind in type(module).__mro__ if kind in self.by_name]
        asked = {text for kind in asking for text in self.by_name[kind]}
        for name in dict.fromkeys((*vars(module), *of_class, *asked)):
            is_own = name not in of_library and name not in _NOT_CALLED and not name.startswith("__")
            is_read = asking or name in self.names
            if is_own and is_read and (with_tensors or not isinstance(vars(module).get(name), Tensor)):
                yield name


class _Reading:
    """Reads functions of a network, each once.

    Attributes:
        seen: the functions that were read.
        reached: what they load, each with the function that it belongs to.
        names, by_name: see `_Code`.
    """

    def __init__(self) -> None:
        self.seen = set[FunctionType]()
        self.reached: list[tuple[FunctionType, _Loads]] = []
        self.names = frozenset[str]()
        self.by_name: dict[type, frozenset[str]] = {}

    def called(self, kind: type) -> list[Any]:
        """Return the methods of a class of modules that are called by the code that was read; all of them if it asks
        for attributes by name."""
        is_asked = any(issubclass(kind, other) or issubclass(other, kind) for other in self.by_name)
        return [
            value
            for name, value in vars(kind).items()
            if name not in _NOT_CALLED and (is_asked or name == "forward" or name in self.names | _UNNAMED)
        ]

    def read(
        self, kind: type, values: Iterable[Any], named_by: Callable[[FunctionType, _Loads], list[Any]]
    ) -> list[Any]:
        """Read the functions in some values that modules of a class call, and return what these name in their turn."""
        found = list[Any]()
        for function in list(_functions_in(values, self.names)):
            if function in self.seen or is_of_python(str(function.__globals__.get("__name__"))):
                continue
            self.seen.add(function)
            for loads in _loads_within(function.__code__):
                self.reached.append((function, loads))
                self.names |= loads.named
                found += named_by(function, loads)
                if _BY_NAME.intersection(loads.globals | loads.attributes):
                    self.by_name[kind] = self.by_name.get(kind, frozenset()) | loads.texts
        return found


def _own_of_library(kind: type) -> frozenset[str]:
    """Return the attributes that torch sets in modules of a class. Those of its own classes, such as a stride, are
    watched with the modules, see `hooks.Watch`."""
    of_torch = [vars(base) for base in kind.__mro__] if _is_of_library(kind) else []
    stated = [
        name
        for own in of_torch
        for part in ("__constants__", "__annotations__")
        for name in own.get(part, ())
    ]
    return _OF_MODULES.union(stated)


def _loaded(
    reached: Iterable[tuple[FunctionType, _Loads]], names: frozenset[str]
) -> dict[Place, tuple[int, Any]]:
    """Return the values that code loads from elsewhere: global values, attributes of Python modules and classes among
    them, variables of the functions around it, and variables of the environment."""
    found: dict[Place, tuple[int, Any]] = {}
    written = {(id(function.__globals__), name) for function, loads in reached for name in loads.written}
    cells = {
        id(cell)
        for function, loads in reached
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        if name in loads.written
    }
    for function, loads in reached:
        space = function.__globals__
        for path in loads.paths:
            if path[0] in space and (id(space), path[0]) not in written:
                found |= _along(space, path, names)
            if path[0] in space and _reads_environment(space[path[0]], path):
                found |= {Place(_ENVIRONMENT, text): (0, os.environ.get(text, _GONE)) for text in loads.texts}
        for module in _imported(function, loads):
            read = loads.attributes & vars(module).keys()
            found |= {
                Place((module.__name__,), name): (id(vars(module)), vars(module)[name]) for name in read
            }
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name in loads.enclosed and id(cell) not in cells:
                found[Place(Enclosed(function), name)] = (id(cell), _content(cell))
    return found


def _along(space: Mapping[str, Any], path: tuple[str, ...], names: frozenset[str]) -> dict[Place, Any]:
    """Return the values along a path from a namespace: the first, and what is read from modules and classes. Where one
    of these itself is used, any of the names may be read from it."""
    found: dict[Place, tuple[int, Any]] = {}
    holder: Any = (str(space.get("__name__")),)
    if holder[0] not in sys.modules or vars(sys.modules[holder[0]]) is not space:
        return found
    for index, name in enumerate(path):
        if name not in space:
            return found
        value = space[name]
        found[Place(holder, name)] = (id(space), value)
        if isinstance(value, ModuleType):
            if is_of_python(value.__name__):
                return found
            holder, space = (value.__name__,), vars(value)
        elif isinstance(value, type):
            if _is_of_library(value) or issubclass(value, (nn.Module, Tensor)):
                return found
            holder, space = value, vars(value)
        else:
            for kind in _own_kinds(value):
                found |= {
                    Place(kind, each): (id(vars(kind)), vars(kind)[each])
                    for each in names & vars(kind).keys()
                }
            return found
        if index == len(path) - 1:
            found |= {Place(holder, each): (id(space), space[each]) for each in names & space.keys()}
    return found


def _reads_environment(value: Any, path: tuple[str, ...]) -> bool:
    """True if a path leads to the variables of the environment."""
    reads = path[1:2] in (("environ",), ("getenv",)) if value is os else False
    return reads or value is os.environ or value is os.getenv


def _own_kinds(value: Any) -> list[type]:
    """Return the classes of an object of the network's own code, from its own to the most general; [] for modules,
    tensors and all others."""
    if isinstance(value, (*_PLAIN, *_CALLED, Tensor, nn.Module, ModuleType)):
        return []
    return [kind for kind in type(value).__mro__ if not _is_of_library(kind)]


def _loads_within(code: CodeType) -> Iterator[_Loads]:
    """Yield what a piece of code and the functions in it load."""
    codes = [code]
    while codes:
        code = codes.pop()
        yield _loads_of(code)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _named_by(function: FunctionType, loads: _Loads) -> list[Any]:
    """Return what a function's code names or encloses; of Python modules what it reads from them."""
    waiting: list[Any] = [function.__globals__.get(name) for name in loads.globals]
    waiting += [*map(_content, function.__closure__ or ()), *_imported(function, loads)]
    found, seen = list[Any](), set[str]()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, ModuleType):
            found.append(value)
        elif value.__name__ not in seen and _is_beside(value, function):
            seen.add(value.__name__)
            waiting += [vars(value)[name] for name in loads.named & vars(value).keys()]
    return found


def _functions_named_by(function: FunctionType, loads: _Loads) -> list[Any]:
    """Return the functions that a function's code names or encloses, and methods that it may call of objects."""
    values = [value for value in _named_by(function, loads) if not isinstance(value, _HOLDING)]
    return list(_functions_in(values, loads.named))


def _imported(function: FunctionType, loads: _Loads) -> Iterator[ModuleType]:
    """Yield the Python modules of the network's own code that a function imports itself."""
    package = str(function.__globals__.get("__package__") or "")
    for dots, name in loads.imports:
        parents = package.split(".")[: len(package.split(".")) + 1 - dots] if dots else []
        module = sys.modules.get(".".join((*parents, *([name] if name else []))))
        if module is not None and _is_beside(module, function):
            yield module


def _is_beside(module: ModuleType, function: FunctionType) -> bool:
    """True if a Python module is of the package of a function, or is not installed: a user's own file."""
    name, own = (str(each).partition(".")[0] for each in (module.__name__, function.__module__))
    return name == own or not (is_of_python(name) or _INSTALLED.intersection(_parts_of_file(module)))


def _parts_of_file(module: ModuleType) -> tuple[str, ...]:
    return Path(str(getattr(module, "__file__", None) or "")).parts


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _functions_in(values: Iterable[Any], names: frozenset[str]) -> Iterator[FunctionType]:
    """Yield the Python functions that code with these names may call with values: methods, properties, decorated and
    partial functions, also in containers, objects, classes and modules of the network's own code."""
    waiting: list[tuple[Any, int]] = [(value, 0) for value in values]
    seen = dict[int, Any]()
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Enum):
            value = value.value
        if id(value) in seen or depth > 2 * _DEEPEST or isinstance(value, (*_PLAIN, Tensor, nn.Module)):
            continue
        seen[id(value)] = value
        if isinstance(value, FunctionType):
            yield value
        waiting += [(part, depth + 1) for part in _parts_called(value, names)]


def _parts_called(value: Any, names: frozenset[str]) -> Iterator[Any]:
    """Yield the parts of a value among which functions may be."""
    if isinstance(value, property):
        yield value.fget
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, (partial, partialmethod)):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)) and len(value) <= _MOST:
        yield from value
    elif isinstance(value, dict) and len(value) <= _MOST:
        yield from dict.values(value)
    elif isinstance(value, ModuleType):
        if not is_of_python(value.__name__) and not _INSTALLED.intersection(_parts_of_file(value)):
            yield from (vars(value)[name] for name in names & vars(value).keys())
    elif isinstance(value, type):
        called = names | (_UNNAMED if issubclass(value, nn.Module) else _UNNAMED | _MADE)
        for kind in value.__mro__ if not _is_of_library(value) else ():
            if not _is_of_library(kind):
                yield from (vars(kind)[name] for name in called & vars(kind).keys())
    else:
        for kind in _own_kinds(value):
            yield from (vars(kind)[name] for name in (names | _UNNAMED) & vars(kind).keys() - _NOT_CALLED)
        attributes = (_attributes_of(value) if not _is_of_library(type(value)) else None) or {}
        yield from (attributes[name] for name in names & attributes.keys())
    wrapped = (
        getattr(value, "__wrapped__", None) if isinstance(value, FunctionType) or callable(value) else None
    )
    if isinstance(wrapped, FunctionType):
        yield wrapped
