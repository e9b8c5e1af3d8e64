"""Files are made smaller and faster without a change of what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.export import Dim, ExportedProgram

import cadsurgery as cs
from cadsurgery.kernels.load import open_kernels
from cadsurgery.network.export.decompose import decompose

onnx, ir = pytest.importorskip("onnx"), pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from cadsurgery.network.export.kernels import declare_kernels  # noqa: E402
from cadsurgery.network.export.tidy import tidy  # noqa: E402

_HEAD = '<ir_version: 10, opset_import: ["" : 20]> graph'
_INPUTS = "(float[N,4] rows, int64[M] first, int64[K] then, bool[M,1] kept)"
_STEPS = {
    "twice": "a = Gather<axis = 0>(rows, first) out = Gather<axis = 0>(a, then)",
    "thrice": "a = Gather<axis = 0>(rows, first) b = Gather<axis = 0>(a, first) out = Gather<axis = 0>(b, then)",
    "behind zeros": "a = Gather<axis = 0>(rows, first) n = Constant<value_float = 0.0>() "
    "b = Where(kept, a, n) out = Gather<axis = 0>(b, then)",
    "behind ones": "a = Gather<axis = 0>(rows, first) n = Constant<value_float = 1.0>() "
    "b = Where(kept, a, n) out = Gather<axis = 0>(b, then)",
}
_OTHERS = {
    "read elsewhere": "a = Gather<axis = 0>(rows, first) b = Gather<axis = 0>(a, then) "
    "c = ReduceSum(a) out = Add(b, c)",
    "of another axis": "a = Gather<axis = 1>(rows, first) out = Gather<axis = 0>(a, then)",
    "other rows for each": "a = Gather<axis = 0>(rows, first) b = Where(kept, a, a) out = Gather<axis = 0>(b, then)",
}


def feed() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    numbers = {"first": draw.integers(0, 4, 9), "then": draw.integers(0, 9, 7)}
    return {"rows": draw.random((9, 4), np.float32), "kept": draw.random((9, 1)) < 0.5, **numbers}


def run(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # of inputs that nothing reads
    if any(node.op_type == "Pick" for node in model.graph.node):
        options.register_custom_ops_library(cs.kernels_for("onnxruntime"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {one.name: feed()[one.name] for one in session.get_inputs()})[0]


def reads_of_rows(model: Any) -> list[str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    floats = {name for name, kind in values.items() if kind == onnx.TensorProto.FLOAT}
    return [
        node.op_type for node in graph.node if node.op_type in ("Gather", "Pick") and node.input[0] in floats
    ]


WITHOUT = pytest.mark.skipif(open_kernels().library is None, reason="there are no kernels")


@pytest.mark.parametrize("has_kernels", [False, pytest.param(True, marks=WITHOUT)])
@pytest.mark.parametrize("name", [*_STEPS, *_OTHERS])
def test_rows_that_are_read_again_are_read_once(name: str, has_kernels: bool) -> None:
    text = f"{_HEAD} {_INPUTS} => (float[K,P] out) {{ {(_STEPS | _OTHERS)[name]} }}"
    model = onnx.parser.parse_model(text)
    tidied = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    tidy(tidied, has_kernels)
    declare_kernels(tidied)
    written = ir.to_proto(tidied)
    assert np.array_equal(run(written), run(model))
    picks = has_kernels and name == "behind zeros"
    once = ["Pick"] if picks else ["Gather"]
    assert reads_of_rows(written) == (once if name in _STEPS else ["Gather", "Gather"])


@pytest.mark.parametrize("kind", ["float", "double"])
def test_arithmetic_of_constants_is_done_once(kind: str) -> None:
    """Whatever the constants hold: OpenVINO never ended at such sums of float64 that were left to it."""
    text = f"""{_HEAD} (float[N,4] rows) => (float[N,4] out) {{
        n = Constant<value_float = 4.0>() places = CastLike(n, many) column = Gather<axis = 1>(many, zero)
        shifted = Sub(column, few) scaled = Mul(shifted, places) sum = ReduceSum<keepdims = 0>(scaled)
        wide = Cast<to = 1>(sum) out = Add(rows, wide) }}"""
    model, draw = onnx.parser.parse_model(text), np.random.default_rng(0)
    dtype = np.float32 if kind == "float" else np.float64
    constants = {"many": draw.random((96, 128)).astype(dtype), "few": draw.random(96).astype(dtype)}
    constants["zero"] = np.array(0)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(*pair[::-1]) for pair in constants.items())
    tidied = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    tidy(tidied, has_kernels=False)
    written = ir.to_proto(tidied)
    assert np.allclose(run(written), run(model))
    assert [node.op_type for node in written.graph.node] == ["Add"]


# -- programs are put into operations that ONNX has: the outputs stay as they are, or torch decomposes them


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


@pytest.mark.parametrize("module", [ManyForms(), WithoutRules()])
def test_no_operation_of_the_table_remains_and_outputs_stay_as_they_are(module: nn.Module) -> None:
    program = program_of(module)
    assert TABLE.keys() & {node.target for node in program.graph.nodes}
    assert decompose(program, TABLE)
    assert not TABLE.keys() & {node.target for node in program.graph.nodes}
    assert not any(map(is_mutable, program.graph.nodes))
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4, 2, 5)
        for output, expected in zip(program.module()(x), module(x), strict=True):
            if isinstance(module, ManyForms):
                assert torch.equal(output, expected)
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
