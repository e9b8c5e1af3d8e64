"""Draw words of the glossary whose pictures the package computes: `word-*` in docs/pictures.

    python -m benchmarks.pictures --only word

`WORDS` names the pictures; `benchmarks.pictures` draws each for light and for dark pages. The other pictures of the
glossary are diagrams, which were drawn once (by this file at commit 733cde4d).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cadsurgery.data.images import normalise, street_scene
from cadsurgery.elements.elements import Elements, to_dense
from cadsurgery.elements.lattice import Fill, Geometry, Lattice
from cadsurgery.masks import FineMapSpec, resolve_mask
from cadsurgery.tasks.figures import LEVEL_COLOURS, LOWEST_COLOUR, draw_lattice
from cadsurgery.tasks.report import COLOURS

GREY = "#8c8c8c"
ORANGE = COLOURS[0]
WIDTH = 7.0  # inches: narrower than other pictures, because these have words in them
_KEPT = ((0, 2), (1, 2), (1, 3), (2, 2))  # blocks of two fine pixels that stay at level 0
_PHOTO = (96, 192)  # pixels of the generated street scene
_STRIDE = 8


def _panels(count: int, height: float, titles: Sequence[str]) -> Any:
    """Make a figure with panels side by side, each with its title and no ticks."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=True):
        _plain(axis, title)
    return figure, axes


def _plain(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _on_grid(axis: Axes, height: int, width: int) -> None:
    axis.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1), aspect="equal")
    axis.axis("off")


def _note(axis: Axes, x: float, y: float, text: str, colour: str) -> None:
    axis.text(x, y, text, color=colour, ha="center", va="center", fontsize=9)


def draw_cells(axis: Axes, lattice: Lattice) -> None:
    """Draw the cells of a lattice's first image with their anchors."""
    height, width = lattice.size
    for pixel in lattice.anchors.tolist():
        row, column = divmod(pixel, width)
        side = int(lattice.side_map[0, row, column])
        face = "none" if side == 1 else f"{GREY}{min(0x18 * side, 0x60):02x}"
        axis.add_patch(Rectangle((column, row), side, side, facecolor=face, edgecolor=GREY, linewidth=0.8))
        axis.plot(column + 0.5, row + 0.5, ".", color=GREY, markersize=5)
    _on_grid(axis, height, width)


def _lattice() -> Lattice:
    """Return a lattice with cells of three levels on 8 x 8 fine pixels."""
    levels = torch.full((1, 8, 8), 2)
    levels[:, :4, 2:] = 1
    levels[:, 4:6, 4:] = 1
    for row, column in _KEPT:
        levels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0
    return Geometry((2, 2)).lattice(levels)


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


def masking() -> Figure:
    """Draw how a mask comes from an image: scores, the level map of a budget, and the lattice."""
    picture, geometry = street_scene(*_PHOTO, 0), Geometry((2,))
    image, size = normalise(picture, None)[None], (_PHOTO[0] // _STRIDE, _PHOTO[1] // _STRIDE)
    grid = FineMapSpec.of(geometry, 1, size, _STRIDE)
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


WORDS: dict[str, Callable[[], Figure]] = {
    "word-cells": cells,
    "word-stages": stages,
    "word-fills": fills,
    "word-masking": masking,
}
PHOTOS = {"word-masking"}  # smaller as JPEG
