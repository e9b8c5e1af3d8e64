"""Pictures of masks and predictions."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from PIL import Image
from torch import Tensor

from cadsurgery.elements.lattice import Lattice

if TYPE_CHECKING:
    from cadsurgery.tasks.bench_report import BenchReport
    from cadsurgery.tasks.keypoints.report import MatchingReport
    from cadsurgery.tasks.segmentation.report import EvaluationReport

LOWEST_COLOUR = "#d9dce1"
LEVEL_COLOURS = ("#d7301f", "#fc8d59", "#fdcc8a", "#a6bddb", "#2b8cbe", "#045a8d")


def mask_figure(
    image: Tensor, lattice: Lattice, output_stride: int, item: int = 0, title: str = ""
) -> Figure:
    """Image, level map and lattice overlay side by side.

    Args:
        image: (3, H, W) in 0..1.
        lattice: of the last stage, as `net.lattice`.
        output_stride: the high one: image pixels per fine pixel.
        item: which image of the lattice's batch.
        title: above the picture.
    """
    levels = lattice.levels[item].cpu().numpy()
    height, width = image.shape[1:]
    count = lattice.geometry.max_level + 1
    figure = Figure(figsize=(15, 0.6 + 5 * height / width), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    pixels = image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
    colours = ListedColormap(LEVEL_COLOURS[:count])
    axes[0].imshow(pixels)
    axes[0].set_title("image")
    shown = axes[1].imshow(levels, cmap=colours, norm=BoundaryNorm(np.arange(count + 1) - 0.5, count))
    axes[1].set_title(f"level map, active fraction {np.mean(levels == 0):.2f}")
    bar = figure.colorbar(shown, ax=axes[1], ticks=range(count), fraction=0.025)
    sides = lattice.geometry.sides
    bar.ax.set_yticklabels([f"{level}: stride {output_stride * sides[level]}" for level in range(count)])
    axes[2].imshow(draw_lattice(pixels, lattice, output_stride, item))
    axes[2].set_title("lattice: one element per cell")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    if title:
        figure.suptitle(title)
    return figure


def draw_lattice(pixels: np.ndarray, lattice: Lattice, output_stride: int, item: int = 0) -> np.ndarray:
    """The image (H, W, 3) with the borders of the cells drawn on it."""
    height, width = pixels.shape[:2]
    side = lattice.side_map[item].cpu().numpy() * output_stride
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    rows = np.minimum(y // output_stride, side.shape[0] - 1)
    columns = np.minimum(x // output_stride, side.shape[1] - 1)
    cell = side[rows, columns]
    border = (y % cell == 0) | (x % cell == 0)
    drawn = pixels.copy()
    drawn[border] = 0.35 * drawn[border] + 0.65 * np.array([0.1, 0.25, 0.9])
    return drawn


def comparison_figure(
    image: Tensor, lattices: Sequence[Lattice], titles: Sequence[str], output_stride: int, title: str = ""
) -> Figure:
    """The image, and beside it each level map on it: what is kept high in colour, the lowest level grey.

    Args:
        image: (3, H, W) in 0..1.
        lattices: of the last stage, one for each mask; of one geometry, the first image of each batch.
        titles: above each.
        output_stride: the high one: image pixels per fine pixel.
        title: above the picture.
    """
    height, width = image.shape[1:]
    count, wide = len(lattices) + 1, 4.6
    columns = min(range(min(count, 3), 5), key=lambda columns: (-count % columns, -columns))
    rows = -(-count // columns)
    above = 0.12 + 0.19 * max(1 + text.count("\n") for text in titles)
    tall = rows * (wide * height / width + above) + (0.7 if title else 0.45)
    figure = Figure(figsize=(wide * columns, tall), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, axis in enumerate(panels):
        axis.set(xticks=[], yticks=[], visible=place < count)
        axis.spines[:].set_visible(False)
    pixels = image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
    panels[0].imshow(pixels)
    panels[0].set_title("image", fontsize=10)
    for axis, lattice, text in zip(panels[1:], lattices, titles, strict=False):
        axis.imshow(draw_levels(pixels, lattice, output_stride))
        axis.set_title(text, fontsize=10)
    geometry = lattices[0].geometry
    handles = [
        Patch(color=colour, label=f"level {level}: output stride {output_stride * geometry.sides[level]}")
        for level, colour in enumerate(_level_colours(geometry.max_level))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def draw_levels(pixels: np.ndarray, lattice: Lattice, output_stride: int, item: int = 0) -> np.ndarray:
    """The image (H, W, 3) in the colours of levels; the lowest level in grey."""
    height, width = pixels.shape[:2]
    levels = lattice.levels[item].cpu().numpy()
    rows = np.minimum(np.arange(height)[:, None] // output_stride, levels.shape[0] - 1)
    columns = np.minimum(np.arange(width)[None, :] // output_stride, levels.shape[1] - 1)
    grey = pixels.mean(2, keepdims=True)
    colours = np.array([to_rgb(colour) for colour in _level_colours(lattice.geometry.max_level)])
    bright = ((grey - grey.min()) / max(np.quantile(grey, 0.98) - grey.min(), 1e-6)).clip(0, 1)
    return colours[levels[rows, columns]] * (0.5 + 0.5 * bright)


def _level_colours(max_level: int) -> tuple[str, ...]:
    return (*LEVEL_COLOURS[:max_level], LOWEST_COLOUR)


def bench_figure(report: BenchReport) -> Figure:
    """Time against active fraction, a panel for each network: the law's band, budgets and dense twins."""
    columns = min(3, len(report.networks))
    rows = -(-len(report.networks) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in panels[len(report.networks) :]:
        axis.set_visible(False)
    for axis, network in zip(panels, report.networks, strict=False):
        high, low = network.high, network.low
        found = sorted(network.rows, key=lambda row: row.active_fraction)
        active = [0.0, *(row.active_fraction for row in found), 1.0]
        law = np.array([low.milliseconds, *(row.law_milliseconds for row in found), high.milliseconds])
        axis.fill_between(
            active,
            law,
            network.band * law,
            color="#a6bddb",
            alpha=0.6,
            label=f"law: 1.00 to {network.band:.2f}",
        )
        axis.plot(active, law, color="#2b8cbe", linewidth=1)
        places = [row.active_fraction for row in found]
        best, median = ([getattr(row, name) for row in found] for name in _TIMES)
        axis.vlines(places, best, median, color="#d7301f", linewidth=1)
        axis.plot(places, median, "_", color="#d7301f", markersize=9, label="median")
        axis.plot(places, best, "o", color="#d7301f", markersize=5, label="best")
        twins = [low.milliseconds, high.milliseconds]
        axis.plot([0, 1], twins, "s", color="#222222", markersize=6, zorder=1.9, label="dense low, high")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("active fraction")
        axis.set_ylabel("ms")
        axis.set_title(f"{network.model}, {network.fill}: law {'holds' if network.holds else 'MISSED'}")
        axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(str(report.setting), fontsize=8)
    return figure


_TIMES = ("milliseconds", "milliseconds_median")


def evaluation_figure(report: EvaluationReport) -> Figure:
    """Mean IoU against MACs: the dense networks joined by a line, the masks around it, each with its name."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = [row for row in report.rows if row.miou is not None]
    shown = [(row, row.macs, 100 * (row.miou or 0)) for row in rows]
    # The dense high network of two pairs is one network: it is drawn and named once.
    dense = {(row.label, round(y, 3)): (x, y) for row, x, y in shown if row.anchor}
    line = sorted(dense.values())
    axes.plot(*zip(*line, strict=True), "s-", color="#222222", linewidth=1, markersize=6)
    for (label, _), (x, y) in dense.items():
        axes.annotate(label, (x, y), (6, -12), textcoords="offset points", fontsize=8, color="#222222")
    widest = max((x for _, x, _ in shown), default=1)
    pairs = list(dict.fromkeys(row.output_stride for row in rows))
    for row, x, y in shown:
        if not row.anchor:
            colour = PAIR_COLOURS[pairs.index(row.output_stride) % len(PAIR_COLOURS)]
            place, side = ((-6, 5), "right") if x > widest / 2 else ((6, 5), "left")
            axes.plot(x, y, "o", color=colour, markersize=6)
            axes.annotate(
                row.label, (x, y), place, textcoords="offset points", ha=side, fontsize=8, color=colour
            )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("MACs of one image")
    axes.set_ylabel("mean IoU, %")
    axes.set_title(f"{report.model}, {report.images} images", fontsize=10)
    return figure


def matching_figure(report: MatchingReport) -> Figure:
    """Matching accuracy against the threshold, and at 3 pixels against MACs."""
    from cadsurgery.tasks.keypoints.report import THRESHOLDS

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curve, cost = figure.subplots(1, 2)
    for place, row in enumerate(report.rows):
        colour, values = PAIR_COLOURS[place % len(PAIR_COLOURS)], row.mma() or []
        style = ("-", "--", ":")[place // len(PAIR_COLOURS) % 3]
        curve.plot(THRESHOLDS, values, style, color=colour, label=row.label)
        cost.plot(row.macs, values[THRESHOLDS.index(3)], "o", color=colour, markersize=6)
        cost.annotate(
            str(place + 1),
            (row.macs, values[THRESHOLDS.index(3)]),
            (5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    curve.set(xlabel="threshold, pixels", ylabel="mean matching accuracy", ylim=(0, 1), xticks=THRESHOLDS)
    handles, labels = curve.get_legend_handles_labels()
    numbered = [f"{place + 1}  {label}" for place, label in enumerate(labels)]
    figure.legend(handles, numbered, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    cost.set(xlabel="MACs of one image", ylabel="mean matching accuracy at 3 pixels")
    cost.set_xlim(left=0)
    cost.margins(y=0.2)
    cost.xaxis.set_major_formatter(EngFormatter())
    for axis in (curve, cost):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(
        f"{report.model}, {report.sequences} sequences, {len(report.rows[0].pairs)} pairs", fontsize=10
    )
    return figure


def matches_figure(
    first: Tensor, second: Tensor, matches: Sequence[tuple[str, Tensor, Tensor, Tensor]], limit: float = 3.0
) -> Figure:
    """Matches between two images, one picture per setting: right ones green, wrong ones red.

    Args:
        first: (3, H, W) in 0..1.
        second: likewise, of any size.
        matches: name, points (k, 2) in the first image, in the second, and errors (k,) in pixels.
        limit: errors up to it are right.
    """
    height = max(first.shape[1], second.shape[1])
    width, gap = first.shape[2] + second.shape[2], first.shape[2]
    canvas = np.ones((height, width, 3), dtype=np.float32)
    for image, left in ((first, 0), (second, gap)):
        pixels = image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        canvas[: pixels.shape[0], left : left + pixels.shape[1]] = pixels
    columns = min(len(matches), 2)
    rows = -(-len(matches) // columns)
    figure = Figure(figsize=(7.5 * columns, rows * (7.5 * height / width + 0.4)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in panels:
        axis.set(xticks=[], yticks=[], visible=False)
    for axis, (name, here, there, errors) in zip(panels, matches, strict=False):
        axis.set_visible(True)
        axis.imshow(0.5 + 0.5 * canvas)
        right = (errors <= limit).cpu().numpy()
        for chosen, colour, over in ((~right, "#d7301f", 2), (right, "#238b45", 3)):
            ends = np.stack([here.cpu().numpy()[chosen], there.cpu().numpy()[chosen] + [gap, 0]], 1)
            axis.add_collection(
                LineCollection(list(ends), colors=colour, linewidths=0.5, alpha=0.7, zorder=over)
            )
            axis.plot(*ends.reshape(-1, 2).T, ".", color=colour, markersize=2, zorder=over)
        axis.set(xlim=(0, width), ylim=(height, 0))
        axis.set_title(f"{name}: {right.sum()} of {len(right)} matches within {limit:g} pixels", fontsize=9)
    return figure


PAIR_COLOURS = ("#d7301f", "#2b8cbe", "#238b45", "#88419d", "#cc7a00")


def class_picture(prediction: Tensor, count: int = 256) -> Image.Image:
    """A class map (H, W) as a palette PNG: the value is the class, the colour a different hue for each; grey of 16 bits
    if there are more than 256 classes."""
    if count > 256:
        return Image.fromarray(prediction.to("cpu").numpy().astype(np.uint16))
    classes = prediction.to("cpu").numpy().astype(np.uint8)
    picture = Image.fromarray(classes, mode="P")
    palette = [0, 0, 0]
    for index in range(1, 256):
        red, green, blue = colorsys.hsv_to_rgb(
            index * 0.618 % 1, 0.65 + 0.3 * (index % 2), 0.95 - 0.25 * (index % 3)
        )
        palette += [int(255 * red), int(255 * green), int(255 * blue)]
    picture.putpalette(palette)
    return picture


def figure_picture(figure: Figure, dpi: int = 90) -> Image.Image:
    """A figure as an image."""
    buffer = io.BytesIO()
    figure.draw_without_rendering()  # the layout knows how high titles are only once the pictures have their place
    figure.savefig(buffer, format="png", dpi=dpi)
    buffer.seek(0)
    return Image.open(buffer)
