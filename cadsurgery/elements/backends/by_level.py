"""Convolutions whose results are scaled and shifted depending on the level of each element."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cadsurgery.elements.backends.choose import Convolution, WindowRead, choose, compute
from cadsurgery.elements.backends.native import Native


def convolve_by_level(work: Convolution) -> Tensor:
    """Compute rows (N, ..., O): sums by the chosen backend, then the factors of the levels, residual and activation.

    The compiled kernels apply all of this while the sums are in registers, at almost no cost.
    """
    weights, reads = work.weights, work.reads
    assert weights.levels is not None and isinstance(reads, WindowRead)
    sums = replace(work, weights=replace(weights, levels=None, activation=None), residual=None)
    choice = choose(sums)
    does_the_rest = isinstance(choice.backend, Native)
    rows: Tensor = compute(work if does_the_rest else sums, choice)
    return rows if does_the_rest else weights.finish(weights.levels.apply(rows, reads.target), work.residual)
