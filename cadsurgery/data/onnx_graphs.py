"""Write an ONNX graph as plain torch operations, from the modules that onnx2torch makes of its nodes.

ONNX computes sizes with tensors: the shape of a map goes through Gather, Slice, Concat and arithmetic into Reshape or
Resize. Here such numbers are numbers of Python, `x.size(2)` and what is computed from it, as in networks that people
write. Constants are read while the graph is written, so that `Reshape` with a constant becomes `x.reshape(...)`.
Tensors that are made of sizes, such as the coordinates of a detector's anchors, are made in each call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadsurgery.data.onnx_padding import LIKE_THE_MAP, call_padded
from cadsurgery.support.errors import CannotConvert

_TO_THE_END = 2**31 - 1  # ends of slices from here on mean the end of the axis
_INTEGERS = (2, 3, 4, 5, 6, 7, 12, 13)  # ONNX's codes of integer types
_ARITHMETIC: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Add": (operator.add, torch.add),
    "Sub": (operator.sub, torch.sub),
    "Mul": (operator.mul, torch.mul),
    "Div": (operator.truediv, torch.div),
    "Pow": (operator.pow, torch.pow),
}
_COMPARISONS: dict[str, Callable[..., bool]] = {
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
}
_ROUNDINGS: dict[str, Callable[..., Any]] = {"Floor": math.floor, "Ceil": math.ceil}
_MODES = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}
_PADDINGS = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}


@dataclass(frozen=True)
class Numbers:
    """Numbers computed from sizes: plain ones, and proxies of numbers. ONNX holds them in a tensor.

    Attributes:
        values: the numbers.
        is_scalar: True if the tensor has no axis.
        is_float: True if they are floating-point numbers.
    """

    values: tuple[Any, ...]
    is_scalar: bool = False
    is_float: bool = False


class OnnxOperation:
    """A node of the ONNX graph: its type, its attributes, and the number of axes of its first input."""

    def __init__(self, node: Any, ranks: Mapping[str, int]) -> None:
        import onnx

        self.type, self.name, self.outputs = str(node.op_type), str(node.name), len(node.output)
        self.attributes = {
            stated.name: onnx.helper.get_attribute_value(stated)
            for stated in node.attribute
            if stated.type != stated.GRAPH
        }
        self.rank = ranks.get(node.input[0], 0) if node.input else 0

    def text(self, name: str, default: str) -> str:
        """Return an attribute that is a text."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)


class OnnxTracer(fx.Tracer):
    """Traces the modules of onnx2torch; constants keep their values, and sizes are numbers.

    Args:
        operations: the operation of each module, by the name of its first output.
        batch: number of images of the file if it is fixed; a Reshape to it keeps the number of a call instead.
    """

    def __init__(self, operations: Mapping[str, OnnxOperation], batch: int | None) -> None:
        super().__init__()
        self._operations, self.batch = operations, batch
        self._image: fx.Proxy | None = None

    @property
    def image(self) -> fx.Proxy:
        """The image, whose device and type of floating-point numbers the tensors that the graph makes have, too."""
        if self._image is None:
            inputs = (node for node in self.graph.nodes if node.op == "placeholder")
            self._image = self.proxy(next(inputs))
        return self._image

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Write one node of the ONNX graph."""
        mapping = getattr(m, "onnx_mapping", None)
        operation = self._operations.get(mapping.outputs[0]) if mapping is not None else None
        write = None if operation is None else self._way_to_write(operation, args)
        result = NotImplemented if write is None else write(self, operation, *args, **kwargs)
        if result is not NotImplemented:
            return result
        call, auto_pad = super().call_module, "" if operation is None else operation.text("auto_pad", "")
        if auto_pad in LIKE_THE_MAP:
            return call_padded(m, auto_pad, args[0], lambda value: call(m, forward, (value,), {}))
        return call(m, forward, args, kwargs)

    def _way_to_write(self, operation: OnnxOperation, args: Any) -> Callable[..., Any] | None:
        """Return the function that writes an operation on these arguments; None if its module is written as it is."""
        has_map = any(isinstance(value, fx.Proxy) for value in args)
        if operation.type == "Shape":
            return _shape
        if any(isinstance(value, Numbers) for value in args):
            table = _OF_MAPS if has_map else _OF_NUMBERS
            return table.get(operation.type, _refuse_numbers)
        return _OF_MAPS.get(operation.type) if has_map else None

    def make(self, function: Callable[..., Any], arguments: Sequence[Any], kind: type) -> Any:
        """Record a tensor of `kind` that is made of sizes, on the image's device and in its type of floats."""
        dtype = self.image.dtype if kind is float else torch.bool if kind is bool else torch.int64
        options = {"dtype": dtype, "device": self.image.device}
        return self.create_proxy("call_function", function, tuple(arguments), options)

    def round(self, function: Callable[..., Any], value: Any) -> Any:
        """Round a number, or record that it is rounded."""
        if isinstance(value, fx.Proxy):
            return self.create_proxy("call_function", function, (value,), {})
        return function(value)


def write_plainly(imported: fx.GraphModule, graph: Any, batch: int | None) -> fx.GraphModule:
    """Return the network that onnx2torch made of an ONNX graph, written as plain torch operations.

    Args:
        imported: result of `onnx2torch.convert` with `attach_onnx_mapping=True`.
        graph: the ONNX graph, with the shapes of its values.
        batch: see `OnnxTracer`.

    Raises:
        CannotConvert: the graph computes with sizes in a way that cannot be written as numbers.
    """
    values = (*graph.input, *graph.value_info, *graph.output)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    operations = {node.output[0]: OnnxOperation(node, ranks) for node in graph.node}
    written = fx.GraphModule(imported, OnnxTracer(operations, batch).trace(imported))
    written.delete_all_unused_submodules()
    for module in written.modules():
        vars(module).pop("onnx_mapping", None)
    return written.eval()


def numbers(value: Any) -> Numbers:
    """Return the numbers of a constant tensor."""
    if isinstance(value, Numbers):
        return value
    return Numbers(tuple(value.flatten().tolist()), value.dim() == 0, value.is_floating_point())


def _refuse_numbers(writer: OnnxTracer, operation: OnnxOperation, *_: Any, **__: Any) -> Any:
    raise CannotConvert(
        f"the ONNX graph computes with the sizes of its maps in {operation.type}.",
        where=operation.name,
        why="sizes are followed through Shape, Gather, Slice, Concat, Cast, arithmetic and rounding only.",
        next="export the network again for a fixed size, which leaves constants in their place.",
    )


# -- operations on numbers -------------------------------------------------------------------------------------------


def _shape(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    given = operation.attributes
    axes = range(operation.rank)[given.get("start", 0) : given.get("end")]
    return Numbers(tuple(value.size(axis) for axis in axes))


def _gather(writer: OnnxTracer, operation: OnnxOperation, value: Any, indices: Any) -> Any:
    chosen = numbers(indices)
    values = tuple(value.values[index] for index in chosen.values)
    return Numbers(values, chosen.is_scalar, value.is_float)


def _slice_numbers(writer: OnnxTracer, operation: OnnxOperation, value: Any, *bounds: Any) -> Any:
    start, end, _, step = (values[0] for values in _bounds(*bounds))
    return Numbers(value.values[start:end:step], False, value.is_float)


def _join(writer: OnnxTracer, operation: OnnxOperation, *parts: Any) -> Any:
    joined = [numbers(part) for part in parts]
    return Numbers(tuple(value for part in joined for value in part.values), False, joined[0].is_float)


def _with_axis(writer: OnnxTracer, operation: OnnxOperation, value: Any, axes: Any = None) -> Any:
    return Numbers(value.values, False, value.is_float)


def _without_axis(writer: OnnxTracer, operation: OnnxOperation, value: Any, axes: Any = None) -> Any:
    return Numbers(value.values, len(value.values) == 1, value.is_float)


def _cast(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    is_integer = operation.attributes["to"] in _INTEGERS
    if not (is_integer and value.is_float):
        return Numbers(value.values, value.is_scalar, not is_integer)
    return Numbers(tuple(writer.round(int, number) for number in value.values), value.is_scalar)


def _round(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    rounded = tuple(writer.round(_ROUNDINGS[operation.type], number) for number in value.values)
    return Numbers(rounded, value.is_scalar, value.is_float)


def _product(writer: OnnxTracer, operation: OnnxOperation, value: Any, axes: Any = None) -> Any:
    return Numbers((math.prod(value.values),), not operation.attributes.get("keepdims", 1), value.is_float)


def _choose(writer: OnnxTracer, operation: OnnxOperation, condition: Any, first: Any, second: Any) -> Any:
    parts = [numbers(part) for part in (condition, first, second)]
    chosen = _broadcast(*parts)
    if any(isinstance(is_first, fx.Proxy) for is_first, _, _ in chosen):
        return _refuse_numbers(writer, operation)
    values = tuple(this if is_first else that for is_first, this, that in chosen)
    return Numbers(values, all(part.is_scalar for part in parts), parts[1].is_float)


def _compare(writer: OnnxTracer, operation: OnnxOperation, first: Any, second: Any) -> Any:
    """Compare numbers. A size is never negative, so comparisons with -1, which asks for the rest, are known."""
    left, right = numbers(first), numbers(second)
    known = []
    for pair in _broadcast(left, right):
        signs = [0 if isinstance(value, fx.Proxy) else value for value in pair]
        if any(isinstance(value, fx.Proxy) for value in pair) and min(signs) >= 0:
            return _refuse_numbers(writer, operation)
        known.append(_COMPARISONS[operation.type](*signs))
    return Numbers(tuple(known), left.is_scalar and right.is_scalar)


def _compute(writer: OnnxTracer, operation: OnnxOperation, first: Any, second: Any) -> Any:
    left, right = numbers(first), numbers(second)
    is_float = left.is_float or right.is_float
    compute = _ARITHMETIC[operation.type][0]
    if operation.type == "Div" and not is_float:
        compute = operator.floordiv  # of sizes, which are not negative
    values = tuple(compute(*pair) for pair in _broadcast(left, right))
    return Numbers(values, left.is_scalar and right.is_scalar, is_float)


def _broadcast(*parts: Numbers) -> list[tuple[Any, ...]]:
    """Return the operands of each result; a single number is one of all."""
    count = max(len(part.values) for part in parts)
    return list(zip(*(part.values * (count // len(part.values)) for part in parts), strict=True))


def _range(writer: OnnxTracer, operation: OnnxOperation, *bounds: Any) -> Any:
    """Write numbers at equal distances, such as the coordinates of a map's columns."""
    parts = [numbers(bound) for bound in bounds]
    kind = float if any(part.is_float for part in parts) else int
    return writer.make(torch.arange, [part.values[0] for part in parts], kind)


def _fill(writer: OnnxTracer, operation: OnnxOperation, shape: Any) -> Any:
    """Write a tensor that has the same value everywhere."""
    from onnx.numpy_helper import to_array

    stated = operation.attributes.get("value")
    value = 0.0 if stated is None else to_array(stated).item()
    return writer.make(torch.full, (numbers(shape).values, value), type(value))


def _keep(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    return value


# -- operations on maps ----------------------------------------------------------------------------------------------


def _arithmetic(writer: OnnxTracer, operation: OnnxOperation, first: Any, second: Any) -> Any:
    """Write arithmetic with a map; constants of a single value are numbers."""
    if "axis" in operation.attributes:  # as in ONNX's first versions
        return NotImplemented
    of_numbers, of_tensors = _ARITHMETIC[operation.type]
    operands = [_as_operand(writer, operation, value) for value in (first, second)]
    return (of_tensors if any(isinstance(value, Tensor) for value in operands) else of_numbers)(*operands)


def _as_operand(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    if isinstance(value, fx.Proxy) or (isinstance(value, Tensor) and value.numel() != 1):
        return value
    constant = numbers(value)
    return constant.values[0] if len(constant.values) == 1 else _refuse_numbers(writer, operation)


def _reshape(writer: OnnxTracer, operation: OnnxOperation, value: Any, shape: Any) -> Any:
    sizes = list(numbers(shape).values)
    for axis, size in enumerate(sizes):
        is_batch = axis == 0 and writer.batch is not None and size == writer.batch
        if isinstance(size, int) and (size == 0 or is_batch):
            sizes[axis] = value.size(axis)
    return value.reshape(sizes)


def _expand(writer: OnnxTracer, operation: OnnxOperation, value: Any, shape: Any) -> Any:
    if isinstance(value, Numbers):
        return _refuse_numbers(writer, operation)
    sizes, rank = numbers(shape).values, value.dim() if isinstance(value, Tensor) else operation.rank
    sizes = (1,) * (rank - len(sizes)) + sizes
    new = len(sizes) - rank
    own = (-1 if isinstance(size, int) and size == 1 else size for size in sizes[new:])
    return writer.create_proxy("call_method", "expand", (value, *sizes[:new], *own), {})


def _resize(writer: OnnxTracer, operation: OnnxOperation, value: Any, *more: Any, **named: Any) -> Any:
    if len(more) == 1:  # Resize of opset 10: scales alone
        return NotImplemented
    given = dict(zip(("roi", "scales", "sizes"), more, strict=False)) | named
    sizes, scales = (
        numbers(given[name]).values[2:] if given.get(name) is not None else () for name in ("sizes", "scales")
    )
    mode, places = (
        operation.text("mode", "nearest"),
        operation.text("coordinate_transformation_mode", "half_pixel"),
    )
    if operation.rank != 4 or mode not in _MODES or not (sizes or scales):
        return NotImplemented
    is_whole = bool(scales) and all(float(scale).is_integer() for scale in scales)
    options: dict[str, Any] = {"size": sizes} if sizes else {"scale_factor": scales}
    options["mode"] = _MODES[mode]
    if mode != "nearest":
        options["align_corners"] = places == "align_corners"
    elif "half_pixel" in places and not is_whole:  # at whole factors the two are the same
        options["mode"] = "nearest-exact"
    return F.interpolate(value, **options)


def _bounds(starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> tuple[Sequence[Any], ...]:
    """Return starts, ends, axes and steps of a slice."""
    firsts, lasts = numbers(starts).values, numbers(ends).values
    places = numbers(axes).values if axes is not None else range(len(firsts))
    return firsts, lasts, places, numbers(steps).values if steps is not None else [1] * len(firsts)


def _slice(writer: OnnxTracer, operation: OnnxOperation, value: Any, *bounds: Any) -> Any:
    firsts, lasts, places, strides = _bounds(*bounds)
    if any(stride < 1 for stride in strides):
        return NotImplemented
    parts = {}
    for axis, first, last, stride in zip(places, firsts, lasts, strides, strict=True):
        ends_there = isinstance(last, int) and last >= _TO_THE_END
        parts[axis % operation.rank] = slice(first, None if ends_there else last, stride)
    return value[tuple(parts.get(axis, slice(None)) for axis in range(max(parts) + 1))]


def _pad(
    writer: OnnxTracer, operation: OnnxOperation, value: Any, pads: Any, *more: Any, **named: Any
) -> Any:
    widths, mode = numbers(pads).values, operation.text("mode", "constant")
    constant = more[0] if more else named.get("constant_value")
    half, axes = len(widths) // 2, len(widths) // 2
    while axes > 1 and all(
        isinstance(width, int) and width == 0 for width in (widths[half - axes], widths[-axes])
    ):
        axes -= 1  # torch's widths begin with the last axis
    torch_widths = [
        width for axis in range(1, axes + 1) for width in (widths[half - axis], widths[len(widths) - axis])
    ]
    filling = numbers(constant).values[0] if constant is not None and mode == "constant" else None
    return F.pad(value, torch_widths, _PADDINGS[mode], filling)


def _split(writer: OnnxTracer, operation: OnnxOperation, value: Any, split: Any = None) -> Any:
    axis, stated = operation.attributes.get("axis", 0), operation.attributes.get("split")
    lengths = list(numbers(split).values) if split is not None else stated
    return value.chunk(operation.outputs, axis) if lengths is None else value.split(list(lengths), axis)


_OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "Gather": _gather,
    "Slice": _slice_numbers,
    "Concat": _join,
    "Unsqueeze": _with_axis,
    "Squeeze": _without_axis,
    "Reshape": _with_axis,
    "Cast": _cast,
    "Identity": _keep,
    "ReduceProd": _product,
    "Where": _choose,
    "Expand": _expand,
    "Range": _range,
    "ConstantOfShape": _fill,
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(_ROUNDINGS, _round),
    **dict.fromkeys(_ARITHMETIC, _compute),
}
_OF_MAPS: dict[str, Callable[..., Any]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "Resize": _resize,
    "Slice": _slice,
    "Pad": _pad,
    "Split": _split,
    "Identity": _keep,
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
}
