"""An operation that acts on each position alone is one node, and does to rows what it does to maps."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import images, random_levels
from networks import ManyOperations, unverified
from torch import Tensor, fx

from cadsurgery.elements.elements import Elements, to_dense
from cadsurgery.elements.lattice import Geometry
from cadsurgery.elements.on_rows import OnRows, keep
from cadsurgery.network.program import runnable

STRIDES = (2, 2)


def elements(seed: int, stage: int = 1) -> Elements:
    """Two images of odd sizes, with cells of every level."""
    torch.manual_seed(0)
    lattice = Geometry(STRIDES).lattice(random_levels(2, (13, 10), STRIDES)).at(stage)
    torch.manual_seed(seed)
    return Elements(torch.randn(lattice.count, 6), lattice)


def vector() -> Tensor:
    return torch.linspace(-1, 1, 12).view(2, 6, 1, 1)


# Each with the same on maps, of which operands that are no elements are dense tensors.
CASES: dict[str, tuple[OnRows, tuple[Any, ...], Callable[..., Tensor]]] = {
    "a function": (OnRows(F.hardtanh), (-0.5, 0.5), lambda x: F.hardtanh(x, -0.5, 0.5)),
    "a method": (OnRows("mul"), (3,), lambda x: x * 3),
    "an operator": (OnRows(operator.truediv), (2,), lambda x: x / 2),
    "of a vector per image": (OnRows(torch.add, "bchw"), (vector(),), lambda x: x + vector()),
    "of a number in a tensor": (OnRows(torch.mul), (torch.tensor(0.5),), lambda x: x * 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_changed_as_maps_are(name: str) -> None:
    on_rows, others, of_map = CASES[name]
    x = elements(1)
    found = on_rows(x, *others)
    assert found.lattice is x.lattice
    torch.testing.assert_close(to_dense(found, 2), of_map(to_dense(x, 2)))


@pytest.mark.parametrize(
    "operation", [operator.add, torch.add, F.relu, "add", keep], ids=lambda one: getattr(one, "__name__", one)
)
def test_generated_code_and_pickles_hold_it(operation: Any) -> None:
    on_rows = OnRows(operation, "bchw", (2, "a join"))
    assert pickle.loads(pickle.dumps(on_rows)) == on_rows
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(
        graph.call_function(on_rows, (x, *((x,) if operation in (operator.add, torch.add, "add") else ())))
    )
    value = elements(1)
    assert torch.equal(runnable(graph)(None, value).rows, graph_free(operation, value.rows))


def graph_free(operation: Any, rows: Tensor) -> Tensor:
    """What an operation of the test above gives."""
    if operation in (operator.add, torch.add, "add"):
        return rows + rows
    return rows.relu() if operation is F.relu else rows


@torch.no_grad()
def test_each_operation_of_the_region_is_one_node() -> None:
    net = unverified(ManyOperations().eval(), "edges", example_input=images(1, 97, 129))
    made = [node for node in net.graph.nodes if isinstance(node.target, OnRows)]
    names = {decision.node for decision in net.plan.chosen("keep")}
    origins = [node.meta["origin"] for node in made if "origin" in node.meta]
    assert made and len(set(origins)) == len(origins) and set(origins) <= names
    assert not any(node.target is getattr and node.args[1] == "lattice" for node in net.graph.nodes)
