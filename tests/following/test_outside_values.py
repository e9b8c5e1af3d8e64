"""What a network's code reads beside its arguments is followed: attributes of modules and classes, global values, the
type of its parameters, what its hooks note. None of it is a constant of the conversion."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial, wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, slow, some
from networks import Encoded, randomise
from torch import Tensor, nn

import cadsurgery as cs

GAIN = 2.0
TABLE = {"turned": False, "unread": [1]}
NOTED: list[Tensor] = []
userconfig = ModuleType("userconfig")  # a file of settings, as it were
userconfig.SCALE = 2.0  # type: ignore[attr-defined]
sys.modules["userconfig"] = userconfig


class Settings:
    """An object as configurations are."""

    def __init__(self) -> None:
        self.shift, self.unread = 1.0, 0


def scaled(x: Tensor) -> Tensor:
    """A function that the network's code names; it reads a global value itself."""
    return x * GAIN


class Encoder(nn.Module):
    """An encoder to output stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(x)))))


class Inner(nn.Module):
    """A part with a mode, a list and an attribute of its class."""

    slope = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.mode, self.gains, self.settings, self.act = "sum", [1.0, 2.0], Settings(), F.relu

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(x, self.slope) + self.settings.shift
        for gain in self.gains:
            x = x * gain + self.act(x)
        return x + 1 if self.mode == "sum" else x * 3


class Order(Enum):
    FIRST, LAST = 1, 2


@dataclass
class Configuration:
    gain: float = 2.0
    order: Order = Order.FIRST


class Reads(Encoder):
    """Reads all kinds of values that are no arguments, of kinds that libraries use, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain, self._shift, self.size = Inner(), 1.0, 0.0, (2, 3)
        self.namespace = SimpleNamespace(gain=2.0, sizes={"a": [1, 2]})
        self.configuration, self.order, self.names = Configuration(), Order.FIRST, ["half", "double"]
        self.mean, self.table, self.depth = np.array([0.5, 0.25]), torch.ones(2, 1, 1), 1
        self.layers = nn.ModuleList([nn.Conv2d(2, 2, 1) for _ in range(3)])

    def half(self, x: Tensor) -> Tensor:
        return x / 2 + 1

    def double(self, x: Any = None) -> Any:
        return super().double() if x is None else x * 2

    @property
    def shift(self) -> float:
        return 3.0 if self.order is Order.FIRST else 4.0

    def forward(self, x: Tensor) -> Tensor:
        y = scaled(self.inner(self.encode(x))) * self.gain + self._shift + userconfig.SCALE + self.size[0]
        for layer in self.layers[: self.depth]:
            y = layer(y)
        for name in self.names:
            y = getattr(self, name)(y)
        y = y * self.namespace.gain + self.namespace.sizes["a"][1] + self.configuration.gain + self.shift
        y = (y - float(self.mean.max())) * (2 * self.table[:, :1])
        return y + self.extra if hasattr(self, "extra") else y


def replace_order(net: Any) -> None:
    net.configuration.order = net.order = Order.LAST


CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda net: setattr(net, "gain", 3.0),
    "the type of an attribute": lambda net: setattr(net, "gain", torch.tensor(2.0)),
    "a private attribute": lambda net: setattr(net, "_shift", 3.0),
    "a tuple": lambda net: setattr(net, "size", (5, 3)),
    "a new attribute": lambda net: setattr(net, "extra", 3.0),
    "an attribute of a part": lambda net: setattr(net.inner, "mode", "product"),
    "a list in place": lambda net: net.inner.gains.append(0.5),
    "another list": lambda net: setattr(net.inner, "gains", [4.0]),
    "an object": lambda net: setattr(net.inner.settings, "shift", 4.0),
    "a function": lambda net: setattr(net.inner, "act", torch.tanh),
    "an attribute of a class, for an object": lambda net: setattr(net.inner, "slope", 0.5),
    "a namespace": lambda net: setattr(net.namespace, "gain", 5.0),
    "nested containers": lambda net: net.namespace.sizes["a"].__setitem__(1, 9),
    "a dataclass": lambda net: setattr(net.configuration, "gain", 7.0),
    "a property": replace_order,
    "names of methods": lambda net: net.names.reverse(),
    "a number of layers": lambda net: setattr(net, "depth", 3),
    "an array": lambda net: net.mean.__setitem__(0, 4.0),
    "a tensor": lambda net: net.table.mul_(3),
    "another tensor": lambda net: setattr(net, "table", torch.full((2, 1, 1), 5.0)),
}
OPTIONS = pytest.mark.parametrize(
    "options", [{"output_stride": (1, 4)}, slow({"coarsest": 16})], ids=["strides", "floors"]
)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def convert(model: nn.Module, options: Any) -> cs.AdaptiveModel:
    own = "all" if "coarsest" in options else "none"
    return cs.adaptify(model, own, example_input=images(2, 61, 83), outputs="native", **options)


@OPTIONS
@pytest.mark.parametrize("change", some(CHANGES.values()), ids=CHANGES)
def test_an_attribute_that_changes_is_read_anew(change: Callable[[Any], object], options: Any) -> None:
    model, x = randomise(Reads()).eval(), images(1, 64, 96)
    net = convert(model, options)
    assert_same(net(x), model(x))
    before = model(x)
    change(model)
    change(net)
    assert float((model(x) - before).abs().max()) > 0.01
    assert_same(net(x), model(x))
    assert_same(copy.deepcopy(net)(x), model(x))


def reading(own: Any, image: Tensor, y: Tensor) -> Tensor:
    """What a network holds and calls with itself; it reads a number, a list and a namespace of the network."""
    return own.head(y) * own.gain + own.gains[0] + own.settings.shift


def scaling(own: Any, image: Tensor, y: Tensor, gain: float = 2.0) -> Tensor:
    return own.head(y) * gain


class Beyond:
    """An object whose methods get the network."""

    def __init__(self) -> None:
        self.scale, self.deeper = 2.0, SimpleNamespace(scale=3.0)

    def combine(self, own: Any, image: Tensor, y: Tensor) -> Tensor:
        return self.inner(own, y) * self.scale

    def inner(self, own: Any, y: Tensor) -> Tensor:
        return reading(own, y, y) * self.deeper.scale

    def __call__(self, own: Any, image: Tensor, y: Tensor) -> Tensor:
        return self.inner(own, y)

    @staticmethod
    def alone(own: Any, y: Tensor) -> Tensor:
        return reading(own, y, y)


def enclosed(gain: Any) -> Callable[..., Tensor]:
    return lambda own, image, y: own.head(y) * (gain if isinstance(gain, float) else gain[0])


@wraps(reading)
def decorated(*given: Any) -> Tensor:
    return reading(*given)


def importing(own: Any, image: Tensor, y: Tensor) -> Tensor:
    from userconfig import reading as imported  # type: ignore[import-not-found]

    return imported(own, image, y)


def keeping() -> Callable[..., Tensor]:
    kept: dict[Any, Tensor] = {}

    def reads(own: Any, image: Tensor, y: Tensor) -> Tensor:
        if "ones" not in kept or kept["ones"].shape[2:] != y.shape[2:]:
            kept["ones"] = torch.ones(1, 1, y.shape[2], y.shape[3])
        return reading(own, image, y) * kept["ones"]

    return reads


class Ways(Enum):
    FIRST = partial(reading)


userconfig.reading, userconfig.table = reading, {"a": [reading]}  # type: ignore[attr-defined]
TWO = [lambda own, image, y: own.head(y) * 2, lambda own, image, y: own.head(y) * 3]
# A function that a network calls with itself, and what changes; by default what `reading` reads.
PASSED: dict[str, tuple[Any, Callable[[Any], object] | None]] = {
    "a function": (reading, None),
    "in a list": (lambda own, image, y: own.held["list"][0](own, image, y), None),
    "in a namespace": (lambda own, image, y: own.held["space"].reading(own, image, y), None),
    "partial": (partial(reading), None),
    "an argument of partial": (partial(lambda other, *given: other(*given), reading), None),
    "decorated": (decorated, None),
    "a method": (Beyond().combine, None),
    "an object": (Beyond(), None),
    "a method of an object in a list": (lambda own, *given: own.held["list"][1].combine(own, *given), None),
    "a static method": (lambda own, image, y: Beyond.alone(own, y), None),
    "of a class": (lambda own, image, y: Beyond()(own, image, y), None),
    "a function of a module": (lambda *given: userconfig.reading(*given), None),
    "a table of a module": (lambda *given: userconfig.table["a"][0](*given), None),
    "imported where it is called": (importing, None),
    "in a class of names": (lambda *given: Ways.FIRST.value(*given), None),
    "of a container of modules": (lambda own, *given: own.encode.reading(own, *given), None),
    "keeps its results": (keeping(), None),
    "a number of a container of modules": (
        lambda own, image, y: own.head(y) * own.encode.gain,
        lambda own: setattr(own.encode, "gain", 7.0),
    ),
    "a number of a method's object": (Beyond().combine, lambda own: setattr(own.then.__self__, "scale", 7.0)),
    "a namespace of an object": (Beyond(), lambda own: setattr(own.then.deeper, "scale", 7.0)),
    "another partial": (
        partial(scaling, gain=3.0),
        lambda own: setattr(own, "then", partial(scaling, gain=7.0)),
    ),
    "an argument": (partial(scaling, gain=3.0), lambda own: own.then.keywords.update(gain=7.0)),
    "another closure": (enclosed(3.0), lambda own: setattr(own, "then", enclosed(7.0))),
    "another list in a closure": (enclosed([3.0]), lambda own: setattr(own, "then", enclosed([7.0]))),
    "another function of a line": (TWO[0], lambda own: setattr(own, "then", TWO[1])),
}


def change_what_is_read(own: Any) -> None:
    own.gain, own.gains[0], own.settings.shift = 7.0, 5.0, 4.0


@pytest.mark.parametrize("name", some(PASSED))
def test_what_functions_read_that_get_the_network_is_read_anew(name: str) -> None:
    then, change = PASSED[name]
    held = {"list": [reading, Beyond()], "space": SimpleNamespace(reading=reading)}
    model = Encoded(then, gain=3.0, gains=[2.0], settings=Settings(), held=held).eval()
    model.encode.reading, model.encode.gain = reading, 3.0  # type: ignore[assignment]
    net, x = convert(model, {"output_stride": (1, 4)}), images(1, 64, 96)
    for each in (x, images(1, 32, 96)):
        assert_same(net(each), model(each))
    assert not net._paths  # nothing has changed
    fast, before = net.optimize(), model(x)
    for own in (model, original_of(net) if change and "module" not in name else net):
        (change or change_what_is_read)(own)
    assert float((model(x) - before).abs().max()) > 0.01
    assert_same(net(x), model(x))
    assert_same(fast(x), before)


def original_of(net: Any) -> Any:
    """Return the copy of the network that a converted one holds, with the objects that its forward calls."""
    return vars(net)["_original"][0]


class Beside:
    """A global object that no network reads; notes whether it was asked how it is copied: it may be all that a program
    holds."""

    asked = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        type(self).asked = True
        return super().__reduce_ex__(protocol)


BESIDE = Beside()


def test_what_no_code_reads_may_change_and_is_not_looked_at() -> None:
    model, x = randomise(Reads()).eval(), images(1, 64, 96)
    net = convert(model, {"output_stride": (1, 4)})
    net.inner.settings.unread, net.unread = 7, 8
    assert_same(net(x), model(x))
    assert not net._paths
    for one in (copy.deepcopy(net), net.optimize()):
        assert_same(one(x), model(x))
    assert not Beside.asked


def test_an_attribute_is_not_set_on_an_inference_copy() -> None:
    fast = convert(randomise(Reads()).eval(), {"output_stride": (1, 4)}).optimize()
    for name in ("gain", "_shift", "extra"):
        with pytest.raises(cs.InvalidInput, match=rf"{name} is set on an inference copy"):
            setattr(fast, name, 3.0)


class OfOwnType(Encoder):
    """Takes type and device from its parameters, as transformers does."""

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x.to(next(self.parameters()).device, self.dtype))
        return y + torch.ones(y.shape[2:], dtype=self.dtype) / 3


@OPTIONS
def test_the_type_of_parameters_is_that_of_the_call(options: Any) -> None:
    model, x = randomise(OfOwnType()).eval(), images(2, 64, 96)
    net = convert(model, options)
    assert_same(net(x), model(x))
    assert_same(net.double()(x), model.double()(x), 1e-9)
    assert_same(net.bfloat16()(x).float(), model.bfloat16()(x).float(), 5e-2)


def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """A hook of a user."""
    NOTED.append(output)


class ReadsNotes(Encoder):
    """Reads what a hook notes in the middle of a call, once Python has asked for a number."""

    def __init__(self, as_number: bool) -> None:
        super().__init__()
        self.as_number = as_number
        self.two.register_forward_hook(note)

    def forward(self, x: Tensor) -> Tensor:
        NOTED.clear()
        y = self.encode(x)
        if y.shape[2] < 2:
            raise ValueError("too small")
        noted = float(NOTED[-1].amax()) if self.as_number else NOTED[-1].amax((2, 3), keepdim=True)[:, :2]
        return y * (1 + noted)


@OPTIONS
@pytest.mark.parametrize("as_number", [False, True], ids=["tensor", "number"])
def test_what_a_hook_notes_is_that_of_the_call(as_number: bool, options: Any) -> None:
    model = randomise(ReadsNotes(as_number)).eval()
    net = convert(model, options)
    for x in (images(1, 64, 96), 3 * images(3, 70, 65) + 2):
        assert_same(net(x), model(x))


class HasConstants(Encoder):
    """Makes a constant on each of its paths."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x)
        return (
            y + torch.tensor([[[1.0]], [[2.0]]]) if y.shape[2] % 2 else y * torch.tensor([[[3.0]], [[4.0]]])
        )


@OPTIONS
def test_a_call_that_takes_another_path_finds_its_constants(options: Any) -> None:
    model = randomise(HasConstants()).eval()
    net = convert(model, options)
    for each in (net, net.optimize(), copy.deepcopy(net)):
        for x in (images(1, 64, 96), images(2, 60, 83), images(2, 61, 80)):
            assert_same(each(x), model(x))


def test_an_object_that_is_held_at_several_depths_is_compared_as_a_whole_at_each() -> None:
    """Met first inside others, where nothing deeper is looked into, and then alone."""

    class Holds(Encoder):
        def __init__(self) -> None:
            super().__init__()
            inner = SimpleNamespace(gains={"first": [2.0, 3.0]})
            self.around = [[[inner]]]
            self.inner = inner
            inner.itself = inner

        def forward(self, x: Tensor) -> Tensor:
            y = self.encode(x) * len(self.around[0][0])
            return y * self.inner.itself.gains["first"][1]

    model, x = randomise(Holds()).eval(), images(1, 64, 96)
    net = convert(model, {"output_stride": (1, 4)})
    assert_same(net(x), model(x))
    assert not net._paths  # nothing has changed
    for each in (net, model):
        each.inner.gains["first"][1] = 7.0
    assert_same(net(x), model(x))


class Flags:
    """A class as a namespace, and objects of it that are asked by methods."""

    turned = False

    def __init__(self) -> None:
        self.is_on = False

    def asked(self) -> bool:
        return self.is_on

    @property
    def shown(self) -> bool:
        return self.asked()

    def __bool__(self) -> bool:
        return self.is_on

    def __getitem__(self, name: str) -> bool:
        return bool(getattr(self, name))


TURNED, FLAGS, OPTION = False, Flags(), Flags()
userconfig.inner = ModuleType("userconfig.inner")  # type: ignore[attr-defined]
userconfig.inner.turned = False
sys.modules["userconfig.inner"] = userconfig.inner


def enclosing() -> tuple[Callable[[], bool], Callable[[bool], None]]:
    """Return a function that reads a variable of the function around it, and one that sets it."""
    turned = False

    def is_turned() -> bool:
        return turned

    def turn(value: bool) -> None:
        nonlocal turned
        turned = value

    return is_turned, turn


is_turned, turn = enclosing()
READ: dict[str, tuple[Callable[[], Any], Callable[[bool], object]]] = {
    "a global value": (lambda: TURNED, lambda value: globals().update(TURNED=value)),
    "a global table": (lambda: TABLE["turned"], lambda value: TABLE.update(turned=value)),
    "by its name": (lambda: globals()["TURNED"], lambda value: globals().update(TURNED=value)),
    "a class": (lambda: Flags.turned, lambda value: setattr(Flags, "turned", value)),
    "the class of an object": (lambda: FLAGS.turned, lambda value: setattr(Flags, "turned", value)),
    "an object": (lambda: FLAGS.is_on, lambda value: setattr(FLAGS, "is_on", value)),
    "a method": (lambda: OPTION.asked(), lambda value: setattr(OPTION, "is_on", value)),
    "a property": (lambda: OPTION.shown, lambda value: setattr(OPTION, "is_on", value)),
    "a truth value": (lambda: bool(OPTION), lambda value: setattr(OPTION, "is_on", value)),
    "an item": (lambda: OPTION["is_on"], lambda value: setattr(OPTION, "is_on", value)),
    "a module in a module": (
        lambda: userconfig.inner.turned,  # type: ignore[attr-defined]
        lambda value: setattr(userconfig.inner, "turned", value),  # type: ignore[attr-defined]
    ),
    "a closure": (is_turned, turn),
    "the environment": (
        lambda: os.environ.get("TURNED_BY_TEST") == "True",
        lambda value: os.environ.update(TURNED_BY_TEST=str(value)),
    ),
}


def asked_outside() -> bool:
    """Stand for what the test reads."""
    raise NotImplementedError


class Turns(Encoder):
    """Returns its channels last where a value outside says so."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x)
        return (2 * y).permute(0, 2, 3, 1) if asked_outside() else y


@pytest.mark.parametrize(("read", "write"), some(READ.values(), rows=True), ids=READ)
def test_a_flag_outside_is_never_kept_in_silence(
    read: Callable[[], Any], write: Callable[[bool], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the flag is: the converted network follows, an inference copy refuses."""
    monkeypatch.setenv("TURNED_BY_TEST", "False")
    monkeypatch.setitem(globals(), "asked_outside", read)
    model, x = randomise(Turns()).eval(), images(1, 64, 96)
    net = convert(model, {"output_stride": (1, 4)})
    fast, before = net.optimize(), model(x)
    assert_same(fast(x), before)
    try:
        write(True)
        assert model(x).shape != before.shape
        assert_same(net(x), model(x))
        with pytest.raises(cs.InvalidInput, match=r"(?s)is .* and was .*call optimize\(\) again"):
            fast(x)
        assert_same(copy.deepcopy(net)(x), model(x))
    finally:
        write(False)
    assert_same(net(x), before)
    assert_same(fast(x), before)


n, gain, steps, tail = 0, 0, 0, 0  # names of attributes, variables, arguments and methods below


class NamesAlike(Encoder):
    """Has names of its own that are global values of the file, too, and reads none of these."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Conv2d(2, 2, 1)

    def tail(self, x: Tensor, gain: float) -> Tensor:
        return x * gain

    def forward(self, x: Tensor) -> Tensor:
        steps = [self.n(self.encode(x))]
        return self.tail(steps[0], gain=2.0)


@pytest.mark.parametrize("name", some(["n", "gain", "steps", "tail"]))
def test_a_global_value_that_only_shares_a_name_may_change(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter of a loop in a notebook, for one."""
    model, x = randomise(NamesAlike()).eval(), images(1, 64, 96)
    net = convert(model, {"output_stride": (1, 4)})
    fast = net.optimize()
    for value in range(3):
        monkeypatch.setitem(globals(), name, value)
        assert_same(fast(x), model(x))
        assert_same(net(x), model(x))
    assert not net._paths


def _counting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that counts and keeps in what it encloses, with functions that enclose each other."""
    count, kept = 0, dict[Any, Any]()

    def wrapper(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        kept[count] = again
        return forward(*args)

    def again() -> Any:
        return wrapper

    return wrapper


class Counted(Encoder):
    @_counting
    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) * GAIN


@OPTIONS
def test_what_calls_count_in_a_closure_is_no_setting(options: Any) -> None:
    """And the reading of functions that enclose each other ends."""
    model, x = randomise(Counted()).eval(), images(1, 64, 96)
    net = convert(model, options)
    fast = net.optimize()
    for _ in range(3):
        assert_same(net(x), model(x))
        assert_same(fast(x), model(x))
    assert not net._paths
