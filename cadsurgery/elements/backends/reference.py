"""The reference backend in torch operations, differentiable and block by block; and a backend of plain expressions.

The reference never holds all gathered rows, which are `taps` times the elements, at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadsurgery.elements.axes import in_order
from cadsurgery.elements.backends.choose import Backend, Work, compute
from cadsurgery.elements.backends.onednn import product
from cadsurgery.elements.backends.sums import normalise_rows, sum_products
from cadsurgery.elements.backends.works import (
    Convolution,
    Filling,
    MapConvolution,
    MapResizing,
    Mixing,
    MixingLines,
    Normalising,
    Picking,
    PixelReading,
    Pooling,
    TransposedConvolution,
    Weighing,
    extend,
)
from cadsurgery.elements.kernel_map import Reading, TapSearch, find_taps, phases, read_rows
from cadsurgery.elements.lattice import CellSearch
from cadsurgery.elements.sizes import is_for_any_size, is_statically_true

# Gathered rows are multiplied in blocks of about this size: small enough to stay near the cache and far
# below a dense network's activations, large enough for the matrix product to run at full speed.
BLOCK_BYTES = 16 << 20


class Torch(Backend):
    """The reference backend, which supports every work."""

    name = "torch"

    def applies(self, work: Work) -> bool:
        """Return True: this backend supports every work."""
        return True

    def find_cells(self, work: CellSearch) -> tuple[Tensor, Tensor, Tensor]:
        """Find the pixels that lie at the corner of their cell."""
        lattice = work.lattice
        (height, width), device = lattice.size, lattice.levels.device
        y = torch.arange(height, device=device).view(1, -1, 1)
        x = torch.arange(width, device=device).view(1, 1, -1)
        image = torch.arange(lattice.batch, device=device).view(-1, 1, 1)
        corner = (image * height + y - y % lattice.side_map) * width + x - x % lattice.side_map
        pixel = (image * height + y) * width + x
        is_anchor = (corner == pixel).flatten()
        row = is_anchor.cumsum(0) - 1
        if lattice.capacity is None:
            anchors = is_anchor.nonzero().squeeze(1)
        else:
            anchors = torch.nonzero_static(is_anchor, size=lattice.capacity[1], fill_value=0).squeeze(1)
        counts = is_anchor.view(lattice.batch, -1).sum(1)
        return anchors, row[corner.flatten()].to(torch.int32), counts

    def find_taps(self, work: TapSearch) -> Reading:
        """Find taps in a padded map of rows."""
        return find_taps(work)

    def convolve_map(self, work: MapConvolution) -> Tensor:
        """Convolve, then add and activate."""
        weights, dtype = work.weights, work.rows.dtype
        operands = work.rows, weights.weight.to(dtype), weights.bias_as(dtype)
        return weights.finish(F.conv2d(*operands, *work.window, weights.groups), work.residual)

    def weigh(self, work: Weighing) -> Tensor:
        """Compute sums (B, C)."""
        return sum_products(work.shares.transpose(0, 1), work.rows)

    def normalise(self, work: Normalising) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise rows, with the gradient in closed form."""
        rows = work.rows
        if work.real is not None:
            rows = torch.where(work.real.to(rows.device).unsqueeze(1), rows, 0.0)
        rows = rows.to(work.shares.dtype)
        weight, bias = (None if part is None else part.to(rows) for part in (work.weight, work.bias))
        return normalise_rows(rows, work.shares, weight, bias, work.eps)

    def convolve(self, work: Convolution) -> Tensor:
        """Rows (N, O)."""
        rows, weight, table = _operands(work)
        out = _GatherByBlocks.apply(
            rows, weight, work.weights.bias_as(rows.dtype), table, work.weights.groups
        )
        return work.weights.finish(out, work.residual)

    def spread(self, work: TransposedConvolution) -> Tensor:
        """Compute rows (N, O): each phase is an ordinary convolution, whose backend is chosen separately."""
        source, target, window = work.reads.source, work.reads.target, work.reads.window
        rows, reading = work.rows, work.reading
        every, place = phases(source, target, window)
        has_outside = reading.has_outside and is_statically_true(reading.sources.shape[0] == 0)
        if not has_outside:  # the halo is mixed once for all phases
            rows = extend(rows, reading, 0.0)
        weights = work.weights if work.residual is None else work.weights.without_activation
        parts = []
        for phase in every:
            own = weights.of_phase(phase.first, window.finer)
            parts.append(compute(Convolution(rows, own, read_rows(phase.table, has_outside))))
        out = torch.cat(parts).index_select(0, place.to(rows.device))
        return out if work.residual is None else work.weights.finish(out, work.residual)

    def pool(self, work: Pooling) -> Tensor:
        """Compute rows (N, C)."""
        reading = work.reading
        blocks = gather_blocks(extend(work.rows, reading, work.outside), reading.table)
        return torch.cat([block.amax(1) if work.largest else block.sum(1) for block in blocks])

    def resize_map(self, work: MapResizing) -> Tensor:
        """Compute a map by torch: to put the larger map in order would take longer."""
        size = work.size if work.factors is None else None
        return F.interpolate(in_order(work.rows), size, work.factors, "bilinear", work.aligned)

    def mix(self, work: Mixing) -> Tensor:
        """Compute rows (M, C)."""
        rows = work.rows
        sources, shares = work.sources.to(rows.device), work.shares.to(rows)
        return F.embedding_bag(sources, rows, per_sample_weights=shares, mode="sum")

    def mix_lines(self, work: MixingLines) -> Tensor:
        """Compute the interpolated lines (L, M, C)."""
        first, second = (work.rows.index_select(1, end) for end in (work.first, work.second))
        return torch.lerp(first, second, work.share.unsqueeze(1))

    def pick(self, work: Picking) -> Tensor:
        """Compute the selected rows (entries, C)."""
        rows = extend(work.rows, work.reading, 0.0)
        return rows.index_select(0, work.reading.table.flatten().to(rows.device))

    def read_pixels(self, work: PixelReading) -> Tensor:
        """Compute pixels (B, h, w, C)."""
        pixels: Tensor = compute(work.picking)
        return pixels.view(work.shape)

    def fill(self, work: Filling) -> Tensor:
        """Compute the filled rows (T, C)."""
        out = compute(work.picking)
        out = out if work.residual is None else out + work.residual
        return out if work.activation is None else work.activation.apply_(out)


class Expression(Backend):
    """Convolutions in a graph, as an expression that compilers optimise and every runtime supports."""

    name = "expression"

    def applies(self, work: Work) -> bool:
        """Return True while a graph is traced."""
        return bool(work.graph)

    def convolve(self, work: Convolution) -> Tensor:
        """Rows (N, O)."""
        rows, weight, table = _operands(work)
        groups, bias = work.weights.groups, work.weights.bias
        gathered = gather(rows, table)
        if groups == 1:
            return work.weights.finish(product(gathered.flatten(1), weight, bias), work.residual)
        parts = gathered.unflatten(2, (groups, -1))  # (N, taps, groups, C / groups)
        weight = weight.unflatten(0, (groups, -1)).squeeze(-1)  # (groups, O / groups, C / groups, taps)
        if weight.shape[2] == 1:
            out = (parts * weight.permute(3, 0, 2, 1).squeeze(2)).sum(1)
        else:
            out = torch.einsum("ntgc,goct->ngo", parts, weight)
        return work.weights.finish(out.flatten(1) if bias is None else out.flatten(1) + bias, work.residual)


def _operands(work: Convolution) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows with padding and halo rows, the weight in matrix layout, and the table."""
    reading = work.reading
    rows = extend(work.rows, reading, work.outside)
    return rows, work.weights.matrix(rows.dtype), reading.table.to(rows.device)


def block_length(table: Tensor, rows: Tensor) -> int:
    """Return how many entries of a table (N, taps) are gathered at once."""
    return max(256, BLOCK_BYTES // (table.shape[1] * rows.shape[1] * rows.element_size()))


def gather_blocks(rows: Tensor, table: Tensor) -> Iterator[Tensor]:
    """Yield the gathered rows of all taps, (n, taps, C), in blocks; a table of unknown length is one block."""
    table = table.to(rows.device)
    for block in (table,) if is_for_any_size(table.shape) else table.split(block_length(table, rows)):
        yield gather(rows, block)


def gather(rows: Tensor, table: Tensor) -> Tensor:
    """Gather rows (n, C) by a table (N, taps), giving (N, taps, C)."""
    return rows.index_select(0, table.flatten()).view(*table.shape, rows.shape[1])


def _apply_taps(block: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Multiply gathered rows (n, taps, C) by the weight of a `_GatherByBlocks`: (n, O)."""
    if groups == 1:
        return product(block.flatten(1), weight, bias)
    # Grouped: the gathered rows are an image; kernel and stride of the convolution equal the number of taps.
    count, taps, channels = block.shape
    image = block.view(1, count * taps, 1, channels).permute(0, 3, 1, 2)
    return (
        F.conv2d(image, weight, bias, stride=(taps, 1), groups=groups).permute(0, 2, 3, 1).reshape(count, -1)
    )


class _GatherByBlocks(torch.autograd.Function):
    """Gather rows by a table and multiply them, block by block, forward and backward.

    The weight is (O, taps C) or, with groups, (O, C / groups, taps, 1). Only the inputs are saved for
    backward; the gathered rows, `taps` times larger, never exist as a whole.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, groups: int
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, table)
        ctx.groups = groups
        length = min(block_length(table, rows), max(table.shape[0], 1))
        gathered = rows.new_empty(length * table.shape[1], rows.shape[1])
        out = rows.new_empty(table.shape[0], weight.shape[0])
        for block, result in zip(table.split(length), out.split(length), strict=True):
            if not len(block):  # a grouped convolution cannot have an image without lines
                continue
            view = gathered[: block.numel()]
            torch.index_select(rows, 0, block.flatten(), out=view)
            result.copy_(_apply_taps(view.view(*block.shape, rows.shape[1]), weight, bias, groups))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, _, table = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_rows = torch.zeros_like(rows) if needs[0] else None
        grad_weight = torch.zeros_like(weight) if needs[1] else None
        length = block_length(table, rows)
        for block, part in zip(table.split(length), grad.contiguous().split(length), strict=True):
            if not len(block):
                continue
            gathered = (
                rows.index_select(0, block.flatten())
                .view(*block.shape, rows.shape[1])
                .requires_grad_(needs[0])
            )
            with torch.enable_grad():
                kernel = weight.detach().requires_grad_(needs[1])
                out = _apply_taps(gathered, kernel, None, ctx.groups)
            wanted = [value for value, need in ((gathered, needs[0]), (kernel, needs[1])) if need]
            gradients = list(torch.autograd.grad(out, wanted, part)) if wanted else []
            if grad_rows is not None:
                grad_rows.index_add_(0, block.flatten(), gradients.pop(0).flatten(0, 1))
            if grad_weight is not None:
                grad_weight += gradients.pop(0)
        return grad_rows, grad_weight, grad.sum(0) if needs[2] else None, None, None
