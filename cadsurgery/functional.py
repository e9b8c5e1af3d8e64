"""The operations of a convolutional network on elements: what `torch.nn.functional` is to dense maps.

Every function takes and returns `Elements`, computes only the elements of its output lattice, is
differentiable, and treats the images of a batch apart from each other. Pointwise functions need no entry
here: they act on `rows` as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cadsurgery.errors import InvalidInput
from cadsurgery.kernel_map import KernelMap, Reading, Window, kernel_map, read_points
from cadsurgery.lattice import Lattice, describe

# Gathered rows are multiplied in blocks of about this size: small enough to stay near the cache and far
# below a dense network's activations, large enough for the matrix product to run at full speed.
BLOCK_BYTES = 16 << 20

_POINT = Window((1, 1))


@dataclass(frozen=True, eq=False)
class Elements:
    """Feature vectors of the cells of a lattice.

    Attributes:
        rows: (N, C), contiguous, in the lattice's order.
        lattice: the cells.
    """

    rows: Tensor
    lattice: Lattice


def to_elements(dense: Tensor, lattice: Lattice) -> Elements:
    """A dense map (B, C, H, W) at the high output stride as elements of stage 0; a view if channels_last."""
    if dense.dim() != 4 or dense.shape[0] != lattice.batch:
        raise InvalidInput(
            f"a batch of {lattice.batch} maps is expected here, not {describe(dense)}.",
            next="give one level map per image.",
        )
    start = lattice.at(0, (dense.shape[2], dense.shape[3]))
    return Elements(dense.permute(0, 2, 3, 1).reshape(-1, dense.shape[1]), start)


def to_dense(x: Elements, spacing: int = 1) -> Tensor:
    """A dense map that reads every `spacing`-th fine pixel by the lattice's fill.

    Args:
        x: elements.
        spacing: 1 for the fine size, the network's own sample distance for its native size.

    Returns:
        (B, C, ceil(H / spacing), ceil(W / spacing)), in channels_last memory.
    """
    lattice = x.lattice
    height, width = lattice.size

    def build() -> Reading:
        pixels = torch.arange(lattice.batch * height * width, device=lattice.levels.device)
        return read_points(lattice, pixels.view(lattice.batch, height, width)[:, ::spacing, ::spacing])

    reading = lattice.pyramid.derive(("to_dense", lattice.stage, lattice.size, spacing), build)
    rows = _extended(x.rows, reading, 0.0).index_select(0, reading.table.flatten().to(x.rows.device))
    return rows.view(*reading.table.shape, -1).permute(0, 3, 1, 2)


def rows_on(value: Elements | Tensor, lattice: Lattice) -> Tensor:
    """Rows (N, C) of a value on a lattice of the same or a later stage.

    Elements are subsampled to the anchors that remain. A tensor with one vector per image, (B, C, 1, 1)
    or (B, C), or one for all, (1, C, 1, 1) or (C, 1, 1), is repeated for every element.
    """
    if isinstance(value, Elements):
        if value.lattice == lattice:
            return value.rows
        table = kernel_map(value.lattice, lattice, _POINT).reading.table.squeeze(1)
        return value.rows.index_select(0, table.to(value.rows.device))
    if value.dim() == 0:
        return value
    per_image = value.flatten(1) if value.dim() in (2, 4) else value.reshape(1, -1)
    if value.dim() > 2 and value.shape[-2:] != (1, 1):
        raise InvalidInput(
            f"{describe(value)} has spatial extent and cannot be combined with elements.",
            next="end the region before this operation: region=[...] takes module names.",
        )
    if per_image.shape[0] == 1:
        return per_image.expand(len(lattice), -1)
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
    target = x.lattice.at(stage, window.output_size(x.lattice.size))
    dense = _dense_conv2d(x, weight, bias, window, target, groups)
    if dense is not None:
        return dense
    if window.is_pointwise:
        rows = rows_on(x, target)
        if groups == 1:
            return Elements(_matmul(rows, weight.flatten(1), bias), target)
        table = torch.arange(len(target), dtype=torch.int32, device=rows.device).unsqueeze(1)
    else:
        reading = kernel_map(x.lattice, target, window).reading
        rows, table = _extended(x.rows, reading, 0.0), reading.table.to(x.rows.device)
    # Ungrouped: taps outermost, so that a row of gathered elements is a row of the matrix. Grouped: contiguous,
    # because torch 2.15 on the CPU multiplies wrongly by a channels_last kernel of width one.
    grouped = groups > 1
    kernel = weight.contiguous().flatten(2).unsqueeze(3) if grouped else weight.permute(0, 2, 3, 1).flatten(1)
    rows, kernel, bias = _autocast(rows, kernel, bias)
    return Elements(_GatherConv.apply(rows, kernel, bias, table, groups), target)


def max_pool2d(x: Elements, window: Window, stage: int) -> Elements:
    """Maximum over the window, evaluated at the elements of the lattice after `stage`.

    With `pool="drop"` cells that are not downsampled here pass unchanged (D2-Net as published);
    otherwise they are pooled with stride one (a-trous).
    """
    target, kmap = _pool_map(x, window, stage)
    rows = _extended(x.rows, kmap.reading, -torch.inf)
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
    rows = _extended(x.rows, kmap.reading, 0.0)
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


def global_mean(x: Elements, keepdim: bool = True) -> Tensor:
    """Mean of each image, every element weighed by the area of its cell: (B, C, 1, 1) or (B, C)."""
    share = x.lattice.membership.to(x.rows.device, torch.promote_types(x.rows.dtype, torch.float32))
    mean = (share @ x.rows.to(share.dtype)).to(x.rows.dtype)
    return mean[:, :, None, None] if keepdim else mean


def global_max(x: Elements, keepdim: bool = True) -> Tensor:
    """Maximum of each image: (B, C, 1, 1) or (B, C)."""
    image = x.lattice.coordinates[0].to(x.rows.device).unsqueeze(1).expand_as(x.rows)
    lowest = x.rows.new_full((x.lattice.batch, x.rows.shape[1]), -torch.inf)
    maximum = lowest.scatter_reduce(0, image, x.rows, "amax")
    return maximum[:, :, None, None] if keepdim else maximum


def native_shape(x: Elements, spacing: int) -> torch.Size:
    """Shape of the map as the network itself sees it, with one sample per `spacing` fine pixels."""
    height, width = x.lattice.size
    return torch.Size((x.lattice.batch, x.rows.shape[1], -(-height // spacing), -(-width // spacing)))


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
        mix = reading.mix.to(rows)
        parts.append(
            F.embedding_bag(reading.sources.to(rows.device), rows, per_sample_weights=mix, mode="sum")
        )
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
    if not (0 <= top - bottom < stride and 0 <= left - right < stride):
        image, padding = F.pad(image, (left, right, top, bottom)), (0, 0)
    out = F.conv2d(image, weight, bias, stride, padding, (dilation_y, dilation_x), groups)
    return Elements(out.permute(0, 2, 3, 1).reshape(-1, out.shape[1]), target)
