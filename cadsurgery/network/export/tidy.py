"""Make the graph of an ONNX file smaller and faster; values stay the same.

The exporter's own optimiser is not used: it takes ten times as long, minutes for a large graph, and engines optimise
the file anyway when they open it. They do not join operations that read rows one after the other, though.
"""

from __future__ import annotations

from typing import Any

from cadsurgery.network.export.kernels import DOMAIN, PICK

LARGEST = 1 << 28  # number of values that a constant may be computed from
_WIDTH_OF_A_HALO = 4  # elements that a halo row is interpolated from


def tidy(model: Any, has_kernels: bool) -> None:
    """Fold constants, join operations that read rows one after the other, remove duplicate and unused parts."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants_ir

    passes.InlinePass()(model)
    # Also of large constants: OpenVINO 2026.4 never ends at sums of constants in float64 that are left to it.
    fold_constants_ir(model, onnx_shape_inference=True, input_size_limit=LARGEST)
    for node in list(model.graph):
        if _gathers_rows(node):
            _join(node, has_kernels)
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.NameFixPass(),
    ):
        step(model)


def _join(node: Any, has_kernels: bool) -> None:
    """Let a Gather of rows read the rows that another Gather read, at the places that both lead to, also behind rows
    that are set to a number."""
    import onnx_ir as ir
    from onnx_ir import tape

    builder = tape.Tape()
    steps: list[Any] = []  # condition and number of a Where
    rows, index = node.inputs
    while (source := rows.producer()) is not None and len(rows.uses()) == 1 and not rows.is_graph_output():
        if _gathers_rows(source):
            rows, inner = source.inputs
            index = _typed(builder.op("Gather", [inner, index], {"axis": 0}), inner.dtype, index.shape)
        elif _sets_rows(source) and not steps:
            condition, rows, number = source.inputs
            shape = ir.Shape([index.shape[0], *condition.shape[1:]])
            steps = [
                _typed(builder.op("Gather", [condition, index], {"axis": 0}), condition.dtype, shape),
                number,
            ]
        else:
            break
    if rows is node.inputs[0]:
        return
    if steps and has_kernels and _is_picked(rows, *steps):
        read = _pick(builder, rows, index, steps[0])
    else:
        read = builder.op("Gather", [rows, index], {"axis": 0})
        read = builder.op("Where", [steps[0], read, steps[1]]) if steps else read
    result = node.outputs[0]
    read.name, read.dtype, read.shape = f"{result.name}_at_once", result.dtype, result.shape
    node.graph.insert_before(node, builder.nodes)
    ir.convenience.replace_all_uses_with(result, read, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def _typed(value: Any, dtype: Any, shape: Any) -> Any:
    value.dtype, value.shape = dtype, shape
    return value


def _gathers_rows(node: Any) -> bool:
    """True if a node reads rows, entries of the first axis, by a vector of their numbers."""
    if node.domain or node.op_type != "Gather" or "axis" not in node.attributes:
        return False
    index = node.inputs[1].shape
    return node.attributes["axis"].as_int() == 0 and index is not None and len(index) == 1


def _sets_rows(node: Any) -> bool:
    """True if a node sets whole rows to a number."""
    if node.domain or node.op_type != "Where" or any(value.shape is None for value in node.inputs):
        return False
    condition, rows, number = (value.shape for value in node.inputs)
    by_row = len(condition) == len(rows) > 0 and all(length == 1 for length in condition[1:])
    return len(number) == 0 and by_row and condition[0] != 1


def _is_picked(rows: Any, condition: Any, number: Any) -> bool:
    """True if a kernel reads the rows, and zeros in place of some."""
    import onnx_ir as ir

    held = ir.convenience.get_const_tensor(number)
    is_zero = held is not None and held.numpy().item() == 0
    of_floats = rows.dtype == ir.DataType.FLOAT and rows.shape is not None and len(rows.shape) == 2
    return is_zero and of_floats and len(condition.shape) == 2


def _pick(builder: Any, rows: Any, index: Any, condition: Any) -> Any:
    """Read rows by the kernel, for which the row after the last holds zeros."""
    import numpy as np
    import onnx_ir as ir

    table = builder.op("Cast", [index], {"to": ir.DataType.INT32})
    column = builder.op("Unsqueeze", [table, _constant(builder, np.array([1]))])
    number = builder.op("Shape", [rows], {"start": 0, "end": 1})
    outside = builder.op("Cast", [number], {"to": ir.DataType.INT32})
    table = builder.op("Where", [condition, column, outside])
    halo = (np.zeros((0, _WIDTH_OF_A_HALO), kind) for kind in (np.int32, np.float32))
    return builder.op(PICK, [rows, table, *(_constant(builder, part) for part in halo)], domain=DOMAIN)


def _constant(builder: Any, numbers: Any) -> Any:
    import onnx_ir as ir

    return builder.op("Constant", [], {"value": ir.tensor(numbers)})
