"""The table of torch's operations, each claim checked by experiment, and the passes that ask it."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, pointwise_rule
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from cadsurgery.following.trace import trace
from cadsurgery.network.adaptive_part import traceable_part
from cadsurgery.network.fuse import Fuser, activation_of
from cadsurgery.network.idioms import step_of
from cadsurgery.support.counting import MacCounter
from cadsurgery.support.torch_operations import (
    asks,
    is_in_place,
    is_kind,
    may_make_nan,
    operation_of,
    spellings,
)
from cadsurgery.surgery.flow import is_filled
from cadsurgery.surgery.spatial import Spatial

# Moderate numbers, zero and those at which functions have poles or end among them.
MODERATE = torch.tensor([-100.0, -50.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 50.0, 100.0])
# Further arguments of calls that need some.
REST: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("threshold",), (0.5, 0.25)),
    **dict.fromkeys(("clamp", "clamp_max", "clamp_min"), (0.25,)),
    **dict.fromkeys(("pow",), (2.0,)),
    "prelu": (torch.tensor([0.25]),),
    "fake_quantize_per_tensor_affine": (0.1, 3, 0, 255),
    **dict.fromkeys(("fill", "full_like"), (0.25,)),
    **dict.fromkeys(("unsafe_split", "unsafe_chunk"), (2, 1)),
    "view": ((2, 66),),
    "reshape": ((2, 66),),
    "unflatten": (1, (3, 2)),
    "unsqueeze": (1,),
    "permute": ((0, 2, 1, 3),),
    "transpose": (1, 2),
    "movedim": (1, 2),
    "split": (2, 1),
    "chunk": (2, 1),
    "tensor_split": (2, 1),
    "select": (1, 0),
    "narrow": (1, 0, 2),
    "to": (torch.float64,),
    "type": (torch.float64,),
}


def every_operation(*kinds: str) -> pytest.MarkDecorator:
    """Each operation of these kinds, by the functions and methods that spell it."""
    found: dict[str, list[Any]] = {}
    for one in spellings(*kinds):
        if not isinstance(one, type) and "layers" not in str(one) and "ops." not in str(one):
            found.setdefault(operation_of(one).name, []).append(one)
    return pytest.mark.parametrize("spelled", [pytest.param(calls, id=name) for name, calls in found.items()])


def run(spelling: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of a call, of a function or a method; None if it does not take these arguments."""
    function = getattr(Tensor, spelling) if isinstance(spelling, str) else spelling
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception:  # torch refuses arguments in many ways
            return None


def tensors(value: Any) -> list[Tensor]:
    return [
        one for one in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(one, Tensor)
    ]


@every_operation("value", "values")
def test_a_pointwise_operation_computes_each_value_alone(spelled: list[Any]) -> None:
    """f(x) in another order is f of x in that order, and in place exactly where the table says so."""
    for spelling in spelled:
        assert_pointwise(spelling, operation_of(spelling).name)


def assert_pointwise(spelling: Any, name: str) -> None:
    x, order = torch.linspace(0.1, 0.9, 12), torch.randperm(12)
    others = (torch.linspace(1, 2, 12), torch.linspace(0.2, 0.3, 12))
    if name.startswith("bitwise"):
        x, others = torch.arange(12), (torch.arange(12).flip(0), torch.arange(12))
    if str(getattr(spelling, "__name__", spelling)) == "float_power_":  # which torch has in float64 alone
        x = x.double()
    attempts = [REST[name]] if name in REST else [(), *((others[:n]) for n in (1, 2)), (x > 0.5, others[0])]
    attempts += [(x > 0.5, 0.25), (1,)]
    for rest in attempts:
        read, shuffled = x.clone(), x[order].clone()
        value = run(spelling, read, *rest)
        moved = [one[order] if isinstance(one, Tensor) and len(one) == 12 else one for one in rest]
        if isinstance(value, Tensor) and value.shape == x.shape:
            torch.testing.assert_close(run(spelling, shuffled, *moved), value[order], equal_nan=True)
            changed = not torch.equal(read, x)
            is_same = value.data_ptr() == read.data_ptr() and name != "positive"
            assert is_in_place(spelling, (read, *rest)) == (is_same or changed)
            return
    assert name in ("where", "polygamma") or str(spelling).startswith("__r"), f"{spelling} was not tried"


def test_modules_of_pointwise_operations() -> None:
    kinds = [kind for kind in spellings("value") if isinstance(kind, type)]
    assert nn.ReLU in kinds
    for kind in kinds:
        module = kind(0.5, 0.25) if kind is nn.Threshold else kind()
        x, order = torch.randn(12), torch.randperm(12)
        module.eval()
        torch.testing.assert_close(module(x[order]), module(x)[order])


def every_function() -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
    """Functions that take one tensor or two and give floating-point values.

    Of torch itself only its operations: other functions change settings of the process, as
    `use_deterministic_algorithms` does, and a tensor is taken for true.
    """
    skipped = ("set_", "resize_", "empty", "manual", "seed", "init", "div_", "dropout", "polynomial", "rnn")
    skipped += ("bessel",)
    for space in (torch, F, operator):
        for name in sorted(dir(space)):
            function = getattr(space, name)
            plain = callable(function) and not isinstance(function, type) and name[0] != "_"
            plain &= space is not torch or hasattr(torch.ops.aten, name)
            if plain and not any(part in name for part in skipped) and "." in f"{function.__module__}.":
                for args in ((MODERATE.clone(),), (MODERATE.clone(), MODERATE.flip(0).clone())):
                    yield function, args


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_makes_nan_of_moderate_numbers_is_stated() -> None:
    """Every function of torch that is given moderate numbers and makes NaN or infinity of them."""
    unsaid = {"kl_div", "gumbel_softmax", "poisson_nll_loss", "soft_margin_loss", "i1"}  # losses, and samples
    found, made = set(), set()
    for function, args in every_function():
        value = run(function, *args)
        for one in tensors(value):
            is_plain = one.layout is torch.strided and one.is_floating_point() and one.device.type == "cpu"
            if is_plain and not bool(one.isfinite().all()):
                (made if may_make_nan(function) else found).add(function.__name__)
    assert found <= unsaid, found - unsaid
    assert {"log", "sqrt", "reciprocal", "floor_divide", "remainder", "truediv", "addcdiv"} - made <= {
        "addcdiv"
    }


@every_operation("copies", "converts", "reshapes", "permutes", "splits", "selects")
def test_what_only_moves_values_makes_none(spelled: list[Any]) -> None:
    for spelling in spelled:
        x, name = torch.randn(2, 6, 11, 1).float(), operation_of(spelling).name
        other = torch.zeros(132) if name.endswith("_as") else None
        value = run(spelling, x.clone(), *((other,) if other is not None else REST.get(name, ())))
        if name in ("cuda", "as_tensor") or (isinstance(spelling, str) and "_" in spelling and value is None):
            continue
        if name == "t":
            value = run(spelling, x[:, :, 0, 0])
        assert tensors(value), spelling
        known = Counter(x.flatten().tolist())
        for one in tensors(value):
            rounded = one.float() if one.dtype not in (torch.float16, torch.bfloat16) else None
            assert rounded is None or not Counter(rounded.flatten().tolist()) - known


@every_operation("value", "values", "copies", "converts", "reshapes", "permutes", "splits", "selects")
def test_what_is_stated_multiplies_and_accumulates_nothing(spelled: list[Any]) -> None:
    """The count is torch's own, and no operation of the table is left out of it for want of a rule."""
    for spelling in spelled:
        x, rest = torch.rand(2, 6, 11, 1) * 0.5 + 0.2, REST.get(operation_of(spelling).name, ())
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            value = run(spelling, x.clone(), *rest)
        for device in ("cpu", "meta") if value is not None else ():
            with MacCounter() as counter, torch.no_grad():
                counted = run(spelling, x.clone().to(device), *rest)
            assert (counter.macs, dict(counter.not_counted)) == (flops.get_total_flops() // 2, {})
            for one, whole in zip(tensors(counted), tensors(value), strict=False):
                assert (one.shape, one.dtype) == (whole.shape, whole.dtype)


def test_all_spellings_are_one_operation() -> None:
    for spelled in (nn.ReLU, nn.ReLU(), F.relu, torch.relu, torch.relu_, Tensor.relu_, "relu", "relu_"):
        assert operation_of(spelled) is operation_of("relu")
    assert operation_of(operator.iadd) is operation_of("__radd__") is operation_of(torch.add)
    assert operation_of(print) is operation_of([]) is operation_of(nn.Conv2d) is None


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (operator.isub, (), True),
        (operator.itruediv, (), True),
        (operator.ifloordiv, (), True),
        ("__isub__", (), True),
        ("div_", (), True),
        ("__add__", (), False),
        (operator.index, (), False),
        (F.hardtanh, (0, -1.0, 1.0, True), True),
        (F.leaky_relu, (0, 0.1, False), False),
        (F.dropout, (0, 0.5, False, True), True),
        (nn.ReLU(inplace=True), (), True),
        (nn.ReLU(), (), False),
    ],
)
def test_in_place_is_known_however_it_is_written(target: Any, args: tuple[Any, ...], expected: bool) -> None:
    assert is_in_place(target, args) is expected
    assert is_in_place(F.relu, (0,), {"inplace": True}) and not is_in_place(F.relu, (0,), {"inplace": False})


class Positional(nn.Module):
    """Changes a value in place by a flag that has no name in the call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        F.hardtanh(y, -0.1, 0.1, True)
        return y


def test_a_graph_follows_what_is_changed_in_place_by_position() -> None:
    model, x = Positional().eval(), images(2, 17, 23)
    assert_same(fx.GraphModule(model, trace(model))(x), model(x), 1e-6)


@pytest.mark.parametrize("change", [operator.isub, operator.imul, operator.setitem, "sub_"])
def test_a_filled_value_that_is_changed_is_none(change: Any) -> None:
    graph = fx.Graph()
    x, filled = graph.placeholder("x"), graph.call_function(torch.zeros, (2,))
    assert is_filled(filled) and is_filled(graph.call_method("cuda", (filled,)))
    if change == "sub_":
        graph.call_method(change, (filled, x))
    else:
        graph.call_function(change, (filled, x) if change is not operator.setitem else (filled, 0, x))
    assert not is_filled(filled)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.tanh_, "tanh"),
        ("sigmoid_", "sigmoid"),
        (F.leaky_relu, "leaky_relu"),
        (F.hardtanh, "hardtanh"),
        (torch.special.expit, "sigmoid"),
    ],
)
def test_activations_are_fused_however_they_are_written(function: Any, name: str) -> None:
    graph = fx.Graph()
    make: Callable[..., fx.Node] = graph.call_method if isinstance(function, str) else graph.call_function
    found = activation_of(step_of(make(function, (graph.placeholder("x"),))), None)
    x = torch.randn(50)
    assert found is not None and found.name == name
    torch.testing.assert_close(found.apply_(x.clone()), run(function, x.clone()))


class Squash(nn.Module):
    """A pointwise operation of a user's own, which makes NaN of negative values."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_y0(x)


@pytest.fixture
def squash_rule() -> Iterator[None]:
    with pointwise_rule(Squash):
        yield


def test_a_rule_of_a_user_says_pointwise_as_ours_do(squash_rule: None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.squash, self.norm = nn.Conv2d(3, 4, 3, 2, 1), Squash(), nn.BatchNorm2d(4)
            self.group, self.pool = nn.GroupNorm(2, 4), nn.MaxPool2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.squash(self.conv(x)))
            z = F.relu(y) + y.sin()
            return F.softmax(self.pool(self.group(torch.cat((z, y.flip(2)), 1)[:, :4])), 1)

    facts = traceable_part(Net().eval(), None)[1]
    spatial = Spatial(facts)
    found = {node.name for node in facts.graph.nodes if spatial.kind(node).kind == "point"}
    assert found == {"squash", "norm", "relu", "sin", "add", "cat", "getitem", "softmax"}


def test_a_division_of_sizes_makes_no_nan() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    height = graph.call_method("size", (x, 2))
    half, ratio = (
        graph.call_function(operator.floordiv, (height, 2)),
        graph.call_function(operator.truediv, (x, 2)),
    )
    fuser = Fuser(graph, nn.Module(), True)
    assert asks(height) and not fuser.may_make_nan(half) and fuser.may_make_nan(ratio)
    assert may_make_nan(operator.mod) and is_kind(nn.LSTM, "mixes")
