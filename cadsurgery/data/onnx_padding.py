"""Write padding that torch's layers cannot have: `auto_pad` of ONNX, and pools with other padding at each side.

With SAME_UPPER and SAME_LOWER n samples give ceil(n / stride) outputs, and a transposed convolution gives n * stride.
Of an odd amount the larger half lies behind the map (upper) or before it (lower).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from cadsurgery.data.onnx_numbers import OnnxOperation

_LIKE_THE_MAP = ("SAME_UPPER", "SAME_LOWER")
_POOLS = ("MaxPool", "AveragePool")


def has_own_padding(operation: OnnxOperation) -> bool:
    """True if an operation's padding is `auto_pad`, or one that torch's layer for it cannot have."""
    if operation.text("auto_pad", "NOTSET") in _LIKE_THE_MAP:
        return True
    pads = operation.attributes.get("pads", [])
    before, behind = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    if operation.type not in (*_POOLS, "ConvTranspose") or not any(pads):
        return False
    kernel = operation.attributes.get("kernel_shape", [])
    is_wide = operation.type in _POOLS and any(
        pad > taps // 2 for pad, taps in zip(before, kernel, strict=True)
    )
    return before != behind or is_wide


def without_padding(model: Any, operations: Mapping[str, OnnxOperation]) -> Any:
    """Return an ONNX model whose layers have no padding where `has_own_padding`; `call_padded` adds it. Operations are
    named by their first output."""
    copy = type(model)()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if has_own_padding(operations[node.output[0]]):
            kept = [stated for stated in node.attribute if stated.name not in ("auto_pad", "pads")]
            del node.attribute[:]
            node.attribute.extend(kept)
    return copy


def call_padded(layer: Any, operation: OnnxOperation, value: Any) -> Any:
    """Call a convolution or pooling that has no padding yet, with the padding that ONNX asks for.

    Args:
        layer: a layer of torch for one to three axes. Padding that is the same for every size and at both borders
            becomes the layer's own.
        operation: the operation, of which `has_own_padding` is true.
        value: the map that it reads, (B, C, ...).
    """
    auto_pad = operation.text("auto_pad", "NOTSET")
    is_upper, is_transposed = auto_pad == "SAME_UPPER", "Transpose" in type(layer).__name__
    axes = len(_numbers(layer.kernel_size, 3))
    kernel, stride, dilation = (
        _numbers(numbers, axes)
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


def _numbers(value: Any, axes: int) -> list[int]:
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
        for span, extra, step in zip(spans, _numbers(layer.output_padding, len(spans)), stride, strict=True)
    ]
    layer.padding = tuple(total // 2 for total in totals)
    result, index = layer(value), [slice(None), slice(None)]
    for axis, (total, step) in enumerate(zip(totals, stride, strict=True), 2):
        length = step * value.size(axis)
        kept = slice(length) if is_upper else slice(1, length + 1)
        index.append(kept if total % 2 else slice(None))
    return result[tuple(index)] if any(total % 2 for total in totals) else result
