"""Cells and kernel maps on a GPU, in a few Triton kernels, where torch would launch seventy small ones for each map.

Sizes follow from bounds on the number of elements (`bounds.py`), so that the device is not waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cadsurgery.elements.backends import triton_kernels
from cadsurgery.elements.sizes import constant

_BLOCK = 256


def available(device: torch.device) -> bool:
    """Return True if the kernels run on this device: NVIDIA from Ampere on (bfloat16, tf32, asynchronous copies)."""
    if not triton_kernels.INSTALLED or triton_kernels.INTERPRETED:
        return triton_kernels.INTERPRETED and device.type == "cpu"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def find_cells(levels: Tensor, sides: tuple[int, ...], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the cells of a level map (B, H, W) int8, of which there are at most `most`.

    Returns:
        The anchors (most,) int64 as pixel numbers, ascending, and 0 behind the last; each pixel's row (B*H*W,) int32;
        and the number of cells of each image (B,) int64.
    """
    levels, count = levels.contiguous(), levels.numel()
    side_of = constant(sides, torch.int32, levels.device)
    flags, index = (torch.empty(count, dtype=torch.int32, device=levels.device) for _ in range(2))
    anchors = torch.zeros(most, dtype=torch.int64, device=levels.device)
    grid, size = (
        (-(-count // _BLOCK),),
        {"HEIGHT": levels.shape[1], "WIDTH": levels.shape[2], "BLOCK": _BLOCK},
    )
    with torch.cuda.device_of(levels):
        triton_kernels.find_anchors[grid](levels, side_of, flags, count, **size)
        ranks = flags.cumsum(0, dtype=torch.int32)
        triton_kernels.place_cells[grid](levels, side_of, ranks, anchors, index, count, **size)
    return anchors, index, flags.view(levels.shape[0], -1).sum(1)


def shift_taps(
    cells: tuple[Tensor, Tensor, Tensor],
    sides: tuple[int, ...],
    targets: Tensor,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    steps: tuple[list[int], list[int]],
    halo: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute a kernel map (n, taps) int32, and its halo: sources (M, 4) int32 and their weights (M, 4) float32.

    Args:
        cells: as in `maps.shift_taps`, like the next four.
        sides: sides of cells of each level.
        targets: anchors of the target lattice.
        sizes: of the source and the target.
        steps: fine pixels from an anchor to its taps; each axis rises evenly.
        halo: M, the most pixels that can be read between anchors; 0 to read such pixels from their own cell.

    Returns:
        Table, sources and weights, and the number of halo rows that are read, a tensor without dimensions; None if
        there is no halo.
    """
    index, anchors, levels = map(Tensor.contiguous, cells)
    (down, across), device = steps, index.device
    entries, pixels, outside = targets.numel() * len(down) * len(across), index.numel(), anchors.numel()
    table = torch.empty(targets.numel(), len(down) * len(across), dtype=torch.int32, device=device)
    sources, shares = (
        torch.empty(halo, 4, dtype=torch.int32, device=device),
        torch.empty(halo, 4, device=device),
    )
    wanted = torch.zeros(pixels, dtype=torch.int32, device=device) if halo else None
    size = {"HEIGHT": sizes[0][0], "WIDTH": sizes[0][1], "BLOCK": _BLOCK}
    wide = {"WIDE": entries >= 1 << 31}
    along = [values[1] - values[0] if len(values) > 1 else 0 for values in (down, across)]
    with torch.cuda.device_of(index):
        triton_kernels.read_taps[(-(-entries // _BLOCK),)](
            *(index, anchors, targets.contiguous(), table, wanted, targets.numel(), outside),
            *(down[0], across[0], *along),
            **size,
            **{"TARGET_HEIGHT": sizes[1][0], "TARGET_WIDTH": sizes[1][1]},
            **{"DOWN": len(down), "ACROSS": len(across), **wide},
        )
        if wanted is None:
            return table, sources, shares, None
        ranks = wanted.cumsum(0, dtype=torch.int32)
        triton_kernels.read_halo[(-(-entries // _BLOCK),)](
            table, ranks, outside, entries, **wide, BLOCK=_BLOCK
        )
        side_of = constant(sides, torch.int32, device)
        triton_kernels.mix_between[(-(-pixels // _BLOCK),)](
            levels, side_of, index, wanted, ranks, sources, shares, pixels, halo, **size
        )
    return table, sources, shares, ranks[-1]


class SampleMap(NamedTuple):
    """Where the taps of a window are read on a grid that all anchors and taps lie on, without an entry for each
    element and tap.

    Tap t of element n reads the row `samples[places[n] + t // width * down + t % width * across]`. Elements that are
    neighbours on the grid find their taps side by side, as in a dense convolution.

    Attributes:
        samples: (S,) int32: of each sample of the grid and of a border around it the row whose cell holds it; N outside
            of the map, and more for a halo row, where a sample that is read lies between anchors.
        places: (n,) int32: where the first tap of each element is.
        down: entries from a line of taps to the next.
        across: entries from a tap to the next in its line.
        width: taps of a line.
        taps: taps of the window.
        sources: (M, 4) int32, the rows that each halo row interpolates.
        mix: (M, 4) float32, their weights.
        used: number of halo rows that are read, a tensor without dimensions; None if there is no halo.
    """

    samples: Tensor
    places: Tensor
    down: int
    across: int
    width: int
    taps: int
    sources: Tensor
    mix: Tensor
    used: Tensor | None


def map_samples(
    cells: tuple[Tensor, Tensor, Tensor],
    sides: tuple[int, ...],
    targets: Tensor,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    steps: tuple[list[int], list[int]],
    spacing: int,
    halo: int,
) -> SampleMap:
    """Compute the map of the samples that lie `spacing` fine pixels apart.

    Args:
        cells: as in `maps.shift_taps`, like the next three.
        sides: sides of cells of each level.
        targets: anchors of the target lattice.
        sizes: of the source and the target.
        steps: samples from an anchor to its taps; each axis rises evenly.
        spacing: fine pixels between samples.
        halo: M, the most samples between anchors that can be read; 0 to read these from their own cell.
    """
    index, anchors, levels = map(Tensor.contiguous, cells)
    (height, width), device, targets = sizes[0], index.device, targets.contiguous()
    above, before = (max(0, -values[0]) for values in steps)
    lines, columns = (
        -(-length // spacing) + ahead + max(0, values[-1])
        for length, ahead, values in zip(sizes[0], (above, before), steps, strict=True)
    )
    down, across = (values[1] - values[0] if len(values) > 1 else 0 for values in steps)
    count = levels.shape[0] * lines * columns
    samples = torch.empty(count, dtype=torch.int32, device=device)
    places = torch.empty(targets.numel(), dtype=torch.int32, device=device)
    sources = torch.empty(halo, 4, dtype=torch.int32, device=device)
    mix = torch.empty(halo, 4, device=device)
    wanted = torch.zeros_like(samples) if halo else None
    # Sizes are no constants here: a picture of another size compiles nothing again.
    size = (height, width, spacing, above, before, lines, columns)
    with torch.cuda.device_of(index):
        triton_kernels.place_taps[(-(-targets.numel() // _BLOCK),)](
            *(index, anchors, targets, places, wanted, targets.numel()),
            *(steps[0][0], steps[1][0], down, across, *size, *sizes[1]),
            **{"DOWN": len(steps[0]), "ACROSS": len(steps[1]), "BLOCK": _BLOCK},
        )
        ranks = wanted.cumsum(0, dtype=torch.int32) if wanted is not None else None
        side_of = constant(sides, torch.int32, device)
        triton_kernels.read_samples[(-(-count // _BLOCK),)](
            *(levels, side_of, index, wanted, ranks, samples, sources, mix, count, anchors.numel(), *size),
            BLOCK=_BLOCK,
        )
    used = ranks[-1] if ranks is not None else None
    width, taps = len(steps[1]), len(steps[0]) * len(steps[1])
    return SampleMap(samples, places, down * columns, across, width, taps, sources, mix, used)
