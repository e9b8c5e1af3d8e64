"""Products of rows and convolutions of dense maps by oneDNN, fused with residual and activation.

oneDNN multiplies rows by a linear layer, whose packed weight serves any number of rows, and convolves dense maps with
weights packed for their shape. Where oneDNN has no operation, torch computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_column, as_rows
from cadsurgery.elements.backends.choose import Backend, compute
from cadsurgery.elements.backends.weights import FusedConv, Pair
from cadsurgery.elements.backends.works import MapConvolution
from cadsurgery.support import torch_internals
from cadsurgery.support.running import running

_POINTWISE, _LINEAR = torch_internals.find("convolve_packed"), torch_internals.find("multiply_packed")
_ONEDNN = (torch.float32, torch.bfloat16)
# Size of a block that stays in the cache until the next operation reads it.
_BLOCK_BYTES = 1 << 20
# A product with fewer rows, or fewer values (torch's own limit), does not use oneDNN's usual kernels and is summed in a
# different order. From these sizes on the result of a row has the same bits for any number of rows.
_FEWEST_ROWS, _FEWEST_VALUES = 64, 20480


def multiply(weights: FusedConv, rows: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute (n, O) from gathered rows (n, taps * C), taps outermost; ungrouped. `residual` (n, O) is added before the
    activation.

    Kept weights multiply blocks of a few fixed numbers of rows. oneDNN generates code for each number of rows that it
    meets, which takes as long as multiplying thousands of rows. So it meets the same numbers in every image, whatever
    the mask keeps; and the bits of a row do not depend on how many rows there are.
    """
    count, fewest = rows.shape[0], _fewest(rows)
    if weights.packed_cache is None or not count or not fewest:
        return _multiply_block(weights, rows, residual)
    out, start = rows.new_empty(count, weights.weight.shape[0]), 0
    for length in _block_lengths(count, fewest):
        part = _rows_of_block(rows, start, length)
        more = _rows_of_block(residual, start, length) if residual is not None else None
        whole = out[start : start + length]
        whole.copy_(_multiply_block(weights, part, more)[: len(whole)])
        start += length
    return out


def _multiply_block(weights: FusedConv, rows: Tensor, residual: Tensor | None) -> Tensor:
    """Compute `multiply` in one operation."""
    if weights.packed_cache is None or not _has_onednn(rows) or not rows.numel():
        plain = product if weights.packed_cache is None and rows.numel() else F.linear
        return weights.finish(plain(rows, weights.matrix(rows.dtype), weights.bias_as(rows.dtype)), residual)
    # The packed weight of a linear layer serves any number of rows. The packed weight of a convolution serves one
    # shape only: with another shape it is reordered in every call, which is far slower.
    weight = weights.form(
        ("rows", rows.dtype),
        lambda: torch_internals.packed_linear(weights.matrix(rows.dtype).contiguous()),
    )
    bias, act = weights.bias_as(rows.dtype), weights.activation
    if residual is None:
        return _apply_rest(weights, _LINEAR(rows, weight, bias, *_fused(weights)))
    residual = residual.contiguous()
    if act is None:
        return _LINEAR.binary(rows, residual, weight, bias, "add")
    if act.name == "relu" and rows.shape[0] > rows.shape[1] and not weights.meets_nan:
        # A convolution fuses both. Reordering its weight in every call is cheaper than the separate pass below.
        point = weights.matrix(rows.dtype)[:, :, None, None]
        out = _convolve(weights, _image(rows), point, _image(residual), ((1, 1), (0, 0), (1, 1)), 1)
        return as_rows(out)
    # The activation is applied block by block, while the sums are in the cache.
    out = rows.new_empty(rows.shape[0], weights.weight.shape[0])
    length = max(64, _BLOCK_BYTES // max(1, out.shape[1] * out.element_size()))
    for part, more, whole in zip(rows.split(length), residual.split(length), out.split(length), strict=True):
        whole.copy_(act.apply_(_LINEAR.binary(part, more, weight, bias, "add")))
    return out


def _block_lengths(count: int, fewest: int) -> Iterator[int]:
    """Yield numbers of rows, multiples of `fewest` by powers of eight, that together are at least `count`."""
    for length in (64 * fewest, 8 * fewest):
        while count >= length:
            yield length
            count -= length
    for _ in range(-(-count // fewest)):
        yield fewest


def _rows_of_block(rows: Tensor, start: int, length: int) -> Tensor:
    """Return rows from `start` on; after the last row zeros follow."""
    part = rows[start : start + length]
    return part if len(part) == length else _fill(part, length)


def convolve(
    weights: FusedConv,
    image: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    residual: Tensor | None = None,
    any_height: bool = False,
) -> Tensor:
    """Compute an ordinary convolution of a dense map (B, C, H, W), see `MapConvolution`; `residual` may be any tensor
    that broadcasts to the result.

    Raises:
        Misfit: the map has other channels than the weight.
    """
    work = MapConvolution(image, weights, (stride, padding, dilation), residual, any_height)
    if residual is not None and residual.shape != work.shape:
        plain = replace(work, weights=weights.without_activation, residual=None)
        return weights.finish(compute(plain), residual)
    out: Tensor = compute(work)
    return out


class OneDNN(Backend):
    """Dense maps, by convolutions that oneDNN fuses."""

    name = "oneDNN"

    def applies(self, work: MapConvolution) -> bool:
        """Return True in inference on the CPU, for maps that hold something."""
        return work.is_inference and _has_onednn(work.rows) and bool(work.rows.numel())

    def convolve_map(self, work: MapConvolution) -> Tensor:
        """Compute a map, channels_last."""
        weights, window, residual = work.weights, work.window, work.residual
        image = work.rows.contiguous(memory_format=torch.channels_last)
        weight = weights.weight.to(image.dtype)
        if weights.dense:
            (stride, padding, dilation), shape = window, list(image.shape)
            pack = torch_internals.packed_convolution
            known = (shape[1], shape[3]) if work.any_height else tuple(shape)
            weight = weights.form(
                ("image", image.dtype, *window, *known),
                lambda: pack(weight.contiguous(), padding, stride, dilation, weights.groups, shape),
            )
        return _convolve(weights, image, weight, residual, window, weights.groups)


def _convolve(
    weights: FusedConv,
    image: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    window: tuple[Pair, Pair, Pair],
    groups: int,
) -> Tensor:
    bias, act, (stride, padding, dilation) = weights.bias_as(image.dtype), weights.activation, window
    numbers = (padding, stride, dilation, groups)
    if residual is None and act is None and weights.packed_cache is None:
        return F.conv2d(image, weight, bias, *window, groups)
    if residual is None:
        return _apply_rest(weights, _POINTWISE(image, weight, bias, *numbers, *_fused(weights)))
    relu = act is not None and act.name == "relu" and not weights.meets_nan
    # Torch itself adds and clamps where oneDNN does not support the map or might read it as contiguous. Torch has
    # no bfloat16 version of this.
    if image.dtype == torch.bfloat16:
        plain = groups == 1 and min(image.shape[1], weight.shape[0]) > 1
        relu = relu and plain and image.shape[2] * image.shape[3] > 1
    residual = residual.contiguous(memory_format=torch.channels_last)
    then = ("add", 1.0, "relu" if relu else None, (), "")
    out = _POINTWISE.binary(image, residual, weight, bias, *numbers, *then)
    return out if relu or act is None else act.apply_(out)


def _fused(weights: FusedConv) -> tuple[str, tuple[float, ...], str]:
    """Return the activation in the format of oneDNN's fused operations."""
    act = None if _is_apart(weights) else weights.activation
    return (act.name, act.scalars, act.algorithm) if act is not None else ("none", (), "")


def _is_apart(weights: FusedConv) -> bool:
    """Return True if the activation must not be fused into a oneDNN operation."""
    return weights.meets_nan and weights.activation is not None and weights.activation.bounds is not None


def _apply_rest(weights: FusedConv, out: Tensor) -> Tensor:
    """Apply the activation, if it was not fused."""
    return weights.activation.apply_(out) if _is_apart(weights) and weights.activation is not None else out


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `rows @ weight.T + bias` for (n, K) rows and an (O, K) weight; differentiable."""
    if rows.device.type == "cpu" and rows.dtype in _ONEDNN:
        count, fewest = rows.shape[0], _fewest(rows)
        if 0 < count < fewest:
            rows = _fill(rows, fewest)
        out = F.conv2d(_image(rows), weight[:, :, None, None], bias)
        return as_rows(out)[:count]
    return F.linear(rows, weight, bias)


def _fewest(rows: Tensor) -> int:
    """Return how many rows of this length a product needs at least; 0 while torch traces or counts operations."""
    return 0 if running.is_observed else max(_FEWEST_ROWS, _FEWEST_VALUES // rows.shape[1] + 1)


def _fill(rows: Tensor, count: int) -> Tensor:
    """Append rows of zeros up to `count` rows."""
    return F.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _image(rows: Tensor | None) -> Any:
    """View rows (n, C) as a channels_last image with exactly these strides; otherwise torch would silently copy it."""
    return as_column(rows) if rows is not None else None


def _has_onednn(values: Tensor) -> bool:
    """Return True if oneDNN's fused operations can be used; they have no gradients, and torch cannot count them."""
    return (
        _POINTWISE is not None
        and values.device.type == "cpu"
        and values.dtype in _ONEDNN
        and (values.dtype != torch.bfloat16 or torch_internals.packs_bfloat16())
        and not running.is_observed
        and not (torch.is_grad_enabled() and values.requires_grad)
    )
