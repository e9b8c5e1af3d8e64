"""Operations that read taps around an element: convolutions, pooling, space to depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadsurgery.functional.elements import Elements, extended, rows_on
from cadsurgery.kernel_map import KernelMap, Window, kernel_map
from cadsurgery.lattice import Lattice

# Gathered rows are multiplied in blocks of about this size: small enough to stay near the cache and far
# below a dense network's activations, large enough for the matrix product to run at full speed.
BLOCK_BYTES = 16 << 20


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


def max_pool2d(x: Elements, window: Window, stage: int) -> Elements:
    """Maximum over the window, evaluated at the elements of the lattice after `stage`.

    With `pool="drop"` cells that are not downsampled here pass unchanged (D2-Net as published);
    otherwise they are pooled with stride one (a-trous).
    """
    target, kmap = _pool_map(x, window, stage)
    outside = -torch.inf if window.outside is None else window.outside
    rows = extended(x.rows, kmap.reading, outside)
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
    rows = extended(x.rows, kmap.reading, window.outside or 0.0)
    total = torch.cat([block.sum(1) for block in _gathered(rows, kmap.reading.table)])
    if divisor is not None:
        return Elements(total / divisor, target)
    counted = kmap.counted if count_include_pad else kmap.inside
    return Elements(total / counted.sum(1, keepdim=True).to(total), target)


def pixel_unshuffle(x: Elements, window: Window, stage: int) -> Elements:
    """Space to depth: the values under an r x r window side by side in the channels."""
    target, kmap = _pool_map(x, window, stage)
    rows = extended(x.rows, kmap.reading, 0.0)
    parts = [block.transpose(1, 2).flatten(1) for block in _gathered(rows, kmap.reading.table)]
    return Elements(torch.cat(parts), target)


def _taps(x: Elements, window: Window, target: Lattice) -> tuple[Tensor, Tensor]:
    """Rows and the (N, taps) table into them that a convolution multiplies."""
    if window.is_pointwise:
        rows = rows_on(x, target)
        return rows, torch.arange(len(target), dtype=torch.int32, device=rows.device).unsqueeze(1)
    reading = kernel_map(x.lattice, target, window).reading
    return extended(x.rows, reading, window.outside or 0.0), reading.table.to(x.rows.device)


def _kernel(weight: Tensor, groups: int) -> Tensor:
    """A kernel (O, C / groups, kh, kw) as `_GatherConv` takes it.

    Ungrouped: taps outermost, so that a row of gathered elements is a row of the matrix. Grouped: contiguous,
    because torch 2.15 on the CPU multiplies wrongly by a channels_last kernel of width one.
    """
    if groups > 1:
        return weight.contiguous().flatten(2).unsqueeze(3)
    return weight.permute(0, 2, 3, 1).flatten(1)


def _pool_map(x: Elements, window: Window, stage: int) -> tuple[Lattice, KernelMap]:
    window = window.fit(x.lattice.size)
    target = x.lattice.at(stage, window.output_size(x.lattice.size))
    return target, kernel_map(
        x.lattice, target, window, drop=target.geometry.pool == "drop" and window.stride > 1
    )


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
