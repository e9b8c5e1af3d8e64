"""Images in and out: reading, normalising, a generated street scene, writing without half-written files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from cadsurgery.errors import FileError
from cadsurgery.files import written_whole

if TYPE_CHECKING:
    from cadsurgery.zoo import Source

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as (3, H, W) float32 in 0..1, resized to `size` (height, width) if given.

    Raises:
        FileError: missing, unreadable or empty.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise FileError(
            f"{path} cannot be read as an image.", why=str(error), next="give a PNG or JPEG."
        ) from error
    if size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255


def read_labels(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """A label file (grey or palette, 8 or 16 bits) as (H, W) int64, resized to `size` (height, width) by the nearest.

    Raises:
        FileError: missing or unreadable, or a picture in colour.
    """
    try:
        with Image.open(path) as file:
            labels, mode = file.copy(), file.mode
    except (OSError, ValueError, SyntaxError) as error:
        raise FileError(
            f"{path} cannot be read as labels.", why=str(error), next="give a PNG of one class per pixel."
        ) from error
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise FileError(
            f"{path} is a picture of mode {mode}, not labels.",
            next="give a PNG with one channel, grey or palette, whose values are classes.",
        )
    if size is not None:
        labels = labels.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(labels).astype(np.int64))


def find_images(paths: Sequence[Path]) -> dict[Path, Path]:
    """Image files among the given files and folders, and where each belongs below an output folder.

    Folders are searched and keep their structure; images that differ in their ending only keep it.

    Raises:
        FileError: a path does not exist, or nothing was found.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileError(f"there is no file or folder {path}.", next="check the path.")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for image in [p for p in inside if p == path or p.suffix.lower() in SUFFIXES]:
            place = image.relative_to(path) if path.is_dir() else Path(image.name)
            target, count = place.with_suffix(".png"), 1
            while target in found.values():
                count += 1
                target = place.with_name(f"{place.stem}_{place.suffix[1:]}{'' if count == 2 else count}.png")
            found.setdefault(image, target)
    if not found:
        raise FileError(
            "there are no images in " + ", ".join(map(str, paths)), next=f"accepted: {', '.join(SUFFIXES)}."
        )
    return found


def normalise(image: Tensor, source: Source | None) -> Tensor:
    """An image (3, H, W) or batch (B, 3, H, W) in 0..1 as the network expects it: mean and standard deviation of its
    source, or ImageNet's."""
    from cadsurgery.zoo import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (source.mean, source.std) if source is not None else (IMAGENET_MEAN, IMAGENET_STD)
    shift, scale = (torch.tensor(values, device=image.device)[:, None, None] for values in (mean, std))
    return (image - shift) / scale


SCENE_CLASSES = ("sky", "building", "ground", "road", "pole", "car")


def street_scene(height: int = 512, width: int = 1024, seed: int = 0) -> Tensor:
    """A generated street scene, (3, H, W) float32 in 0..1: smooth areas, edges and thin structures."""
    return labelled_scene(height, width, seed)[0]


def labelled_scene(height: int = 512, width: int = 1024, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A generated street scene and its labels (H, W), int64 indices into `SCENE_CLASSES`."""
    random = np.random.default_rng(seed)
    rows = np.linspace(0, 1, height)[:, None, None]
    sky = np.array([150, 185, 225]) * (1 - rows) + np.array([225, 232, 238]) * rows
    canvas = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    classes = Image.new("L", (width, height), 0)
    on_canvas, on_classes = ImageDraw.Draw(canvas), ImageDraw.Draw(classes)

    def paint(shape: str, box: Sequence[object], colour: tuple[int, ...], name: str, **options: int) -> None:
        getattr(on_canvas, shape)(box, fill=colour, **options)
        getattr(on_classes, shape)(box, fill=SCENE_CLASSES.index(name), **options)

    def shade(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(value) for value in random.integers(low, high, 3))

    horizon, ground = int(0.45 * height), int(0.5 * height)
    left = 0
    while left < width:
        wide, tall = int(width * random.uniform(0.08, 0.18)), int(height * random.uniform(0.15, 0.38))
        wall = shade(90, 190)
        window = tuple(max(0, value - 60) for value in wall)
        paint("rectangle", (left, horizon - tall, left + wide, ground), wall, "building")
        step_x, step_y = max(8, wide // 6), max(8, height // 18)
        for x in range(left + step_x // 2, left + wide - step_x // 2, step_x):
            for y in range(horizon - tall + step_y // 2, horizon - step_y // 2, step_y):
                paint("rectangle", (x, y, x + step_x // 2, y + step_y // 2), window, "building")
        left += max(1, wide)
    paint("rectangle", (0, ground, width, height), (120, 118, 112), "ground")
    corners = [
        (0.42 * width, horizon),
        (0.58 * width, horizon),
        (0.98 * width, height),
        (0.02 * width, height),
    ]
    paint("polygon", corners, (78, 80, 84), "road")
    for part in np.linspace(0.05, 0.95, 7):
        y, half = horizon + part * (height - horizon), 1 + 5 * part * width / 1024
        box = (width / 2 - half, y, width / 2 + half, y + 0.05 * height * part)
        paint("rectangle", box, (235, 235, 225), "road")
    for side in (0.2, 0.33, 0.71, 0.86):
        x, base = int((side + random.uniform(-0.05, 0.05)) * width), horizon + int(0.12 * height)
        paint(
            "line", (x, base, x, base - int(0.32 * height)), (45, 45, 48), "pole", width=max(1, width // 250)
        )
        radius, top = height // 40, base - int(0.36 * height)
        paint("ellipse", (x - radius, top, x + radius, top + 2 * radius), (190, 40, 40), "pole")
    for car in range(4):
        x = int((0.15 + 0.22 * car + random.uniform(-0.06, 0.06)) * width)
        y = horizon + int((0.14 + random.uniform(0, 0.2)) * height)
        wide, tall = int(0.09 * width), int(0.08 * height)
        paint("rectangle", (x, y, x + wide, y + tall), shade(30, 220), "car")
        paint("rectangle", (x + wide // 5, y - tall // 2, x + 4 * wide // 5, y), (60, 70, 85), "car")
        for wheel in (0.2, 0.75):
            middle, radius = x + int(wheel * wide), tall // 4
            box = (middle - radius, y + tall - radius, middle + radius, y + tall + radius)
            paint("ellipse", box, (20, 20, 20), "car")
    smooth = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float64)
    pixels = (smooth + random.normal(0, 1.5, smooth.shape)).clip(0, 255) / 255
    labels = torch.from_numpy(np.array(classes, dtype=np.int64))
    return torch.from_numpy(pixels).permute(2, 0, 1).float(), labels


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        FileError: the path cannot be written.
    """
    with written_whole(path) as temporary:
        picture.save(temporary, "PNG")
