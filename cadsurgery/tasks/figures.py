"""Pictures of masks and predictions."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from cadsurgery.data.images import shown
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.sizes import divide_up
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput
from cadsurgery.tasks.report import canvas, panels
from cadsurgery.tasks.report import figure_picture as figure_picture

VIEWS = CLASSES, OVERLAY, SIDE = "classes", "overlay", "side"  # of predictions
LOWEST_COLOUR = "#d9dce1"
_BORDER = 2  # samples by which paddings and convolutions without them change the size of a fine map
_DARK = 0.5  # mean of the channels below which lines are bright
_LINES = ((0.75, 0.9, 1.0), (0.05, 0.15, 0.7))  # on what is dark, and on what is bright
LEVEL_COLOURS = ("#d7301f", "#fc8d59", "#fdcc8a", "#a6bddb", "#2b8cbe", "#045a8d")


def mask_figure(
    image: Tensor | np.ndarray | Image.Image, lattice: Lattice, output_stride: int, title: str = ""
) -> Figure:
    """Draw the image, the level map and the lattice side by side.

    Args:
        image: (C, H, W), not normalised; or a batch, whose first image is drawn, an array (H, W, C) or (H, W), or a
            picture of PIL.
        lattice: lattice of the last stage, as `net.lattice`; its first image is drawn.
        output_stride: high output stride: image pixels per fine pixel.
        title: title of the figure.

    Raises:
        InvalidInput: it is no image, or not of the lattice's size.
    """
    image = _of_lattice(image, lattice, output_stride)
    levels = lattice.levels[0].cpu().numpy()
    height, width = image.shape[1:]
    count = lattice.geometry.max_level + 1
    figure = canvas(15, 0.6 + 5 * height / width)
    axes = figure.subplots(1, 3)
    pixels = _pixels(image)
    colours = ListedColormap(_level_colours(count - 1))
    axes[0].imshow(pixels)
    axes[0].set_title("image")
    shown = axes[1].imshow(levels, cmap=colours, norm=BoundaryNorm(np.arange(count + 1) - 0.5, count))
    axes[1].set_title(f"level map, active fraction {np.mean(levels == 0):.2f}")
    bar = figure.colorbar(shown, ax=axes[1], ticks=range(count), fraction=0.025)
    sides = lattice.geometry.sides
    bar.ax.set_yticklabels([f"{level}: stride {output_stride * sides[level]}" for level in range(count)])
    axes[2].imshow(draw_lattice(pixels, lattice, output_stride))
    axes[2].set_title("lattice: one element per cell")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(title)
    return figure


def _as_image(image: Tensor | np.ndarray | Image.Image) -> Tensor:
    """Return an image as a tensor (C, H, W): of a batch the first one, of an array or a picture of PIL its channels.

    Raises:
        InvalidInput: it is none of these.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype.kind in "uifb":
        scale = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
        values = torch.from_numpy(image.astype(np.float32) / scale)
        if values.dim() in (2, 3):
            return values[None] if values.dim() == 2 else values.movedim(-1, 0)
        image = values.movedim(-1, 1) if values.dim() == 4 else values
    if isinstance(image, Tensor):
        image = image[0] if image.dim() == 4 and len(image) else image
        if image.dim() == 3 and 0 not in image.shape:
            return (
                image
                if image.is_floating_point()
                else image.float() / (255 if image.dtype == torch.uint8 else 1)
            )
    raise InvalidInput(
        f"{describe(image)} is not an image.",
        next="give a tensor (C, H, W) that is not normalised, an array (H, W, C), or a picture of PIL.",
    )


def _of_lattice(image: Tensor | np.ndarray | Image.Image, lattice: Lattice, output_stride: int) -> Tensor:
    """Return the image (C, H, W) of a lattice.

    Raises:
        InvalidInput: it is no image, or of another size.
    """
    picture, samples = _as_image(image), tuple(lattice.levels.shape[1:])
    fitting = tuple(divide_up(length, output_stride) for length in picture.shape[1:])
    if any(abs(found - needed) > _BORDER for found, needed in zip(samples, fitting, strict=True)):
        height, width = (output_stride * length for length in samples)
        raise InvalidInput(
            f"the image has {picture.shape[1]} x {picture.shape[2]} pixels, and the lattice is of one of about "
            f"{height} x {width}.",
            why="a lattice is that of the network's last call.",
            next="give the image of that call, not normalised, or call the network with this one first.",
        )
    return picture


def _pixels(image: Tensor | np.ndarray | Image.Image) -> np.ndarray:
    """Convert an image to an array (H, W, 3)."""
    return shown(_as_image(image)).permute(1, 2, 0).cpu().numpy()


def _on_pixels(values: Tensor, pixels: np.ndarray, output_stride: int) -> np.ndarray:
    """Upsample a fine map to the pixels of an image: (H, W)."""
    height, width = pixels.shape[:2]
    rows = np.minimum(np.arange(height) // output_stride, values.shape[0] - 1)
    columns = np.minimum(np.arange(width) // output_stride, values.shape[1] - 1)
    return values.cpu().numpy()[np.ix_(rows, columns)]


def draw_lattice(pixels: np.ndarray, lattice: Lattice, output_stride: int) -> np.ndarray:
    """Draw the borders of the cells on an image (H, W, 3): dark on what is bright, bright on what is dark."""
    cell = output_stride * _on_pixels(lattice.side_map[0], pixels, output_stride)
    y, x = np.indices(cell.shape)
    border = (y % cell == 0) | (x % cell == 0)
    drawn = pixels.copy()
    is_dark = pixels[border].mean(1, keepdims=True) < _DARK
    drawn[border] = 0.35 * drawn[border] + 0.65 * np.where(is_dark, *_LINES)
    return drawn


def comparison_figure(
    image: Tensor | np.ndarray | Image.Image,
    lattices: Sequence[Lattice],
    titles: Sequence[str],
    output_stride: int,
    title: str = "",
) -> Figure:
    """Draw the image, and beside it each level map over the image: kept areas in colour, the lowest level grey.

    Args:
        image: as for `mask_figure`.
        lattices: lattices of the last stage, one per mask, of one geometry; the first image of each batch is drawn.
        titles: title of each panel.
        output_stride: high output stride: image pixels per fine pixel.
        title: title of the figure.

    Raises:
        InvalidInput: as `mask_figure`.
    """
    image = _of_lattice(image, lattices[0], output_stride)
    height, width = image.shape[1:]
    count, wide = len(lattices) + 1, 4.6
    columns = min(range(min(count, 3), 5), key=lambda columns: (-count % columns, -columns))
    above = 0.12 + 0.19 * max(1 + text.count("\n") for text in titles)
    tall = wide * height / width + above
    figure, axes = panels(count, columns, wide, tall, above=0.7 if title else 0.45)
    pixels = _pixels(image)
    drawn = [pixels, *(draw_levels(pixels, lattice, output_stride) for lattice in lattices)]
    for axis, picture, text in zip(axes, drawn, ("image", *titles), strict=True):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.imshow(picture)
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


def draw_levels(pixels: np.ndarray, lattice: Lattice, output_stride: int) -> np.ndarray:
    """Colour an image (H, W, 3) by level; the lowest level is grey."""
    levels = _on_pixels(lattice.levels[0], pixels, output_stride)
    grey = pixels.mean(2, keepdims=True)
    colours = np.array([to_rgb(colour) for colour in _level_colours(lattice.geometry.max_level)])
    bright = ((grey - grey.min()) / max(np.quantile(grey, 0.98) - grey.min(), 1e-6)).clip(0, 1)
    return colours[levels] * (0.5 + 0.5 * bright)


def _level_colours(max_level: int) -> tuple[str, ...]:
    return (*LEVEL_COLOURS[:max_level], LOWEST_COLOUR)


def matches_figure(
    first: Tensor, second: Tensor, matches: Sequence[tuple[str, Tensor, Tensor, Tensor]], limit: float = 3.0
) -> Figure:
    """Draw matches between two images, one panel per setting: correct matches green, wrong ones red.

    Args:
        first: (3, H, W) in 0..1.
        second: the other image, of any size.
        matches: for each setting its name, points (k, 2) in the first and in the second image, and errors (k,) in
            pixels.
        limit: largest error, in pixels, of a correct match.
    """
    first, second = _as_image(first), _as_image(second)
    height = max(first.shape[1], second.shape[1])
    width, gap = first.shape[2] + second.shape[2], first.shape[2]
    both = np.ones((height, width, 3), dtype=np.float32)
    for image, left in ((first, 0), (second, gap)):
        pixels = _pixels(image)
        both[: pixels.shape[0], left : left + pixels.shape[1]] = pixels
    figure, axes = panels(len(matches), min(len(matches), 2), 7.5, 7.5 * height / width + 0.4)
    for axis, (name, here, there, errors) in zip(axes, matches, strict=True):
        axis.imshow(0.5 + 0.5 * both)
        right = (errors <= limit).cpu().numpy()
        for chosen, colour, over in ((~right, "#d7301f", 2), (right, "#238b45", 3)):
            ends = np.stack([here.cpu().numpy()[chosen], there.cpu().numpy()[chosen] + [gap, 0]], 1)
            axis.add_collection(
                LineCollection(list(ends), colors=colour, linewidths=0.5, alpha=0.7, zorder=over)
            )
            axis.plot(*ends.reshape(-1, 2).T, ".", color=colour, markersize=2, zorder=over)
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axis.set_title(f"{name}: {right.sum()} of {len(right)} matches within {limit:g} pixels", fontsize=9)
    return figure


def class_picture(prediction: Tensor, count: int = 256) -> Image.Image:
    """Convert a class map (H, W) to a palette PNG: the value is the class, and each class has another hue. Pixels that
    were not asked for, of class -1, get the largest value, which is transparent.

    With more than 256 classes, or values, it is a 16-bit grey image.
    """
    classes = prediction.to("cpu").long().numpy()
    lacks = bool((classes < 0).any())
    if count + (lacks and count > 1) > 256:
        return Image.fromarray(classes.astype(np.uint16))
    picture = Image.fromarray(classes.astype(np.uint8), mode="P")
    picture.putpalette(palette().flatten().tolist())
    if lacks:
        picture.info["transparency"] = 255
    return picture


def palette() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the colours of 256 classes, (256, 3) uint8; the first one is black."""
    hues = [
        colorsys.hsv_to_rgb(index * 0.618 % 1, 0.65 + 0.3 * (index % 2), 0.95 - 0.25 * (index % 3))
        for index in range(1, 256)
    ]
    return (255 * np.array([(0, 0, 0), *hues])).astype(np.uint8)


def prediction_picture(image: Tensor, classes: Tensor, view: str) -> Image.Image:
    """Draw a class map (H, W) on its image (C, h, w): `overlay`, or `side`, the image and the classes side by side."""
    pixels = Image.fromarray((255 * _pixels(image)).round().astype(np.uint8))
    colours = class_picture(classes.clamp(min=0)).convert("RGB").resize(pixels.size, Image.Resampling.NEAREST)
    if view == OVERLAY:
        asked = Image.fromarray((classes >= 0).to("cpu").numpy()).resize(
            pixels.size, Image.Resampling.NEAREST
        )
        return Image.composite(Image.blend(pixels, colours, 0.5), pixels, asked.convert("L"))
    both = Image.new("RGB", (2 * pixels.width, pixels.height))
    both.paste(pixels, (0, 0))
    both.paste(colours, (pixels.width, 0))
    return both


def legend_figure(names: Mapping[int, str]) -> Figure:
    """Draw the colours of classes in `class_picture`, each with its name."""
    colours = palette() / 255
    handles = [Patch(color=colours[index], label=name) for index, name in names.items()]
    figure = canvas(3, 0.3 + 0.25 * len(handles))
    figure.legend(handles=handles, loc="center", frameon=False)
    return figure
