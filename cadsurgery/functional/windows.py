"""Operations that read taps around an element: convolutions, pooling, space to depth."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadsurgery.functional import gpu, native
from cadsurgery.functional.costs import Costs, best_time, costs
from cadsurgery.functional.elements import Elements, extended, mixed, own_image, rows_on, to_dense
from cadsurgery.functional.kernels import Kernel, PackedConv, product
from cadsurgery.kernel_map import Reading, Window, divisors, kernel_map
from cadsurgery.lattice import Geometry, Lattice, is_exporting

# Gathered rows are multiplied in blocks of about this size: small enough to stay near the cache and far
# below a dense network's activations, large enough for the matrix product to run at full speed.
BLOCK_BYTES = 16 << 20
# Devices with torch.autocast; asked for here, because compilers before torch 2.15 cannot.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)


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
    if not torch.compiler.is_compiling() and not _needs_gradient(x.rows, weight, bias):
        return fused_conv2d(x, Kernel(weight, bias, groups), window=window, stage=stage)
    window, target = _target(x, window, stage)
    rows, weight, bias = _autocast(x.rows, weight, bias)
    x = Elements(rows, x.lattice)
    dense = _as_dense(x, window, target, window.outside or 0.0)
    if dense is not None:
        image, stride, padding, dilation = dense
        return _from_dense(F.conv2d(image, weight, bias, stride, padding, dilation, groups), target)
    whole = _is_kept_whole(x.rows, weight, bias)
    if window.is_pointwise and groups == 1:
        multiply = torch.ops.cadsurgery.product_of_rows if whole else product
        return Elements(multiply(rows_on(x, target), weight.flatten(1), bias), target)
    if whole:
        reading = _reading(x, window, target)
        halo = (reading.sources, reading.mix, reading.used)
        outside = window.outside or 0.0
        out = torch.ops.cadsurgery.product_by_table(
            x.rows, reading.table, *halo, reading.has_outside, outside, weight, bias, groups
        )
        return Elements(out, target)
    if gpu.supports(x.rows, weight, groups) and not torch.compiler.is_compiling():
        return Elements(_on_gpu(x, Kernel(weight, bias, groups), window, target, None, "none"), target)
    rows, table = _taps(x, window, target)
    return Elements(_gather_conv(rows, _kernel(weight, groups), bias, table, groups), target)


def fused_conv2d(
    x: Elements,
    kernel: Kernel | PackedConv,
    residual: Elements | None = None,
    *,
    window: Window,
    stage: int | None,
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
    window, target = _target(x, window, x.lattice.stage if stage is None else stage)
    x = Elements(_autocast(x.rows)[0], x.lattice)
    if residual is not None and any(a < b for a, b in zip(residual.lattice.size, target.size, strict=True)):
        # The sum is smaller than the product: rare, so in separate steps.
        plain = fused_conv2d(
            x, replace(kernel, activation=None, kept=None), window=window, stage=target.stage
        )
        target = plain.lattice.at(target.stage, residual.lattice.size)
        rows = rows_on(plain, target).clone()
        return Elements(kernel.finish(rows, rows_on(residual, target)), target)
    more = rows_on(residual, target).to(x.rows.dtype) if residual is not None else None
    if window.is_pointwise and kernel.groups == 1:
        rows = rows_on(x, target)
        flat = more.reshape(-1, more.shape[-1]) if more is not None else None
        out = kernel.on_rows(rows.reshape(-1, rows.shape[-1]), flat)
        return Elements(out.view(*rows.shape[:-1], -1), target)
    dense = _as_dense(x, window, target, window.outside or 0.0)
    if dense is None:
        whole = _on_whole_map_is_cheaper(x, kernel, window, target)
        run = _on_whole_map if whole else _gathered_product
        return Elements(run(x, kernel, window, target, more), target)
    image, stride, padding, dilation = dense
    shown = _image_of(more, target) if more is not None else None
    return _from_dense(kernel.on_image(image, stride, padding, dilation, shown), target)


def _gathered_product(
    x: Elements, kernel: Kernel, window: Window, target: Lattice, residual: Tensor | None
) -> Tensor:
    """Rows (N, O) of a convolution by its kernel map."""
    if gpu.supports(x.rows, kernel.weight, kernel.groups):
        act = kernel.activation
        name = gpu.activation_name(act.name, act.scalars, act.algorithm) if act is not None else "none"
        out = _on_gpu(x, kernel, window, target, residual, name or "none")
        return out if name is not None or act is None else act.apply_(out)
    return _product_by_table(x.rows, _reading(x, window, target), window.outside or 0.0, kernel, residual)


def _product_by_table(
    rows: Tensor, reading: Reading, outside: float, kernel: Kernel, residual: Tensor | None = None
) -> Tensor:
    """The products of gathered rows with a kernel, (N, O), block by block: the gathered rows, `taps` times as many as
    there are elements, never exist as a whole."""
    table = reading.table.to(rows.device)
    if _is_compiled(rows, kernel):
        run = kernel.grouped if kernel.groups > 1 else kernel.implicit
        return run(_rows(rows, reading, outside), table, residual)
    block, count = _block_length(table, rows), table.shape[0]
    if kernel.groups > 1:
        weight, bias = _kernel(kernel.weight.to(rows.dtype), kernel.groups), kernel.bias
        bias = bias.to(rows.dtype) if bias is not None else None
        rows = extended(rows, reading, outside)
        parts = [_apply_taps(part, weight, bias, kernel.groups) for part in _gathered(rows, table)]
        return kernel.finish(torch.cat(parts), residual)
    out = rows.new_empty(count, kernel.weight.shape[0])
    with _workspace(min(block, max(count, 1)) * table.shape[1], rows.shape[1], rows) as buffer:
        compiled = native.supported(rows)
        source = _rows(rows, reading, outside) if compiled else None
        rows = extended(rows, reading, outside) if not compiled else rows
        for start in range(0, count, block):
            part = table[start : start + block]
            gathered = buffer[: part.numel()]
            if source is not None:
                native.gather(source, part, gathered)
            else:
                torch.index_select(rows, 0, part.flatten(), out=gathered)
            more = residual[start : start + block] if residual is not None else None
            out[start : start + block] = kernel.on_rows(gathered.view(part.shape[0], -1), more)
    return out


def _is_compiled(rows: Tensor, kernel: Kernel) -> bool:
    """Whether there is compiled code that reads the rows where they lie."""
    if not native.supported(rows):
        return False
    if kernel.groups > 1:
        return native.has_grouped(kernel.weight, kernel.groups)
    # Its weight has to be packed: worth it where that is kept.
    return kernel.kept is not None and rows.dtype == kernel.weight.dtype and native.has_product(kernel.weight)


def _on_whole_map_is_cheaper(x: Elements, kernel: Kernel, window: Window, target: Lattice) -> bool:
    """Whether the costs measured on this machine say so; only where forms are kept, for inference in earnest."""
    if kernel.kept is None or x.rows.device.type != "cpu" or not x.lattice.geometry.dense_shortcut:
        return False
    if window.mode != "zeros" or window.outside or x.lattice.geometry.anchor != "corner":
        return False
    outputs, group = kernel.weight.shape[:2]
    kind = "plain" if kernel.groups == 1 else "depthwise" if group == 1 else f"groups of {group}"
    compiled = _is_compiled(x.rows, kernel)
    found = costs(
        f"{kind}, {window.taps} taps, {x.rows.dtype}, compiled {compiled}", lambda: _measured(x, kernel)
    )
    pixels = target.batch * target.size[0] * target.size[1]
    return found.prefer_dense(
        kernel.weight[0].numel() * outputs, len(target), pixels, (x.rows.shape[1], outputs)
    )


def _on_whole_map(
    x: Elements, kernel: Kernel, window: Window, target: Lattice, residual: Tensor | None
) -> Tensor:
    """The same by its definition: the map read at every fine pixel, convolved as a whole, kept at the anchors."""
    top, _, left, _ = (window.spacing * step for step in window.padding)
    dilation = (window.spacing * window.dilation[0], window.spacing * window.dilation[1])
    (height, width), (rows, columns) = x.lattice.size, target.size
    bottom = rows - 1 + dilation[0] * (window.kernel[0] - 1) + 1 - height - top
    right = columns - 1 + dilation[1] * (window.kernel[1] - 1) + 1 - width - left
    image = F.pad(to_dense(x), (left, right, top, bottom))
    plain = Kernel(kernel.weight, kernel.bias, kernel.groups)
    whole = plain.on_image(image, (1, 1), (0, 0), dilation).permute(0, 2, 3, 1)
    return kernel.finish(whole.reshape(-1, whole.shape[-1]).index_select(0, target.anchors), residual)


def _measured(x: Elements, kernel: Kernel) -> Costs:
    """Costs of a convolution of this kind, with 128 channels on a ragged lattice that is the same for all."""
    _, group, height, width = kernel.weight.shape
    channels = 128 if kernel.groups == 1 else max(1, 128 // group) * group
    inner = channels if kernel.groups == 1 else group
    weight = kernel.weight.new_ones(channels, inner, height, width)
    own = Kernel(weight, None, channels // inner, None, {})
    blocks = torch.arange(16 * 32).view(1, 16, 32) % 2
    lattice = Geometry((2,)).lattice(blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)).at(1)
    sample = Elements(x.rows.new_ones(len(lattice), channels), lattice)
    padding = (height // 2, height // 2, width // 2, width // 2)
    window, target = _target(sample, Window((height, width), 1, (1, 1), padding, spacing=2), 1)
    image, work = to_dense(sample), weight[0].numel() * channels
    dense = best_time(lambda: own.on_image(image, (1, 1), (height // 2, width // 2), (1, 1)))
    sparse = best_time(lambda: _gathered_product(sample, own, window, target, None))
    moved = best_time(lambda: to_dense(sample))
    pixels = image.shape[2] * image.shape[3]
    return Costs(dense / (pixels * work), sparse / (len(target) * work), moved / image.numel())


def _on_gpu(
    x: Elements, kernel: Kernel, window: Window, target: Lattice, residual: Tensor | None, activation: str
) -> Tensor:
    """Rows (N, O) by the kernel that gathers and multiplies in one; what it needs of the kernel map is kept."""
    reading = _reading(x, window, target)
    key = (x.lattice.stage, x.lattice.size, target.stage, target.size, window)
    derive = x.lattice.pyramid.derive
    if reading.sources.shape[0] or window.outside:
        rows, table = extended(x.rows, reading, window.outside or 0.0), reading.table
    else:  # padding is read as a negative entry: no copy of the rows with a row of zeros behind them
        rows, count = x.rows, len(x.lattice)
        table = derive(("signed", *key), lambda: reading.table.masked_fill(reading.table == count, -1))
    weight = kernel.weight.flatten(1) if kernel.groups > 1 else kernel.matrix(x.rows.dtype)
    reversed_map = derive(
        ("reversed", *key), lambda: cache(lambda: gpu.reversed_map(table, rows.shape[0]))
    )  # made when a gradient first asks
    return gpu.gather_conv(
        rows,
        weight,
        table,
        kernel.bias,
        residual=residual,
        activation=activation,
        groups=kernel.groups,
        reverse=reversed_map,
    )


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
    window, target = _target(x, window, stage)
    rows, table = _taps(x, window, target)
    kernels = (mix @ weight).view(-1, *shape)
    biases = mix @ bias if bias is not None else [None] * len(kernels)
    static = target.capacity is not None
    tables = [table] * target.batch if static else table.split(target.counts.tolist())
    parts = []
    for kernel, offset, part in zip(kernels, biases, tables, strict=True):
        values, matrix, more = _autocast(rows, _kernel(kernel, groups), offset)
        parts.append(_gather_conv(values, matrix, more, part, groups))
    return Elements(own_image(parts, target) if static else torch.cat(parts), target)


def max_pool2d(x: Elements, window: Window, stage: int) -> Elements:
    """Maximum over the window, evaluated at the elements of the lattice after `stage`.

    With `pool="drop"` cells that are not downsampled here pass unchanged (D2-Net as published);
    otherwise they are pooled with stride one (a-trous).
    """
    window, target = _target(x, window, stage)
    outside = -torch.inf if window.outside is None else window.outside
    drop = _drops(target, window)
    dense = _as_dense(x, window, target, outside, -torch.inf) if not drop else None
    if dense is not None:
        image, stride, padding, dilation = dense
        return _from_dense(F.max_pool2d(image, window.kernel, stride, padding, dilation), target)
    return Elements(_pooled(x, kernel_map(x.lattice, target, window, drop=drop), outside, True), target)


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
    window, target = _target(x, window, stage)
    drop = _drops(target, window)
    reading = kernel_map(x.lattice, target, window, drop=drop)
    total = _pooled(x, reading, window.outside or 0.0, False)
    if divisor is not None:
        return Elements(total / divisor, target)
    counts = divisors(x.lattice, target, window, drop=drop, padding=count_include_pad)
    return Elements(total / counts.unsqueeze(1).to(total), target)


def pixel_unshuffle(x: Elements, window: Window, stage: int) -> Elements:
    """Space to depth: the values under an r x r window side by side in the channels."""
    window, target = _target(x, window, stage)
    reading = kernel_map(x.lattice, target, window, drop=_drops(target, window))
    rows = extended(x.rows, reading, 0.0)
    parts = [block.transpose(1, 2).flatten(1) for block in _gathered(rows, reading.table)]
    return Elements(torch.cat(parts), target)


def _target(x: Elements, window: Window, stage: int) -> tuple[Window, Lattice]:
    """The window with its padding known, and the lattice of its output."""
    window = window.fit(x.lattice.size)
    return window, x.lattice.at(stage, window.output_size(x.lattice.size))


def _drops(target: Lattice, window: Window) -> bool:
    """Whether cells that are not downsampled here pass as they are."""
    return target.geometry.pool == "drop" and window.stride > 1


def _is_kept_whole(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a graph that is made here holds a convolution as one operation: on the CPU the blocks of
    `_product_by_table` are faster than what compilers make of the expression. It has no gradient and no place in an
    exported program, which must run without this package."""
    return (
        torch.compiler.is_compiling()
        and not is_exporting()
        and rows.device.type == "cpu"
        and not _needs_gradient(rows, weight, bias)
    )


def _gather_conv(rows: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, groups: int) -> Tensor:
    """`_GatherConv`, or while a graph is made the same as an expression that compilers optimise."""
    if not torch.compiler.is_compiling():
        return _GatherConv.apply(rows, weight, bias, table, groups)
    gathered = rows.index_select(0, table.flatten()).view(*table.shape, -1)
    if groups == 1:
        return product(gathered.flatten(1), weight, bias)
    parts = gathered.unflatten(2, (groups, -1))  # (N, taps, groups, C / groups)
    kernel = weight.unflatten(0, (groups, -1)).squeeze(-1)  # (groups, O / groups, C / groups, taps)
    if kernel.shape[2] == 1:
        out = (parts * kernel.permute(3, 0, 2, 1).squeeze(2)).sum(1)
    else:
        out = torch.einsum("ntgc,goct->ngo", parts, kernel)
    return out.flatten(1) if bias is None else out.flatten(1) + bias


def _needs_gradient(*values: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


def _reading(x: Elements, window: Window, target: Lattice) -> Reading:
    """Where a convolution reads: its kernel map, or for one tap the rows themselves."""
    if window.is_pointwise and x.lattice == target:
        own = torch.arange(len(target), dtype=torch.int32, device=x.rows.device).unsqueeze(1)
        nothing = own.new_empty(0, 4)
        return Reading(own, nothing, nothing.double(), False)
    return kernel_map(x.lattice, target, window)


def _taps(x: Elements, window: Window, target: Lattice) -> tuple[Tensor, Tensor]:
    """Rows and the (N, taps) table into them that a convolution multiplies."""
    reading = _reading(x, window, target)
    return extended(x.rows, reading, window.outside or 0.0), reading.table.to(x.rows.device)


def _rows(rows: Tensor, reading: Reading, outside: float) -> native.Rows:
    """What compiled code reads: the rows as they are, the halo apart."""
    halo = mixed(rows, reading.sources, reading.mix) if reading.sources.shape[0] else None
    return native.Rows(rows.contiguous(), halo, outside)


def _pooled(x: Elements, reading: Reading, outside: float, largest: bool) -> Tensor:
    """The largest value or the sum over the taps of each element: (N, C)."""
    if not _needs_gradient(x.rows) and native.supported(x.rows):
        out = x.rows.new_empty(reading.table.shape[0], x.rows.shape[1])
        native.pool(_rows(x.rows, reading, outside), reading.table, out, largest)
        return out
    rows = extended(x.rows, reading, outside)
    return torch.cat([block.amax(1) if largest else block.sum(1) for block in _gathered(rows, reading.table)])


def _kernel(weight: Tensor, groups: int) -> Tensor:
    """A kernel (O, C / groups, kh, kw) as `_GatherConv` takes it.

    Ungrouped: taps outermost, so that a row of gathered elements is a row of the matrix. Grouped: contiguous,
    because torch 2.15 on the CPU multiplies wrongly by a channels_last kernel of width one.
    """
    if groups > 1:
        return weight.contiguous().flatten(2).unsqueeze(3)
    return weight.permute(0, 2, 3, 1).flatten(1)


def _block_length(table: Tensor, rows: Tensor) -> int:
    return max(256, BLOCK_BYTES // (table.shape[1] * rows.shape[1] * rows.element_size()))


def _gathered(rows: Tensor, table: Tensor) -> Iterator[Tensor]:
    """Rows of all taps, (n, taps, C), in blocks."""
    for block in table.to(rows.device).split(_block_length(table, rows)):
        yield rows.index_select(0, block.flatten()).view(*block.shape, -1)


def _autocast(*values: Any) -> tuple[Any, ...]:
    """The operands in the type torch.autocast wants convolutions in, if it is on: as F.conv2d does."""
    device = values[0].device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return values
    dtype = torch.get_autocast_dtype(device)
    return tuple(value.to(dtype) if value is not None else None for value in values)


_LOCAL = threading.local()


@contextmanager
def _workspace(count: int, channels: int, like: Tensor) -> Iterator[Tensor]:
    """Memory (count, channels) to gather into, kept from call to call: fresh memory costs as much as filling it.

    Each thread has its own, and what is called within takes another.
    """
    free = _LOCAL.__dict__.setdefault("free", {})
    memory = free.pop(key := (like.device, like.dtype), None)
    if memory is None or memory.numel() < count * channels:
        memory = like.new_empty(count * channels)
    try:
        yield memory[: count * channels].view(count, channels)
    finally:
        free[key] = memory


def _apply_taps(block: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Products of gathered rows (n, taps, C) with the weight of a `_GatherConv`: (n, O)."""
    if groups == 1:
        return product(block.flatten(1), weight, bias)
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


_OPERATIONS = torch.library.Library("cadsurgery", "FRAGMENT")
_OPERATIONS.define("product_of_rows(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")
_OPERATIONS.define(
    "product_by_table(Tensor rows, Tensor table, Tensor sources, Tensor mix, Tensor? used, bool has_outside, "
    "float outside, Tensor weight, Tensor? bias, int groups) -> Tensor"
)
_OPERATIONS.impl("product_of_rows", product, "CPU")


def _whole_product(
    rows: Tensor,
    table: Tensor,
    sources: Tensor,
    mix: Tensor,
    used: Tensor | None,
    has_outside: bool,
    outside: float,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    if used is not None:
        sources, mix = sources[: int(used)], mix[: int(used)]
    reading = Reading(table.contiguous(), sources, mix, has_outside)
    return _product_by_table(rows, reading, outside, Kernel(weight, bias, groups))


_OPERATIONS.impl("product_by_table", _whole_product, "CPU")


@torch.library.register_fake("cadsurgery::product_of_rows")
def _product_shape(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


@torch.library.register_fake("cadsurgery::product_by_table")
def _whole_product_shape(rows: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return rows.new_empty(table.shape[0], rest[5].shape[0])
