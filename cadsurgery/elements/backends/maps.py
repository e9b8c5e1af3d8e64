"""Interface to `maps.c`: cells and kernel maps in compiled code, in one pass over pixels and two over table entries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cadsurgery.kernels.dispatch import call, function

_HERE = torch.device("cpu")  # whatever the default device is


def find_cells(levels: Tensor, sides: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Find the cells of a level map (B, H, W) int8, given the `sides` of cells of each level. Return the anchors (N,)
    int64 as pixel numbers, each pixel's row (B*H*W,) int32, and the number of cells of each image (B,) int64."""
    levels, side_of = levels.contiguous(), torch.tensor(sides, device=_HERE)
    anchors, index = (
        torch.empty(levels.numel(), dtype=dtype, device=_HERE) for dtype in (torch.int64, torch.int32)
    )
    counts = torch.empty(levels.shape[0], dtype=torch.int64, device=_HERE)
    find = function("find_cells")
    assert find is not None
    count = call(find, (levels, side_of, anchors, index, counts, *levels.shape))
    return anchors[:count].clone(), index, counts


def shift_taps(
    cells: tuple[Tensor | None, Tensor, Tensor],
    sides: tuple[int, ...],
    targets: Tensor,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    steps: tuple[list[int], list[int]],
    has_halo: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a kernel map (n, taps) int32, and its halo: sources (M, 4) int32 and their weights (M, 4) float64.

    Args:
        cells: source lattice: the row of each pixel's cell (B*H*W,) int32, None if it is the pixel's number; the
            anchors (N,) int64, not read without a halo; and the level of each pixel's cell (B, H, W) int8.
        sides: sides of cells of each level.
        targets: anchors (n,) int64 of the target lattice.
        sizes: fine (height, width) of the source and the target.
        steps: fine pixels from an anchor to its taps, down and across.
        has_halo: interpolate points inside cells from several cells; otherwise they are read from their own cell.
    """
    index, (anchors, levels) = cells[0], map(Tensor.contiguous, cells[1:])
    targets, side_of = targets.contiguous(), torch.tensor(sides, device=_HERE)
    down, across = (torch.tensor(step, device=_HERE) for step in steps)
    pixels, n = levels.numel(), targets.numel()
    count = pixels if index is None else anchors.numel()
    taps = down.numel() * across.numel()
    ints = partial(torch.empty, dtype=torch.int32, device=_HERE)
    table, rank = ints(n, taps), ints(pixels if has_halo else 0)
    lines = ints(levels.shape[0] * levels.shape[1])
    most = min(pixels - count, n * taps) if has_halo else 0
    sources, mix = ints(most, 4), torch.empty(most, 4, dtype=torch.float64, device=_HERE)
    tensors = (anchors, levels, side_of, targets, down, across, table, rank, lines, sources, mix)
    numbers = (pixels, count, n, *sizes[0], *sizes[1], down.numel(), across.numel(), has_halo)
    shift = function("shift_taps")
    assert shift is not None
    index = index.contiguous() if index is not None else None
    halo = call(shift, (index, *tensors, *numbers))
    return table, sources[:halo], mix[:halo]


def read_map(
    shape: tuple[int, int, int],
    result: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return which positions each position of a dense convolution reads, (positions, taps) int32.

    Args:
        shape: batch, height and width of the map that is read; their product stands for positions outside.
        result: (height, width) of the result.
        kernel: (height, width) of the window, as in torch; so are stride, padding and dilation.
    """
    height, width = fine = result[0] * stride[0], result[1] * stride[1]
    pixels = torch.arange(shape[0] * height * width, device=_HERE).view(shape[0], height, width)
    targets = pixels[:, :: stride[0], :: stride[1]].flatten()
    steps = [
        [step * tap - pad for tap in range(taps)]
        for taps, step, pad in zip(kernel, dilation, padding, strict=True)
    ]
    cells = (None, targets, torch.zeros(shape, dtype=torch.int8, device=_HERE))
    return shift_taps(cells, (1,), targets, (shape[1:], fine), (steps[0], steps[1]), False)[0]
