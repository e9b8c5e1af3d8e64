"""Products of rows and convolutions of dense maps by oneDNN, fused with residual and activation.

oneDNN multiplies rows by a linear layer, whose packed weight serves any number of rows, and convolves dense maps with
weights packed for their shape. Where oneDNN has no operation, torch computes the same; grouped convolutions that
oneDNN has no fast code for are computed by the table's kernels for elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.axes import as_column, as_map, as_rows, fast_layout
from cadsurgery.elements.backends.choose import Convolution, check_channels, compute
from cadsurgery.elements.backends.gpu import can_finish, finish
from cadsurgery.elements.backends.maps import read_map
from cadsurgery.elements.backends.native import Native
from cadsurgery.elements.backends.weights import FusedConv, Pair
from cadsurgery.elements.kernel_map import read_rows
from cadsurgery.kernels import isa
from cadsurgery.support import torch_internals
from cadsurgery.support.running import running

_POINTWISE, _LINEAR = torch_internals.find("convolve_packed"), torch_internals.find("multiply_packed")
_ONEDNN = (torch.float32, torch.bfloat16)
# Size of a block that stays in the cache until the next operation reads it.
_BLOCK_BYTES = 1 << 20
# A product with fewer rows, or fewer values (torch's own limit), does not use oneDNN's usual kernels and is summed in a
# different order. From these sizes on the result of a row has the same bits for any number of rows.
_FEWEST_ROWS, _FEWEST_VALUES = 64, 20480


class _FastGrouped(NamedTuple):
    """What oneDNN, or torch in its place, has fast code for among grouped convolutions of dense maps.

    Attributes:
        dtype: type of the map.
        isa: instruction set that the processor has.
        padding: widest padding of a depthwise convolution with fast code; beyond, the kernel for elements is faster.
        group: most channels of a group, of more than one, for which the kernel for elements is faster.
    """

    dtype: torch.dtype
    isa: str
    padding: int
    group: int


# The first row of a type counts whose instruction set the processor has. Where the kernels are chosen, they took a
# tenth less time at least, and for depthwise convolutions a third to a ninetieth (docs/notes.md, "Dense maps or
# elements"), with the table of what each position reads.
_FAST = (
    _FastGrouped(torch.float32, "avx512", 6, 2),
    _FastGrouped(torch.float32, "avx2", 4, 4),
    _FastGrouped(torch.float32, "sse4", 3, 32),
    _FastGrouped(torch.bfloat16, "avx512bf16", 6, 2),
    _FastGrouped(torch.bfloat16, "avx512", 4, 32),
    _FastGrouped(torch.bfloat16, "sse4", -1, 32),
    _FastGrouped(torch.float64, "avx2", -1, 32),
    _FastGrouped(torch.float64, "sse4", -1, 4),
)


def has_fast_code(dtype: torch.dtype, group: int, padding: int) -> bool:
    """Return False for grouped convolutions of dense maps that a kernel for elements computes faster."""
    row = next((row for row in _FAST if row.dtype == dtype and row.isa in isa.allowed()), None)
    return row is None or (padding <= row.padding if group == 1 else group > row.group)


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
    """Compute an ordinary convolution of a dense map (B, C, H, W).

    `residual` is added before the activation; it may be any tensor that broadcasts to the result. With `any_height` one
    packed weight serves maps of all heights, as those of the bands of a picture.

    Raises:
        Misfit: the map has other channels than the weight.
    """
    if not running.in_graph:
        check_channels(image.shape[1], weights.weight.shape[1] * weights.groups)
    if residual is not None and residual.shape != _shape(weights, image, stride, padding, dilation):
        return weights.finish(
            convolve(weights.without_activation, image, stride, padding, dilation), residual
        )
    if weights.groups > 1 and weights.dense and not running.in_graph:
        out = _convolve_elements(weights, image, (stride, padding, dilation), residual)
        if out is not None:
            return out
    weight, bias = weights.weight.to(image.dtype), weights.bias_as(image.dtype)
    is_pointwise = weights.groups == 1 and (*weight.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0)
    if weights.dense and is_pointwise and not running.in_graph:
        return _multiply_pixels(weights, image, residual)
    if not _has_onednn(image) or not image.numel():
        window = (stride, padding, dilation, weights.groups)
        if can_finish(image, weight):
            return _finish_on_gpu(weights, F.conv2d(image, weight, None, *window), residual)
        return weights.finish(F.conv2d(image, weight, bias, *window), residual)
    image = image.contiguous(memory_format=torch.channels_last)
    if weights.dense:
        shape, pack = list(image.shape), torch_internals.packed_convolution
        known = (shape[1], shape[3]) if any_height else tuple(shape)
        weight = weights.form(
            ("image", image.dtype, stride, padding, dilation, *known),
            lambda: pack(weight.contiguous(), padding, stride, dilation, weights.groups, shape),
        )
    return _convolve(weights, image, weight, residual, (stride, padding, dilation), weights.groups)


def _convolve_elements(
    weights: FusedConv, image: Tensor, window: tuple[Pair, Pair, Pair], residual: Tensor | None
) -> Tensor | None:
    """Compute a grouped convolution of a dense map by a kernel for elements; None if that is no faster."""
    batch, _, height, width = _shape(weights, image, *window)
    if has_fast_code(image.dtype, weights.weight.shape[1], max(window[1])) or min(batch, height, width) < 1:
        return None
    work = Convolution(as_rows(image), weights, None)
    if not Native().applies(work):
        return None
    table = read_map((batch, *image.shape[2:]), (height, width), weights.weight.shape[2:], *window)
    more = as_rows(residual) if residual is not None else None
    out = compute(replace(work, reads=read_rows(table, True), residual=more))
    return as_map(out, batch, (height, width))


def _finish_on_gpu(weights: FusedConv, sums: Tensor, residual: Tensor | None) -> Tensor:
    """Apply bias, residual and activation to a dense map of a GPU in one pass."""
    sums = sums.contiguous(memory_format=torch.channels_last)
    more = as_rows(residual) if residual is not None else None
    rows = sums.permute(0, 2, 3, 1).view(-1, sums.shape[1])
    finish(rows, weights.bias_as(sums.dtype), more, weights.activation)
    return sums


def _multiply_pixels(weights: FusedConv, image: Tensor, residual: Tensor | None) -> Tensor:
    """Compute a 1x1 convolution of a dense map as a product of its pixels, viewed as rows."""
    more = as_rows(residual) if residual is not None else None
    out = compute(Convolution(as_rows(image), weights, None, residual=more))
    return fast_layout(as_map(out, image.shape[0], (image.shape[2], image.shape[3])))


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


def _shape(weights: FusedConv, image: Tensor, *window: Pair) -> tuple[int, ...]:
    """Return the shape of the result for an image."""
    axes = zip(image.shape[2:], weights.weight.shape[2:], *window, strict=True)
    sizes = ((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in axes)
    return image.shape[0], weights.weight.shape[0], *sizes


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
