"""What floors make simpler: a transposed convolution without overlap computes each sample from one sample of its input,
so that all phases are one product.
"""

from __future__ import annotations

from functools import partial

import torch
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
