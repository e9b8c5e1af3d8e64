"""Where floors keep cells of the coarsest level whole, their elements are small dense maps, one after the other.

A transposed convolution without overlap is one there, and a fine map is made of them and of coarse cells interpolated as
one small map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.backends.choose import (
    Backend,
    Convolution,
    Pooling,
    TransposedConvolution,
    WindowRead,
    compute,
)
from cadsurgery.elements.backends.weights import FusedConv, transpose_weight
from cadsurgery.elements.lattice import Lattice


class Patches(Backend):
    """Transposed convolutions without overlap in inference."""

    name = "patches"

    def applies(self, work: Convolution | TransposedConvolution | Pooling) -> bool:
        """Return True if source and target have the same patches, of more than one sample."""
        reads = work.reads
        if not isinstance(work, TransposedConvolution) or not isinstance(reads, WindowRead):
            return False
        source, target, window = reads.source, reads.target, reads.window
        if not work.is_inference or work.rows.dim() != 2 or reads.drop:
            return False
        is_apart = window.kernel == (window.finer, window.finer) and not any(window.padding)
        has_patches = source.is_patched and target.is_patched and target.patch_side >= window.finer
        return is_apart and has_patches and source.stage > 0 and source.size == target.size

    def spread(self, work: TransposedConvolution) -> Tensor:
        """Compute rows (N, O): each sample of the result reads one sample."""
        source, target, weights = work.reads.source, work.reads.target, work.weights
        finer, rows = work.reads.window.finer, work.rows
        out = rows.new_empty(target.count, weights.weight.shape[0])
        of_patches, side = _in_patches(source), source.patch_side
        if of_patches:
            image = rows[:of_patches].view(-1, side, side, rows.shape[1]).permute(0, 3, 1, 2)
            by_input = transpose_weight(weights.weight, weights.groups).to(image.dtype)
            bias = weights.bias_as(rows.dtype)
            result = F.conv_transpose2d(image, by_input, bias, finer, groups=weights.groups)
            out[: of_patches * finer**2] = result.permute(0, 2, 3, 1).flatten(0, 2)
        _spread_others(work, weights, out[_in_patches(target) :])
        return weights.finish(out, work.residual)


def _spread_others(work: TransposedConvolution, weights: FusedConv, out: Tensor) -> None:
    """Compute the rows of coarse cells and of what the border cuts, phase by phase."""
    source, target, window = work.reads.source, work.reads.target, work.reads.window
    finer, spacing, width = window.finer, window.spacing, target.size[1]
    anchors = target.anchors[_in_patches(target) :]
    y, x = anchors // width, anchors % width
    own = source.index[(y - y % spacing) * width + x - x % spacing]
    phase = y // window.output_spacing % finer * finer + x // window.output_spacing % finer
    others = work.rows.index_select(0, own)
    for number in phase.unique().tolist():
        chosen = (phase == number).nonzero().squeeze(1)
        plain = weights.of_phase(divmod(number, finer), finer).without_activation
        out[chosen] = compute(Convolution(others[chosen], plain, None))


def _corners(lattice: Lattice) -> Tensor:
    """Return the corners of the patches (n,) as pixel numbers."""
    return lattice.patches if lattice.patches is not None else torch.empty(0, dtype=torch.long)


def _in_patches(lattice: Lattice) -> int:
    """Return the number of rows in patches."""
    return len(_corners(lattice)) * lattice.patch_side**2


def has_pixels(lattice: Lattice, spacing: int) -> bool:
    """True if `to_pixels` can read a lattice: no kept cell is cut by the border."""
    geometry = lattice.geometry
    if (
        not geometry.floors
        or geometry.fill != "linear"
        or not geometry.dense_shortcut
        or lattice.patches is None
    ):
        return False
    cell = geometry.sides[geometry.max_level]
    cells = -(-lattice.size[0] // cell) * -(-lattice.size[1] // cell)
    is_uncut = lattice.count == _in_patches(lattice) + cells - len(lattice.patches)
    return is_uncut and cell % spacing == 0 and spacing % (cell // lattice.patch_side) == 0


def to_pixels(rows: Tensor, lattice: Lattice, spacing: int) -> Tensor:
    """Read every `spacing`-th fine pixel of a lattice with linear fill, (1, h, w, C): coarse cells are interpolated as
    one small map of their anchors, whole patches are copied."""
    cell, side = lattice.geometry.sides[lattice.geometry.max_level], lattice.patch_side
    (height, width), many = lattice.size, cell // spacing
    # Beyond the last anchors the border is replicated, which may be kept fine.
    y, x = (torch.cat((torch.arange(0, length, cell), torch.tensor([length - 1]))) for length in lattice.size)
    of_ends = lattice.index.view(lattice.size)[y][:, x]
    ends = rows.index_select(0, of_ends.flatten()).view(1, *of_ends.shape, -1).permute(0, 3, 1, 2)
    ends = ends.to(torch.promote_types(rows.dtype, torch.float32))
    size = [(length - 1) * many + 1 for length in of_ends.shape]
    every = F.interpolate(ends, size=size, mode="bilinear", align_corners=True)
    by_pixel = every[:, :, :-1, :-1].permute(0, 2, 3, 1).to(rows.dtype).contiguous()
    corners, step = _corners(lattice), side // many
    patches = rows[: _in_patches(lattice)].view(-1, side, side, rows.shape[1])[:, ::step, ::step]
    by_cell = by_pixel[0].unflatten(1, (-1, many)).unflatten(0, (-1, many)).transpose(1, 2)
    by_cell[corners // width // cell, corners % width // cell] = patches
    return by_pixel[:, : -(-height // spacing), : -(-width // spacing)]
