"""Draw the words of the glossary: `word-*` in docs/pictures, each from objects of the package where there are any.

    python -m benchmarks.pictures --only word

`WORDS` names the pictures; `benchmarks.pictures` draws each for light and for dark pages. Networks have random weights,
and images are generated, so nothing but the package is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from torch import Tensor

import cadsurgery as cs
from cadsurgery.data.images import labelled_scene, normalise, street_scene
from cadsurgery.elements.elements import Elements, to_dense
from cadsurgery.elements.gaps import gaussian_fill
from cadsurgery.elements.kernel_map import Window, kernel_map
from cadsurgery.elements.lattice import Fill, Geometry, Lattice
from cadsurgery.masks import FineMapSpec, resolve_mask
from cadsurgery.masks.unit import Normalisation
from cadsurgery.methods.resampling.locations import boundaries, sample, target_locations, uniform_locations
from cadsurgery.methods.sampling.gates import Opened, hard_shares, shares
from cadsurgery.network.dependencies import reached
from cadsurgery.support.divergence import divergence
from cadsurgery.surgery.plan import Plan
from cadsurgery.tasks.figures import LEVEL_COLOURS, LOWEST_COLOUR, draw_lattice
from cadsurgery.tasks.report import COLOURS

GREY = "#8c8c8c"
ORANGE, BLUE, GREEN, PINK, YELLOW = COLOURS
WIDTH = 7.0  # inches: narrower than other pictures, because these have words in them
_KEPT = ((0, 2), (1, 2), (1, 3), (2, 2))  # blocks of two fine pixels that stay at level 0
_PHOTO = (96, 192)  # pixels of the generated street scene
_STRIDE = 8


# -- how things are drawn -------------------------------------------------------------------------------


def _ink() -> str:
    return str(matplotlib.rcParams["text.color"])


def _panels(count: int, height: float, titles: Sequence[str], widths: Sequence[float] = ()) -> Any:
    """Make a figure with panels side by side, each with its title and no ticks."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, width_ratios=widths or None)[0]
    for axis, title in zip(axes, titles, strict=True):
        _plain(axis, title)
    return figure, axes


def _on_grid(axis: Axes, height: int, width: int) -> None:
    axis.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1), aspect="equal")
    axis.axis("off")


def draw_cells(axis: Axes, lattice: Lattice, rows: bool = False) -> list[tuple[int, int]]:
    """Draw the cells of a lattice's first image with their anchors, or with the rows of their elements; return the
    anchors in the order of the rows."""
    height, width = lattice.size
    anchors = [divmod(int(pixel), width) for pixel in lattice.anchors]
    for number, (row, column) in enumerate(anchors):
        side = int(lattice.side_map[0, row, column])
        face = "none" if side == 1 else f"{GREY}{min(0x18 * side, 0x60):02x}"
        axis.add_patch(Rectangle((column, row), side, side, facecolor=face, edgecolor=GREY, linewidth=0.8))
        if rows:
            axis.text(
                column + 0.5, row + 0.5, str(number), ha="center", va="center", fontsize=7, color=_ink()
            )
        else:
            axis.plot(column + 0.5, row + 0.5, ".", color=GREY, markersize=5)
    _on_grid(axis, height, width)
    return anchors


def _plain(axis: Axes, title: str = "", size: float = 9) -> None:
    axis.set_title(title, fontsize=size)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _diagram(
    height: float, whole: float | None = None, bottom: float = 0.0, share: float = 1.0
) -> tuple[Figure, Axes]:
    """Make a figure whose data units are inches, with the origin at the top left.

    The diagram may be a part of it: above `bottom` of a figure of a height, and on a share of the width.
    """
    figure = Figure(figsize=(WIDTH, whole or height))
    axis = figure.add_axes((0, bottom, share, 1 - bottom))
    axis.set(xlim=(0, share * WIDTH), ylim=(height, 0))
    axis.axis("off")
    return figure, axis


def _box(
    axis: Axes, x: float, y: float, text: str, width: float = 1.2, height: float = 0.5, colour: str = GREY
) -> None:
    """Draw a box around a text; (x, y) is its centre."""
    corner = (x - width / 2, y - height / 2)
    shape = FancyBboxPatch(
        corner,
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=f"{colour}30",
        edgecolor=colour,
    )
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=_ink(), connectionstyle=style)
    )


def _note(axis: Axes, x: float, y: float, text: str, colour: str | None = None, **options: Any) -> None:
    look = {"ha": "center", "va": "center", "fontsize": 9, **options}
    axis.text(x, y, text, color=colour or _ink(), **look)


def _small(axis: Axes, x: float, y: float, text: str, colour: str | None = None, **options: Any) -> None:
    _note(axis, x, y, text, colour, **{"fontsize": 8, **options})


def _chain(axis: Axes, y: float, *boxes: tuple[Any, ...], height: float = 0.5) -> None:
    """Draw boxes (centre, text, width, and a colour other than grey) in a line, with arrows between them."""
    end = None
    for x, text, width, *colours in boxes:
        colour = colours[0] if colours else GREY
        if end is not None:
            _arrow(axis, (end, y), (x - width / 2, y))
        _box(axis, x, y, text, width, height, colour)
        end = x + width / 2


def _lattice() -> Lattice:
    """Return a lattice with cells of three levels on 8 x 8 fine pixels."""
    levels = torch.full((1, 8, 8), 2)
    levels[:, :4, 2:] = 1
    levels[:, 4:6, 4:] = 1
    for row, column in _KEPT:
        levels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0
    return Geometry((2, 2)).lattice(levels)


def _mixed() -> Lattice:
    """Return a lattice with cells of two levels on 8 x 8 fine pixels."""
    return Geometry((2,)).lattice(_lattice().levels.clamp(max=1).long())


# -- geometry --------------------------------------------------------------------------------------------


def maps() -> Figure:
    """Draw the samples of an image, of the fine map and of the network's own map."""
    high, low, side = 4, 8, 16
    titles = (
        f"image: {side} x {side} pixels",
        f"fine map: output stride {high}",
        f"the network's own map:\noutput stride {low}, spacing {low // high}",
    )
    figure, axes = _panels(3, 2.6, titles)
    for axis, stride, colour in zip(axes, (1, high, low), (GREY, BLUE, ORANGE), strict=True):
        for at in range(side + 1):
            axis.plot([0, side], [at, at], color=GREY, linewidth=0.2)
            axis.plot([at, at], [0, side], color=GREY, linewidth=0.2)
        for row, column in itertools.product(range(0, side, stride), repeat=2):
            if stride > 1:
                axis.add_patch(
                    Rectangle((column, row), high, high, facecolor="none", edgecolor=GREY, linewidth=0.8)
                )
                axis.plot(column + 0.5, row + 0.5, "o", color=colour, markersize=6)
        _on_grid(axis, side, side)
    axes[0].add_patch(Rectangle((5, 6), 1, 1, color=GREY))
    _note(axes[0], 5.5, 8.2, "a pixel")
    axes[1].add_patch(Rectangle((4, 4), high, high, facecolor=f"{BLUE}60", edgecolor=BLUE))
    _note(axes[1], 6, 6.3, "a fine\npixel", fontsize=7.5)
    for start, end in (((0.5, 3), (8.5, 3)), ((8.5, 3), (0.5, 3))):
        axes[2].annotate("", end, start, arrowprops={"arrowstyle": "->", "color": _ink()})
    _note(axes[2], 4.5, 5, "2 fine pixels")
    return figure


def cells() -> Figure:
    """Draw a level map, its lattice, and a part of the lattice."""
    lattice = _lattice()
    part = lattice.choose(torch.arange(8).expand(1, 8, 8) >= 4)
    titles = (
        "level map: one level per fine pixel",
        f"lattice: {lattice.count} cells,\n{lattice.count} elements",
        f"part: {part.count} of them",
    )
    figure, axes = _panels(3, 2.75, titles)
    colours = [*LEVEL_COLOURS[:2], LOWEST_COLOUR]
    for row, column in itertools.product(range(8), repeat=2):
        level = int(lattice.levels[0, row, column])
        axes[0].add_patch(Rectangle((column, row), 1, 1, facecolor=colours[level], edgecolor="white", lw=0.5))
        _note(axes[0], column + 0.5, row + 0.5, str(level), "#1a1a1a")
    _on_grid(axes[0], 8, 8)
    draw_cells(axes[1], lattice)
    axes[1].add_patch(Rectangle((0, 4), 4, 4, facecolor="none", edgecolor=ORANGE, linewidth=2))
    axes[1].plot(0.5, 4.5, "o", color=ORANGE, markersize=6)
    _note(axes[1], 2.4, 4.55, "anchor", ORANGE)
    _note(axes[1], 2, 6, "a cell", ORANGE)
    _note(axes[1], 2, 7.1, "of level 2", ORANGE)
    draw_cells(axes[2], part)
    axes[2].add_patch(Rectangle((0, 0), 8, 8, facecolor="none", edgecolor=GREY, linewidth=0.8, linestyle=":"))
    return figure


def stages() -> Figure:
    """Draw the lattice of one level map after each stage."""
    lattice = _lattice()
    shown = [lattice.at(stage) for stage in range(3)]
    titles = [
        f"stage {stage}{': the fine map' if not stage else ''}\n{one.count} elements"
        for stage, one in enumerate(shown)
    ]
    figure, axes = _panels(3, 2.6, titles)
    for axis, one in zip(axes, shown, strict=True):
        draw_cells(axis, one)
    return figure


def reading() -> Figure:
    """Draw a window, the row of the kernel map of one element, and what the halo mixes."""
    lattice = _mixed()
    window = Window((3, 3), padding=(1, 1, 1, 1), spacing=2)
    found = kernel_map(lattice, lattice, window)
    target = (5, 5)
    figure, axes = _panels(
        3,
        2.75,
        (
            "window: 3 x 3, spacing 2",
            "kernel map: rows that\nthe nine taps read",
            "reading: a halo row mixes\nup to four elements",
        ),
    )
    anchors = draw_cells(axes[0], lattice)
    number = anchors.index(target)
    table = found.table[number].tolist()
    draw_cells(axes[1], lattice, rows=True)
    draw_cells(axes[2], lattice)
    mixed = [(place, entry - lattice.count - 1) for place, entry in enumerate(table) if entry > lattice.count]
    for place, entry in enumerate(table):
        row, column = target[0] + 2 * (place // 3 - 1), target[1] + 2 * (place % 3 - 1)
        face = BLUE if entry < lattice.count else "none"
        for axis in axes[:1]:
            axis.plot(column + 0.5, row + 0.5, "o", color=BLUE, markerfacecolor=face, markersize=9)
        if entry < lattice.count:
            axes[1].add_patch(Rectangle((column, row), 1, 1, facecolor="none", edgecolor=BLUE, linewidth=1.8))
    axes[0].plot(target[1] + 0.5, target[0] + 0.5, "s", color=ORANGE, markersize=14, markerfacecolor="none")
    axes[1].plot(target[1] + 0.5, target[0] + 0.5, "s", color=ORANGE, markersize=14, markerfacecolor="none")
    place, halo = mixed[1]
    row, column = target[0] + 2 * (place // 3 - 1), target[1] + 2 * (place % 3 - 1)
    axes[2].plot(column + 0.5, row + 0.5, "o", color=BLUE, markerfacecolor="none", markersize=9)
    for source, share in zip(found.sources[halo].tolist(), found.mix[halo].tolist(), strict=True):
        if share > 0:
            y, x = anchors[source]
            axes[2].plot([x + 0.5, column + 0.5], [y + 0.5, row + 0.5], color=BLUE, linewidth=1.2)
            axes[2].plot(x + 0.5, y + 0.5, "o", color=BLUE, markersize=6)
            _small(axes[2], x + (-0.6 if x < column else 1.4), y + 0.5, f"{share:g}"[1:])
    return figure


def fills() -> Figure:
    """Draw a disc that is kept in cells of four fine pixels, as each fill reads it."""
    side = 32
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc = (((y - 15.5) ** 2 + (x - 15.5) ** 2) < 110).float()[None, None]
    lattices = {fill: Geometry((4,), fill=fill).uniform(1, 1, (side, side)) for fill in get_args(Fill)}
    titles = ["the map, and the anchors\nof its cells", *(f'fill="{fill}"' for fill in lattices)]
    figure, axes = _panels(1 + len(lattices), 2.1, titles)
    axes[0].imshow(disc[0, 0], cmap="gray", vmin=-0.3, vmax=1.3)
    first = next(iter(lattices.values()))
    places = [divmod(int(pixel), side) for pixel in first.anchors]
    axes[0].plot([x for _, x in places], [y for y, _ in places], ".", color=ORANGE, markersize=4)
    for axis, (fill, lattice) in zip(axes[1:], lattices.items(), strict=True):
        guide = disc if fill == "guided" else None
        elements = Elements(disc.flatten()[lattice.anchors].unsqueeze(1), lattice)
        axis.imshow(to_dense(elements, guide=guide)[0, 0], cmap="gray", vmin=-0.3, vmax=1.3)
    return figure


def adapters() -> Figure:
    """Draw where a mean shift and a refinement stand."""
    figure, axis = _diagram(2.5)
    _chain(
        axis,
        0.55,
        (0.85, "elements", 1.25),
        (2.45, "mean over\nthe image", 1.2),
        (3.85, "layer", 0.9),
        (4.95, "+", 0.4, ORANGE),
        (6.2, "vector", 1.4),
    )
    _arrow(axis, (4.95, 1.05), (4.95, 0.8))
    _small(axis, 4.95, 1.15, "a shift for each level, weighed by its share of the image")
    _note(axis, 4.95, 0.2, "mean shift", ORANGE)
    _chain(
        axis,
        2.05,
        (0.85, "entering\nfeatures", 1.25),
        (2.6, "small network", 1.4, GREEN),
        (4.3, "+", 0.4, GREEN),
        (5.9, "fine map, corrected near\nwhat is downsampled", 2.0),
    )
    _arrow(axis, (4.3, 1.6), (4.3, 1.8))
    _small(axis, 4.3, 1.5, "fine map behind the region")
    _note(axis, 2.6, 2.42, "refinement", GREEN)
    return figure


def layouts() -> Figure:
    """Draw the order in memory of a map of 2 x 3 positions and two channels in three layouts."""
    height, width, channels = 2, 3, 2
    numbers = torch.arange(height * width).view(1, 1, height, width).expand(1, channels, height, width)
    channel = torch.arange(channels).view(1, channels, 1, 1).expand_as(numbers)
    orders = {
        "bchw: batch, channel, height, width": lambda x: x,
        "bhwc: channels last": lambda x: x.permute(0, 2, 3, 1),
        "bpc: positions flattened": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2),
    }
    figure, axis = _diagram(2.0)
    palette = (ORANGE, BLUE, GREEN, PINK, YELLOW, GREY)
    for line, (title, order) in enumerate(orders.items()):
        y = 0.18 + 0.6 * line
        _note(axis, 0.1, y + 0.17, f"{title}\n{tuple(order(numbers).shape)}", ha="left", fontsize=8.5)
        places = zip(order(numbers).flatten().tolist(), order(channel).flatten().tolist(), strict=True)
        for at, (number, one) in enumerate(places):
            left = 2.55 + 0.36 * at
            axis.add_patch(
                Rectangle((left, y), 0.33, 0.34, facecolor=f"{palette[number]}60", edgecolor=palette[number])
            )
            _small(axis, left + 0.165, y + 0.17, f"c{one}")
    _small(axis, 3.5, 1.9, "each colour is a position; c0 and c1 are its channels, in the order of memory")
    return figure


# -- computing -------------------------------------------------------------------------------------------


def computing() -> Figure:
    """Draw how an operation finds the backend that computes it."""
    figure, axis = _diagram(2.7)
    _chain(axis, 0.45, (0.75, "operation:\nconv2d", 1.2), (2.75, "work: rows, taps, type,\nactivation", 1.9))
    for y, text, colour in (
        (0.35, "compiled C: takes it, serves", ORANGE),
        (0.85, "oneDNN: would take it", GREY),
        (1.35, "Triton: no, not on a CPU", GREY),
        (1.85, "torch, the reference: takes all", GREY),
    ):
        _box(axis, 5.6, y, text, 2.4, 0.38, colour)
        if colour == ORANGE:
            _arrow(axis, (3.7, 0.45), (4.4, y))
    _small(axis, 5.6, 2.25, "backends, in the order of their table;\nthe first that can serves")
    weights = torch.arange(24).view(4, 6)
    for left, title, shown in (
        (0.3, "weights", weights),
        (2.3, "packed weights", weights.view(2, 2, 6).transpose(1, 2).reshape(4, 6)),
    ):
        for (row, column), number in np.ndenumerate(shown.numpy()):
            colour = (ORANGE, BLUE, GREEN, PINK)[number // 6]
            axis.add_patch(
                Rectangle((left + 0.22 * column, 1.3 + 0.22 * row), 0.2, 0.2, facecolor=f"{colour}90", lw=0)
            )
        _note(axis, left + 0.66, 2.4, title)
    _arrow(axis, (1.72, 1.74), (2.2, 1.74))
    return figure


def eight_bits() -> Figure:
    """Draw the values of a map with the grid that calibration chose for them."""
    generator = torch.Generator().manual_seed(0)
    values = F.hardswish(torch.randn(40000, generator=generator) * 2)
    low, high = float(values.min()), float(values.max())
    scale = (high - low) / 255
    zero = round(-low / scale)
    figure, (axis,) = _panels(1, 2.2, ("values of a map on calibration images, without labels",))
    axis.hist(values.numpy(), bins=120, color=f"{BLUE}90", log=True)
    top = axis.get_ylim()[1]
    for number in range(0, 256, 15):
        at = scale * (number - zero)
        axis.axvline(at, color=GREY, linewidth=0.7)
        if number % 30 == 0 or number == 255:
            _small(axis, at, top * 2.2, str(number))
    axis.axvline(0, color=ORANGE, linewidth=1.5)
    axis.set_ylim(top=top * 5)
    axis.minorticks_off()
    axis.set_yticks([])
    axis.set_xticks([0], [f"0 is number {zero} of the grid"], fontsize=9)
    axis.set_xlabel(
        f"grid: 256 values (every 15th drawn), {scale:.3f} apart, from end to end of the values", fontsize=9
    )
    return figure


# -- masks -----------------------------------------------------------------------------------------------


def _scene(seed: int = 0) -> tuple[Tensor, Tensor, FineMapSpec, Geometry]:
    """Return a picture, the picture in the unit of masks, its fine map, and a geometry of two levels."""
    picture = street_scene(*_PHOTO, seed)
    geometry = Geometry((2,))
    size = (_PHOTO[0] // _STRIDE, _PHOTO[1] // _STRIDE)
    return picture, normalise(picture, None)[None], FineMapSpec.of(geometry, 1, size, _STRIDE), geometry


def masking() -> Figure:
    """Draw how a mask comes from an image: scores, the level map of a budget, and the lattice."""
    picture, image, grid, geometry = _scene()
    spec = "edges | budget:fraction=0.25"
    features = image[:, :, :: grid.output_stride, :: grid.output_stride]
    scores = resolve_mask("edges").scores(image, features, grid)[0]
    lattice = geometry.lattice(resolve_mask(spec)(image, features, grid).long())
    active = float((lattice.levels == 0).float().mean())
    figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
    axes = figure.subplots(2, 2).flat
    titles = (
        "image",
        "scores of the provider `edges`",
        f"level map, active fraction {active:.2f}",
        f"masking: the lattice of {lattice.count} elements",
    )
    pixels = picture.permute(1, 2, 0).numpy()
    axes[0].imshow(pixels)
    axes[1].imshow(scores.numpy(), cmap="gray")
    axes[2].imshow(lattice.levels[0].numpy(), cmap=ListedColormap([LEVEL_COLOURS[0], LOWEST_COLOUR]))
    axes[3].imshow(draw_lattice(pixels, lattice, _STRIDE))
    for axis, title in zip(axes, titles, strict=True):
        _plain(axis, title)
    figure.suptitle(f'the mask with the spec "{spec}": a quarter of the patches stays high', fontsize=9)
    return figure


def units() -> Figure:
    """Draw the values of one picture as two networks take it, and in the unit that masks see."""
    picture, image, _, _ = _scene()
    own = Normalisation((0.5,) * 3, (0.5,) * 3)
    shown = {
        "picture, 0..1": picture,
        "as one network takes it:\nmean .5, deviation .5": (picture - 0.5) / 0.5,
        "as masks see it: after\nImageNet's mean and deviation": own.in_unit(((picture - 0.5) / 0.5)[None])[
            0
        ],
    }
    assert torch.allclose(shown["as masks see it: after\nImageNet's mean and deviation"], image[0], atol=1e-5)
    figure, axes = _panels(3, 2.2, list(shown))
    for axis, values in zip(axes, shown.values(), strict=True):
        axis.hist(values.flatten().numpy(), bins=np.linspace(-2.8, 3.2, 90), color=f"{BLUE}90")
        axis.set(xlim=(-2.8, 3.2))
        axis.set_xticks([-2, -1, 0, 1, 2], [-2, -1, 0, 1, 2], fontsize=8)
        axis.spines["bottom"].set_visible(True)
    return figure


def budgets() -> Figure:
    """Draw how many elements some images have by a threshold and by a budget."""
    counts: dict[str, list[int]] = {"edges:threshold=0.6": [], "edges | budget:fraction=0.5": []}
    for seed in range(6):
        _, image, grid, geometry = _scene(seed)
        for spec, found in counts.items():
            levels = resolve_mask(spec)(
                image, image[:, :, :: grid.output_stride, :: grid.output_stride], grid
            )
            levels = torch.where(levels, 0, 1) if levels.dtype == torch.bool else levels.long()
            found.append(geometry.lattice(levels).count)
    titles = ("by a threshold: differs by image", "by a budget: recurs for images of a size")
    figure, axes = _panels(2, 2.0, titles)
    for axis, (spec, found), colour in zip(axes, counts.items(), (GREY, ORANGE), strict=True):
        axis.bar(range(1, 7), found, color=f"{colour}90", width=0.6)
        for place, count in enumerate(found, 1):
            _small(axis, place, count + 12, str(count))
        axis.set(ylim=(0, max(max(one) for one in counts.values()) * 1.18))
        axis.set_xlabel(f"six images, {spec}", fontsize=8.5)
    return figure


def passes() -> Figure:
    """Draw what a call gives its masks."""
    figure, axis = _diagram(2.6)
    _chain(
        axis,
        1.95,
        (0.55, "image", 0.8),
        (1.95, "stem", 0.8),
        (3.75, "region,\nby the lattice", 1.3, ORANGE),
        (5.9, "result", 0.9),
    )
    _box(axis, 3.75, 1.1, "mask", 0.9, 0.36, ORANGE)
    _arrow(axis, (3.75, 1.28), (3.75, 1.7))
    _arrow(axis, (0.55, 1.7), (3.3, 1.12), -0.1)
    _arrow(axis, (1.95, 1.7), (3.3, 1.2))
    _box(axis, 1.5, 0.42, "call context: labels,\nkeypoints, another mask", 2.2, 0.55, BLUE)
    _arrow(axis, (2.6, 0.5), (3.4, 0.92))
    _box(axis, 5.5, 0.42, "first pass: region with everything\nat the lowest level", 2.6, 0.55, BLUE)
    _arrow(axis, (4.5, 0.7), (4.2, 0.95))
    return figure


# -- surgery ---------------------------------------------------------------------------------------------


def _fcn_plan() -> Plan:
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None).eval()
    return cs.plan(model)


def surgery() -> Figure:
    """Draw the passes of a conversion, and the decisions of a real plan, node by node."""
    plan = _fcn_plan()
    figure, axis = _diagram(1.9, 4.3, 0.56)
    _chain(
        axis,
        0.45,
        (0.75, "facts:\nshapes, MACs", 1.2),
        (2.45, "rules: one per\noperation", 1.3),
        (4.15, "flow: grid and\nspacing", 1.3),
        (5.95, "plan: a decision\nper node", 1.4, ORANGE),
    )
    _chain(
        axis,
        1.45,
        (2.45, "treatment: how it\nruns on elements", 1.6, GREEN),
        (4.35, "rewritten graph", 1.3),
        (6.05, "laws verified", 1.2, ORANGE),
    )
    _arrow(axis, (2.45, 0.7), (2.45, 1.2))
    _small(axis, 2.55, 0.95, "returns", ha="left")
    _arrow(axis, (5.95, 0.7), (4.75, 1.2))
    below = figure.add_axes((0.11, 0.17, 0.87, 0.36))
    groups: dict[str, tuple[str, list[int]]] = {
        "before the region (stem)": (GREY, []),
        "adapted: its stride follows the level map": (ORANGE, []),
        "region: kept on elements": (BLUE, []),
        "barrier: ends the region": (PINK, []),
        "dense after the region": (GREEN, []),
    }
    names = list(groups)
    ends = {one.node for one in plan.region_end}
    for place, one in enumerate(plan.decisions):
        kind = {"adapt": 1, "keep": 2, "barrier": 3}.get(one.action, 4 if one.after else 0)
        kind = 3 if one.node in ends else kind
        groups[names[kind]][1].append(place)
    own = [_own_stride(one.shape, plan.example_shape) for one in plan.decisions]
    for name, (colour, places) in groups.items():
        shown = [place for place in places if own[place]]
        is_one = len(shown) < 4  # seen among many
        below.plot(
            shown, [own[place] for place in shown], "s", color=colour, label=name, markersize=3.5 + 3 * is_one,
            zorder=2 + is_one,
        )  # fmt: skip
    below.set_yscale("log", base=2)
    below.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"], fontsize=8)
    below.minorticks_off()
    below.set_ylabel("grid:\noutput stride\nas given", fontsize=8)
    below.set_xticks([])
    below.set_xlabel("operations of torchvision's fcn_resnet50, in order", fontsize=8)
    below.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=7.5, columnspacing=1)
    return figure


def _own_stride(shape: tuple[int, ...], image: tuple[int, ...]) -> int:
    """Return the output stride of a map (B, C, h, w) on an image; 0 if the shape is no map's."""
    return round(image[2] / shape[2]) if len(shape) == 4 and shape[2] > 1 else 0


def laws() -> Figure:
    """Draw the two laws that every conversion is verified by."""
    figure, axis = _diagram(1.9)
    for y, kept, dense in (
        (0.35, "converted, at its own output stride", "network as given"),
        (0.95, "converted, everything high", "dense network at the high output stride"),
        (1.55, "converted, everything low", "dense network at the low output stride"),
    ):
        _box(axis, 1.75, y, kept, 2.7, 0.46, ORANGE)
        _note(axis, 3.5, y, "=", fontsize=16)
        _box(axis, 5.25, y, dense, 2.9, 0.46)
    return figure


# -- other methods ---------------------------------------------------------------------------------------


def _positions(density: float, side: int = 14) -> Tensor:
    """Return the positions (side, side) that a stand-in for a gate opens, with a grid prior of two."""
    score = Opened(density)(3, torch.zeros(1, side, side))
    return hard_shares(shares(score, 1.0, None, 0))[0] > 0


def exits() -> Figure:
    """Draw segments and exits of an anytime network, and the positions that each exit leaves to the next."""
    figure, axis = _diagram(1.65, 3.3, 0.5)
    _chain(
        axis,
        1.15,
        (0.5, "image", 0.75),
        (2.0, "segment 1", 1.2, ORANGE),
        (3.95, "segment 2", 1.2, BLUE),
        (5.9, "segment 3", 1.2, GREEN),
    )
    for number, (x, colour) in enumerate(((2.0, ORANGE), (3.95, BLUE), (5.9, GREEN)), 1):
        _box(axis, x, 0.35, f"exit {number}", 0.8, 0.36, colour)
        _arrow(axis, (x, 0.9), (x, 0.53))
    left = [torch.ones(14, 14, dtype=torch.bool), _positions(0.5), _positions(0.5) & _positions(0.25)]
    for number, (x, mask) in enumerate(zip((2.0, 3.95, 5.9), left, strict=True), 1):
        small = figure.add_axes(((x - 0.5) / WIDTH, 0.09, 1.0 / WIDTH, 0.36))
        small.imshow(
            mask.numpy(),
            cmap=ListedColormap([f"{GREY}40", (ORANGE, BLUE, GREEN)[number - 1]]),
            vmin=0,
            vmax=1,
        )
        small.set(xticks=[], yticks=[])
        small.set_xlabel(f"{float(mask.float().mean()):.2f} left", fontsize=8)
    axis.text(0.1, 1.5, " ")
    figure.text(
        0.02,
        0.27,
        "positions (places)\nthat a segment\ncomputes; grey:\nconfident before",
        fontsize=8,
        va="center",
    )
    return figure


def gaps() -> Figure:
    """Draw a map of which some positions were computed, filled by Gaussians of two widths."""
    side = 24
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    values = ((x / 5).sin() + (y / 4).cos())[None, None] * 0.4 + 1.0
    there = F.interpolate(_positions(0.5, 12).float()[None, None], scale_factor=2)[0] > 0
    there[:, ::4, ::4] = True
    floor = torch.tensor([0.3])
    shown = {
        "computed positions;\ngaps are hatched": torch.where(there, values[0], torch.nan)[0],
        "filled, width 0.7": gaussian_fill(values, there, 0.7, True, floor)[0, 0],
        "filled, width 3": gaussian_fill(values, there, 3.0, True, floor)[0, 0],
    }
    figure, axes = _panels(3, 2.6, list(shown))
    for axis, picture in zip(axes, shown.values(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=0.2, vmax=1.9)
        axis.set_facecolor(f"{ORANGE}40")
        axis.patch.set_hatch("////")
        axis.patch.set_edgecolor(ORANGE)
    axes[2].set_xlabel(
        "a larger width is a narrower Gaussian:\nfar from all values only the floor is left", fontsize=8
    )
    return figure


def sampled() -> Figure:
    """Draw locations near boundaries, what is sampled there, and a grid that is folded."""
    picture, labels = labelled_scene(*_PHOTO)
    marked = boundaries(labels, targets=[4, 5])
    locations = target_locations(marked, grid=10)
    folded = uniform_locations(6).clone()
    folded[2, 2] = torch.tensor([0.85, 0.8], dtype=folded.dtype)
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    axes = figure.subplots(2, 2).flat
    pixels = picture.permute(1, 2, 0).numpy()
    height, width = _PHOTO
    axes[0].imshow(
        np.where(marked.numpy()[..., None], matplotlib.colors.to_rgb(ORANGE), 0.35 + 0.65 * pixels)
    )
    axes[0].set_title("boundaries of the target classes\npole and car", fontsize=9)
    axes[1].imshow(pixels)
    _draw_mesh(axes[1], locations, height, width, BLUE)
    axes[1].set_title("sampler `labels`: a grid of locations", fontsize=9)
    axes[2].imshow(sample(picture[None], locations[None], (64, 64))[0].permute(1, 2, 0).numpy())
    axes[2].set_title("warp: the samples as a picture of 64 x 64;\nthe inverse leads back", fontsize=9)
    _draw_mesh(axes[3], folded, 1, 1, BLUE)
    axes[3].set(ylim=(1.05, -0.05), xlim=(-0.05, 1.05), aspect="equal")
    axes[3].set_title("a folded grid: cells lie on others", fontsize=9)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def _draw_mesh(axis: Axes, locations: Tensor, height: int, width: int, colour: str) -> None:
    rows, columns = (locations * torch.tensor([max(height - 1, 1), max(width - 1, 1)])).unbind(-1)
    for one in (*zip(rows, columns, strict=True), *zip(rows.T, columns.T, strict=True)):
        axis.plot(one[1], one[0], color=colour, linewidth=0.8)
    axis.plot(columns.flatten(), rows.flatten(), ".", color=ORANGE, markersize=4)


def gates() -> Figure:
    """Draw the branch of a gate, and the positions that it opens."""
    side, grid = 14, 4
    opened = _positions(0.35, side)
    prior = torch.zeros(side, side, dtype=torch.bool)
    prior[::grid, ::grid] = True
    score = Opened(0.35)(3, torch.zeros(1, side, side))
    soft = shares(score, 1.0, None, grid)[0]
    density = float((hard_shares(soft) > 0).float().mean())
    figure, axis = _diagram(2.5, share=0.66)
    _chain(
        axis,
        1.75,
        (0.45, "fork", 0.6),
        (1.75, "gated\nconvolution", 1.05, ORANGE),
        (3.0, "ReLU", 0.6, ORANGE),
        (4.1, "+", 0.4),
    )
    _box(axis, 1.75, 0.95, "gate", 0.7, 0.34, BLUE)
    _arrow(axis, (0.5, 1.5), (1.4, 0.98), -0.2)
    _arrow(axis, (1.75, 1.12), (1.75, 1.5))
    axis.add_patch(
        FancyArrowPatch(
            (0.45, 1.5),
            (4.1, 1.5),
            arrowstyle="-|>",
            mutation_scale=10,
            color=_ink(),
            connectionstyle="bar,fraction=-0.33",
        )
    )
    axis.add_patch(Rectangle((1.15, 1.4), 2.25, 0.7, facecolor="none", edgecolor=ORANGE, linestyle=":"))
    _small(axis, 2.27, 2.28, "segment: runs at the open positions", ORANGE)
    _small(axis, 2.3, 0.2, "branch: from the fork to the addition")
    small = figure.add_axes((0.7, 0.16, 0.27, 0.7))
    small.imshow((opened | prior).numpy(), cmap=ListedColormap([f"{GREY}40", ORANGE]))
    rows, columns = prior.nonzero().unbind(1)
    small.plot(columns, rows, ".", color=BLUE, markersize=6)
    small.set(xticks=[], yticks=[])
    small.set_title(f"density {density:.2f} (share 1 or 0)", fontsize=8.5)
    small.set_xlabel("blue: grid prior, always computed", fontsize=8)
    return figure


# -- networks --------------------------------------------------------------------------------------------


def programs() -> Figure:
    """Draw a converted network in its halves, its dense twin, and a host."""
    figure, axis = _diagram(3.35)
    _note(axis, 0.15, 0.2, "program: the whole graph of a converted network", ha="left", fontsize=8.5)
    boxes = (
        (0.55, "image", 0.8),
        (2.0, "stem", 1.0, BLUE),
        (3.6, "region", 1.3, ORANGE),
        (5.2, "dense\nafter it", 0.9, ORANGE),
        (6.4, "result", 0.8),
    )
    _chain(axis, 0.75, *boxes)
    axis.plot([2.75, 2.75], [0.35, 1.2], color=_ink(), linestyle=":")
    _note(axis, 1.9, 1.2, "first half", BLUE, fontsize=8.5)
    _note(axis, 4.3, 1.2, "second half", ORANGE, fontsize=8.5)
    _note(axis, 2.75, 1.36, "here the mask is asked", fontsize=8.5)
    _note(
        axis,
        0.15,
        1.75,
        "dense twin: the same weights at one output stride everywhere",
        ha="left",
        fontsize=8.5,
    )
    _chain(
        axis,
        2.1,
        (0.55, "image", 0.8),
        (3.2, "the same layers, dense, output stride 8", 3.4),
        (6.4, "result", 0.8),
        height=0.36,
    )
    _note(
        axis,
        0.15,
        2.6,
        "host: Python that no graph can follow, with a converted part inside",
        ha="left",
        fontsize=8.5,
    )
    _box(axis, 3.5, 3.0, "", 5.2, 0.56)
    _chain(
        axis, 3.0, (2.2, "converted backbone", 1.7, ORANGE), (4.8, "proposals, boxes, ...", 1.8), height=0.34
    )
    return figure


def cone() -> Figure:
    """Draw the elements of three layers that one result depends on."""
    lattice = Geometry((2,)).lattice(F.pad(_mixed().levels.long(), (0, 4, 0, 4), value=1))
    window = Window((3, 3), padding=(1, 1, 1, 1), spacing=2)
    width = lattice.size[1]
    wanted = torch.zeros(1, *lattice.size, dtype=torch.bool)
    wanted[0, 4, 4] = True
    parts = [lattice.choose(wanted)]
    for _ in range(2):
        parts.append(lattice.choose(reached(lattice, kernel_map(lattice, parts[-1], window)).view_as(wanted)))
    titles = (
        "wanted: one element",
        f"layer before: {parts[1].count}",
        f"two layers before: {parts[2].count}",
    )
    figure, axes = _panels(3, 2.5, titles)
    for axis, part in zip(axes, parts, strict=True):
        draw_cells(axis, lattice)
        for pixel in part.anchors.tolist():
            row, column = divmod(pixel, width)
            side = int(lattice.side_map[0, row, column])
            axis.add_patch(Rectangle((column, row), side, side, facecolor=f"{ORANGE}70", edgecolor=ORANGE))
    return figure


def macs() -> Figure:
    """Draw the MACs of a network as given, with a mask, and with everything high and low, by where they are."""
    size = (128, 256)
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None).eval()
    net = cs.adaptify(model, "edges | budget:fraction=0.34", verify_laws=False)
    report = net.macs(normalise(street_scene(*size), None)[None])
    figure, (axis,) = _panels(1, 2.1, (f"fcn_resnet50, {size[0]} x {size[1]}: billions of MACs",))
    rows = {
        "network as given": lambda layer: layer.given or 0,
        "everything high": lambda layer: layer.high,
        "a third kept high": lambda layer: layer.mask,
        "everything low": lambda layer: layer.low,
    }
    for place, count in enumerate(rows.values()):
        inside = sum(count(layer) for layer in report.layers if layer.in_region) / 1e9
        outside = sum(count(layer) for layer in report.layers if not layer.in_region) / 1e9
        axis.barh(place, inside, color=f"{ORANGE}a0")
        axis.barh(place, outside, left=inside, color=f"{GREY}a0")
        _note(axis, inside + outside + 0.2, place, f"{inside + outside:.1f}", ha="left", fontsize=8.5)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axis.tick_params(length=0)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    handles = [Patch(color=f"{ORANGE}a0", label="in the region"), Patch(color=f"{GREY}a0", label="outside")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def fidelity() -> Figure:
    """Draw the predictions of two outputs, and their divergence at each pixel."""
    _, labels = labelled_scene(*_PHOTO)
    high = 6 * F.one_hot(labels, 6).permute(2, 0, 1).float()[None]
    high = F.avg_pool2d(high, 9, 1, 4)
    small = high[:, :, ::12, ::12]
    low = F.interpolate(small, size=_PHOTO, mode="bilinear")
    apart = divergence(high, low)[0]
    same = float((high.argmax(1) == low.argmax(1)).float().mean())
    titles = (
        "classes of one output",
        f"classes of a coarser one:\n{100 * same:.0f} % of pixels the same",
        "divergence of each pixel",
    )
    figure, axes = _panels(3, 1.7, titles)
    classes = ListedColormap([GREY, BLUE, GREEN, PINK, ORANGE, YELLOW])
    for axis, scores in zip(axes, (high, low), strict=False):
        axis.imshow(scores.argmax(1)[0], cmap=classes, vmin=0, vmax=5)
    axes[2].imshow(apart, cmap="magma")
    return figure


WORDS: dict[str, Callable[[], Figure]] = {
    "word-maps": maps,
    "word-cells": cells,
    "word-stages": stages,
    "word-reading": reading,
    "word-fills": fills,
    "word-adapters": adapters,
    "word-layouts": layouts,
    "word-computing": computing,
    "word-eight-bits": eight_bits,
    "word-masking": masking,
    "word-units": units,
    "word-budgets": budgets,
    "word-passes": passes,
    "word-surgery": surgery,
    "word-laws": laws,
    "word-exits": exits,
    "word-gaps": gaps,
    "word-sampled": sampled,
    "word-gates": gates,
    "word-programs": programs,
    "word-cone": cone,
    "word-macs": macs,
    "word-fidelity": fidelity,
}
PHOTOS = {"word-masking", "word-sampled"}  # smaller as JPEG
