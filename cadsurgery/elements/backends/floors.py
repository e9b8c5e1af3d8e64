"""What floors make simpler: transposed convolutions without overlap, and fine maps of two levels.

A transposed convolution without overlap computes each sample from one sample of its input: all phases are one product.
In a fine map coarse cells are interpolated as one small map of their anchors, and finer cells are put on top.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import Backend, compute
from cadsurgery.elements.backends.weights import FusedConv
from cadsurgery.elements.backends.works import Convolution, Pooling, TransposedConvolution, WindowRead
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.sizes import is_statically_true


class WithoutOverlap(Backend):
    """Transposed convolutions without overlap in inference."""

    name = "without overlap"

    def applies(self, work: Convolution | TransposedConvolution | Pooling) -> bool:
        """Return True if every sample of the result reads one sample."""
        reads = work.reads
        if not isinstance(work, TransposedConvolution) or not isinstance(reads, WindowRead):
            return False
        source, target, window = reads.source, reads.target, reads.window
        if work.gradient or work.graph == "compiled" or work.rows.dim() != 2:
            return False
        is_whole = source.part is None and target.part is None
        return window.reads_one_sample and is_whole and source.geometry.floors and not reads.drop

    def spread(self, work: TransposedConvolution) -> Tensor:
        """Compute rows (N, O)."""
        source, target, finer = work.reads.source, work.reads.target, work.reads.window.finer
        spacing, channels = work.reads.window.output_spacing, work.weights.weight.shape[0]
        if target.uniform_side >= finer * spacing:  # all rows are of the first phase
            sums = compute(
                Convolution(work.rows, work.weights.of_phase((0, 0), finer).without_activation, None)
            )
            return work.weights.finish(sums.index_select(0, _row_numbers(source, target)), work.residual)
        sums = compute(Convolution(work.rows, _all_phases(work.weights, finer), None))
        if work.weights.groups > 1:
            sums = sums.view(-1, channels, finer**2).transpose(1, 2)
        read = target.derive(
            ("one sample", source.key, finer, spacing), partial(_row_numbers, source, target, finer, spacing)
        )
        return work.weights.finish(sums.reshape(-1, channels).index_select(0, read), work.residual)


def _row_numbers(source: Lattice, target: Lattice, finer: int = 1, spacing: int = 1) -> Tensor:
    """Return the number of the source's row that holds each element of the target, times the phases, plus the phase."""
    index, device = source.index.view(-1, *source.size), source.index.device
    for axis, (own, length) in enumerate(zip(source.size, target.size, strict=True), 1):
        if not is_statically_true(own == length):  # a map may end before the next one
            index = index.index_select(axis, torch.arange(length, device=device).clamp(max=own - 1))
    if finer > 1:
        y, x = (torch.arange(n, dtype=torch.int32, device=device) // spacing % finer for n in target.size)
        index = index * finer**2 + (y * finer).unsqueeze(1) + x
    return index.flatten().index_select(0, target.anchors)


def _all_phases(weights: FusedConv, finer: int) -> FusedConv:
    """Return a 1x1 convolution to all phases of each sample: phase after phase, or in groups channel after channel."""

    def make() -> FusedConv:
        order = (2, 3, 0, 1) if weights.groups == 1 else (0, 2, 3, 1)
        kernel = weights.weight.permute(order).flatten(0, 2)[:, :, None, None].contiguous()
        bias = weights.bias
        if bias is not None:
            bias = bias.repeat(finer**2) if weights.groups == 1 else bias.repeat_interleave(finer**2)
        return weights.changed(weight=kernel, bias=bias, activation=None)

    return weights.form("all phases", make)


def has_pixels(rows: Tensor, lattice: Lattice, spacing: int) -> bool:
    """True if `to_pixels` can read rows of a lattice: cells are of the coarsest level or of the network's own grid."""
    geometry = lattice.geometry
    if rows.dim() != 2 or rows.requires_grad or rows.device != lattice.levels.device:
        return False
    if not geometry.floors or geometry.fill != "linear" or not geometry.dense_shortcut:
        return False
    if lattice.part is not None or lattice.stage == 0 or not lattice.is_counted_here:
        return False
    cell, own = geometry.sides[geometry.max_level], geometry.sides[lattice.stage - 1]
    is_uniform = lattice.uniform_side == max(cell, own)
    return (is_uniform or lattice.pyramid.has_two_levels) and cell % spacing == 0 and spacing % own == 0


def to_pixels(rows: Tensor, lattice: Lattice, spacing: int) -> Tensor:
    """Read every `spacing`-th fine pixel (B, h, w, C) of a lattice with linear fill."""
    coarsest = lattice.geometry.max_level
    cell, (height, width) = lattice.geometry.sides[coarsest], lattice.size
    # Beyond the last anchors the border is replicated, which may be kept fine.
    device = lattice.levels.device
    y, x = (
        torch.cat((torch.arange(0, length, cell, device=device), torch.tensor([length - 1], device=device)))
        for length in lattice.size
    )
    of_ends = lattice.index.view(-1, height, width)[:, y][:, :, x]
    ends = rows.index_select(0, of_ends.flatten()).view(*of_ends.shape, -1).permute(0, 3, 1, 2)
    ends = ends.to(torch.promote_types(rows.dtype, torch.float32))
    size = [(length - 1) * (cell // spacing) + 1 for length in of_ends.shape[1:]]
    every = F.interpolate(ends, size=size, mode="bilinear", align_corners=True)
    lines, columns = -(-height // spacing), -(-width // spacing)
    pixels = every[:, :, :lines, :columns].permute(0, 2, 3, 1).to(rows.dtype).contiguous()
    if lattice.uniform_level == coarsest:
        return pixels

    def build() -> tuple[Tensor, Tensor]:
        is_read = lattice.level_of_rows < coarsest
        y, x = (torch.arange(length, dtype=torch.int32, device=device) for length in lattice.size)
        if spacing > lattice.geometry.sides[lattice.stage - 1]:
            on_grid = (y % spacing == 0).unsqueeze(1) & (x % spacing == 0)
            is_read &= on_grid.repeat(lattice.batch, 1, 1).flatten().index_select(0, lattice.anchors)
        fine = is_read.nonzero().squeeze(1)
        anchors = lattice.anchors.index_select(0, fine)
        if spacing == 1:
            return fine, anchors
        image = torch.arange(lattice.batch, dtype=torch.int32, device=device).view(-1, 1, 1)
        numbers = (image * lines + (y // spacing).unsqueeze(1)) * columns + x // spacing
        return fine, numbers.flatten().index_select(0, anchors).long()

    fine, places = lattice.derive(("fine pixels", spacing), build)
    pixels.view(-1, rows.shape[1]).index_copy_(0, places, rows.index_select(0, fine))
    return pixels
