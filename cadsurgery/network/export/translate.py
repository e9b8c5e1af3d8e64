"""ONNX translations of torch operations that torch's exporter lacks or translates to slow or unsupported forms.

Needs onnxscript; this module is imported only when an ONNX file is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from onnx_ir import DataType
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops.core import (
    aten_clamp,
    aten_clamp_tensor,
    aten_einsum,
    aten_index,
    aten_slice,
    aten_where,
)
from onnxscript.function_libs.torch_lib.ops.nn import aten_avg_pool2d, aten_pad
from onnxscript.values import Op, Opset

from cadsurgery.elements.backends.operators import KERNELS, Kernel
from cadsurgery.network.export.kernels import DOMAIN, schema

op: Any = opset18
_KERNELS = Opset(DOMAIN, 1)
_ATEN = torch.ops.aten


def _sort(self: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """Sort by TopK of all values, which by ONNX puts the lower index first among equal values.

    OpenVINO does not keep this order, so masks do not use the indices.
    """
    count = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    values, indices = op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)
    return values, indices


def _nonzero_static(self: Any, size: Any, fill_value: int = -1) -> Any:
    places = op.Transpose(op.NonZero(self), perm=[1, 0])
    size = op.Reshape(_number(size), op.Constant(value_ints=[1]))
    axes = op.Constant(value_ints=[1])
    filling = op.Expand(
        op.Constant(value_ints=[fill_value]),
        op.Concat(size, op.Slice(op.Shape(places), axes, op.Constant(value_ints=[2])), axis=0),
    )
    zero = op.Constant(value_ints=[0])
    return op.Slice(op.Concat(places, filling, axis=0), zero, size, zero)


def _remainder(self: Any, other: Any) -> Any:
    """Compute the remainder of integers by an image size, which is a tensor."""
    return op.Mod(self, op.CastLike(_number(other), self))


def _floor_divide(self: Any, other: Any) -> Any:
    """Divide, rounding down; integers exactly, because OpenVINO rounds some quotients of negative numbers down that
    ONNX rounds towards zero."""
    if self.dtype.is_floating_point():
        return op.Floor(op.Div(self, other))
    by = op.CastLike(_number(other), self)
    return op.Div(op.Sub(self, op.Mod(self, by)), by)


def _avg_pool2d(
    self: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Average, or sum and divide by a number of the user's, which torch's own translation leaves out."""
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad or divisor_override is not None)
    mean = aten_avg_pool2d(self, *options)
    if divisor_override is None:
        return mean
    height, width = kernel_size if len(kernel_size) == 2 else (*kernel_size, *kernel_size)
    return op.Mul(mean, op.CastLike(op.Constant(value_float=height * width / divisor_override), mean))


def _index(self: Any, indices: Any) -> Any:
    """Index by one integer tensor with Gather, which accepts 32 bits and is many times faster than GatherND."""
    tensors = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(tensors) == 1 and tensors[0][1].dtype != DataType.BOOL:
        return op.Gather(self, tensors[0][1], axis=tensors[0][0])
    return aten_index(self, indices)


def _index_select(self: Any, axis: int, index: Any) -> Any:
    """Gather by integers of any width, without the conversion to 64 bits."""
    return op.Gather(self, index, axis=axis)


def _product_of_taps(rows: Any, table: Any, weight: Any, bias: Any) -> Any:
    outputs, channels, taps = weight.shape
    gathered = op.Reshape(op.Gather(rows, table), op.Constant(value_ints=[-1, taps * channels]))
    by_tap = op.Transpose(weight, perm=[0, 2, 1])
    matrix = op.Reshape(by_tap, op.Constant(value_ints=[outputs, taps * channels]))
    return op.Gemm(gathered, matrix, bias, transB=1)


def _sum_of_taps(rows: Any, table: Any, weight: Any) -> Any:
    columns = table.meta.setdefault("columns", [])  # of all layers that read by this table
    if not columns:
        columns += [op.Gather(table, tap, axis=1) for tap in range(weight.shape[1])]
    products = (
        op.Mul(op.Gather(rows, column), op.Gather(weight, tap, axis=1)) for tap, column in enumerate(columns)
    )
    return reduce(op.Add, products)


def _mix_rows(rows: Any, sources: Any, shares: Any) -> Any:
    second = op.Constant(value_ints=[1])
    shares = op.Unsqueeze(op.CastLike(shares, rows), second)
    return op.Squeeze(op.MatMul(shares, op.Gather(rows, sources)), second)


def _in_32_bits(translation: Callable[..., Any]) -> Callable[..., Any]:
    """Compute with levels, which are int8, as int32: before version 1.31 ONNX Runtime lacks some operations of int8."""

    def translate(*args: Any) -> Any:
        is_level = [getattr(argument, "dtype", None) == DataType.INT8 for argument in args]
        if not any(is_level):
            return translation(*args)
        pairs = zip(args, is_level, strict=True)
        wide = [op.Cast(one, to=DataType.INT32) if narrow else one for one, narrow in pairs]
        return op.Cast(translation(*wide), to=DataType.INT8)

    return translate


def _einsum(equation: str, tensors: Any, path: Any = None) -> Any:
    """Weigh the channels of an image by a product, which takes a thirtieth of the time of Einsum in ONNX Runtime."""
    if equation != "bchw,c->bhw":
        return aten_einsum(equation, tensors, path)
    image, weights = tensors
    pixels = op.Reshape(image, op.Constant(value_ints=[0, 0, -1]))
    grey = op.MatMul(op.Unsqueeze(weights, op.Constant(value_ints=[0])), pixels)  # (B, 1, H W)
    size = op.Concat(op.Shape(image, end=1), op.Shape(image, start=2), axis=0)
    return op.Reshape(grey, size)


def _round(self: Any, digits: Any = None) -> Any:
    """Round a quotient of sizes, halves to the even number as Python does."""
    return op.Cast(op.Round(self), to=DataType.INT64)


def _pool_to_bins(self: Any, output_size: Any) -> Any:
    """Average over bins by a product along each axis: torch's decomposition decides by the example's size."""
    lengths, bins = self.shape[2:], list(output_size)
    if all(type(one) is int and length % one == 0 for one, length in zip(bins, lengths, strict=True)):
        steps = [length // one for one, length in zip(bins, lengths, strict=True)]
        return op.AveragePool(self, kernel_shape=steps, strides=steps)
    rows, columns = (_shares(self, axis, count) for axis, count in zip((2, 3), bins, strict=True))
    return op.MatMul(rows, op.MatMul(self, op.Transpose(columns, perm=[1, 0])))


def _batch_norm(
    self: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    eps: float,
    *rest: Any,
) -> Any:
    """Normalise by the statistics of the batch, or by given ones."""
    axes = op.Constant(value_ints=[0, *range(2, len(self.shape))])
    by_channel = op.Constant(value_ints=[-1, *(1,) * (len(self.shape) - 2)])
    centred = op.Sub(self, op.ReduceMean(self, axes) if training else op.Reshape(mean, by_channel))
    spread = op.ReduceMean(op.Mul(centred, centred), axes) if training else op.Reshape(variance, by_channel)
    normalised = op.Div(centred, op.Sqrt(op.Add(spread, op.CastLike(op.Constant(value_float=eps), self))))
    if weight is not None:
        normalised = op.Mul(normalised, op.Reshape(weight, by_channel))
    return normalised if bias is None else op.Add(normalised, op.Reshape(bias, by_channel))


def _shares(image: Any, axis: int, count: Any) -> Any:
    """Return the share (bins, n) that each of n samples along an axis has in each bin."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    length, count = op.Squeeze(op.Shape(image, start=axis, end=axis + 1)), op.Squeeze(_number(count))
    bins, last = op.Unsqueeze(op.Range(zero, count, one), op.Constant(value_ints=[1])), op.Sub(count, one)
    first = op.Div(op.Mul(bins, length), count)
    end = op.Div(op.Add(op.Mul(op.Add(bins, one), length), last), count)
    place = op.Range(zero, length, one)
    is_inside = op.And(op.GreaterOrEqual(place, first), op.Less(place, end))
    return op.Div(op.CastLike(is_inside, image), op.CastLike(op.Sub(end, first), image))


def _numel(self: Any) -> Any:
    return op.Size(self)


def _call(kernel: Kernel) -> Callable[..., Any]:
    """Return a translation that calls a kernel: with tensors, all whole numbers as one of them, and attributes."""
    kinds = kernel.kinds

    def translate(*arguments: Any) -> Any:
        given = list(zip(kinds.items(), arguments, strict=True))
        inputs, lengths = ([one for (_, kind), one in given if kind == of] for of in ("Tensor", "int"))
        if lengths:  # each is a number or a tensor
            one = op.Constant(value_ints=[1])
            sizes = op.Concat(*(op.Reshape(_number(length), one) for length in lengths), axis=0)
            inputs.append(op.Cast(sizes, to=DataType.INT32))
        numbers = {name: one for (name, kind), one in given if kind == "float"}
        names = kernel.names
        name = names if isinstance(names, str) else names[len(inputs[list(kinds).index("weight")].shape)]
        return Op(_KERNELS, name, schema(kernel, name))(*inputs, **numbers)

    return translate


def _require_equal(levels: Any, one: Any, other: Any, reason: str) -> Any:
    """Join a row of each length, which engines refuse if they differ; the reason is the operation's name in errors."""
    first = op.Constant(value_ints=[1])
    sizes = (op.Concat(first, op.Reshape(_number(length), first), axis=0) for length in (one, other))
    both = op.Concat(*(op.ConstantOfShape(size) for size in sizes), axis=0)
    both.producer().name = reason
    nothing = op.Cast(op.ReduceMax(both, keepdims=0), to=DataType.INT64)
    return op.Reshape(levels, op.Add(op.Shape(levels), nothing))


def _dropout_of_channels(values: Any, *_: Any) -> Any:
    """Dropout in evaluation, which torch's exporter cannot translate; networks in which it is on do not convert."""
    return op.Identity(values)


def _quotients(numbers: Any, by: Any) -> Any:
    return op.Div(numbers, op.CastLike(_number(by), numbers))


def _number(value: Any) -> Any:
    return op.Constant(value_int=value) if isinstance(value, int) else value


def _pad(self: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """Pad; circular padding is written as slices that are joined, because OpenVINO has no `wrap`."""
    if mode != "circular" or not all(isinstance(length, int) and length >= 0 for length in pad):
        return aten_pad(self, pad, mode, value)
    for index in range(0, len(pad), 2):
        axis, zero = op.Constant(value_ints=[-1 - index // 2]), op.Constant(value_ints=[0])
        before, after = pad[index : index + 2]
        end = op.Constant(value_ints=[_END])
        parts = [op.Slice(self, op.Constant(value_ints=[-before]), end, axis)] if before else []
        parts += [self]
        parts += [op.Slice(self, zero, op.Constant(value_ints=[after]), axis)] if after else []
        self = op.Concat(*parts, axis=-1 - index // 2) if len(parts) > 1 else self
    return self


_END = (1 << 63) - 1  # of an axis, as ONNX's Slice has it
_BEHIND_ANY_END = 1 << 30  # longer than any axis, and finite: see `_slice`


def _slice(self: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Slice an axis; a slice of the whole axis with a step gets a finite end.

    In files of any size OpenVINO 2026.4 believes that an axis of `x[::2]` is as long as that of x if the shortest and
    the longest possible length of both are the same, 1 and infinity (see its pull request 37932), and takes one
    length for the other. With a finite end the longest lengths differ.
    """
    if step != 1 and (end is None or (isinstance(end, int) and end > _BEHIND_ANY_END)):
        end = _BEHIND_ANY_END
    return aten_slice(self, dim, start, end, step)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    _ATEN.sort.stable: _sort,
    _ATEN.nonzero_static.default: _nonzero_static,
    _ATEN.index.Tensor: _index,
    _ATEN.index_select.default: _index_select,
    _ATEN.where.self: _in_32_bits(aten_where),
    _ATEN.clamp.default: _in_32_bits(aten_clamp),
    _ATEN.clamp.Tensor: _in_32_bits(aten_clamp_tensor),
    _ATEN.einsum.default: _einsum,
    _ATEN.remainder.Scalar: _remainder,
    _ATEN.floor_divide.default: _floor_divide,
    _ATEN.sym_numel.default: _numel,
    _ATEN._adaptive_avg_pool2d.default: _pool_to_bins,
    _ATEN.batch_norm.default: _batch_norm,
    _ATEN.avg_pool2d.default: _avg_pool2d,
    _ATEN.pad.default: _pad,
    _ATEN.slice.Tensor: _slice,
    round: _round,
    torch.ops.cadsurgery.product_of_taps.default: _product_of_taps,
    torch.ops.cadsurgery.sum_of_taps.default: _sum_of_taps,
    torch.ops.cadsurgery.mix_rows.default: _mix_rows,
    _ATEN.feature_dropout.default: _dropout_of_channels,
    _ATEN.feature_alpha_dropout.default: _dropout_of_channels,
    torch.ops.cadsurgery.quotients.default: _quotients,
    torch.ops.cadsurgery.require_equal.default: _require_equal,
    **{kernel.operation: _call(kernel) for kernel in KERNELS},
}

# Those of this package's own operations; an ordinary export of a dense network has torch's translations of all others.
OWN = {
    operation: by for operation, by in TABLE.items() if getattr(operation, "namespace", "") == "cadsurgery"
}
