"""Write an ONNX graph as plain torch operations, node by node.

A node is written by `onnx_maps` or, where it computes with sizes, by `onnx_numbers`; layers with weights and what else
is not there are modules of onnx2torch, under the node's name. Constants are read while the graph is written, so that
`Reshape` with a constant becomes `x.reshape(...)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cadsurgery.data.onnx_maps import OF_MAPS, refuse
from cadsurgery.data.onnx_numbers import OF_NUMBERS, Numbers, OnnxOperation, OnnxTracer, refuse_numbers
from cadsurgery.support.errors import as_refusal, describe_error

_LATEST = 30  # an opset that no converter of onnx2torch is from


def version_of(node: Any, opset: int) -> int | None:
    """Return the opset that the meaning of a node's operator is from; None if ONNX has no such operator."""
    from onnx import defs

    try:
        return int(
            defs.get_schema(node.op_type, max_inclusive_version=opset, domain=node.domain).since_version
        )
    except defs.SchemaError:
        return None


def is_known(node: Any, opset: int) -> bool:
    """True if an operator is written here, or by onnx2torch."""
    if node.domain not in ("", "ai.onnx"):
        return False
    return (
        node.op_type in OF_MAPS or node.op_type in OF_NUMBERS or _converter(node.op_type, opset) is not None
    )


@cache
def _converter(kind: str, opset: int) -> Any:
    """Return onnx2torch's converter of an operator: that of its own version, or the nearest one; None if there is none.

    Later versions allow more types of values, or attributes whose defaults change nothing. Where they mean something
    else, onnx2torch has them, or the comparison with ONNX Runtime finds it.
    """
    from onnx2torch.node_converters import get_converter

    for version in (*range(opset, 0, -1), *range(opset + 1, _LATEST)):
        try:
            return get_converter(kind, version, "")
        except NotImplementedError:
            continue
    return None


def _refusing(operation: OnnxOperation, by: str = "") -> AbstractContextManager[None]:
    # Converters and torch raise errors of many types for attributes and arguments that they do not take.
    return as_refusal(lambda error: refuse(operation, by + describe_error(error)))


class _Graph(nn.Module):
    """The nodes of an ONNX graph, for a tracer to follow.

    Args:
        model: the ONNX model, whose nodes lose the padding that `_call_padded` adds.
        shapes: see `write_plainly`.
        tracer: the tracer that records this module.
    """

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int | None, ...]], tracer: OnnxTracer) -> None:
        from onnx2torch.onnx_graph import OnnxGraph

        super().__init__()
        opset, operations = opset_of(model), []
        for stored in model.graph.node:
            operation = OnnxOperation(stored, version_of(stored, opset) or opset, shapes, tracer)
            operations.append(operation)
            if _has_own_padding(operation):
                kept = [stated for stated in stored.attribute if stated.name not in ("auto_pad", "pads")]
                del stored.attribute[:]
                stored.attribute.extend(kept)
        held = {tensor.name for tensor in model.graph.initializer}
        graph = OnnxGraph(model.graph)
        self._tracer, self._input, self._results = tracer, inputs_of(model)[0].name, graph.output_values
        self._steps: list[tuple[OnnxOperation, nn.Module | None, tuple[str, ...], tuple[str, ...]]] = []
        needed = [name for name in self._results if name in held]
        for operation, (name, node) in zip(operations, graph.nodes.items(), strict=True):
            module, read = None, node.input_values
            converter = None if operation.type in OF_MAPS else _converter(operation.type, opset)
            if converter is not None:
                with _refusing(operation, "onnx2torch: "):
                    module, mapping = converter(node, graph)
                read = mapping.inputs
                self.add_module(name, module)
            needed += [value for value in read if value in held]
            self._steps.append((operation, module, read, node.output_values))
        self.initializers = nn.Module()
        self._constants: dict[str, str] = {}
        for value in dict.fromkeys(needed):
            self._constants[value] = f"onnx_initializer_{len(self._constants)}"
            self.initializers.register_buffer(self._constants[value], graph.initializers[value].to_torch())

    def forward(self, image: Any) -> Any:
        self._tracer.image = image
        values: dict[str, Any] = {"": None, self._input: image}
        for value, name in self._constants.items():
            values[value] = getattr(self.initializers, name)
        for operation, module, read, made in self._steps:
            with _refusing(operation):
                result = _write(operation, module, [values[value] for value in read])
            if len(made) == 1:
                values[made[0]] = result
            else:
                values.update({value: result[index] for index, value in enumerate(made) if value})
        results = [values[value] for value in self._results]
        return results[0] if len(results) == 1 else results


def _write(operation: OnnxOperation, module: nn.Module | None, args: list[Any]) -> Any:
    """Write one node of the ONNX graph."""
    has_map = any(isinstance(value, fx.Proxy) for value in args)
    if any(isinstance(value, Numbers) for value in args):
        of_numbers = None if has_map else OF_NUMBERS.get(operation.type)
        return (of_numbers or OF_MAPS.get(operation.type, refuse_numbers))(operation, *args)
    if operation.type in OF_MAPS:
        return OF_MAPS[operation.type](operation, *args)
    if module is None:
        return OF_NUMBERS[operation.type](operation, *args)
    if _has_own_padding(operation):
        return _call_padded(module, operation, args[0])
    names = list(inspect.signature(module.forward).parameters)
    given = {name: value for name, value in zip(names, args, strict=False) if value is not None}
    return module(**given) if any(value is None for value in args) else module(*args)


def opset_of(model: Any) -> int:
    """Return the opset whose operators a model has."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def inputs_of(model: Any) -> list[Any]:
    """Return what a call of a model gives: its inputs without those that the file holds."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def write_plainly(
    model: Any, shapes: Mapping[str, tuple[int | None, ...]], batch: int | None
) -> fx.GraphModule:
    """Return the network of an ONNX graph, written as plain torch operations.

    Args:
        model: the ONNX model, without functions; `is_known` is true of each node. Its nodes are changed.
        shapes: lengths of the axes of its values, None where they are free.
        batch: see `OnnxTracer`.

    Raises:
        CannotConvert: an operator has a form that is not read, or the graph computes with sizes in a way that cannot be
            written as numbers.
    """
    tracer = OnnxTracer(batch)
    graph = _Graph(model, shapes, tracer)
    written = fx.GraphModule(graph, tracer.trace(graph))
    written.delete_all_unused_submodules()
    return written.eval()


# -- padding that torch's layers cannot have: `auto_pad` of ONNX, and pools with other padding at each side ----------

# With these n samples give ceil(n / stride) outputs, and a transposed convolution gives n * stride. Of an odd amount
# the larger half lies behind the map (upper) or before it (lower).
_LIKE_THE_MAP = ("SAME_UPPER", "SAME_LOWER")
_POOLS = ("MaxPool", "AveragePool")


def _has_own_padding(operation: OnnxOperation) -> bool:
    """True if an operation's padding is `auto_pad`, or one that torch's layer for it cannot have."""
    if operation.get("auto_pad", "NOTSET") in _LIKE_THE_MAP:
        return True
    pads = operation.get("pads", [])
    before, behind = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    if operation.type not in (*_POOLS, "ConvTranspose") or not any(pads):
        return False
    kernel = operation.get("kernel_shape", [])
    is_wide = operation.type in _POOLS and any(
        pad > taps // 2 for pad, taps in zip(before, kernel, strict=True)
    )
    return before != behind or is_wide


def _call_padded(layer: Any, operation: OnnxOperation, value: Any) -> Any:
    """Call a convolution or pooling that has no padding yet, with the padding that ONNX asks for.

    Args:
        layer: a layer of torch for one to three axes. Padding that is the same for every size and at both borders
            becomes the layer's own.
        operation: the operation, of which `_has_own_padding` is true.
        value: the map that it reads, (B, C, ...).
    """
    auto_pad = operation.get("auto_pad", "NOTSET")
    is_upper, is_transposed = auto_pad == "SAME_UPPER", "Transpose" in type(layer).__name__
    axes = len(_per_axis(layer.kernel_size, 3))
    kernel, stride, dilation = (
        _per_axis(numbers, axes)
        for numbers in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
    )
    spans = [step * (taps - 1) + 1 for taps, step in zip(kernel, dilation, strict=True)]
    if auto_pad not in _LIKE_THE_MAP:
        pads = operation.attributes["pads"]
        halves = list(zip(pads[:axes], pads[axes:], strict=True))
        if is_transposed:
            kept = [slice(before, -behind or None) for before, behind in halves]
            return layer(value)[(slice(None), slice(None), *kept)]
        is_behind = all(before == 0 for before, _ in halves)
    elif is_transposed:
        return _call_cropped(layer, spans, stride, is_upper, value)
    else:
        totals = [
            _total(span, step, value, axis)
            for axis, (span, step) in enumerate(zip(spans, stride, strict=True), 2)
        ]
        halves, is_behind = [_halves(total, is_upper) for total in totals], is_upper
        is_own = all(type(total) is int and total % 2 == 0 for total in totals)
        if is_own and all(before <= taps // 2 for (before, _), taps in zip(halves, kernel, strict=True)):
            layer.padding = tuple(before for before, _ in halves)
            return layer(value)
    widths = tuple(width for pair in reversed(halves) for width in pair)
    if not hasattr(layer, "count_include_pad"):
        is_convolution = hasattr(layer, "in_channels")
        return layer(F.pad(value, widths, "constant", 0.0 if is_convolution else float("-inf")))
    if layer.count_include_pad:
        return layer(F.pad(value, widths))
    if is_behind and kernel == stride == [2] * axes:  # incomplete windows at the end alone
        layer.ceil_mode = True
        return layer(value)
    inside = F.pad(torch.ones_like(value[:, :1]), widths)
    return layer(F.pad(value, widths)) / layer(inside)


def _per_axis(value: Any, axes: int) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * axes


def _total(span: int, stride: int, value: Any, axis: int) -> Any:
    """Return how many samples of padding an axis needs: a number, or what is computed from its length."""
    if stride == 1 or span == 1:
        return span - 1
    total = span - stride + -value.size(axis) % stride
    return total if span >= stride else (total + abs(total)) // 2  # none where it would be negative


def _halves(total: Any, is_upper: bool) -> tuple[Any, Any]:
    smaller = total // 2
    return (smaller, total - smaller) if is_upper else (total - smaller, smaller)


def _call_cropped(layer: Any, spans: list[int], stride: list[int], is_upper: bool, value: Any) -> Any:
    """Call a transposed convolution whose output is `stride` times as long as its input. Its padding crops as much
    before as behind; the rest is cut off."""
    totals = [
        max(0, span + extra - step)
        for span, extra, step in zip(spans, _per_axis(layer.output_padding, len(spans)), stride, strict=True)
    ]
    layer.padding = tuple(total // 2 for total in totals)
    result, index = layer(value), [slice(None), slice(None)]
    for axis, (total, step) in enumerate(zip(totals, stride, strict=True), 2):
        length = step * value.size(axis)
        kept = slice(length) if is_upper else slice(1, length + 1)
        index.append(kept if total % 2 else slice(None))
    return result[tuple(index)] if any(total % 2 for total in totals) else result
