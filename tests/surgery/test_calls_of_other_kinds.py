"""Calls that differ from the one a network was converted on in what Python code asks of arguments are followed."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, images, some
from networks import randomise
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.elements.lattice import Geometry
from cadsurgery.following.arguments import argument_kind
from cadsurgery.network.adaptive_part import traceable_part
from cadsurgery.network.conversion import carry_out
from cadsurgery.surgery.decide import make_plan
from cadsurgery.surgery.verify import Case, verify

Use = Callable[[Any, Tensor, Any], Tensor]
Pair = namedtuple("Pair", "low high")


class Asks(nn.Module):
    """An encoder to output stride 4 and what is asked of it."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)
        self.heads = nn.ModuleDict({str(number): nn.Conv2d(2, 2, 1) for number in (1, 2, 3)})
        self.gain_1, self.gain_2, self.gain_3 = 0.5, 1.0, 3.0
        self.use = use

    def forward(self, x: Tensor, value: Any = None) -> Tensor:
        return self.use(self, self.head(F.relu(self.two(F.relu(self.one(x))))), value)


def scaled(part: Tensor) -> Tensor:
    return part / (1 + part.abs().amax())


PARTS: dict[str, Use] = {
    "iteration": lambda net, y, _: torch.stack([scaled(part) for part in y]),
    "map": lambda net, y, _: torch.stack(list(map(scaled, y.unbind()))),
    "places": lambda net, y, _: torch.stack([scaled(y[place]) for place in range(len(y))]),
    "split": lambda net, y, _: torch.cat([scaled(part) for part in torch.split(y, 1)]),
    "chunk": lambda net, y, _: torch.cat([scaled(part) for part in y.chunk(y.shape[0])]),
    "tensor_split": lambda net, y, _: torch.cat([scaled(part) for part in y.tensor_split(y.size(0))]),
    "number of parts": lambda net, y, _: y * len(y.split(1)),
    "all but the first": lambda net, y, _: torch.cat([y[:1], *map(scaled, y.split(1)[1:])]),
    "strips": lambda net, y, _: torch.cat([scaled(part) for part in y.split(4, 2)], 2),
    "pieces of the width": lambda net, y, _: torch.cat([scaled(part) for part in y.chunk(5, -1)], -1),
    "two axes": lambda net, y, _: torch.cat(
        [torch.cat([scaled(part) for part in row.split(6, 3)], 3) for row in y.split(5, 2)], 2
    ),
    "channels": lambda net, y, _: torch.stack([scaled(part) for part in y.unbind(1)], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", some(PARTS.values(), every=4), ids=PARTS)
def test_there_are_as_many_parts_as_the_call_has(use: Use) -> None:
    model = randomise(Asks(use)).eval()
    net = cs.adaptify(model, "none", example_input=images(1, 64, 96), outputs="native")
    for each in (net, net.optimize()):
        for size in ((3, 64, 96), (1, 70, 61)):
            x = images(*size)
            with torch.no_grad():
                assert_same(each(x), model(x))


ASKED: dict[str, tuple[Use, Sequence[Any]]] = {
    "text of a number": (lambda net, y, v: net.heads[str(v)](y), (1, 2, 3)),
    "format": (lambda net, y, v: net.heads[f"{v}"](y), (1, 2, 3)),
    "representation": (lambda net, y, v: net.heads[repr(v)](y), (1, 2, 3)),
    "named attribute": (lambda net, y, v: y * getattr(net, "gain_{}".format(v)), (1, 2, 3)),  # noqa: UP032
    "key": (lambda net, y, v: y * {1: 2.0, 2: 5.0}.get(v, 7.0), (1, 2, 3)),
    "set": (lambda net, y, v: -y if v in {1, 2} else y, (1, 2, 3)),
    "hash": (lambda net, y, v: y * (hash(v) % 5), (1, 2, 3)),
    "class": (lambda net, y, v: y * 2 if type(v) is float else y, (1, 1.0)),
    "instance": (lambda net, y, v: y * 2 if isinstance(v, bool) else y, (1, True)),
    "attribute of a value": (lambda net, y, v: y * 2 if hasattr(v, "shape") else y, (1, torch.ones(1))),
    "tensor or number": (
        lambda net, y, v: y * v if torch.is_tensor(v) else y / v,
        (2, torch.tensor([[[3.0]]])),
    ),
    "axes": (lambda net, y, v: y * v if v.ndim == 3 else y + v.mean(), (torch.ones(2, 1, 1), torch.ones(4))),
    "whole numbers": (
        lambda net, y, v: y if v.is_floating_point() else -y,
        (torch.ones(1), torch.ones(1).long()),
    ),
    "length": (lambda net, y, v: y + len(v), ((1.0, 2.0), (1.0,), [3.0, 4.0, 5.0], ())),
    "pairs": (
        lambda net, y, v: sum((y * a + b for a, b in v), y),
        ([(1.0, 2.0)], [(1.0, 2.0), (3.0, 4.0)], []),
    ),
    "keys": (lambda net, y, v: y + len("".join(v)), ({"a": 1.0}, {"a": 1.0, "further": None}, {})),
    "presence": (lambda net, y, v: y * v["gain"] if "gain" in v else -y, ({"gain": 2.0}, {"shift": 2.0})),
    "order": (lambda net, y, v: y * next(iter(v.values())), ({"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 4.0})),
    "inside": (
        lambda net, y, v: y if not v["of"] or v["of"][0] is None else -y,
        ({"of": [None]}, {"of": [1.0]}),
    ),
    "text": (lambda net, y, v: y * 2 if v.startswith("a") else y, ("all", "none")),
    "truth": (lambda net, y, v: y * (v or 5), (None, 0, 2)),
    "none": (lambda net, y, v: y if v is None else y * v, (None, 2.0, torch.ones(1) * 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"output_stride": (1, 4)}, {"coarsest": 16}], ids=["strides", "floors"])
@pytest.mark.parametrize("asked", some(ASKED.values()), ids=ASKED)
def test_what_python_asks_of_an_argument_is_asked_of_the_calls_own(
    asked: tuple[Use, Sequence[Any]], options: Any
) -> None:
    use, values = asked
    model, x = randomise(Asks(use)).eval(), images(2, 61, 70)
    own = "all" if "coarsest" in options else "none"
    example = (images(1, 64, 96), values[0])
    net = cs.adaptify(model, own, example_input=example, outputs="native", **options)
    with torch.no_grad():
        for value in (*values, values[0]):
            assert_same(net(x, value), model(x, value))
        assert_same(net.optimize()(x, values[-1]), model(x, values[-1]))


def test_kinds_tell_apart_what_python_code_may() -> None:
    map_of_3 = torch.ones(1, 3, 4, 4)
    alike = [
        (1, 2), (1.0, 7.5), ("a", "a"), (map_of_3, torch.zeros(5, 3, 7, 9)), (map_of_3, map_of_3.double()),
        (map_of_3, map_of_3 > 0),
        ([1, 2.0], [3, 4.0]), ({"a": 1}, {"a": 2}), (Pair(1, 2), Pair(3, 4)),
    ]  # fmt: skip
    different = [
        (1, 1.0), (1, True), ("a", "b"), (None, 1), (map_of_3, map_of_3[:, :2]),
        (map_of_3, map_of_3[0]), ([1, 2], (1, 2)), ([1], [1, 2]), ({"a": 1}, {"b": 1}),
        ({"a": 1}, OrderedDict(a=1)), (Pair(1, 2), (1, 2)), (torch.float32, torch.float64), (True, False),
    ]  # fmt: skip
    assert [pair for pair in alike if argument_kind(pair[0]) != argument_kind(pair[1])] == []
    assert [pair for pair in different if argument_kind(pair[0]) == argument_kind(pair[1])] == []


def test_a_call_that_cannot_be_followed_is_refused_with_the_reason() -> None:
    def use(net: Any, y: Tensor, value: Any) -> Tensor:
        if value is not None and value.max() > 1:  # decides by values
            return -y
        return y

    net = cs.adaptify(randomise(Asks(use)).eval(), "none", example_input=images(1, 64, 96))
    for each in (net, net.optimize()):
        with pytest.raises(cs.InvalidInput, match=r"(?s)value=a .* is not what .*Read for this call.*traced"):
            each(images(1, 64, 96), torch.ones(3))


def test_an_example_that_became_a_constant_is_found_by_the_verification() -> None:
    """On the example itself nothing is wrong."""
    model = randomise(Asks(lambda net, y, _: y)).double().eval()
    _, facts = traceable_part(model, images(1, 64, 96, torch.float64))
    plan, flow = make_plan(facts, (1, 4), "auto", "", "native")
    program = carry_out(plan, flow, Geometry(plan.stage_strides, plan.max_level))
    case = Case.of(facts, program.graph, plan, program.geometry)
    assert all(check.passed for check in verify(case))
    with torch.no_grad():
        facts.model.register_buffer("constant", facts.model(facts.example))
    graph = program.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        constant = graph.get_attr("constant")
    output.args = ((constant, output.args[0][1]),)  # type: ignore[index]
    with pytest.raises(cs.CannotConvert, match="another call"):
        verify(replace(case, adapted=graph))
