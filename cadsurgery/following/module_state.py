"""What the modules of a network hold: noted before foreign code runs, and put back afterwards.

Containers may be of classes with methods of their own: a library's table of classes makes an object at each look-up.
They are therefore read and written by the methods of `dict`, `list`, `set` and `deque` themselves, and only entries
that were replaced, added or removed meanwhile are written.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from cadsurgery.following.example_tracer import name_spaces

_MISSING = object()
# Values without contents of their own, or whose contents belong to others.
_PLAIN = (
    Tensor,
    nn.Module,
    type,
    FunctionType,
    MethodType,
    ModuleType,
    str,
    bytes,
    int,
    float,
    type(None),
    tuple,
)
_CONSTANT = re.compile(r"_\w+_constant\d+")
_PARTS_OF_MODULE = ("_parameters", "_buffers")
_CONTAINERS = (dict, list, set, deque)
# Modules whose classes and functions hold nothing of a network: of Python's library all but those whose classes hold
# only what others put into them.
_PYTHON = {*sys.stdlib_module_names, "builtins", "torch"} - {"types", "argparse", "collections"}


@dataclass(frozen=True)
class Entry:
    """An attribute of a module, or an item of a dictionary or list.

    Attributes:
        container: the dictionary or list that holds it; for an attribute that of the module.
        key: its name, key or position there.
        place: its name for messages, e.g. `head.grids[1]`.
        is_new_item: true for an item that a dictionary of the network's gained.
    """

    container: Any
    key: Any
    place: str
    is_new_item: bool = False

    @property
    def value(self) -> Any:
        """The value now; None if there is none."""
        if _is(self.container, dict):
            return dict.get(self.container, self.key)
        parts = _values(self.container)
        return parts[self.key] if self.key < len(parts) else None

    def put(self, value: Any) -> None:
        """Replace the value."""
        _methods(self.container).__setitem__(self.container, self.key, value)

    def remove(self, value: Any) -> None:
        """Remove a value that a call kept and, from a dictionary that gained it, all alike: it may hold several."""
        if not _is(self.container, dict):
            self.put(None)
            return
        kinds = (type(self.key), type(value))
        items = list(_items(self.container)) if self.is_new_item else []
        alike = [key for key, item in items if (type(key), type(item)) == kinds]
        for key in (self.key, *alike):
            _delete(self.container, key)


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Put everything back behind a block in which a network runs: what its modules hold, and the values of its buffers
    and of tensors that are attributes."""
    state = State(model)
    held = [*model.buffers(), *(entry.value for entry in state.tensors())]
    values = [tensor.detach().clone() for tensor in held]
    try:
        yield
    finally:
        state.restore()
        for tensor, value in zip(held, values, strict=True):
            tensor.data.copy_(value)


class State:
    """All attributes of a network's modules, what containers in them hold, and global containers of its code."""

    def __init__(self, model: nn.Module) -> None:
        """Note them. Tensors are noted as objects, not by their values."""
        self._noted = [(place, held, _contents(held)) for place, held in _containers(model)]
        self._of_modules = {id(vars(module)[part]) for module in model.modules() for part in _PARTS_OF_MODULE}

    def restore(self) -> None:
        """Put everything back that was replaced, added or removed, but modes of modules and torch.fx's constants."""
        for _, held, contents in self._noted:
            if _differs(held, contents):  # few of them: a call changes few attributes
                _put_back(held, contents)

    def tensors(self) -> list[Entry]:
        """Return the tensors that are no parameters or buffers."""
        pairs = [(place, held) for place, held, _ in self._noted if _is(held, dict)]
        return [
            Entry(held, key, _join(place, key))
            for place, held in pairs
            if id(held) not in self._of_modules
            for key, value in _items(held)
            if isinstance(value, Tensor) and not _is_of_torch(key)
        ]

    def changes(self) -> list[Entry]:
        """Return what was replaced or added since, except parts that lists gained."""
        return [
            Entry(held, key, _join(place, key), self._is_new_item(held, contents, key))
            for place, held, contents in self._noted
            for key in _changed(held, contents)
        ]

    def written(self) -> frozenset[tuple[int, Any]]:
        """Return the attributes and items that are others since, by the identity of what holds them and their key; a
        list that has more or fewer parts with the key None."""
        items = {(id(entry.container), entry.key) for entry in self.changes()}
        return frozenset(
            items | {(id(held), None) for _, held, contents in self._noted if len(held) != len(contents)}
        )

    def _is_new_item(self, held: Any, contents: Any, key: Any) -> bool:
        is_item = (
            _is(held, dict) and not dict.__contains__(held, "_modules") and id(held) not in self._of_modules
        )
        return is_item and key not in contents


@dataclass(frozen=True)
class CallCaches:
    """What a network keeps, and how it is forgotten.

    Attributes:
        state: what the network held before.
        forgetting: functions, each of which lets it forget an attribute or item.
        written: attributes that calls change, by the identity of their container and their key.
    """

    state: State
    forgetting: tuple[Callable[[], None], ...] = ()
    written: frozenset[tuple[int, Any]] = frozenset()

    def forget(self) -> None:
        """Let the network be as if it had never been called."""
        self.state.restore()
        for forget in self.forgetting:
            forget()

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """Forget for a block; then put everything back that the network held before."""
        self.forget()
        try:
            yield
        finally:
            self.state.restore()


def _containers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield all containers that a network holds or its code has, with their places."""
    waiting: list[tuple[str, Any]] = [(path, vars(module)) for path, module in model.named_modules()]
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if not _is_of_python(kind)}
    for kind in kinds:
        waiting += [
            (f"{kind.__name__}.{name}", value) for name, value in vars(kind).items() if _is_container(value)
        ]
        waiting += _enclosed(vars(kind).values())
    seen, spaces = set[int](), {id(space): space for space in name_spaces(model)}
    while waiting:
        place, held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        yield place, held
        if (
            own := _attributes(held)
        ) is not None:  # a container of a class of its own may keep more beside its items
            waiting.append((place, own))
        parts = _items(held) if _is(held, dict) else enumerate(_values(held))
        for key, part in list(parts):
            if type(part) in (FunctionType, MethodType) and not _is_of_python(part):
                function = getattr(part, "__func__", part)
                spaces[id(function.__globals__)] = function.__globals__
                waiting += _enclosed([function])
            inside = part if _is_container(part) else _attributes(part)
            if inside is not None:
                waiting.append((place if _is_part_of_module(key) else _join(place, key), inside))
    found = dict[int, tuple[str, Any]]()
    for space in spaces.values():
        for name, value in list(space.items()):
            if _is_container(value) and id(value) not in seen and not name.startswith("__"):
                found.setdefault(id(value), (name, value))
    of_python = _held_by_python(found.keys())
    yield from (named for number, named in found.items() if number not in of_python)


def _enclosed(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the containers that functions take from the functions around them, such as the results that a decorator
    keeps, with the names of the functions."""
    waiting, seen = [value for value in values if type(value) is FunctionType], set[FunctionType]()
    while waiting:
        function = waiting.pop()
        if function in seen or _is_of_python(function):
            continue
        seen.add(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            value = cell.cell_contents if cell != CellType() else None
            if type(value) is FunctionType:
                waiting.append(value)
            elif _is_container(value):
                yield f"{function.__qualname__}.{name}", value


def _is_of_torch(key: Any) -> bool:
    """True if an attribute is a module's mode, or a constant of a graph, which torch.fx keeps in the traced network."""
    return isinstance(key, str) and (key == "training" or _CONSTANT.fullmatch(key) is not None)


def _is_part_of_module(key: Any) -> bool:
    return type(key) is str and key in _PARTS_OF_MODULE


def _is(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """True if a value is of a type. `isinstance` would ask the value, which may be made at the question."""
    return issubclass(type(value), kinds)


def _is_of_python(kind: Any) -> bool:
    """True for classes and functions of Python and torch, whose attributes and globals belong to no network."""
    return str(kind.__module__).partition(".")[0] in _PYTHON


def _is_container(value: Any) -> bool:
    return _is(value, _CONTAINERS)


def _attributes(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object of the network's own code; None for any other value."""
    if _is(value, _PLAIN) or _is_of_python(type(value)):
        return None
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if type(attributes) is dict else None


def _held_by_python(numbers: Set[int]) -> set[int]:
    """Return which ids are of values that are global in Python's library, such as `sys.modules`."""
    names = [name for name in list(sys.modules) if name.partition(".")[0] in sys.stdlib_module_names]
    modules = [sys.modules.get(name) for name in names]
    spaces = [vars(module) for module in modules if type(module) is ModuleType]
    return {number for space in spaces for number in numbers & set(map(id, list(space.values())))}


# -- containers by the methods of their base class -------------------------------------------------------------


def _methods(held: Any) -> Any:
    """Return the class whose methods read and write a container: none of its own."""
    if type(held) in _CONTAINERS:  # nearly always, and this is asked of all that a network holds
        return type(held)
    return next(kind for kind in (OrderedDict, *_CONTAINERS) if _is(held, kind))


def _items(held: Any) -> Any:
    """Return the items of a dictionary, in its order."""
    return _methods(held).items(held)


def _values(held: Any) -> list[Any]:
    """Return the values of a list, set or deque."""
    return list(_methods(held).__iter__(held))


def _contents(held: Any) -> Any:
    return dict(list(_items(held))) if _is(held, dict) else _values(held)


def _differs(held: Any, contents: Any) -> bool:
    kind = _methods(held)
    if kind.__len__(held) != len(contents):
        return True
    if kind is set:
        return {*map(id, set.__iter__(held))} != {*map(id, contents)}
    if not _is(held, dict):
        return not all(map(is_, kind.__iter__(held), contents))
    keys, values = kind.keys(held), kind.values(held)
    return not (all(map(is_, keys, contents)) and all(map(is_, values, contents.values())))


def _put_back(held: Any, contents: Any) -> None:
    """Give a container its contents back; entries that are still the same are not written."""
    kind = _methods(held)
    if kind is list:
        list.__setitem__(held, slice(None), contents)
    elif kind is set:
        set.intersection_update(held, contents)
        set.update(held, contents)
    elif kind is deque:
        deque.clear(held)
        deque.extend(held, contents)
    else:
        _put_items_back(held, contents, kind)


def _put_items_back(held: Any, contents: dict[Any, Any], kind: Any) -> None:
    now = dict(list(_items(held)))
    contents = contents | {key: value for key, value in now.items() if _is_of_torch(key)}
    for key in now.keys() - contents.keys():
        _delete(held, key)
    for key, value in contents.items():
        if now.get(key, _MISSING) is not value:
            kind.__setitem__(held, key, value)
    if any(a is not b for a, b in zip(kind.keys(held), contents, strict=True)):
        for key, value in contents.items():
            _delete(held, key)
            kind.__setitem__(held, key, value)


def _delete(held: Any, key: Any) -> None:
    if dict.__contains__(held, key):  # `OrderedDict.pop` asks a subclass for the value
        _methods(held).__delitem__(held, key)


def _changed(held: Any, contents: Any) -> list[Any]:
    if _is(held, dict):
        changed = [key for key, value in _items(held) if contents.get(key, _MISSING) is not value]
        return [key for key in changed if not _is_of_torch(key)]
    if _is(held, list):
        pairs = zip(_values(held), contents, strict=False)
        return [index for index, pair in enumerate(pairs) if pair[0] is not pair[1]]
    return []


def _join(place: str, key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{place}.{key}" if place else key
    return f"{place}[{key!r}]"
