"""Converting a network leaves alone what is not the network's: tables, registries and modules of its libraries."""

from __future__ import annotations

import logging
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from sys import modules as loaded
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import some
from networks import Encoded, converted_quietly
from torch import Tensor, fx, nn

from cadsurgery.following.module_state import State

ASKED: Counter[str] = Counter()


class MakesObjects(OrderedDict[str, Any]):
    """A table of classes, of which a look-up makes an object, as libraries keep activations."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)()


class Counting(dict[str, Any]):
    """A dictionary that counts what its own methods are asked."""

    def __getitem__(self, name: str) -> Any:
        ASKED[name] += 1
        return super().__getitem__(name)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("this table is complete")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("this table is complete")

    def clear(self) -> None:
        raise TypeError("this table is complete")


class Numbered(list[Any]):
    """A list whose iteration gives other values than it holds."""

    def __iter__(self) -> Iterator[Any]:
        return enumerate(super().__iter__())


class MadeWhenAsked:
    """An object that is made at the first question about its class, as lazy settings are."""

    @property
    def __class__(self) -> Any:
        ASKED["class"] += 1
        return dict


ACTIVATIONS = MakesObjects(relu=nn.ReLU, silu=nn.SiLU)
COMPLETE = Counting(mean=0.5, std=0.25)
NUMBERED = Numbered([nn.ReLU, nn.SiLU])
LAST = deque[Any]([1, 2], maxlen=2)
SEEN: set[Any] = {"a"}
LAZY = MadeWhenAsked()
REMEMBERED: OrderedDict[Any, Any] = OrderedDict(a=1, b=2)


def beside(change: Callable[[Any, Tensor], Any]) -> nn.Module:
    """A network that changes something beside itself in each call."""

    def then(own: Any, image: Tensor, y: Tensor) -> Tensor:
        change(own, y)
        return own.head(y) + COMPLETE["mean"]

    return Encoded(then, act=ACTIVATIONS["relu"])


def _remember(own: Any, y: Tensor) -> None:
    REMEMBERED[y.shape[2]] = y
    REMEMBERED.move_to_end("a")
    LAST.append(y)
    SEEN.add(y)


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing": lambda own, y: None,
    "its attribute": lambda own, y: setattr(own, "last", y),
    "globals": _remember,
    "an item of a table that refuses": lambda own, y: dict.__setitem__(COMPLETE, "last", y),
}
WRITING = (CHANGES["globals"], CHANGES["an item of a table that refuses"])


def contents_of(value: Any) -> Any:
    """What a container holds, by identity, whatever its own methods say."""
    if issubclass(type(value), dict):
        kind: Any = OrderedDict if issubclass(type(value), OrderedDict) else dict
        return [(id(key), id(item)) for key, item in kind.items(value)]
    kind = next(kind for kind in (list, set, deque) if issubclass(type(value), kind))
    ids = [id(item) for item in kind.__iter__(value)]
    return sorted(ids) if kind is set else ids


def everything() -> dict[tuple[str, str], Any]:
    """The global containers of all loaded modules, but of Python, torch and this package, which keep caches."""
    own = {*sys.stdlib_module_names, "torch", "cadsurgery", "sympy", "mpmath"}
    spaces = {
        name: {**vars(module)}
        for name, module in [*loaded.items()]
        if type(module) is ModuleType and name.partition(".")[0] not in own
    }
    return {
        (name, key): contents_of(value)
        for name, space in spaces.items()
        for key, value in space.items()
        if value is not loaded and issubclass(type(value), (dict, list, set, deque))
        if key not in ("ASKED", "__warningregistry__")
    }


@pytest.mark.parametrize("name", some(CHANGES))
def test_no_global_container_of_any_module_changes(name: str) -> None:
    model = beside(CHANGES[name])
    converted_quietly(model)  # the first conversion imports what it needs
    written = {
        (__name__, key) for key in ("REMEMBERED", "LAST", "SEEN", "COMPLETE") if CHANGES[name] in WRITING
    }
    before = everything()
    ASKED.clear()
    net, image = converted_quietly(model), torch.rand(2, 3, 48, 80)
    after = everything()
    assert {key: after[key] for key in before if key not in written} == {
        key: value for key, value in before.items() if key not in written
    }
    assert ASKED["std"] == ASKED["class"] == 0  # nobody but forward itself asks a table
    held = [*OrderedDict.items(REMEMBERED), *dict.items(COMPLETE)]
    values = [*(part for item in held for part in item), *LAST, *SEEN]
    assert not any(
        isinstance(value, fx.Proxy) for value in values
    )  # calls of the network itself leave tensors
    assert isinstance(beside(CHANGES[name]).act, nn.ReLU), "another network can be built"
    assert torch.allclose(net(image), model(image), atol=1e-5)


def test_modules_and_loggers_that_forward_makes_stay() -> None:
    name = "made_while_a_network_was_read"

    def change(own: Any, y: Tensor) -> None:
        loaded.setdefault(name, ModuleType(name))
        own.logger.getChild(name).debug("called")

    model = beside(change)
    model.logger = logging.getLogger(__name__)
    try:
        converted_quietly(model)
        assert name in sys.modules and f"{__name__}.{name}" in logging.Logger.manager.loggerDict
    finally:
        sys.modules.pop(name, None)


class KeepsOrder(dict[str, Any]):
    """A dictionary with a list of its keys beside it."""

    def __init__(self, **items: Any) -> None:
        self.order: list[str] = []
        for name, value in items.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        self.order.append(name)
        super().__setitem__(name, value)


@pytest.mark.parametrize("kind", [dict, OrderedDict, KeepsOrder])
def test_what_changed_is_put_back_in_its_order_and_the_rest_is_not_written(kind: Any) -> None:
    model = nn.Identity()
    model.held = held = kind(a=1, b=[2], c=3)
    before = [*held.items()]
    state = State(model)
    del held["a"]
    held["d"], held["c"] = 4, torch.ones(1)
    state.restore()
    assert [*held.items()] == before and [*reversed(held)] == ["c", "b", "a"]
    assert held["b"] is before[1][1]
    assert getattr(held, "order", ["a", "b", "c"]) == ["a", "b", "c"]
