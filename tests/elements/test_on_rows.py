"""An operation that acts on each position alone is one node, and does to rows what it does to maps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import images, random_levels
from networks import ManyOperations, unverified
from torch import Tensor

from cadsurgery.elements.elements import Elements, to_dense
from cadsurgery.elements.lattice import Geometry
from cadsurgery.elements.on_rows import OnRows

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


@torch.no_grad()
def test_each_operation_of_the_region_is_one_node() -> None:
    net = unverified(ManyOperations().eval(), "edges", example_input=images(1, 97, 129))
    made = [node for node in net.graph.nodes if isinstance(node.target, OnRows)]
    names = {decision.node for decision in net.plan.chosen("keep")}
    origins = [node.meta["origin"] for node in made if "origin" in node.meta]
    assert made and len(set(origins)) == len(origins) and set(origins) <= names
    assert not any(node.target is getattr and node.args[1] == "lattice" for node in net.graph.nodes)
