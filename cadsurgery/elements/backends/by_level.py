"""Convolutions whose results are scaled and shifted by the level of each element."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cadsurgery.elements.backends.choose import Convolution, WindowRead, choose, compute
from cadsurgery.elements.backends.native import Native


def convolve_by_level(work: Convolution) -> Tensor:
    """Rows (N, ..., O): the sums by whatever backend is chosen, then factors, residual and activation.

    Compiled code does the rest too, while the sums are in its registers; so it costs next to nothing.
    """
    weights, reads = work.weights, work.reads
    assert weights.levels is not None and isinstance(reads, WindowRead)
    sums = replace(work, weights=replace(weights, levels=None, activation=None), residual=None)
    choice = choose(sums)
    does_the_rest = isinstance(choice.backend, Native)
    rows: Tensor = compute(work if does_the_rest else sums, choice)
    return rows if does_the_rest else weights.finish(weights.levels.apply(rows, reads.target), work.residual)
