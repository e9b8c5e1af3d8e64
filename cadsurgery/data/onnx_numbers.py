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
from itertools import zip_longest
from typing import Any

import numpy as np
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
_OF_ONE: dict[str, Callable[..., Any]] = {
    **{"Floor": math.floor, "Ceil": math.ceil, "Sqrt": math.sqrt, "Neg": operator.neg},
}


@dataclass(frozen=True)
class Numbers:
    """Numbers computed from sizes: plain ones, and proxies of numbers.

    Attributes:
        array: the numbers, as objects, arranged as in the tensor in which ONNX holds them.
        is_float: True if they are floating-point numbers.
    """

    array: np.ndarray[Any, Any]
    is_float: bool = False

    @classmethod
    def of(cls, values: Sequence[Any], shape: Sequence[int] = (-1,), is_float: bool = False) -> Numbers:
        """Return numbers in an array of a shape, by default in a row."""
        row = np.empty(len(values), object)
        for place, value in enumerate(values):  # one by one, since NumPy looks into what it converts
            row[place] = value
        return cls(row.reshape(shape), is_float)

    @property
    def values(self) -> tuple[Any, ...]:
        """The numbers in a row."""
        return tuple(self.array.ravel().tolist())


class OnnxOperation:
    """A node of the ONNX graph.

    Attributes:
        type: the operator's name, such as `Conv`.
        version: the opset that its meaning is from.
        attributes: what the file states.
        outputs: the number of its outputs.
        shape: lengths of its first input's axes; None where they are free.
        second_shape: those of its second input.
        tracer: records what is written for it.
    """

    def __init__(
        self, node: Any, version: int, shapes: Mapping[str, tuple[int | None, ...]], tracer: OnnxTracer
    ) -> None:
        import onnx

        self.tracer = tracer
        self.type, self.name, self.version = str(node.op_type), str(node.name), version
        self.outputs = len(node.output)
        self.attributes: dict[str, Any] = {}
        for stated in node.attribute:
            value = None if stated.type == stated.GRAPH else onnx.helper.get_attribute_value(stated)
            self.attributes[stated.name] = value.decode() if isinstance(value, bytes) else value
        self.shape, self.second_shape = (
            shapes.get(node.input[at], ()) if len(node.input) > at else () for at in (0, 1)
        )

    @property
    def rank(self) -> int:
        """The number of axes of its first input."""
        return len(self.shape)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default where the file does not state it."""
        return self.attributes.get(name, default)

    def __str__(self) -> str:
        return f"{self.type} (opset {self.version}) {self.name}".strip()


class OnnxTracer(fx.Tracer):
    """Traces an ONNX graph that is computed by plain torch operations; constants keep their values.

    Args:
        batch: number of images of the file if it is fixed; a Reshape to it keeps the number of a call instead.

    Attributes:
        image: the image, whose device and type of floating-point numbers the tensors that the graph makes have, too.
    """

    image: fx.Proxy

    def __init__(self, batch: int | None) -> None:
        super().__init__()
        self.batch = batch

    def make(self, function: Callable[..., Any], arguments: Sequence[Any], kind: type) -> Any:
        """Record a tensor of `kind` that is made of sizes, on the image's device and in its type of floats."""
        dtype = self.image.dtype if kind is float else torch.bool if kind is bool else torch.int64
        options = {"dtype": dtype, "device": self.image.device}
        return self.create_proxy("call_function", function, tuple(arguments), options)

    def record(self, function: Callable[..., Any], value: Any) -> Any:
        """Compute a function of a number, or record that it is computed."""
        if isinstance(value, fx.Proxy):
            return self.create_proxy("call_function", function, (value,), {})
        return function(value)


def numbers(value: Any) -> Numbers:
    """Return the numbers of a constant tensor."""
    if isinstance(value, Numbers):
        return value
    return Numbers.of(value.flatten().tolist(), value.shape, value.is_floating_point())


def stated_numbers(operation: OnnxOperation, stated: str, given: Any) -> Any:
    """Return a list of numbers that are an attribute in earlier opsets and an input in later ones; None if neither
    states them."""
    return operation.get(stated) if given is None else list(numbers(given).values)


def refuse_numbers(operation: OnnxOperation, *_: Any, **__: Any) -> Any:
    """Refuse an operation that sizes are not followed through."""
    raise CannotConvert(
        f"the ONNX graph computes with the sizes of its maps in {operation.type}.",
        where=operation.name,
        why="sizes are followed through Shape, Gather, Slice, Concat, Cast, arithmetic and rounding only.",
        next="export the network again for a fixed size, which leaves constants in their place.",
    )


# -- operations on numbers -------------------------------------------------------------------------------------------


def _gather(operation: OnnxOperation, value: Any, indices: Any) -> Any:
    return _at_each_place(value.values.__getitem__, numbers(indices), is_float=value.is_float)


def _slice(operation: OnnxOperation, value: Any, *bounds: Any) -> Any:
    parts = [slice(None)] * value.array.ndim
    for start, end, axis, step in zip(*bounds_of(operation, *bounds), strict=True):
        parts[axis] = slice(start, end, step)
    return Numbers(value.array[tuple(parts)], value.is_float)


def _join(operation: OnnxOperation, *parts: Any) -> Any:
    joined = [numbers(part) for part in parts]
    axis = operation.attributes["axis"]
    return Numbers(np.concatenate([part.array for part in joined], axis), joined[0].is_float)


def _with_axes(operation: OnnxOperation, value: Any, given: Any = None) -> Any:
    axes = stated_numbers(operation, "axes", given)
    return Numbers(np.expand_dims(value.array, axes), value.is_float)


def _without_axes(operation: OnnxOperation, value: Any, given: Any = None) -> Any:
    axes = stated_numbers(operation, "axes", given)
    return Numbers(value.array.squeeze(None if axes is None else tuple(axes)), value.is_float)


def _arrange(operation: OnnxOperation, value: Any, given: Any = None) -> Any:
    """Arrange numbers in a row, in rows of a table, or as a tensor of more axes."""
    sizes = stated_numbers(operation, "shape", given)
    if len(sizes) > 2:  # what a map is joined with
        made = operation.tracer.make(torch.tensor, [[*value.values]], float if value.is_float else int)
        return made.reshape(sizes)
    if len(sizes) == 1:
        return Numbers(value.array.ravel(), value.is_float)
    if any(isinstance(size, fx.Proxy) for size in sizes):
        return refuse_numbers(operation)
    return Numbers(value.array.reshape(sizes), value.is_float)


def _turn(operation: OnnxOperation, value: Any) -> Any:
    return Numbers(value.array.transpose(operation.get("perm")), value.is_float)


def _cast(operation: OnnxOperation, value: Any) -> Any:
    is_integer = operation.attributes["to"] in _INTEGERS
    if not (is_integer and value.is_float):
        return Numbers(value.array, not is_integer)
    return _at_each_place(lambda number: operation.tracer.record(int, number), value, is_float=False)


def _of_one(operation: OnnxOperation, value: Any) -> Any:
    function = _OF_ONE[operation.type]
    return _at_each_place(lambda number: operation.tracer.record(function, number), value)


def _product(operation: OnnxOperation, value: Any, axes: Any = None) -> Any:
    shape = (1,) if operation.get("keepdims", 1) else ()
    return Numbers.of([math.prod(value.values)], shape, value.is_float)


def _choose(operation: OnnxOperation, condition: Any, first: Any, second: Any) -> Any:
    is_first, *parts = (numbers(part) for part in (condition, first, second))
    is_float = any(part.is_float for part in parts)
    if is_float and any(isinstance(value, fx.Proxy) for value in is_first.values):
        return refuse_numbers(operation)
    return _at_each_place(_one_of, is_first, *parts, is_float=is_float)


def _one_of(is_first: Any, this: Any, that: Any) -> Any:
    """Return one of two whole numbers; where sizes say which, by arithmetic, since nothing branches at them."""
    if isinstance(is_first, fx.Proxy):
        return that + is_first * (this - that)
    return this if is_first else that


def _compare(operation: OnnxOperation, first: Any, second: Any) -> Any:
    """Compare numbers. A size is never negative, so comparisons with -1, which asks for the rest, are known."""
    compare = _COMPARISONS[operation.type]

    def compared(*pair: Any) -> Any:
        is_size = [isinstance(value, fx.Proxy) for value in pair]
        if all(is_size) and pair[0].node is pair[1].node:
            return compare(0, 0)
        if any(is_size) and (all(is_size) or min(_as_size(value) for value in pair) >= 0 or _is_less(*pair)):
            return compare(*pair)
        return compare(*map(_as_size, pair))

    return _at_each_place(compared, numbers(first), numbers(second), is_float=False)


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


def _extreme(operation: OnnxOperation, *parts: Any) -> Any:
    """Return the least, or the largest, of numbers at each place."""
    values = list(map(numbers, parts))
    if any(part.is_float for part in values):
        return refuse_numbers(operation)
    compare = operator.lt if operation.type == "Min" else operator.gt

    def better(this: Any, that: Any) -> Any:
        return _one_of(compare(this, that), this, that)

    return _at_each_place(lambda *place: reduce(better, place), *values)


def _compute(operation: OnnxOperation, first: Any, second: Any) -> Any:
    parts = numbers(first), numbers(second)
    compute = operator.mod if operation.type == "Mod" else ARITHMETIC[operation.type][0]
    if operation.type == "Div" and not any(part.is_float for part in parts):
        compute = _quotient
    return _at_each_place(compute, *parts)


def _quotient(number: Any, by: Any) -> Any:
    """Divide whole numbers as ONNX does, towards zero; Python rounds down."""
    if isinstance(by, int) and by > 0 and _is_less(number):
        is_negative = number < 0
        return (number + is_negative * (by - 1)) // by
    if isinstance(number, int) and isinstance(by, int):
        return abs(number) // abs(by) * (1 if (number < 0) == (by < 0) else -1)
    return number // by


def _at_each_place(function: Callable[..., Any], *parts: Numbers, is_float: bool | None = None) -> Numbers:
    """Return what a function makes of the numbers at each place; they are floats, unless it is said, if some are."""
    arrays = np.broadcast_arrays(*(part.array for part in parts))
    places = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    is_float = any(part.is_float for part in parts) if is_float is None else is_float
    return Numbers.of([function(*place) for place in places], arrays[0].shape, is_float)


def _range(operation: OnnxOperation, *bounds: Any) -> Any:
    """Write numbers at equal distances, such as the coordinates of a map's columns."""
    parts = [numbers(bound) for bound in bounds]
    kind = float if any(part.is_float for part in parts) else int
    return operation.tracer.make(torch.arange, [part.values[0] for part in parts], kind)


def _fill(operation: OnnxOperation, shape: Any) -> Any:
    """Write a tensor that has the same value everywhere."""
    from onnx.numpy_helper import to_array

    stated = operation.get("value")
    value = 0.0 if stated is None else to_array(stated).item()
    count = numbers(shape).values
    if len(count) == 1 and isinstance(count[0], int) and type(value) is int:  # a list of numbers, for a shape
        return Numbers.of([value] * count[0])
    return operation.tracer.make(torch.full, (count, value), type(value))


def bounds_of(operation: OnnxOperation, *given: Any) -> tuple[Sequence[Any], ...]:
    """Return starts, ends, axes and steps of a slice; before opset 10 they are attributes."""
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (
        stated_numbers(operation, name, values) for name, values in zip_longest(names, given)
    )
    return starts, ends, range(len(starts)) if axes is None else axes, steps or [1] * len(starts)


OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _join,
    "Unsqueeze": _with_axes,
    "Squeeze": _without_axes,
    "Reshape": _arrange,
    "Transpose": _turn,
    **dict.fromkeys(("Min", "Max"), _extreme),
    "Cast": _cast,
    "ReduceProd": _product,
    "Where": _choose,
    "Range": _range,
    "ConstantOfShape": _fill,
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(_OF_ONE, _of_one),
    **dict.fromkeys((*ARITHMETIC, "Mod"), _compute),
}
