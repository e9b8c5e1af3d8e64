"""Operators of ONNX written as plain torch operations, for every opset.

Attributes that became inputs in a later opset are read from either. Of the oldest opsets only what ONNX Runtime runs is
here: arithmetic and PRelu from opset 7 on.

Operators that are not here are those of onnx2torch, or have a body of other operators in ONNX's own definitions. Each
function takes the operation and its inputs; None stands for an input that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cadsurgery.data.onnx_numbers import (
    ARITHMETIC,
    Numbers,
    OnnxOperation,
    bounds_of,
    numbers,
    refuse_numbers,
    stated_numbers,
)
from cadsurgery.support.errors import CannotConvert

_TO_THE_END = 2**31 - 1  # ends of slices from here on mean the end of the axis
_MODES = {"nearest": "nearest", "linear": "bilinear", "bilinear": "bilinear", "cubic": "bicubic"}
_PADDINGS = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def refuse(operation: OnnxOperation, why: str) -> CannotConvert:
    """Return the error for an operator in a form that is not read."""
    return CannotConvert(
        f"the ONNX graph has {operation.type} in a form that is not read.",
        where=str(operation),
        why=why,
        next="write this step with other operators, or load the network where it was trained: cs.adaptify(model).",
    )


# -- arithmetic and activations --------------------------------------------------------------------------------------


def _arithmetic(operation: OnnxOperation, first: Any, second: Any) -> Any:
    """Write arithmetic with a map; constants of a single value are numbers."""
    of_numbers, of_tensors = ARITHMETIC[operation.type]
    operands = [_as_operand(operation, value) for value in (first, second)]
    return (of_tensors if any(isinstance(value, Tensor) for value in operands) else of_numbers)(*operands)


def _as_operand(operation: OnnxOperation, value: Any) -> Any:
    if isinstance(value, fx.Proxy) or (isinstance(value, Tensor) and value.numel() != 1):
        return value
    constant = numbers(value)
    return constant.values[0] if len(constant.values) == 1 else refuse_numbers(operation)


def _of_several(operation: OnnxOperation, *values: Any) -> Any:
    """Write Sum, Mean, Max and Min of any number of maps and constants."""
    if operation.type in ("Sum", "Mean"):
        total = reduce(lambda left, right: torch.add(left, _as_operand(operation, right)), _map_first(values))
        return total / len(values) if operation.type == "Mean" and len(values) > 1 else total
    together: Callable[..., Any]
    together, bound = (torch.maximum, "min") if operation.type == "Max" else (torch.minimum, "max")

    def join(left: Any, other: Any) -> Any:
        right: Any = _as_operand(operation, other)
        is_map = isinstance(right, fx.Proxy | Tensor)
        return together(left, right) if is_map else left.clamp(**{bound: right})

    return reduce(join, _map_first(values))


def _map_first(values: Sequence[Any]) -> list[Any]:
    return sorted(values, key=lambda value: not isinstance(value, fx.Proxy))


def _clip(operation: OnnxOperation, value: Any, least: Any = None, most: Any = None) -> Any:
    low, high = (
        operation.get(name) if bound is None else _as_operand(operation, bound)
        for name, bound in (("min", least), ("max", most))
    )
    if low is None and high is None:
        return value
    if type(low) in (int, float) and low == 0 and high in (None, 6):
        return F.relu(value) if high is None else F.relu6(value)
    return torch.clamp(value, low, high)


def _prelu(operation: OnnxOperation, value: Any, slope: Any) -> Any:
    if not isinstance(slope, Tensor):
        raise refuse(operation, "its slope is computed from the picture.")
    if slope.numel() == 1:
        return F.leaky_relu(value, slope.item())
    place = slope.dim() - operation.rank + 1  # of the channels among its axes
    if place in (0, 1) and slope.numel() == slope.shape[place] == operation.shape[1]:
        return F.prelu(value, slope.flatten())
    return torch.where(value >= 0, value, value * slope)


def _shrink(operation: OnnxOperation, value: Any) -> Any:
    bound, shift = (operation.get(name, default) for name, default in (("lambd", 0.5), ("bias", 0.0)))
    return torch.where(value > bound, value - shift, torch.where(value < -bound, value + shift, value * 0))


def _softmax(operation: OnnxOperation, value: Any) -> Any:
    """Write Softmax and LogSoftmax; before opset 13 they are of all axes from the stated one on."""
    function = F.log_softmax if operation.type == "LogSoftmax" else F.softmax
    axis = operation.get("axis", -1 if operation.version >= 13 else 1) % operation.rank
    if operation.version >= 13 or all(length == 1 for length in operation.shape[axis + 1 :]):
        return function(value, axis)
    sizes = [value.size(index) for index in range(operation.rank)]
    return function(value.flatten(axis), -1).reshape(sizes)


# -- statistics ------------------------------------------------------------------------------------------------------


def _reduce(operation: OnnxOperation, value: Any, given: Any = None) -> Any:
    axes = stated_numbers(operation, "axes", given)
    if not axes:
        if operation.get("noop_with_empty_axes", 0):
            return value
        axes = list(range(operation.rank))
    axes = sorted(axis % operation.rank for axis in axes)
    return _REDUCTIONS[operation.type](value, axes, keepdim=bool(operation.get("keepdims", 1)))


def _product(value: Any, axes: Sequence[int], keepdim: bool) -> Any:
    for axis in reversed(axes):
        value = torch.prod(value, axis, keepdim=keepdim)
    return value


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    **{"ReduceMax": torch.amax, "ReduceMin": torch.amin, "ReduceMean": torch.mean, "ReduceSum": torch.sum},
    **{"ReduceLogSumExp": torch.logsumexp, "ReduceProd": _product},
    "ReduceL1": lambda value, axes, keepdim: torch.sum(torch.abs(value), axes, keepdim=keepdim),
    "ReduceL2": lambda value, axes, keepdim: torch.linalg.vector_norm(value, 2, axes, keepdim=keepdim),
    "ReduceSumSquare": lambda value, axes, keepdim: torch.sum(value * value, axes, keepdim=keepdim),
    "ReduceLogSum": lambda value, axes, keepdim: torch.log(torch.sum(value, axes, keepdim=keepdim)),
}


def _over_the_map(operation: OnnxOperation, value: Any) -> Any:
    """Write GlobalMaxPool, GlobalAveragePool and GlobalLpPool."""
    axes = list(range(2, operation.rank))
    if operation.type == "GlobalLpPool":
        return torch.linalg.vector_norm(value, operation.get("p", 2), axes, keepdim=True)
    return (torch.amax if operation.type == "GlobalMaxPool" else torch.mean)(value, axes, keepdim=True)


def _lp_pool(operation: OnnxOperation, value: Any) -> Any:
    """Write LpPool as an average pooling of powers."""
    kernel, pads, power = (
        operation.get("kernel_shape"),
        operation.get("pads", [0, 0, 0, 0]),
        operation.get("p", 2),
    )
    has_more = operation.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or operation.get("ceil_mode")
    if operation.rank != 4 or has_more or any(step != 1 for step in operation.get("dilations", ())):
        raise refuse(operation, "it is read for maps of two axes, without auto_pad, ceil_mode and dilations.")
    powers = torch.abs(value) ** power
    if any(pads):
        powers = F.pad(powers, [pads[1], pads[3], pads[0], pads[2]])
    mean = F.avg_pool2d(powers, kernel, operation.get("strides", [1, 1]))
    return (mean * (kernel[0] * kernel[1])) ** (1 / power)


def _normalise_by_length(operation: OnnxOperation, value: Any) -> Any:
    return F.normalize(value, operation.get("p", 2), operation.get("axis", -1) % operation.rank)


def _layer_norm(operation: OnnxOperation, value: Any, scale: Any, shift: Any = None) -> Any:
    axis, epsilon = operation.get("axis", -1) % operation.rank, operation.get("epsilon", 1e-5)
    if operation.outputs > 1 or not isinstance(scale, Tensor) or scale.dim() != operation.rank - axis:
        raise refuse(operation, "it has a scale that is a constant of the normalised axes, and one output.")
    return F.layer_norm(value, list(scale.shape), scale, shift, epsilon)


def _group_norm(operation: OnnxOperation, value: Any, scale: Any, shift: Any) -> Any:
    groups, channels = operation.attributes["num_groups"], operation.shape[1]
    if not isinstance(scale, Tensor) or not isinstance(shift, Tensor) or channels is None:
        raise refuse(operation, "its scale and bias are no constants.")
    if operation.version < 21:  # one for each group
        scale, shift = (part.repeat_interleave(channels // groups) for part in (scale, shift))
    return F.group_norm(value, groups, scale, shift, operation.get("epsilon", 1e-5))


# -- shapes ----------------------------------------------------------------------------------------------------------


def _shape_of(operation: OnnxOperation, value: Any) -> Any:
    """Return the sizes of a map or of an array of numbers, for Shape; their product for Size."""
    axes = range(operation.rank)[operation.get("start", 0) : operation.get("end")]
    is_map = not isinstance(value, Numbers)
    sizes = [value.size(axis) for axis in axes] if is_map else value.array.shape
    return Numbers.of([math.prod(sizes)], ()) if operation.type == "Size" else Numbers.of(sizes)


def _reshape(operation: OnnxOperation, value: Any, shape: Any = None) -> Any:
    sizes = list(stated_numbers(operation, "shape", shape))
    for axis, size in enumerate(sizes):
        is_batch = axis == 0 and operation.tracer.batch is not None and size == operation.tracer.batch
        if isinstance(size, int) and (size == 0 or is_batch):
            sizes[axis] = value.size(axis)
    return value.reshape(sizes)


def _expand(operation: OnnxOperation, value: Any, shape: Any) -> Any:
    if isinstance(value, Numbers):
        return refuse_numbers(operation)
    sizes, rank = numbers(shape).values, value.dim() if isinstance(value, Tensor) else operation.rank
    sizes = (1,) * (rank - len(sizes)) + sizes
    new = len(sizes) - rank
    own = (-1 if isinstance(size, int) and size == 1 else size for size in sizes[new:])
    return operation.tracer.create_proxy("call_method", "expand", (value, *sizes[:new], *own), {})


def _squeeze(operation: OnnxOperation, value: Any, given: Any = None) -> Any:
    axes = stated_numbers(operation, "axes", given)
    if axes is None:
        axes = [axis for axis, length in enumerate(operation.shape) if length == 1]
    for axis in sorted((axis % operation.rank for axis in axes), reverse=True):
        value = value.squeeze(axis)
    return value


def _unsqueeze(operation: OnnxOperation, value: Any, given: Any = None) -> Any:
    axes = stated_numbers(operation, "axes", given)
    rank = len(axes) + (value.dim() if isinstance(value, Tensor) else operation.rank)
    for axis in sorted(axis % rank for axis in axes):
        value = value.unsqueeze(axis)
    return value


def _slice(operation: OnnxOperation, value: Any, *bounds: Any) -> Any:
    firsts, lasts, places, strides = bounds_of(operation, *bounds)
    parts, turned = {}, []
    for axis, first, last, stride in zip(places, firsts, lasts, strides, strict=True):
        ends_there = isinstance(last, int) and last >= _TO_THE_END
        end = None if ends_there else last
        if stride < 0:  # from behind; ends before the first sample mean all of them
            if not (isinstance(first, int) and isinstance(last, int)):
                return refuse_numbers(operation)
            first, end = _from_behind(operation, axis % operation.rank, first, last)
            turned.append(axis % operation.rank)
        parts[axis % operation.rank] = slice(first, end, abs(stride))
    if turned:
        value = value.flip(turned)
        if all((part.start, part.stop, part.step) == (0, None, 1) for part in parts.values()):
            return value
    return value[tuple(parts.get(axis, slice(None)) for axis in range(max(parts) + 1))]


def _from_behind(operation: OnnxOperation, axis: int, first: int, last: int) -> tuple[int, int | None]:
    """Return start and end of a slice with a negative step, on the axis turned round."""
    length = operation.shape[axis]
    if length is not None:
        first, last = (
            max(bound + length if bound < 0 else min(bound, length - 1), -1) for bound in (first, last)
        )
        return length - 1 - first, length - 1 - last
    if first >= _TO_THE_END:
        first = -1
    if first >= 0 or last >= 0:
        raise refuse(operation, "it runs backwards from a place that depends on the map's size.")
    return -1 - first, None if last < -(2**15) else -1 - last


def _pad(operation: OnnxOperation, value: Any, pads: Any = None, fill: Any = None, given: Any = None) -> Any:
    widths, rank = stated_numbers(operation, "pads", pads), operation.rank
    mode = operation.get("mode", "constant")
    axes = range(rank) if given is None else [axis % rank for axis in numbers(given).values]
    stated = dict(zip(axes, zip(widths[: len(axes)], widths[len(axes) :], strict=True), strict=True))
    pairs = [stated.get(axis, (0, 0)) for axis in range(rank)]
    while len(pairs) > 1 and all(isinstance(width, int) and width == 0 for width in pairs[0]):
        del pairs[0]  # torch's widths begin with the last axis
    torch_widths = [width for pair in reversed(pairs) for width in pair]
    constant = operation.get("value") if fill is None else numbers(fill).values[0]
    return F.pad(value, torch_widths, _PADDINGS[mode], constant if mode == "constant" else None)


def _split(operation: OnnxOperation, value: Any, split: Any = None) -> Any:
    axis, lengths = operation.get("axis", 0), stated_numbers(operation, "split", split)
    return value.chunk(operation.outputs, axis) if lengths is None else value.split(list(lengths), axis)


def _depth_to_space(operation: OnnxOperation, value: Any) -> Any:
    """Write DepthToSpace; where the place is the slower part of a channel's number (DCR), channels are shuffled."""
    block = operation.attributes["blocksize"]
    if operation.get("mode", "DCR") == "DCR":
        value = F.channel_shuffle(value, block * block)
    return F.pixel_shuffle(value, block)


def _space_to_depth(operation: OnnxOperation, value: Any) -> Any:
    if operation.shape[1] is None:
        raise refuse(operation, "the number of its channels is not known.")
    return F.channel_shuffle(F.pixel_unshuffle(value, operation.attributes["blocksize"]), operation.shape[1])


def _gather(operation: OnnxOperation, value: Any, index: Any) -> Any:
    """Write Gather of a map; an index of one number takes its axis away."""
    if isinstance(index, Numbers) or (isinstance(index, Tensor) and index.dim() == 0):
        chosen = numbers(index)
        index = list(chosen.values) if chosen.array.ndim else chosen.values[0]
    rank = value.dim() if isinstance(value, Tensor) else operation.rank
    before = (slice(None),) * (operation.get("axis", 0) % rank)
    return value[(*before, index)]


def _gather_places(operation: OnnxOperation, value: Any, places: Any) -> Any:
    """Write GatherND: samples at the places that the last axis of a tensor names."""
    if operation.get("batch_dims", 0):
        raise refuse(operation, "places of each image of a batch (batch_dims) are not read.")
    return value[_places(operation, places)]


def _places(operation: OnnxOperation, places: Any) -> tuple[Any, ...]:
    """Return the coordinates of samples, a tensor for each axis."""
    count = places.shape[-1] if isinstance(places, Tensor) else (operation.second_shape or (None,))[-1]
    if not isinstance(count, int):
        raise refuse(operation, "how many axes its places are along depends on the picture.")
    return tuple(places[..., axis] for axis in range(count))


def _put_at_places(operation: OnnxOperation, value: Any, places: Any, new: Any) -> Any:
    """Write ScatterND: a copy with other samples at the places that the last axis of a tensor names."""
    kind = operation.get("reduction", "none")
    if kind not in ("none", "add"):
        raise refuse(operation, f"samples that are joined by {kind} are not read.")
    indices = _places(operation, places)
    # Also of a constant that is written into, which torch would compute at once.
    return operation.tracer.create_proxy(
        "call_function", torch.index_put, (value, indices, new, kind == "add"), {}
    )


def _running_sum(operation: OnnxOperation, value: Any, axis: Any) -> Any:
    place = int(numbers(axis).values[0])
    turned = value.flip(place) if operation.get("reverse") else value
    total = torch.cumsum(turned, place)
    total = total - turned if operation.get("exclusive") else total
    return total.flip(place) if operation.get("reverse") else total


def _topk(operation: OnnxOperation, value: Any, count: Any = None) -> Any:
    number = operation.get("k") if count is None else numbers(count).values[0]
    is_largest, is_sorted = (bool(operation.get(name, 1)) for name in ("largest", "sorted"))
    return torch.topk(value, number, operation.get("axis", -1), is_largest, is_sorted)


def _cast(operation: OnnxOperation, value: Any, *more: Any) -> Any:
    from onnx2torch.node_converters.cast import TENSOR_TYPE_TO_TORCH_TYPE

    kind = TENSOR_TYPE_TO_TORCH_TYPE.get(operation.attributes["to"])
    if kind is None:
        raise refuse(operation, f"torch has no type for ONNX's number {operation.attributes['to']}.")
    return value.to(kind)


# -- other sizes -----------------------------------------------------------------------------------------------------


def _resize(operation: OnnxOperation, value: Any, *more: Any) -> Any:
    """Write Resize, and Upsample, which is Resize of opset 10 under another name."""
    is_first = operation.type == "Upsample" or operation.version < 11  # scales alone, places by their corners
    names = ("scales",) if is_first else ("roi", "scales", "sizes")
    given = dict(zip(names, more, strict=False))
    sizes, scales = (stated_numbers(operation, name, given.get(name)) for name in ("sizes", "scales"))
    axes = [axis % operation.rank for axis in operation.get("axes", range(operation.rank))]
    mode = operation.get("mode", "nearest")
    places = "asymmetric" if is_first else operation.get("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if is_first else operation.get("nearest_mode", "round_prefer_floor")
    if operation.rank != 4 or mode not in _MODES or not (sizes or scales):
        raise refuse(operation, f"mode {mode} of {operation.rank} axes is not read.")
    is_stretched = operation.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if not is_stretched or places == "tf_crop_and_resize":
        raise refuse(operation, "only resizes of the whole map to sizes or by factors are read.")
    stated = dict(zip(axes, sizes or scales, strict=True))
    others = [stated.get(axis, 1) for axis in (0, 1)]
    if not sizes and any(isinstance(factor, fx.Proxy) or factor != 1 for factor in others):
        raise refuse(operation, "it resizes channels or the batch.")
    options: dict[str, Any] = (
        {"size": [stated[axis] if axis in stated else value.size(axis) for axis in (2, 3)]}
        if sizes
        else {"scale_factor": [stated.get(axis, 1.0) for axis in (2, 3)]}
    )
    return _interpolate(operation, value, options, mode, places, rounding)


def _interpolate(
    operation: OnnxOperation, value: Any, options: dict[str, Any], mode: str, places: str, rounding: str
) -> Any:
    scales = options.get("scale_factor", ())
    known = all(isinstance(scale, (int, float)) for scale in scales)
    is_whole = bool(scales) and known and all(float(scale).is_integer() for scale in scales)
    options["mode"] = _MODES[mode]
    if mode == "nearest":
        if places == "align_corners" or (
            known and scales and places == "asymmetric" and not _is_floor(scales, rounding)
        ):
            raise refuse(operation, f"nearest samples by {places} and {rounding} are not those of torch.")
        if "half_pixel" in places and not is_whole:  # at whole factors the two are the same
            options["mode"] = "nearest-exact"
        return F.interpolate(value, **options)
    if operation.get("antialias"):
        options["antialias"] = True
    if places != "asymmetric":
        options["align_corners"] = places == "align_corners"
        return F.interpolate(value, **options)
    if mode not in ("linear", "bilinear") or (scales and not is_whole):
        raise refuse(operation, f"mode {mode} by {places} is read for whole factors of linear resizes.")
    # Places k / s are those of corners that meet on a map that is longer by one sample, less the last one.
    sizes = options.get("size") or [value.size(axis + 2) * int(scale) for axis, scale in enumerate(scales)]
    longer = F.pad(value, (0, 1, 0, 1), "replicate")
    result = F.interpolate(longer, size=[size + 1 for size in sizes], mode="bilinear", align_corners=True)
    return result[:, :, :-1, :-1]


def _is_floor(scales: Sequence[Any], rounding: str) -> bool:
    """True if nearest samples at k / scale are those below: of halves, rounding prefers the lower one."""
    is_exact = all((2 / float(scale)).is_integer() for scale in scales)
    return rounding == "floor" or (rounding == "round_prefer_floor" and is_exact)


def _sample(operation: OnnxOperation, value: Any, grid: Any) -> Any:
    mode = _MODES.get(operation.get("mode", "linear"), "bilinear")
    is_aligned = bool(operation.get("align_corners", 0))
    if (operation.second_shape or (None,))[0] == 1 and isinstance(value, fx.Proxy):  # the same for all images
        grid = operation.tracer.create_proxy("call_method", "expand", (grid, value.size(0), -1, -1, -1), {})
    return F.grid_sample(value, grid, mode, operation.get("padding_mode", "zeros"), is_aligned)


OF_MAPS: dict[str, Callable[..., Any]] = {
    "Shape": _shape_of,
    "Size": _shape_of,
    "Identity": lambda operation, value: value,
    "Dropout": lambda operation, value, *more: value,
    "Cast": _cast,
    "Clip": _clip,
    "Gelu": lambda operation, value: F.gelu(value, approximate=operation.get("approximate", "none")),
    "PRelu": _prelu,
    "ThresholdedRelu": lambda operation, value: F.threshold(value, operation.get("alpha", 1.0), 0.0),
    "Shrink": _shrink,
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "Cosh": lambda operation, value: torch.cosh(value),
    "Sinh": lambda operation, value: torch.sinh(value),
    "Acosh": lambda operation, value: torch.acosh(value),
    "Asinh": lambda operation, value: torch.asinh(value),
    "Atanh": lambda operation, value: torch.atanh(value),
    "Mish": lambda operation, value: F.mish(value),
    **dict.fromkeys(("Sum", "Mean", "Max", "Min"), _of_several),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"), _over_the_map),
    "LpPool": _lp_pool,
    "LpNormalization": _normalise_by_length,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "Reshape": _reshape,
    "Expand": _expand,
    "Tile": lambda operation, value, repeats: value.repeat(*numbers(repeats).values),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Pad": _pad,
    "Split": _split,
    "DepthToSpace": _depth_to_space,
    "Gather": _gather,
    "GatherND": _gather_places,
    "ScatterND": _put_at_places,
    "CumSum": _running_sum,
    "TopK": _topk,
    "SpaceToDepth": _space_to_depth,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "GridSample": _sample,
    **dict.fromkeys(ARITHMETIC, _arithmetic),
}
