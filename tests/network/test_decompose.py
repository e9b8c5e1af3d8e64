"""Programs are put into operations that ONNX has: the outputs stay as they are, or torch decomposes the program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import some
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.export import Dim, ExportedProgram

from cadsurgery.network.export.decompose import decompose


class ManyForms(nn.Module):
    """Operations without an ONNX translation, and changes in place of a tensor and of a view that nobody else reads."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = (x * 2).add_(1).clamp_(min=0)
        rows = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
        marked = torch.zeros(rows.shape[0]).index_fill_(0, torch.tensor([0, 2]), 3)
        pairs = (1 - rows).square().flatten(1).unflatten(0, (-1, 2))
        wide = marked[:1].expand_as(marked).to(torch.float64).to(torch.float32)
        return y, pairs, wide + marked, (rows - 1).reshape_as(rows).relu_(), y.detach()


class WithoutRules(nn.Module):
    """Operations that this package has no rule for: one with several outputs, one of sizes, one of two types."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        low, high = torch.aminmax(x, dim=1)
        return nn.functional.softplus(low), high, x.new_zeros(x.shape[0]), (x > 0) & (x < 1)


class ReadsAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first = y[0]
        y.add_(1)
        return first + y


def program_of(module: nn.Module) -> ExportedProgram:
    return torch.export.export(module, (torch.rand(3, 4, 2, 5),), dynamic_shapes=({0: Dim.DYNAMIC},))


TABLE = get_decompositions(
    [
        torch.ops.aten.rsub.Scalar,
        torch.ops.aten.square.default,
        torch.ops.aten.softplus.default,
        torch.ops.aten.aminmax.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.__and__.Tensor,
    ]
)


def is_mutable(node: Any) -> bool:
    return hasattr(node.target, "_schema") and node.target._schema.is_mutable


@pytest.mark.parametrize("batch", some([2, 3, 7], every=3))
def test_outputs_stay_as_they_are(batch: int) -> None:
    program, x = program_of(ManyForms()), torch.randn(batch, 4, 2, 5)
    assert decompose(program, TABLE)
    assert not any(map(is_mutable, program.graph.nodes))
    for output, expected in zip(program.module()(x), ManyForms()(x), strict=True):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("module", [ManyForms(), WithoutRules()])
def test_no_operation_of_the_table_remains(module: nn.Module) -> None:
    program, x = program_of(module), torch.randn(5, 4, 2, 5)
    assert TABLE.keys() & {node.target for node in program.graph.nodes}
    assert decompose(program, TABLE)
    assert not TABLE.keys() & {node.target for node in program.graph.nodes}
    for output, expected in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(output, expected)


def test_a_view_that_is_read_after_a_change_is_left_to_torch() -> None:
    program, x = program_of(ReadsAView()), torch.randn(2, 4, 2, 5)
    before = [node.target for node in program.graph.nodes]
    assert not decompose(program, {})
    assert [node.target for node in program.graph.nodes] == before
    assert torch.equal(program.module()(x), ReadsAView()(x))


def test_an_operation_that_torch_makes_of_changes_in_place_is_left_to_torch() -> None:
    def shift(x: Tensor, other: float) -> Tensor:
        return x.clone().add_(other)

    program = program_of(nn.Threshold(0.5, 2.0))
    target = torch.ops.aten.threshold.default
    assert not decompose(program, {target: lambda x, threshold, value: shift(x, value)})
    assert target in {node.target for node in program.graph.nodes}
