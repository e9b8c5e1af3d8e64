"""How the products of a convolution with the rows of a lattice are evaluated: by compiled code that reads them where
they lie, in gathered blocks, on the whole map where that is cheaper, on a GPU, or as an expression for compilers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadsurgery.elements.backends import gpu, native
from cadsurgery.elements.backends.costs import Costs, best_time, costs
from cadsurgery.elements.backends.packed import Kernel, product
from cadsurgery.elements.elements import Elements, extended, needs_gradient, rows_and_halo, to_dense
from cadsurgery.elements.kernel_map import Reading, Window, kernel_map
from cadsurgery.elements.lattice import Geometry, Lattice, is_exporting

# Gathered rows are multiplied in blocks of about this size: small enough to stay near the cache and far
# below a dense network's activations, large enough for the matrix product to run at full speed.
BLOCK_BYTES = 16 << 20

# Devices with torch.autocast; asked for here, because compilers before torch 2.15 cannot.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)


def product_on_elements(
    x: Elements, kernel: Kernel, window: Window, target: Lattice, residual: Tensor | None
) -> Tensor:
    """Rows (N, O) of a convolution by its kernel map."""
    if gpu.supports(x.rows, kernel.weight, kernel.groups):
        act = kernel.activation
        name = gpu.activation_name(act.name, act.scalars, act.algorithm) if act is not None else "none"
        out = product_on_gpu(x, kernel, window, target, residual, name or "none")
        return out if name is not None or act is None else act.apply_(out)
    return product_by_table(x.rows, tap_reading(x, window, target), window.outside or 0.0, kernel, residual)


def product_by_table(
    rows: Tensor, reading: Reading, outside: float, kernel: Kernel, residual: Tensor | None = None
) -> Tensor:
    """The products of the rows a table names with a kernel, (N, O)."""
    if _is_compiled(rows, kernel):
        return kernel.by_table(rows_and_halo(rows, reading, outside), reading.table.to(rows.device), residual)
    return product_by_gathering(rows, reading, outside, kernel, residual)


def product_by_gathering(
    rows: Tensor, reading: Reading, outside: float, kernel: Kernel, residual: Tensor | None = None
) -> Tensor:
    """The same block by block: the gathered rows, `taps` times as many as the elements, never exist as a whole."""
    table = reading.table.to(rows.device)
    block, count = _block_length(table, rows), table.shape[0]
    if kernel.groups > 1:
        weight, bias = kernel.matrix(rows.dtype), kernel.offset(rows.dtype)
        rows = extended(rows, reading, outside)
        parts = [_apply_taps(part, weight, bias, kernel.groups) for part in gathered_blocks(rows, table)]
        return kernel.finish(torch.cat(parts), residual)
    out = rows.new_empty(count, kernel.weight.shape[0])
    with _workspace(min(block, max(count, 1)) * table.shape[1], rows.shape[1], rows) as buffer:
        compiled = native.supported(rows)
        source = rows_and_halo(rows, reading, outside) if compiled else None
        rows = extended(rows, reading, outside) if not compiled else rows
        for start in range(0, count, block):
            part = table[start : start + block]
            gathered = buffer[: part.numel()]
            if source is not None:
                native.gather(source, part, gathered)
            else:
                torch.index_select(rows, 0, part.flatten(), out=gathered)
            more = residual[start : start + block] if residual is not None else None
            out[start : start + block] = kernel.on_elements(gathered.view(part.shape[0], -1), more)
    return out


def _is_compiled(rows: Tensor, kernel: Kernel) -> bool:
    """Whether there is compiled code that reads the rows where they lie."""
    if not native.supported(rows):
        return False
    if kernel.groups > 1:
        return native.has_grouped(kernel.weight, kernel.groups)
    # Its weight has to be packed: worth it where that is kept.
    return kernel.kept is not None and rows.dtype == kernel.weight.dtype and native.has_product(kernel.weight)


def whole_map_is_cheaper(x: Elements, kernel: Kernel, window: Window, target: Lattice) -> bool:
    """Whether the costs measured on this machine say so; only where forms are kept, for inference in earnest, and not
    while torch observes what is called: what is measured then, in another thread, would be other code."""
    geometry, partial = x.lattice.geometry, x.lattice.part or target.part
    if partial or native.is_observed() or kernel.kept is None or x.rows.device.type != "cpu":
        return False
    if not geometry.dense_shortcut or geometry.anchor != "corner" or window.mode != "zeros" or window.outside:
        return False
    outputs, group = kernel.weight.shape[:2]
    kind = "plain" if kernel.groups == 1 else "depthwise" if group == 1 else f"groups of {group}"
    compiled = _is_compiled(x.rows, kernel)
    way = "compiled" if compiled else "gathered"
    found = costs(
        f"{kind}, {window.taps} taps, {x.rows.dtype}, {way}", lambda: _measured(x, kernel, compiled)
    )
    pixels = target.batch * target.size[0] * target.size[1]
    return found.prefer_dense(
        kernel.weight[0].numel() * outputs, len(target), pixels, (x.rows.shape[1], outputs)
    )


def product_on_whole_map(
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


def _measured(x: Elements, kernel: Kernel, compiled: bool) -> Costs:
    """Costs of a convolution of this kind, with 128 channels on a ragged lattice that is the same for all; on elements
    by the code that runs this kernel, which need not be that of one with 128 channels."""
    _, group, height, width = kernel.weight.shape
    channels = 128 if kernel.groups == 1 else max(1, 128 // group) * group
    inner = channels if kernel.groups == 1 else group
    weight = kernel.weight.new_ones(channels, inner, height, width)
    own = Kernel(weight, None, channels // inner, None, {})
    blocks = torch.arange(16 * 32).view(1, 16, 32) % 2
    lattice = Geometry((2,)).lattice(blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)).at(1)
    sample = Elements(x.rows.new_ones(len(lattice), channels), lattice)
    padding = (height // 2, height // 2, width // 2, width // 2)
    window, target = target_of(sample, Window((height, width), 1, (1, 1), padding, spacing=2), 1)
    image, work = to_dense(sample), weight[0].numel() * channels
    dense = best_time(lambda: own.on_image(image, (1, 1), (height // 2, width // 2), (1, 1)))
    reading = tap_reading(sample, window, target)
    on_elements = product_by_table if compiled else product_by_gathering
    sparse = best_time(lambda: on_elements(sample.rows, reading, 0.0, own))
    moved = best_time(lambda: to_dense(sample))
    pixels = image.shape[2] * image.shape[3]
    return Costs(dense / (pixels * work), sparse / (len(target) * work), moved / image.numel())


def product_on_gpu(
    x: Elements, kernel: Kernel, window: Window, target: Lattice, residual: Tensor | None, activation: str
) -> Tensor:
    """Rows (N, O) by the kernel that gathers and multiplies in one; what it needs of the kernel map is kept."""
    reading = tap_reading(x, window, target)
    key = (x.lattice.key, target.key, window)
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


def target_of(x: Elements, window: Window, stage: int | Lattice) -> tuple[Window, Lattice]:
    """The window with its padding known, and the lattice of its output, if only its stage is given."""
    window = window.fit(x.lattice.size)
    if isinstance(stage, Lattice):
        return window, stage
    return window, x.lattice.at(stage, window.output_size(x.lattice.size))


def is_kept_whole(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a graph that is made here holds a convolution as one operation: on the CPU the blocks of
    `product_by_table` are faster than what compilers make of the expression. It has no gradient and no place in an
    exported program, which must run without this package."""
    return (
        torch.compiler.is_compiling()
        and not is_exporting()
        and rows.device.type == "cpu"
        and not needs_gradient(rows, weight, bias)
    )


def gather_conv(rows: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, groups: int) -> Tensor:
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


def tap_reading(x: Elements, window: Window, target: Lattice) -> Reading:
    """Where a convolution reads: its kernel map, or for one tap the rows themselves."""
    if window.is_pointwise and x.lattice == target:
        own = torch.arange(len(target), dtype=torch.int32, device=x.rows.device).unsqueeze(1)
        nothing = own.new_empty(0, 4)
        return Reading(own, nothing, nothing.double(), False)
    return kernel_map(x.lattice, target, window)


def taps_of(x: Elements, window: Window, target: Lattice) -> tuple[Tensor, Tensor]:
    """Rows and the (N, taps) table into them that a convolution multiplies."""
    reading = tap_reading(x, window, target)
    return extended(x.rows, reading, window.outside or 0.0), reading.table.to(x.rows.device)


def _block_length(table: Tensor, rows: Tensor) -> int:
    return max(256, BLOCK_BYTES // (table.shape[1] * rows.shape[1] * rows.element_size()))


def gathered_blocks(rows: Tensor, table: Tensor) -> Iterator[Tensor]:
    """Rows of all taps, (n, taps, C), in blocks."""
    for block in table.to(rows.device).split(_block_length(table, rows)):
        yield rows.index_select(0, block.flatten()).view(*block.shape, -1)


def autocast(*values: Any) -> tuple[Any, ...]:
    """The operands in the type torch.autocast wants convolutions in, if it is on: as F.conv2d does."""
    device = values[0].device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return values
    dtype = torch.get_autocast_dtype(device)
    return tuple(value.to(dtype) if value is not None else None for value in values)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Products within are taken in the type of their operands even if torch.autocast is on: for sums that need it."""
    device = like.device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


_LOCAL = threading.local()


@contextmanager
def _workspace(count: int, channels: int, like: Tensor) -> Iterator[Tensor]:
    """Memory (count, channels) to gather into, kept from call to call: fresh memory costs as much as filling it.

    Each thread has its own, and what is called within takes another.
    """
    free = _LOCAL.__dict__.setdefault("free", {})
    memory = free.pop(key := (like.device, like.dtype), None)
    if memory is None or memory.numel() < count * channels:
        with torch.inference_mode(False):  # it outlives the mode of this call
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
    return product_by_table(rows, reading, outside, Kernel(weight, bias, groups))


_OPERATIONS.impl("product_by_table", _whole_product, "CPU")


@torch.library.register_fake("cadsurgery::product_of_rows")
def _product_shape(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


@torch.library.register_fake("cadsurgery::product_by_table")
def _whole_product_shape(rows: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return rows.new_empty(table.shape[0], rest[5].shape[0])
