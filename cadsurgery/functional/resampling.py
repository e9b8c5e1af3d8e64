"""Operations that make a map finer: onto the lattice of an earlier stage, or beyond the high output stride."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cadsurgery.errors import InvalidInput
from cadsurgery.functional.elements import Elements, extended, mixed
from cadsurgery.kernel_map import read_points
from cadsurgery.lattice import Lattice


def resize(
    x: Elements,
    stage: int,
    spacings: tuple[int, int],
    scale: int,
    size: tuple[int, int] | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
) -> Elements:
    """Upsampling inside the region: onto the lattice of an earlier stage.

    Where a cell of the output is as large as the one it lies in (it was never downsampled), the value is taken over:
    in the dense network at that stride there is nothing to resize. Elsewhere it is read between the coarse cells
    as torch.nn.functional.interpolate reads between samples.

    Args:
        x: elements.
        stage: of the output, at most the input's.
        spacings: fine pixels between the samples of the network's own grid, before and after.
        scale: how many times finer the output is.
        size: samples (height, width) of the output on the network's own grid; default `scale` times the input's.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.

    Raises:
        InvalidInput: the output would be larger than the fine map.
    """
    before = tuple(-(-length // spacings[0]) for length in x.lattice.size)
    after = tuple(size) if size is not None else tuple(count * scale for count in before)
    room = x.lattice.whole_size
    fine = tuple(count * spacings[1] for count in after)
    if any(length - spacings[1] >= most for length, most in zip(fine, room, strict=True)):
        raise InvalidInput(
            f"upsampling to {after[0]}x{after[1]} samples gives more than the network's own maps have.",
            why="the image is not divisible by the network's strides.",
            next="pad or resize the image to a multiple of the lowest output stride.",
        )
    target = x.lattice.resampled(stage, (min(fine[0], room[0]), min(fine[1], room[1])))
    key = ("resize", x.lattice.key, target.key, spacings, before, after, mode, align_corners)

    def build() -> tuple[Tensor, Tensor]:
        image, *place = target.coordinates
        side = target.side_map.flatten()[target.anchors]
        ratios = _ratios(before, after, spacings, align_corners)
        return _between_cells(x.lattice, image, place, side, ratios, mode, align_corners)

    sources, mix = x.lattice.pyramid.derive(key, build)
    return Elements(mixed(x.rows, sources, mix), target)


def resize_to_dense(
    x: Elements,
    spacing: int,
    scale: int,
    size: tuple[int, int] | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
) -> Tensor:
    """Upsampling that leaves the region: a dense map finer than the high output stride.

    Each of its samples is read between cells of the size of the one it lies in, as `resize` does it.

    Args:
        x: elements.
        spacing: fine pixels between the samples of the network's own grid, before.
        scale: how many times finer the output is; more than `spacing`.
        size: samples (height, width) of the output; default `scale` times the input's.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.
    """
    before = tuple(-(-length // spacing) for length in x.lattice.size)
    after = tuple(size) if size is not None else tuple(count * scale for count in before)
    device, side = x.lattice.levels.device, spacing / scale
    image = torch.arange(x.lattice.batch, device=device).view(-1, 1, 1).expand(-1, *after).flatten()
    axes = [torch.arange(count, device=device, dtype=torch.float64) * side for count in after]
    place = [
        grid.repeat(x.lattice.batch)
        for grid in (axes[0].repeat_interleave(after[1]), axes[1].repeat(after[0]))
    ]
    ratios = _ratios(before, after, (spacing, side), align_corners)
    sides = torch.full_like(place[0], side)
    sources, mix = _between_cells(x.lattice, image, place, sides, ratios, mode, align_corners)
    return mixed(x.rows, sources, mix).view(x.lattice.batch, *after, -1).permute(0, 3, 1, 2)


def pixel_shuffle(x: Elements, stage: int, spacings: tuple[int, int], scale: int) -> Elements:
    """Depth to space: an element reads the channels of its phase on the output's own grid.

    Args:
        x: elements (N, C r r).
        stage: of the output.
        spacings: fine pixels between the samples of the network's own grid, before and after.
        scale: r.
    """
    target = x.lattice.resampled(stage, x.lattice.size)
    (height, width), (image, y, x_) = x.lattice.size, target.coordinates
    down, across = (at // spacings[1] % scale for at in (y, x_))
    points = (image * height + y - down * spacings[1]) * width + x_ - across * spacings[1]
    reading = read_points(x.lattice, points)
    rows = extended(x.rows, reading, 0.0).index_select(0, reading.table.to(x.rows.device))
    phase = (down * scale + across).to(rows.device)
    rows = rows.unflatten(1, (-1, scale * scale))
    return Elements(rows.gather(2, phase.view(-1, 1, 1).expand(-1, rows.shape[1], 1)).squeeze(2), target)


def _ratios(
    before: Sequence[int], after: Sequence[int], spacings: tuple[float, float], align_corners: bool
) -> tuple[float, ...]:
    """Per axis, how far a grid of `after` samples is from fitting one of `before`; 1 unless the sizes do not divide."""
    if align_corners:  # the outermost samples coincide
        before, after = [have - 1 for have in before], [max(want - 1, 1) for want in after]
    return tuple(have * spacings[0] / (want * spacings[1]) for have, want in zip(before, after, strict=True))


def _between_cells(
    source: Lattice,
    image: Tensor,
    place: Sequence[Tensor],
    side: Tensor,
    ratios: Sequence[float],
    mode: str,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Elements (M, 4) and their weights that samples of a finer grid are resized from.

    Args:
        source: the lattice that is read.
        image: (M,) image of each sample.
        place: its y and x, in fine pixels.
        side: (M,) distance of samples there, in fine pixels.
        ratios: see `_ratios`.
        mode: `nearest` or `bilinear`.
        align_corners: as in torch.
    """
    height, width = source.size
    inside = [at.long().clamp(max=length - 1) for at, length in zip(place, source.size, strict=True)]
    cell = source.side_map.flatten()[(image * height + inside[0]) * width + inside[1]]
    same = cell == side
    ends = []
    for fine, length, ratio in zip(place, source.size, ratios, strict=True):
        at = fine.double()
        if mode == "nearest":
            point = (at * ratio / cell).floor() * cell
        else:
            point = at * ratio if align_corners else (at + side / 2) * ratio - cell / 2
        point = torch.where(same, at, point).clamp(min=0)
        low = (point / cell + 1e-9).floor()
        share = torch.where(same, 0.0, (point / cell - low).clamp(min=0))
        first = (low * cell).long().clamp(max=length - 1)
        ends.append(((first, 1 - share), ((first + cell).clamp(max=length - 1), share)))
    points = [(image * height + y) * width + x for y, _ in ends[0] for x, _ in ends[1]]
    weights = [v * h for _, v in ends[0] for _, h in ends[1]]
    return source.index[torch.stack(points, 1)], torch.stack(weights, 1)
