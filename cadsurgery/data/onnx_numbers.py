"""Compute with the sizes of maps as an ONNX graph does, with numbers of Python in place of tensors.

ONNX computes sizes with tensors: the shape of a map goes through Gather, Slice, Concat and arithmetic into Reshape or
Resize. Here such numbers are numbers of Python, `x.size(2)` and what is computed from it, as in networks that people
write. Tensors that are made of sizes, such as the coordinates of a detector's anchors, are made in each call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from cadsurgery.support.errors import CannotConvert

_INTEGERS = (2, 3, 4, 5, 6, 7, 12, 13)  # ONNX's codes of integer types
ARITHMETIC: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
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


@dataclass(frozen=True)
class Numbers:
    """Numbers computed from sizes: plain ones, and proxies of numbers. ONNX holds them in a tensor.

    Attributes:
        values: the numbers.
        is_scalar: True if the tensor has no axis.
        is_float: True if they are floating-point numbers.
        table: numbers of rows and columns, where the tensor has two axes, as lists of paddings have.
    """

    values: tuple[Any, ...]
    is_scalar: bool = False
    is_float: bool = False
    table: tuple[int, int] | None = None

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the rows of a table."""
        assert self.table is not None
        down, across = self.table
        return [self.values[row * across : (row + 1) * across] for row in range(down)]

    def with_rows(self, rows: Sequence[Sequence[Any]]) -> Numbers:
        """Return a table of these rows."""
        values = tuple(value for row in rows for value in row)
        return Numbers(values, False, self.is_float, (len(rows), len(values) // max(1, len(rows))))


class OnnxOperation:
    """A node of the ONNX graph.

    Attributes:
        type: the operator's name, such as `Conv`.
        version: the opset that its meaning is from.
        attributes: what the file states; attributes that are texts by `text`.
        outputs: the number of its outputs.
        shape: lengths of its first input's axes; None where they are free.
        second_shape: those of its second input.
    """

    def __init__(self, node: Any, version: int, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
        import onnx

        self.type, self.name, self.version = str(node.op_type), str(node.name), version
        self.outputs = len(node.output)
        self.attributes = {
            stated.name: onnx.helper.get_attribute_value(stated)
            for stated in node.attribute
            if stated.type != stated.GRAPH
        }
        self.shape, self.second_shape = (
            shapes.get(node.input[at], ()) if len(node.input) > at else () for at in (0, 1)
        )

    @property
    def rank(self) -> int:
        """The number of axes of its first input."""
        return len(self.shape)

    def __str__(self) -> str:
        return f"{self.type} (opset {self.version}) {self.name}".strip()

    def text(self, name: str, default: str) -> str:
        """Return an attribute that is a text."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)


class OnnxTracer(fx.Tracer):
    """Traces an ONNX graph that is computed by plain torch operations; constants keep their values.

    Args:
        batch: number of images of the file if it is fixed; a Reshape to it keeps the number of a call instead.
    """

    def __init__(self, batch: int | None) -> None:
        super().__init__()
        self.batch = batch
        self._image: fx.Proxy | None = None

    @property
    def image(self) -> fx.Proxy:
        """The image, whose device and type of floating-point numbers the tensors that the graph makes have, too."""
        if self._image is None:
            inputs = (node for node in self.graph.nodes if node.op == "placeholder")
            self._image = self.proxy(next(inputs))
        return self._image

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


def numbers(value: Any) -> Numbers:
    """Return the numbers of a constant tensor."""
    if isinstance(value, Numbers):
        return value
    return Numbers(tuple(value.flatten().tolist()), value.dim() == 0, value.is_floating_point())


def refuse_numbers(writer: OnnxTracer, operation: OnnxOperation, *_: Any, **__: Any) -> Any:
    """Refuse an operation that sizes are not followed through."""
    raise CannotConvert(
        f"the ONNX graph computes with the sizes of its maps in {operation.type}.",
        where=operation.name,
        why="sizes are followed through Shape, Gather, Slice, Concat, Cast, arithmetic and rounding only.",
        next="export the network again for a fixed size, which leaves constants in their place.",
    )


# -- operations on numbers -------------------------------------------------------------------------------------------


def shape_of(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    """Return the sizes of a map, for Shape; their product for Size."""
    given = operation.attributes
    axes = range(operation.rank)[given.get("start", 0) : given.get("end")]
    sizes = tuple(value.size(axis) for axis in axes)
    return Numbers((math.prod(sizes),), True) if operation.type == "Size" else Numbers(sizes)


def _count(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    """Return how many numbers there are: the shape of their tensor, or its size."""
    if value.is_scalar:
        return Numbers((1,), True) if operation.type == "Size" else Numbers(())
    return Numbers((len(value.values),), operation.type == "Size")


def _root(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    return Numbers(tuple(writer.round(math.sqrt, number) for number in value.values), value.is_scalar, True)


def _remainder(writer: OnnxTracer, operation: OnnxOperation, first: Any, second: Any) -> Any:
    left, right = numbers(first), numbers(second)
    values = tuple(operator.mod(*pair) for pair in _broadcast(left, right))
    return Numbers(values, left.is_scalar and right.is_scalar, left.is_float or right.is_float)


def _negate(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    return Numbers(tuple(-number for number in value.values), value.is_scalar, value.is_float)


def _gather(writer: OnnxTracer, operation: OnnxOperation, value: Any, indices: Any) -> Any:
    chosen = numbers(indices)
    values = tuple(value.values[index] for index in chosen.values)
    return Numbers(values, chosen.is_scalar, value.is_float)


def _slice_numbers(writer: OnnxTracer, operation: OnnxOperation, value: Any, *bounds: Any) -> Any:
    parts = [*zip(*bounds_of(operation, *bounds), strict=True)]
    if value.table:
        rows = value.rows()
        for start, end, axis, step in parts:
            part = slice(start, end, step)
            rows = rows[part] if axis in (0, -2) else [row[part] for row in rows]
        return value.with_rows(rows)
    ((start, end, _, step),) = parts
    return Numbers(value.values[start:end:step], False, value.is_float)


def _join(writer: OnnxTracer, operation: OnnxOperation, *parts: Any) -> Any:
    joined = [numbers(part) for part in parts]
    return Numbers(tuple(value for part in joined for value in part.values), False, joined[0].is_float)


def _with_axis(writer: OnnxTracer, operation: OnnxOperation, value: Any, axes: Any = None) -> Any:
    return Numbers(value.values, False, value.is_float)


def _without_axis(writer: OnnxTracer, operation: OnnxOperation, value: Any, axes: Any = None) -> Any:
    return Numbers(value.values, len(value.values) == 1, value.is_float)


def _arrange(writer: OnnxTracer, operation: OnnxOperation, value: Any, shape: Any = None) -> Any:
    """Arrange numbers in a row, in rows of a table, or as a tensor of more axes."""
    sizes = list(operation.attributes.get("shape", []) if shape is None else numbers(shape).values)
    if len(sizes) > 2:  # what a map is joined with
        dtype = writer.image.dtype if value.is_float else torch.int64
        options = {"dtype": dtype, "device": writer.image.device}
        return writer.create_proxy("call_function", torch.tensor, ([*value.values],), options).reshape(sizes)
    if len(sizes) != 2:
        return Numbers(value.values, not sizes, value.is_float)
    if any(isinstance(size, fx.Proxy) for size in sizes):
        return refuse_numbers(writer, operation)
    known = len(value.values)
    down, across = (known // abs(sizes[1 - at] or 1) if size == -1 else size for at, size in enumerate(sizes))
    return Numbers(value.values, False, value.is_float, (down, across))


def _turn(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    """Return a table with its rows as columns."""
    if not value.table or operation.attributes.get("perm", [1, 0]) == [0, 1]:
        return value
    return value.with_rows([*zip(*value.rows(), strict=True)])


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
    is_float = parts[1].is_float or parts[2].is_float
    if is_float and any(isinstance(is_first, fx.Proxy) for is_first, _, _ in chosen):
        return refuse_numbers(writer, operation)
    values = tuple(_one_of(*choice) for choice in chosen)
    return Numbers(values, all(part.is_scalar for part in parts), is_float)


def _one_of(is_first: Any, this: Any, that: Any) -> Any:
    """Return one of two whole numbers; where sizes say which, by arithmetic, since nothing branches at them."""
    if isinstance(is_first, fx.Proxy):
        return that + is_first * (this - that)
    return this if is_first else that


def _compare(writer: OnnxTracer, operation: OnnxOperation, first: Any, second: Any) -> Any:
    """Compare numbers. A size is never negative, so comparisons with -1, which asks for the rest, are known."""
    left, right = numbers(first), numbers(second)
    compare, known = _COMPARISONS[operation.type], []
    for pair in _broadcast(left, right):
        is_size = [isinstance(value, fx.Proxy) for value in pair]
        if all(is_size) and pair[0].node is pair[1].node:
            known.append(compare(0, 0))
        elif any(is_size) and (
            all(is_size) or min(_as_size(value) for value in pair) >= 0 or _is_less(*pair)
        ):
            known.append(compare(*pair))
        else:
            known.append(compare(*map(_as_size, pair)))
    return Numbers(tuple(known), left.is_scalar and right.is_scalar)


def _as_size(value: Any) -> Any:
    return 0 if isinstance(value, fx.Proxy) else value


def _is_less(*values: Any) -> bool:
    """True if a number may be negative: a difference of sizes, or what is computed from one."""
    nodes = [value.node for value in values if isinstance(value, fx.Proxy)]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.target in (operator.sub, operator.neg) or any(
            isinstance(one, (int, float)) and one < 0 for one in node.args
        ):
            return True
        new = [one for one in node.all_input_nodes if one not in seen and one.op == "call_function"]
        seen.update(new)
        nodes += new
    return False


def _extreme(writer: OnnxTracer, operation: OnnxOperation, *parts: Any) -> Any:
    """Return the least, or the largest, of numbers at each place."""
    values = list(map(numbers, parts))
    if any(part.is_float for part in values):
        return refuse_numbers(writer, operation)
    compare = operator.lt if operation.type == "Min" else operator.gt
    places = _broadcast(*values)
    chosen = tuple(
        reduce(lambda this, that: _one_of(compare(this, that), this, that), place) for place in places
    )
    return Numbers(chosen, all(part.is_scalar for part in values))


def _compute(writer: OnnxTracer, operation: OnnxOperation, first: Any, second: Any) -> Any:
    left, right = numbers(first), numbers(second)
    is_float = left.is_float or right.is_float
    compute = ARITHMETIC[operation.type][0]
    if operation.type == "Div" and not is_float:
        compute = _quotient
    values = tuple(compute(*pair) for pair in _broadcast(left, right))
    return Numbers(values, left.is_scalar and right.is_scalar, is_float)


def _quotient(number: Any, by: Any) -> Any:
    """Divide whole numbers as ONNX does, towards zero; Python rounds down."""
    if isinstance(by, int) and by > 0 and _is_less(number):
        is_negative = number < 0
        return (number + is_negative * (by - 1)) // by
    if isinstance(number, int) and isinstance(by, int):
        return abs(number) // abs(by) * (1 if (number < 0) == (by < 0) else -1)
    return number // by


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
    count = numbers(shape).values
    if len(count) == 1 and isinstance(count[0], int) and type(value) is int:  # a list of numbers, for a shape
        return Numbers((value,) * count[0])
    return writer.make(torch.full, (numbers(shape).values, value), type(value))


def keep(writer: OnnxTracer, operation: OnnxOperation, value: Any) -> Any:
    """Return the value."""
    return value


def bounds_of(operation: OnnxOperation, *given: Any) -> tuple[Sequence[Any], ...]:
    """Return starts, ends, axes and steps of a slice; before opset 10 they are attributes."""
    stated = [operation.attributes.get(name) for name in ("starts", "ends", "axes")]
    starts, ends, axes, steps = (*(given or stated), None, None)[:4]
    firsts, lasts = (
        [*values] if isinstance(values, list) else numbers(values).values for values in (starts, ends)
    )
    places = range(len(firsts)) if axes is None else axes if isinstance(axes, list) else numbers(axes).values
    return firsts, lasts, places, numbers(steps).values if steps is not None else [1] * len(firsts)


OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "Gather": _gather,
    "Slice": _slice_numbers,
    "Concat": _join,
    "Unsqueeze": _with_axis,
    "Squeeze": _without_axis,
    "Reshape": _arrange,
    "Transpose": _turn,
    **dict.fromkeys(("Min", "Max"), _extreme),
    "Cast": _cast,
    "Identity": keep,
    "ReduceProd": _product,
    "Where": _choose,
    "Range": _range,
    "ConstantOfShape": _fill,
    "Neg": _negate,
    "Mod": _remainder,
    "Sqrt": _root,
    **dict.fromkeys(("Shape", "Size"), _count),
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(_ROUNDINGS, _round),
    **dict.fromkeys(ARITHMETIC, _compute),
}
