"""Programs are put into operations that ONNX has: the outputs stay as they are, or torch decomposes the program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
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


class ReadsAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first = y[0]
        y.add_(1)
        return first + y


def program_of(module: nn.Module) -> ExportedProgram:
    return torch.export.export(module, (torch.rand(3, 4, 2, 5),), dynamic_shapes=({0: Dim.DYNAMIC},))


def is_mutable(node: Any) -> bool:
    return hasattr(node.target, "_schema") and node.target._schema.is_mutable


@pytest.mark.parametrize("batch", [2, 3, 7])
def test_outputs_stay_as_they_are(batch: int) -> None:
    program, x = program_of(ManyForms()), torch.randn(batch, 4, 2, 5)
    assert decompose(program, {torch.ops.aten.rsub.Scalar, torch.ops.aten.square.default})
    assert not any(map(is_mutable, program.graph.nodes))
    for output, expected in zip(program.module()(x), ManyForms()(x), strict=True):
        assert torch.equal(output, expected)


def test_no_operation_of_the_table_remains() -> None:
    program, table = program_of(ManyForms()), {torch.ops.aten.rsub.Scalar, torch.ops.aten.square.default}
    assert table & {node.target for node in program.graph.nodes}
    assert decompose(program, table)
    assert not table & {node.target for node in program.graph.nodes}


@pytest.mark.parametrize(
    ("module", "table"),
    [(ReadsAView(), set()), (nn.Softplus(), {torch.ops.aten.softplus.default})],
    ids=["a view is read after the change", "an operation that has no rule"],
)
def test_what_is_not_known_is_left_to_torch(module: nn.Module, table: set[Any]) -> None:
    program, x = program_of(module), torch.randn(2, 4, 2, 5)
    before = [node.target for node in program.graph.nodes]
    assert not decompose(program, table)
    assert [node.target for node in program.graph.nodes] == before
    assert torch.equal(program.module()(x), module(x))
