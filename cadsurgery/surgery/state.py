"""What the modules of a network hold: noted before foreign code runs, and put back afterwards."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from cadsurgery.surgery.carry import name_spaces

_MISSING = object()
# Values without contents of their own, or whose contents belong to others.
_PLAIN = (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType, str, bytes, int, float, type(None))
_CONSTANT = re.compile(r"_\w+_constant\d+")
_PARTS_OF_MODULE = ("_parameters", "_buffers")


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
        if isinstance(self.container, dict):
            return self.container.get(self.key)
        return self.container[self.key] if self.key < len(self.container) else None

    def put(self, value: Any) -> None:
        """Replace the value."""
        self.container[self.key] = value

    def remove(self, value: Any) -> None:
        """Remove a value that a call kept and, from a dictionary that gained it, all alike: it may hold several."""
        if not isinstance(self.container, dict):
            self.put(None)
            return
        kinds = (type(self.key), type(value))
        items = self.container.items() if self.is_new_item else ()
        alike = [key for key, item in items if (type(key), type(item)) == kinds]
        for key in (self.key, *alike):
            self.container.pop(key, None)


class State:
    """All attributes of a network's modules, what containers in them hold, and global containers of its code."""

    def __init__(self, model: nn.Module) -> None:
        """Note them. Tensors are noted as objects, not by their values."""
        self._noted = [(place, held, _contents(held)) for place, held in _containers(model)]
        self._of_modules = {id(vars(module)[part]) for module in model.modules() for part in _PARTS_OF_MODULE}

    def restore(self) -> None:
        """Put everything back that was replaced, added or removed, but modes of modules and torch.fx's constants."""
        for _, held, contents in self._noted:
            if not _differs(held, contents):  # most of them: a call changes few attributes
                continue
            if isinstance(contents, dict):
                contents = contents | {key: value for key, value in held.items() if _is_of_torch(key)}
            if _differs(held, contents):
                _refill(held, contents)

    def tensors(self) -> list[Entry]:
        """Return the tensors that are no parameters or buffers."""
        pairs = [(place, held) for place, held, _ in self._noted if isinstance(held, dict)]
        return [
            Entry(held, key, _join(place, key))
            for place, held in pairs
            if id(held) not in self._of_modules
            for key, value in held.items()
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
        is_item = isinstance(held, dict) and "_modules" not in held and id(held) not in self._of_modules
        return is_item and key not in contents


@dataclass(frozen=True)
class Kept:
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
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if not _is_from_torch(kind)}
    for kind in kinds:
        waiting += [
            (f"{kind.__name__}.{name}", value) for name, value in vars(kind).items() if _is_container(value)
        ]
    seen = set[int]()
    while waiting:
        place, held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        yield place, held
        parts = held.items() if isinstance(held, dict) else enumerate(held)
        for key, part in list(parts):
            inside = part if _is_container(part) else _attributes(part)
            if inside is not None:
                waiting.append((place if key in _PARTS_OF_MODULE else _join(place, key), inside))
    for space in name_spaces(model):
        for name, value in list(space.items()):
            if _is_container(value) and id(value) not in seen and not name.startswith("__"):
                seen.add(id(value))
                yield name, value


def _is_of_torch(key: Any) -> bool:
    """True if an attribute is a module's mode, or a constant of a graph, which torch.fx keeps in the traced network."""
    return isinstance(key, str) and (key == "training" or _CONSTANT.fullmatch(key) is not None)


def _is_from_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set, deque))


def _attributes(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object of the network's own code; None for any other value."""
    if isinstance(value, (*_PLAIN, tuple)) or _is_from_torch(type(value)):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _contents(held: Any) -> Any:
    return dict(held) if isinstance(held, dict) else list(held)


def _differs(held: Any, contents: Any) -> bool:
    if len(held) != len(contents):
        return True
    if not isinstance(held, dict):
        return any(a is not b for a, b in zip(held, contents, strict=True))
    pairs = zip(held.items(), contents.items(), strict=True)
    return any(a is not b or value is not other for (a, value), (b, other) in pairs)


def _refill(held: Any, contents: Any) -> None:
    held.clear()
    held.update(contents) if isinstance(held, (dict, set)) else held.extend(contents)


def _changed(held: Any, contents: Any) -> list[Any]:
    if isinstance(held, dict):
        changed = [key for key in held if contents.get(key, _MISSING) is not held[key]]
        return [key for key in changed if not _is_of_torch(key)]
    if isinstance(held, list):
        return [
            place for place, pair in enumerate(zip(held, contents, strict=False)) if pair[0] is not pair[1]
        ]
    return []


def _join(place: str, key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{place}.{key}" if place else key
    return f"{place}[{key!r}]"
