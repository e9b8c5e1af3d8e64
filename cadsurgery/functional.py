"""The operations of a convolutional network on elements: what `torch.nn.functional` is to dense maps.

Every function takes and returns `Elements`, computes only the elements of its output lattice, is
differentiable, and treats the images of a batch apart from each other. Pointwise functions need no entry
here: they act on `rows` as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cadsurgery.errors import InvalidInput
from cadsurgery.kernel_map import KernelMap, Reading, Window, kernel_map, read_points
from cadsurgery.lattice import Lattice, describe
from cadsurgery.layout import NCHW, image_dims, is_flat

# Gathered rows are multiplied in blocks of about this size: small enough to stay near the cache and far
# below a dense network's activations, large enough for the matrix product to run at full speed.
BLOCK_BYTES = 16 << 20

_POINT = Window((1, 1))


@dataclass(frozen=True, eq=False)
class Elements:
    """Feature vectors of the cells of a lattice.

    Attributes:
        rows: (N, C), contiguous, in the lattice's order; (N, *channel axes) where a map has several.
        lattice: the cells.
    """

    rows: Tensor
    lattice: Lattice


def to_elements(dense: Tensor, lattice: Lattice, layout: str = NCHW) -> Elements:
    """A dense map at the high output stride as elements of stage 0; a view if it is channels_last in memory."""
    if dense.dim() != len(layout) or dense.shape[layout.index("b")] != lattice.batch:
        raise InvalidInput(
            f"a batch of {lattice.batch} maps is expected here, not {describe(dense)}.",
            next="give one level map per image.",
        )
    image = [layout.index(axis) for axis in "bhwp" if axis in layout]
    channels = [dim for dim, axis in enumerate(layout) if axis == "c"]
    by_pixel = dense.permute(*image, *channels)
    size = lattice.size if "p" in layout else (by_pixel.shape[1], by_pixel.shape[2])
    return Elements(by_pixel.flatten(0, len(image) - 1).contiguous(), lattice.resampled(0, size))


def fine_map(dense: Tensor, layout: str) -> Tensor:
    """A dense map of any layout as (B, C, H, W): what a mask provider is shown."""
    if layout == NCHW:
        return dense
    image = [layout.index(axis) for axis in "bhw"]
    channels = [dim for dim, axis in enumerate(layout) if axis == "c"]
    return dense.permute(*image, *channels).flatten(3).permute(0, 3, 1, 2)


def to_dense(x: Elements, spacing: int = 1, layout: str = NCHW) -> Tensor:
    """A dense map that reads every `spacing`-th fine pixel by the lattice's fill.

    Args:
        x: elements.
        spacing: 1 for the fine size, the network's own sample distance for its native size.
        layout: of the result.

    Returns:
        By default (B, C, ceil(H / spacing), ceil(W / spacing)), in channels_last memory.
    """
    lattice = x.lattice
    height, width = lattice.size

    def build() -> Reading:
        pixels = torch.arange(lattice.batch * height * width, device=lattice.levels.device)
        return read_points(lattice, pixels.view(lattice.batch, height, width)[:, ::spacing, ::spacing])

    reading = lattice.pyramid.derive(("to_dense", lattice.stage, lattice.size, spacing), build)
    rows = _extended(x.rows.reshape(len(lattice), -1), reading, 0.0)
    rows = rows.index_select(0, reading.table.flatten().to(x.rows.device))
    by_pixel = rows.view(*reading.table.shape, *x.rows.shape[1:])
    present = "bhw" + "c" * (x.rows.dim() - 1)
    if "p" in layout:
        by_pixel, present = by_pixel.flatten(1, 2), present.replace("hw", "p")
    channels = iter(dim for dim, axis in enumerate(present) if axis == "c")
    return by_pixel.permute([next(channels) if axis == "c" else present.index(axis) for axis in layout])


def rows_on(value: Elements | Tensor, lattice: Lattice, layout: str = NCHW) -> Tensor:
    """Rows (N, *channel axes) of a value on a lattice of the same or a later stage.

    Elements are subsampled to the anchors that remain. A tensor without extent in the image, such as one
    vector per image (B, C, 1, 1) or one for all (C, 1, 1), is repeated for every element as torch would
    broadcast it against a map of `layout`.
    """
    if isinstance(value, Elements):
        if value.lattice == lattice:
            return value.rows
        table = kernel_map(value.lattice, lattice, _POINT).reading.table.squeeze(1)
        return value.rows.index_select(0, table.to(value.rows.device))
    if value.dim() == 0:
        return value
    if not is_flat(value.shape, layout):
        raise InvalidInput(
            f"{describe(value)} has spatial extent and cannot be combined with elements.",
            next="end the region before this operation: region=[...] takes module names.",
        )
    value = value.reshape(*(1,) * (len(layout) - value.dim()), *value.shape)
    channels = [dim for dim, axis in enumerate(layout) if axis == "c"]
    per_image = value.permute(layout.index("b"), *channels, *image_dims(layout))
    per_image = per_image.reshape(per_image.shape[: 1 + len(channels)])
    if per_image.shape[0] == 1:
        return per_image.expand(len(lattice), *per_image.shape[1:])
    return per_image.index_select(0, lattice.coordinates[0].to(value.device))


def common_lattice(stage: int, *values: Elements) -> Lattice:
    """The lattice of `stage` that all operands of a join can be read on: the smallest fine size."""
    height = min(value.lattice.size[0] for value in values)
    width = min(value.lattice.size[1] for value in values)
    return values[0].lattice.at(stage, (height, width))


def conv2d(
    x: Elements, weight: Tensor, bias: Tensor | None, window: Window, stage: int, groups: int = 1
) -> Elements:
    """Convolution evaluated at the elements of the lattice after `stage`.

    out(e) = sum_t w[t] X(a(e) + S (d t - p)): dilated for cells that are kept, strided for cells that are
    downsampled here (Hesse et al. 2023, Fig. 8c).

    Args:
        x: elements (N, C).
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        window: the operation as the network has it, with the spacing of its grid.
        stage: stage of the output, at least the input's.
        groups: channel groups.
    """
    window = window.fit(x.lattice.size)
    target = x.lattice.at(stage, window.output_size(x.lattice.size))
    dense = _dense_conv2d(x, weight, bias, window, target, groups)
    if dense is not None:
        return dense
    if window.is_pointwise and groups == 1:
        return Elements(_matmul(rows_on(x, target), weight.flatten(1), bias), target)
    rows, table = _taps(x, window, target)
    rows, kernel, bias = _autocast(rows, _kernel(weight, groups), bias)
    return Elements(_GatherConv.apply(rows, kernel, bias, table, groups), target)


def conv2d_per_image(
    x: Elements,
    mix: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    stage: int,
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
    window = window.fit(x.lattice.size)
    target = x.lattice.at(stage, window.output_size(x.lattice.size))
    rows, table = _taps(x, window, target)
    counts = torch.bincount(target.coordinates[0], minlength=target.batch).tolist()
    kernels = (mix @ weight).view(-1, *shape)
    biases = mix @ bias if bias is not None else [None] * len(kernels)
    parts = []
    for kernel, offset, part in zip(kernels, biases, table.split(counts), strict=True):
        operands = _autocast(rows, _kernel(kernel, groups), offset)
        parts.append(_GatherConv.apply(*operands, part, groups))
    return Elements(torch.cat(parts), target)


def _taps(x: Elements, window: Window, target: Lattice) -> tuple[Tensor, Tensor]:
    """Rows and the (N, taps) table into them that a convolution multiplies."""
    if window.is_pointwise:
        rows = rows_on(x, target)
        return rows, torch.arange(len(target), dtype=torch.int32, device=rows.device).unsqueeze(1)
    reading = kernel_map(x.lattice, target, window).reading
    return _extended(x.rows, reading, window.outside or 0.0), reading.table.to(x.rows.device)


def _kernel(weight: Tensor, groups: int) -> Tensor:
    """A kernel (O, C / groups, kh, kw) as `_GatherConv` takes it.

    Ungrouped: taps outermost, so that a row of gathered elements is a row of the matrix. Grouped: contiguous,
    because torch 2.15 on the CPU multiplies wrongly by a channels_last kernel of width one.
    """
    if groups > 1:
        return weight.contiguous().flatten(2).unsqueeze(3)
    return weight.permute(0, 2, 3, 1).flatten(1)


def max_pool2d(x: Elements, window: Window, stage: int) -> Elements:
    """Maximum over the window, evaluated at the elements of the lattice after `stage`.

    With `pool="drop"` cells that are not downsampled here pass unchanged (D2-Net as published);
    otherwise they are pooled with stride one (a-trous).
    """
    target, kmap = _pool_map(x, window, stage)
    outside = -torch.inf if window.outside is None else window.outside
    rows = _extended(x.rows, kmap.reading, outside)
    return Elements(torch.cat([block.amax(1) for block in _gathered(rows, kmap.reading.table)]), target)


def avg_pool2d(
    x: Elements, window: Window, stage: int, count_include_pad: bool = True, divisor: int | None = None
) -> Elements:
    """Mean over the window, evaluated at the elements of the lattice after `stage`; see `max_pool2d`.

    Args:
        x: elements.
        window: the operation.
        stage: stage of the output.
        count_include_pad: whether padding counts in the divisor, as in torch; what lies beyond never does.
        divisor: fixed divisor instead.
    """
    target, kmap = _pool_map(x, window, stage)
    rows = _extended(x.rows, kmap.reading, window.outside or 0.0)
    total = torch.cat([block.sum(1) for block in _gathered(rows, kmap.reading.table)])
    if divisor is not None:
        return Elements(total / divisor, target)
    counted = kmap.counted if count_include_pad else kmap.inside
    return Elements(total / counted.sum(1, keepdim=True).to(total), target)


def batch_norm(x: Elements, norm: nn.BatchNorm2d, *, weighted: bool | None = None) -> Elements:
    """Batch normalisation with the parameters and statistics of `norm`.

    In training the statistics run over the real elements of all images. `weighted` weighs each by the
    area of its cell, so that the statistics estimate those of the dense network; False counts each once,
    as published; None leaves it to the geometry. Running statistics are updated like torch does.
    """
    use_batch = norm.training or norm.running_mean is None or norm.running_var is None
    if not use_batch:
        rows = F.batch_norm(
            x.rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )
        return Elements(rows, x.lattice)
    if x.lattice.geometry.statistics == "area" if weighted is None else weighted:
        share = x.lattice.weights / x.lattice.weights.sum()
    else:
        share = torch.full((len(x.lattice),), 1 / len(x.lattice), dtype=torch.float64)
    share = share.to(x.rows.device, torch.promote_types(x.rows.dtype, torch.float32))
    values = x.rows.to(share.dtype)
    mean = share @ values
    centred = values - mean
    variance = share @ centred.square()
    if norm.training and norm.track_running_stats:
        _update_statistics(norm, mean.detach(), variance.detach(), len(x.lattice))
    scale = (variance + norm.eps).rsqrt()
    rows = centred * scale if norm.weight is None else torch.addcmul(norm.bias, centred, scale * norm.weight)
    return Elements(rows.to(x.rows.dtype), x.lattice)


def drop_per_image(x: Elements, dropout: nn.Module) -> Elements:
    """Dropout of whole channels or whole images, as `dropout` does it to a map: one factor per image and channel."""
    if not dropout.training:
        return x
    factors = dropout(x.rows.new_ones(x.lattice.batch, x.rows.shape[1], 1, 1))
    return Elements(x.rows * rows_on(factors, x.lattice), x.lattice)


def global_mean(x: Elements, keepdim: bool = True, layout: str = NCHW) -> Tensor:
    """Mean of each image, every element weighed by the area of its cell: (B, C, 1, 1) or (B, C)."""
    share = x.lattice.membership.to(x.rows.device, torch.promote_types(x.rows.dtype, torch.float32))
    values = x.rows.reshape(len(x.lattice), -1).to(share.dtype)
    return _per_image((share @ values).to(x.rows.dtype), x, keepdim, layout)


def global_max(x: Elements, keepdim: bool = True, layout: str = NCHW) -> Tensor:
    """Maximum of each image: (B, C, 1, 1) or (B, C)."""
    values = x.rows.reshape(len(x.lattice), -1)
    image = x.lattice.coordinates[0].to(x.rows.device).unsqueeze(1).expand_as(values)
    lowest = values.new_full((x.lattice.batch, values.shape[1]), -torch.inf)
    return _per_image(lowest.scatter_reduce(0, image, values, "amax"), x, keepdim, layout)


def global_reduce(
    x: Elements,
    how: str,
    dims: tuple[int, ...],
    keepdim: bool = False,
    correction: int = 1,
    spacing: int = 1,
    layout: str = NCHW,
) -> Tensor:
    """A reduction over the image axes of each image, and over channel axes if `dims` has some.

    A sum or norm runs over as many values as the network's own grid has: the weighted mean times their number. So
    it keeps the scale the weights were trained with, at any resolution.

    Args:
        x: elements.
        how: `mean`, `sum`, `norm` (Euclidean), `var`, `std`, `amax` or `amin`.
        dims: axes of the dense map that are reduced; all image axes are among them.
        keepdim: keep them with size one.
        correction: of variances, as in torch.
        spacing: fine pixels between the samples of the network's own grid.
        layout: of the dense map.
    """
    channels = [dim for dim in dims if layout[dim] == "c"]
    samples = math.prod(native_shape(x, spacing, layout)[dim] for dim in dims)

    def mean(rows: Tensor) -> Tensor:
        whole = global_mean(Elements(rows, x.lattice), True, layout)
        return whole.mean(channels, keepdim=True) if channels else whole

    if how in ("amax", "amin"):
        sign = 1 if how == "amax" else -1
        found = sign * global_max(Elements(sign * x.rows, x.lattice), True, layout)
        found = getattr(found, how)(channels, keepdim=True) if channels else found
    elif how in ("var", "std"):
        centred = x.rows - rows_on(mean(x.rows), x.lattice, layout)
        found = mean(centred.square()) * (samples / max(samples - correction, 1))
        found = found.sqrt() if how == "std" else found
    elif how == "norm":
        found = (mean(x.rows.square()) * samples).sqrt()
    else:
        found = mean(x.rows) * (samples if how == "sum" else 1)
    return found if keepdim else found.squeeze(dims)


def _per_image(values: Tensor, x: Elements, keepdim: bool, layout: str) -> Tensor:
    """One vector (B, C) per image in the axes of a layout, its image axes of size one or gone."""
    channels = iter(range(1, x.rows.dim()))
    kept = [next(channels) if axis == "c" else 0 for axis in layout if axis in "bc"]
    values = values.view(-1, *x.rows.shape[1:]).permute(kept)
    for dim in image_dims(layout) if keepdim else ():
        values = values.unsqueeze(dim)
    return values


def softmax_over_image(x: Elements, spacing: int) -> Elements:
    """Softmax over all positions of each image, for every channel apart.

    Each element counts as often as the network's own grid has samples in its cell, so that the weights sum to one over
    that grid; see `global_reduce`.
    """
    layout = "bp" + "c" * (x.rows.dim() - 1)
    highest = rows_on(global_max(x, True, layout), x.lattice, layout)
    exponents = (x.rows - highest).exp()
    total = global_reduce(Elements(exponents, x.lattice), "sum", (1,), True, 0, spacing, layout)
    return Elements(exponents / rows_on(total, x.lattice, layout), x.lattice)


def normalize_over_image(x: Elements, spacing: int) -> Elements:
    """Each channel of an image divided by its Euclidean norm over all positions; see `global_reduce`."""
    layout = "bp" + "c" * (x.rows.dim() - 1)
    norm = global_reduce(x, "norm", (1,), True, 0, spacing, layout).clamp(min=1e-12)
    return Elements(x.rows / rows_on(norm, x.lattice, layout), x.lattice)


def sum_of_products(x: Elements, other: Elements, spacing: int, layout: str) -> Tensor:
    """The matrix product of two maps along their positions: (B, ..., I, J) from rows (N, ..., I) and (N, ..., J).

    The sum over positions is scaled to the network's own grid; see `global_reduce`. It is what attention between
    channels and pooling by attention are made of.
    """
    height, width = (-(-length // spacing) for length in x.lattice.size)
    share = x.lattice.weights / (x.lattice.size[0] * x.lattice.size[1]) * height * width
    weighed = x.rows * share.to(x.rows).view(-1, *(1,) * (x.rows.dim() - 1))
    counts = torch.bincount(x.lattice.coordinates[0], minlength=x.lattice.batch).tolist()
    parts = zip(weighed.split(counts), other.rows.split(counts), strict=True)
    return torch.stack([torch.einsum("n...i,n...j->...ij", left, right) for left, right in parts])


def matrix_on_rows(x: Elements, matrix: Tensor, transposed: bool) -> Elements:
    """A matrix (K, J), or one per image (B, ..., K, J), on the last channel axis of rows (N, ..., K).

    Args:
        x: elements.
        matrix: as the network multiplies it from the right; `transposed` if from the left.
        transposed: whether its last two axes are (J, K).
    """
    matrix = matrix.transpose(-1, -2) if transposed else matrix
    if matrix.dim() == 2:
        return Elements(x.rows @ matrix, x.lattice)
    counts = torch.bincount(x.lattice.coordinates[0], minlength=x.lattice.batch).tolist()
    matrices = matrix.expand(x.lattice.batch, *matrix.shape[1:])
    parts = zip(x.rows.split(counts), matrices, strict=True)
    return Elements(torch.cat([torch.einsum("n...k,...kj->n...j", *part) for part in parts]), x.lattice)


def group_norm(
    x: Elements, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Elements:
    """Group normalisation: each image and group by its own mean and variance, elements weighed by area.

    With as many groups as channels it is instance normalisation.
    """
    centred, variance = _centred_groups(x, groups)
    rows = (centred * (variance + eps).rsqrt()).flatten(1).to(x.rows.dtype)
    if weight is not None:
        rows = rows * weight if bias is None else torch.addcmul(bias, rows, weight)
    return Elements(rows, x.lattice)


def group_deviation(x: Elements, groups: int, eps: float) -> Elements:
    """Standard deviation of each image and group (Liu et al. 2020, EvoNorm-S0), repeated for its channels."""
    centred, variance = _centred_groups(x, groups)
    rows = (variance + eps).sqrt().expand_as(centred).flatten(1)
    return Elements(rows.to(x.rows.dtype), x.lattice)


def _centred_groups(x: Elements, groups: int) -> tuple[Tensor, Tensor]:
    """Rows (N, groups, C / groups) less the mean of their image and group, and its variance (N, groups, 1)."""
    dtype = torch.promote_types(x.rows.dtype, torch.float32)
    layout = "bcchw"

    def mean(rows: Tensor) -> Tensor:
        found = global_reduce(Elements(rows, x.lattice), "mean", (2, 3, 4), True, layout=layout)
        return rows_on(found, x.lattice, layout)

    rows = x.rows.to(dtype).unflatten(1, (groups, -1))
    centred = rows - mean(rows)
    return centred, mean(centred.square())


def resize(
    x: Elements,
    stage: int,
    spacings: tuple[int, int],
    scale: int,
    size: tuple[int, int] | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
) -> Elements:
    """Upsampling inside the region: onto the lattice of an earlier stage.

    Where a cell of the output is as large as the one it lies in (it was never downsampled), the value is taken over:
    in the dense network at that stride there is nothing to resize. Elsewhere it is read between the coarse cells
    as torch.nn.functional.interpolate reads between samples.

    Args:
        x: elements.
        stage: of the output, at most the input's.
        spacings: fine pixels between the samples of the network's own grid, before and after.
        scale: how many times finer the output is.
        size: samples (height, width) of the output on the network's own grid; default `scale` times the input's.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.

    Raises:
        InvalidInput: the output would be larger than the fine map.
    """
    before = tuple(-(-length // spacings[0]) for length in x.lattice.size)
    after = tuple(size) if size is not None else tuple(count * scale for count in before)
    room = x.lattice.whole_size
    fine = tuple(count * spacings[1] for count in after)
    if any(length - spacings[1] >= most for length, most in zip(fine, room, strict=True)):
        raise InvalidInput(
            f"upsampling to {after[0]}x{after[1]} samples gives more than the network's own maps have.",
            why="the image is not divisible by the network's strides.",
            next="pad or resize the image to a multiple of the lowest output stride.",
        )
    target = x.lattice.resampled(stage, (min(fine[0], room[0]), min(fine[1], room[1])))
    key = ("resize", x.lattice.stage, x.lattice.size, target, spacings, before, after, mode, align_corners)

    def build() -> tuple[Tensor, Tensor]:
        image, *place = target.coordinates
        side = target.side_map.flatten()[target.anchors]
        ratios = tuple(
            have * spacings[0] / (want * spacings[1]) for have, want in zip(before, after, strict=True)
        )
        if align_corners:
            ratios = tuple(
                (h - 1) * spacings[0] / max((w - 1) * spacings[1], 1)
                for h, w in zip(before, after, strict=True)
            )
        return _between_cells(x.lattice, image, place, side, ratios, mode, align_corners)

    sources, mix = x.lattice.pyramid.derive(key, build)
    return Elements(_mixed(x.rows, sources, mix), target)


def resize_to_dense(
    x: Elements,
    spacing: int,
    scale: int,
    size: tuple[int, int] | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
) -> Tensor:
    """Upsampling that leaves the region: a dense map finer than the high output stride.

    Each of its samples is read between cells of the size of the one it lies in, as `resize` does it.

    Args:
        x: elements.
        spacing: fine pixels between the samples of the network's own grid, before.
        scale: how many times finer the output is; more than `spacing`.
        size: samples (height, width) of the output; default `scale` times the input's.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.
    """
    before = tuple(-(-length // spacing) for length in x.lattice.size)
    after = tuple(size) if size is not None else tuple(count * scale for count in before)
    device, side = x.lattice.levels.device, spacing / scale
    image = torch.arange(x.lattice.batch, device=device).view(-1, 1, 1).expand(-1, *after).flatten()
    axes = [torch.arange(count, device=device, dtype=torch.float64) * side for count in after]
    place = [
        grid.repeat(x.lattice.batch)
        for grid in (axes[0].repeat_interleave(after[1]), axes[1].repeat(after[0]))
    ]
    ratios = tuple(have * scale / want for have, want in zip(before, after, strict=True))
    if align_corners:
        ratios = tuple(
            (have - 1) * scale / max(want - 1, 1) for have, want in zip(before, after, strict=True)
        )
    sides = torch.full_like(place[0], side)
    sources, mix = _between_cells(x.lattice, image, place, sides, ratios, mode, align_corners)
    return _mixed(x.rows, sources, mix).view(x.lattice.batch, *after, -1).permute(0, 3, 1, 2)


def pixel_shuffle(x: Elements, stage: int, spacings: tuple[int, int], scale: int) -> Elements:
    """Depth to space: an element reads the channels of its phase on the output's own grid.

    Args:
        x: elements (N, C r r).
        stage: of the output.
        spacings: fine pixels between the samples of the network's own grid, before and after.
        scale: r.
    """
    target = x.lattice.resampled(stage, x.lattice.size)
    (height, width), (image, y, x_) = x.lattice.size, target.coordinates
    down, across = (at // spacings[1] % scale for at in (y, x_))
    points = (image * height + y - down * spacings[1]) * width + x_ - across * spacings[1]
    reading = read_points(x.lattice, points)
    rows = _extended(x.rows, reading, 0.0).index_select(0, reading.table.to(x.rows.device))
    phase = (down * scale + across).to(rows.device)
    rows = rows.unflatten(1, (-1, scale * scale))
    return Elements(rows.gather(2, phase.view(-1, 1, 1).expand(-1, rows.shape[1], 1)).squeeze(2), target)


def pixel_unshuffle(x: Elements, window: Window, stage: int) -> Elements:
    """Space to depth: the values under an r x r window side by side in the channels."""
    target, kmap = _pool_map(x, window, stage)
    rows = _extended(x.rows, kmap.reading, 0.0)
    parts = [block.transpose(1, 2).flatten(1) for block in _gathered(rows, kmap.reading.table)]
    return Elements(torch.cat(parts), target)


def native_shape(x: Elements, spacing: int, layout: str = NCHW) -> torch.Size:
    """Shape of the map as the network itself sees it, with one sample per `spacing` fine pixels."""
    height, width = (-(-length // spacing) for length in x.lattice.size)
    channels = iter(x.rows.shape[1:])
    known = {"b": x.lattice.batch, "h": height, "w": width, "p": height * width}
    return torch.Size(next(channels) if axis == "c" else known[axis] for axis in layout)


def _between_cells(
    source: Lattice,
    image: Tensor,
    place: Sequence[Tensor],
    side: Tensor,
    ratios: Sequence[float],
    mode: str,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Elements (M, 4) and their weights that samples of a finer grid are resized from.

    Args:
        source: the lattice that is read.
        image: (M,) image of each sample.
        place: its y and x, in fine pixels.
        side: (M,) distance of samples there, in fine pixels.
        ratios: how far the output's grid is from fitting the input's, per axis; 1 unless sizes do not divide.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.
    """
    height, width = source.size
    inside = [at.long().clamp(max=length - 1) for at, length in zip(place, source.size, strict=True)]
    cell = source.side_map.flatten()[(image * height + inside[0]) * width + inside[1]]
    same = cell == side
    ends = []
    for fine, length, ratio in zip(place, source.size, ratios, strict=True):
        at = fine.double()
        if mode == "nearest":
            point = (at * ratio / cell).floor() * cell
        else:
            point = at * ratio if align_corners else (at + side / 2) * ratio - cell / 2
        point = torch.where(same, at, point).clamp(min=0)
        low = (point / cell + 1e-9).floor()
        share = torch.where(same, 0.0, (point / cell - low).clamp(min=0))
        first = (low * cell).long().clamp(max=length - 1)
        ends.append(((first, 1 - share), ((first + cell).clamp(max=length - 1), share)))
    points = [(image * height + y) * width + x for y, _ in ends[0] for x, _ in ends[1]]
    weights = [v * h for _, v in ends[0] for _, h in ends[1]]
    return source.index[torch.stack(points, 1)], torch.stack(weights, 1)


def _mixed(rows: Tensor, sources: Tensor, mix: Tensor) -> Tensor:
    """Weighted sums of rows: (M, C)."""
    return F.embedding_bag(sources.to(rows.device), rows, per_sample_weights=mix.to(rows), mode="sum")


def _update_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    unbiased = variance * (count / max(count - 1, 1))
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean), momentum or 0.0)
        norm.running_var.lerp_(unbiased.to(norm.running_var), momentum or 0.0)


def _pool_map(x: Elements, window: Window, stage: int) -> tuple[Lattice, KernelMap]:
    window = window.fit(x.lattice.size)
    target = x.lattice.at(stage, window.output_size(x.lattice.size))
    return target, kernel_map(
        x.lattice, target, window, drop=target.geometry.pool == "drop" and window.stride > 1
    )


def _extended(rows: Tensor, reading: Reading, padding: float) -> Tensor:
    """The rows a reading's table points into: the elements, one row of padding, the halo."""
    halo = reading.sources.shape[0]
    if not halo and not reading.has_outside:
        return rows
    parts = [rows, rows.new_full((1, rows.shape[1]), padding)]
    if halo:
        parts.append(_mixed(rows, reading.sources, reading.mix))
    return torch.cat(parts)


def _block_length(table: Tensor, rows: Tensor) -> int:
    return max(256, BLOCK_BYTES // (table.shape[1] * rows.shape[1] * rows.element_size()))


def _gathered(rows: Tensor, table: Tensor) -> Iterator[Tensor]:
    """Rows of all taps, (n, taps, C), in blocks."""
    for block in table.to(rows.device).split(_block_length(table, rows)):
        yield rows.index_select(0, block.flatten()).view(*block.shape, -1)


def _matmul(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`rows @ weight.T + bias` for (n, K) rows and an (O, K) weight.

    On the CPU a 1x1 convolution on the rows seen as a channels_last image reaches the rate of a dense
    convolution, which the matrix product does not on every processor.
    """
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16):
        image = rows.reshape(1, rows.shape[0], 1, rows.shape[1]).permute(0, 3, 1, 2)
        return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(rows.shape[0], -1)
    return F.linear(rows, weight, bias)


def _autocast(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the type torch.autocast wants convolutions in, if it is on: as F.conv2d does."""
    device = rows.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return rows, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return rows.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None


def _apply_taps(block: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Products of gathered rows (n, taps, C) with the weight of a `_GatherConv`: (n, O)."""
    if groups == 1:
        return _matmul(block.flatten(1), weight, bias)
    # Grouped: the gathered rows are the image of a convolution whose kernel and stride are the taps.
    count, taps, channels = block.shape
    image = block.view(1, count * taps, 1, channels).permute(0, 3, 1, 2)
    return (
        F.conv2d(image, weight, bias, stride=(taps, 1), groups=groups).permute(0, 2, 3, 1).reshape(count, -1)
    )


class _GatherConv(torch.autograd.Function):
    """Gather rows by a table and multiply them, block by block, forward and backward.

    The weight is (O, taps C) or, with groups, (O, C / groups, taps, 1). Saves its inputs only: the
    gathered rows, `taps` times larger, never exist as a whole.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, groups: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, table)
        ctx.groups = groups
        length = min(_block_length(table, rows), max(table.shape[0], 1))
        gathered = rows.new_empty(length * table.shape[1], rows.shape[1])
        out = rows.new_empty(table.shape[0], weight.shape[0])
        for block, result in zip(table.split(length), out.split(length), strict=True):
            view = gathered[: block.numel()]
            torch.index_select(rows, 0, block.flatten(), out=view)
            result.copy_(_apply_taps(view.view(*block.shape, -1), weight, bias, groups))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _, table = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_rows = torch.zeros_like(rows) if needs[0] else None
        grad_weight = torch.zeros_like(weight) if needs[1] else None
        length = _block_length(table, rows)
        for block, part in zip(table.split(length), grad.contiguous().split(length), strict=True):
            gathered = rows.index_select(0, block.flatten()).view(*block.shape, -1).requires_grad_(needs[0])
            with torch.enable_grad():
                kernel = weight.detach().requires_grad_(needs[1])
                out = _apply_taps(gathered, kernel, None, ctx.groups)
            wanted = [value for value, need in ((gathered, needs[0]), (kernel, needs[1])) if need]
            found = list(torch.autograd.grad(out, wanted, part)) if wanted else []
            if grad_rows is not None:
                grad_rows.index_add_(0, block.flatten(), found.pop(0).flatten(0, 1))
            if grad_weight is not None:
                grad_weight += found.pop(0)
        return grad_rows, grad_weight, grad.sum(0) if needs[2] else None, None, None


def _dense_conv2d(
    x: Elements, weight: Tensor, bias: Tensor | None, window: Window, target: Lattice, groups: int
) -> Elements | None:
    """The convolution as an ordinary dense one, where both lattices are uniform; else None."""
    geometry = x.lattice.geometry
    if not geometry.dense_shortcut or geometry.anchor != "corner" or window.mode != "zeros":
        return None
    if window.outside:
        return None
    source_level, target_level = x.lattice.uniform_level, target.uniform_level
    if source_level is None or target_level is None:
        return None
    side, stride = geometry.sides[source_level], geometry.sides[target_level] // geometry.sides[source_level]
    steps = (*window.dilation, *window.padding)
    if any(step * window.spacing % side for step in steps):
        return None
    dilation_y, dilation_x, top, _, left, _ = (step * window.spacing // side for step in steps)
    (height, width), (rows, columns) = x.lattice.grid(source_level), target.grid(target_level)
    image = x.rows.reshape(x.lattice.batch, height, width, -1).permute(0, 3, 1, 2)
    # Padding below and to the right that the last output needs, whatever the network's own padding says.
    reach_y, reach_x = dilation_y * (window.kernel[0] - 1) + 1, dilation_x * (window.kernel[1] - 1) + 1
    bottom, right = (
        (rows - 1) * stride + reach_y - height - top,
        (columns - 1) * stride + reach_x - width - left,
    )
    padding = (top, left)
    if min(top, left) < 0 or not (0 <= top - bottom < stride and 0 <= left - right < stride):
        image, padding = F.pad(image, (left, right, top, bottom)), (0, 0)
    out = F.conv2d(image, weight, bias, stride, padding, (dilation_y, dilation_x), groups)
    return Elements(out.permute(0, 2, 3, 1).reshape(-1, out.shape[1]), target)
