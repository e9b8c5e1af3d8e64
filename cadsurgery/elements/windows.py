"""Operations that read taps around an element: convolutions, pooling, space to depth."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends import gpu, native
from cadsurgery.elements.backends.packed import Kernel, PackedConv, kernel_matrix, product
from cadsurgery.elements.elements import (
    Elements,
    common_lattice,
    extended,
    needs_gradient,
    own_image,
    rows_and_halo,
    rows_on,
)
from cadsurgery.elements.kernel_map import Reading, Window, divisors, kernel_map
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.elements.products import (
    autocast,
    gather_conv,
    gathered_blocks,
    is_kept_whole,
    product_on_elements,
    product_on_gpu,
    product_on_whole_map,
    tap_reading,
    taps_of,
    target_of,
    whole_map_is_cheaper,
)


def _macs_of_weight(out: Elements, x: Elements, weight: Tensor, *rest: Any, **options: Any) -> int:
    """Every element of the result meets every entry of the weight once."""
    return len(out.lattice) * weight.numel()


def _macs_of_kernel(
    out: Elements, x: Elements, kernel: Kernel | PackedConv, *rest: Any, **options: Any
) -> int:
    return len(out.lattice) * kernel.weight.numel()


def _macs_of_shape(out: Elements, *rest: Any, shape: tuple[int, ...], **options: Any) -> int:
    return len(out.lattice) * math.prod(shape)


@operation(reads="window", macs=_macs_of_weight)
def conv2d(
    x: Elements, weight: Tensor, bias: Tensor | None, window: Window, stage: int | Lattice, groups: int = 1
) -> Elements:
    """Convolution evaluated at the elements of the lattice after `stage`.

    out(e) = sum_t w[t] X(a(e) + S (d t - p)): dilated for cells that are kept, strided for cells that are
    downsampled here (Hesse et al. 2023, Fig. 8c).

    Args:
        x: elements (N, C).
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        window: the operation as the network has it, with the spacing of its grid.
        stage: stage of the output, at least the input's, or its lattice; so in all functions here.
        groups: channel groups.
    """
    if not torch.compiler.is_compiling() and not needs_gradient(x.rows, weight, bias):
        return fused_conv2d(x, Kernel(weight, bias, groups), window=window, stage=stage)
    window, target = target_of(x, window, stage)
    rows, weight, bias = autocast(x.rows, weight, bias)
    x = Elements(rows, x.lattice)
    dense = _as_dense(x, window, target, window.outside or 0.0)
    if dense is not None:
        image, stride, padding, dilation = dense
        return _from_dense(F.conv2d(image, weight, bias, stride, padding, dilation, groups), target)
    whole = is_kept_whole(x.rows, weight, bias)
    if window.is_pointwise and groups == 1:
        multiply = torch.ops.cadsurgery.product_of_rows if whole else product
        return Elements(multiply(rows_on(x, target), weight.flatten(1), bias), target)
    if whole:
        reading = tap_reading(x, window, target)
        halo = (reading.sources, reading.mix, reading.used)
        outside = window.outside or 0.0
        out = torch.ops.cadsurgery.product_by_table(
            x.rows, reading.table, *halo, reading.has_outside, outside, weight, bias, groups
        )
        return Elements(out, target)
    if gpu.supports(x.rows, weight, groups) and not torch.compiler.is_compiling():
        return Elements(product_on_gpu(x, Kernel(weight, bias, groups), window, target, None, "none"), target)
    rows, table = taps_of(x, window, target)
    return Elements(gather_conv(rows, kernel_matrix(weight, groups), bias, table, groups), target)


@operation(reads="window", macs=_macs_of_kernel)
def fused_conv2d(
    x: Elements,
    kernel: Kernel | PackedConv,
    residual: Elements | None = None,
    *,
    window: Window,
    stage: int | Lattice | None,
) -> Elements:
    """`conv2d` with a residual added and an activation applied in the same pass; without gradients.

    Args:
        x: elements (N, C); of a pointwise window also with more channel axes before the last.
        kernel: weight, bias, groups and activation.
        residual: elements of the output's stage or an earlier one.
        window: the operation as the network has it, with the spacing of its grid.
        stage: stage of the output; None for the input's.
    """
    kernel = kernel.kernel if isinstance(kernel, PackedConv) else kernel
    window, target = target_of(x, window, x.lattice.stage if stage is None else stage)
    x = Elements(autocast(x.rows)[0], x.lattice)
    if residual is not None and not _is_of(residual, target, (*x.rows.shape[1:-1], kernel.weight.shape[0])):
        plain = fused_conv2d(x, kernel.alone, window=window, stage=target)
        target = common_lattice(target.stage if target.part is None else target, plain, residual)
        return Elements(kernel.finish(rows_on(plain, target), rows_on(residual, target)), target)
    more = rows_on(residual, target).to(x.rows.dtype) if residual is not None else None
    if window.is_pointwise and kernel.groups == 1:
        rows = rows_on(x, target)
        flat = more.reshape(-1, more.shape[-1]) if more is not None else None
        steady = target.uniform_level is not None
        out = kernel.on_elements(rows.reshape(-1, rows.shape[-1]), flat, steady=steady)
        return Elements(out.view(*rows.shape[:-1], out.shape[-1]), target)
    dense = _as_dense(x, window, target, window.outside or 0.0)
    if dense is None:
        whole = whole_map_is_cheaper(x, kernel, window, target)
        run = product_on_whole_map if whole else product_on_elements
        return Elements(run(x, kernel, window, target, more), target)
    image, stride, padding, dilation = dense
    shown = _image_of(more, target) if more is not None else None
    return _from_dense(kernel.on_image(image, stride, padding, dilation, shown), target)


def _is_of(residual: Elements, target: Lattice, channels: tuple[int, ...]) -> bool:
    """Whether a residual has the product's size and channels; rarely not, and the sum is a step of its own then."""
    large = all(a >= b for a, b in zip(residual.lattice.size, target.size, strict=True))
    return large and residual.rows.shape[1:] == channels


@operation(reads="window", macs=_macs_of_shape)
def conv2d_per_image(
    x: Elements,
    mix: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    stage: int | Lattice,
    shape: tuple[int, ...],
    groups: int = 1,
) -> Elements:
    """Convolution whose kernel is another mixture of experts for each image (Yang et al. 2019, CondConv).

    Args:
        x: elements (N, C).
        mix: (B, experts), how much each expert counts for each image.
        weight: (experts, O * C / groups * kh * kw).
        bias: (experts, O) or None.
        window: the operation.
        stage: stage of the output.
        shape: of one kernel, (O, C / groups, kh, kw).
        groups: channel groups.
    """
    window, target = target_of(x, window, stage)
    rows, table = taps_of(x, window, target)
    kernels = (mix @ weight).view(-1, *shape)
    biases = mix @ bias if bias is not None else [None] * len(kernels)
    static = target.capacity is not None
    tables = [table] * target.batch if static else table.split(target.counts.tolist())
    parts = []
    for kernel, offset, part in zip(kernels, biases, tables, strict=True):
        values, matrix, more = autocast(rows, kernel_matrix(kernel, groups), offset)
        parts.append(gather_conv(values, matrix, more, part, groups))
    return Elements(own_image(parts, target) if static else torch.cat(parts), target)


@operation(reads="window", outside=-math.inf, drops=True)
def max_pool2d(x: Elements, window: Window, stage: int | Lattice) -> Elements:
    """Maximum over the window, evaluated at the elements of the lattice after `stage`.

    With `pool="drop"` cells that are not downsampled here pass unchanged (D2-Net as published);
    otherwise they are pooled with stride one (a-trous).
    """
    window, target = target_of(x, window, stage)
    if window.is_pointwise:
        return Elements(_subsampled(x, target), target)
    outside = -torch.inf if window.outside is None else window.outside
    drop = drops(target, window)
    dense = _as_dense(x, window, target, outside, -torch.inf) if not drop else None
    if dense is not None:
        image, stride, padding, dilation = dense
        return _from_dense(F.max_pool2d(image, window.kernel, stride, padding, dilation), target)
    return Elements(_pooled(x, kernel_map(x.lattice, target, window, drop=drop), outside, True), target)


@operation(reads="window", drops=True)
def avg_pool2d(
    x: Elements,
    window: Window,
    stage: int | Lattice,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Elements:
    """Mean over the window, evaluated at the elements of the lattice after `stage`; see `max_pool2d`.

    Args:
        x: elements.
        window: the operation.
        stage: stage of the output.
        count_include_pad: whether padding counts in the divisor, as in torch; what lies beyond never does.
        divisor: fixed divisor instead.
    """
    window, target = target_of(x, window, stage)
    if window.is_pointwise:
        rows = _subsampled(x, target)
        return Elements(rows if divisor is None else rows / divisor, target)
    drop = drops(target, window)
    reading = kernel_map(x.lattice, target, window, drop=drop)
    total = _pooled(x, reading, window.outside or 0.0, False)
    if divisor is not None:
        return Elements(total / divisor, target)
    counts = divisors(x.lattice, target, window, drop=drop, padding=count_include_pad)
    return Elements(total / counts.unsqueeze(1).to(total), target)


@operation(reads="window", drops=True)
def pixel_unshuffle(x: Elements, window: Window, stage: int | Lattice) -> Elements:
    """Space to depth: the values under an r x r window side by side in the channels."""
    window, target = target_of(x, window, stage)
    reading = kernel_map(x.lattice, target, window, drop=drops(target, window))
    rows = extended(x.rows, reading, 0.0)
    parts = [block.transpose(1, 2).flatten(1) for block in gathered_blocks(rows, reading.table)]
    return Elements(torch.cat(parts), target)


def drops(target: Lattice, window: Window) -> bool:
    """Whether cells that are not downsampled here pass as they are."""
    return target.geometry.pool == "drop" and window.stride > 1


def _subsampled(x: Elements, target: Lattice) -> Tensor:
    """Rows of pools of a single tap: their own memory, as of any pool, which may be overwritten."""
    rows = rows_on(x, target)
    return rows.clone() if rows is x.rows else rows


def _pooled(x: Elements, reading: Reading, outside: float, largest: bool) -> Tensor:
    """The largest value or the sum over the taps of each element: (N, C)."""
    if not needs_gradient(x.rows) and native.supported(x.rows):
        out = x.rows.new_empty(reading.table.shape[0], x.rows.shape[1])
        native.pool(rows_and_halo(x.rows, reading, outside), reading.table, out, largest)
        return out
    rows = extended(x.rows, reading, outside)
    return torch.cat(
        [block.amax(1) if largest else block.sum(1) for block in gathered_blocks(rows, reading.table)]
    )


def _as_dense(
    x: Elements, window: Window, target: Lattice, outside: float = 0.0, padding: float = 0.0
) -> tuple[Tensor, tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """Image, stride, padding and dilation of an ordinary dense operation that does the same, where both lattices are
    uniform; else None.

    Args:
        x: elements.
        window: the operation.
        target: lattice of the output.
        outside: what lies outside the map.
        padding: what the dense operation pads with. Where that differs, or the operation cannot pad so far, the image
            is padded here.
    """
    geometry = x.lattice.geometry
    if not geometry.dense_shortcut or geometry.anchor != "corner" or window.mode != "zeros":
        return None
    source_level, target_level = x.lattice.uniform_level, target.uniform_level
    if source_level is None or target_level is None or x.rows.dim() != 2:
        return None
    side, stride = geometry.sides[source_level], geometry.sides[target_level] // geometry.sides[source_level]
    steps = (*window.dilation, *window.padding)
    if any(step * window.spacing % side for step in steps):
        return None
    dilation_y, dilation_x, top, _, left, _ = (step * window.spacing // side for step in steps)
    (height, width), (rows, columns) = x.lattice.grid(source_level), target.grid(target_level)
    image = _image_of(x.rows, x.lattice)
    # Padding below and to the right that the last output needs, whatever the network's own padding says.
    reach_y, reach_x = dilation_y * (window.kernel[0] - 1) + 1, dilation_x * (window.kernel[1] - 1) + 1
    bottom, right = (
        (rows - 1) * stride + reach_y - height - top,
        (columns - 1) * stride + reach_x - width - left,
    )
    own = (top, left)
    symmetric = 0 <= top - bottom < stride and 0 <= left - right < stride
    far = padding == -torch.inf and any(
        2 * p > k for p, k in zip(own, window.kernel, strict=True)
    )  # torch's limit
    if min(own) < 0 or not symmetric or far or outside != padding:
        image, own = F.pad(image, (left, right, top, bottom), value=outside), (0, 0)
    return image, (stride, stride), own, (dilation_y, dilation_x)


def _image_of(rows: Tensor, lattice: Lattice) -> Tensor:
    """Rows on a uniform lattice as a dense channels_last map."""
    level = lattice.uniform_level
    assert level is not None
    return rows.view(lattice.batch, *lattice.grid(level), -1).permute(0, 3, 1, 2)


def _from_dense(image: Tensor, target: Lattice) -> Elements:
    """A dense map as elements of a uniform lattice."""
    return Elements(image.permute(0, 2, 3, 1).reshape(len(target), -1), target)
