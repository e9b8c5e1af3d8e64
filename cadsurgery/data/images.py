"""Read, normalise and write images, and generate street scenes."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional

from cadsurgery.data import limits, stores, tiff
from cadsurgery.data.channels import as_channels as as_channels
from cadsurgery.data.channels import per_channel
from cadsurgery.data.channels import statistics_of as statistics_of
from cadsurgery.data.deep import open_large, read_deep
from cadsurgery.support import files
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import FileError, InvalidInput, as_refusal
from cadsurgery.support.files import check_folder, write_whole
from cadsurgery.support.folders import NO_PICTURES, describe_left_out, is_hidden, warn_of_left_out
from cadsurgery.support.kinds import PICTURE, of_another_kind
from cadsurgery.support.memory import is_out_of_memory

if TYPE_CHECKING:
    from cadsurgery.data.networks import Source

SUFFIXES = PICTURE.endings
_OF_FIRST = ("GIF", "MPO")  # formats whose first picture is read: animations, photographs with smaller copies
# Formats that pictures can be written in, by file name ending.
FORMATS = {
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"},
    **{".tif": "TIFF", ".tiff": "TIFF", ".pdf": "PDF"},
}


def read_image(
    path: Path | str,
    size: tuple[int, int] | None = None,
    *,
    channels: int | None = 3,
    bands: Sequence[int] = (),
    upright: bool = True,
    content: bytes | None = None,
) -> Tensor:
    """Read an image file as (channels, H, W) float32, resized to `size` (height, width) if given.

    Integers are divided by the largest value of their type, e.g. 255 or 65535; floating-point values stay as they are.
    Palettes are read as the colours that they stand for. Of a GIF the first picture is read; of a TIFF file the one
    that is there in full, not reduced copies of it, masks, and labels of slides.

    Args:
        path: the image file, or its address in object storage; `FILE,page=N` for a page of a TIFF file, from 0 on, and
            `FILE,level=N` for a smaller copy of its picture, which is level 0.
        size: target size, or None to keep the size.
        channels: number of channels: as many bands are taken as they are, colour becomes grey, grey becomes colour,
            transparency is left out; see `as_channels`. None: all bands of the file but transparency.
        bands: which bands of the file to take, counted from 1, in their order; transparency is the last. Default: all.
        upright: rotate the image by its EXIF orientation, as viewers show it; False keeps it as stored.
        content: content of the file, if it was read before.

    Raises:
        FileError: the file is missing, unreadable or empty, holds several pictures, or has values of unknown range.
        InvalidInput: the size has no pixels, or too many; or the file has other bands than asked for.
    """
    check_size(size)
    place, named = tiff.split_page(path)
    if content is None and stores.is_remote(place):
        content = stores.read_bytes(str(place))
    if tiff.is_tiff(place, content):
        with _as_file_error(path, "an image", _GIVE):
            read = tiff.read_bands(path, content, upright=upright)
        if not isinstance(read, int):
            stored, has_alpha = read
            image = as_channels(stored, channels, bands, name=path, has_alpha=has_alpha)
            return resized(image, size)
        named = ("page", read)
    with _open(place, "an image", _GIVE, content, named) as file:
        return from_picture(file, channels, bands, name=path, size=size, upright=upright)


def read_picture_for(
    source: Source | None,
    path: Path | str,
    size: tuple[int, int] | None = None,
    *,
    bands: Sequence[int] = (),
    upright: bool = True,
    content: bytes | None = None,
) -> Tensor:
    """Read an image file as a network takes it before `normalise`: its channels, from its bands; see `read_image`.

    Args:
        source: the network's source; None for the bands of the file.
        path, size, upright, content: see `read_image`.
        bands: the bands to take instead of the source's.

    Raises:
        FileError, InvalidInput: as `read_image`; or values that are not finite, or far from the network's pictures.
    """
    channels, chosen = (None, bands) if source is None else (source.channels, bands or source.bands)
    if content is None and stores.is_remote(path):
        content = stores.read_bytes(str(tiff.split_page(path)[0]))
    image = read_image(path, size, channels=channels, bands=chosen, upright=upright, content=content)
    check_values(image, source, path)
    if tiff.is_tiff(tiff.split_page(path)[0], content):
        with _as_file_error(path, "an image", _GIVE):
            masked = tiff.count_masked(path, content)
        if masked:
            raise _without_data(path, masked)
    return image


# Standard deviations of a network's pictures from their mean, beyond which a value has another unit.
_FAR = 50


def check_values(image: Tensor, source: Source | None, name: object) -> None:
    """Refuse values of a file that are not finite, or that are in another unit than a network's pictures.

    Raises:
        InvalidInput: see above.
    """
    low, high = (float(value) for value in image.aminmax())
    if not math.isfinite(low + high):
        count = int((~image.isfinite()).any(0).sum())
        raise _without_data(name, count)
    if source is None or (low >= 0 and high <= 1):
        return
    means, deviations = (per_channel(values, len(image)) for values in (source.mean, source.std))
    reach = [(mean - _FAR * std, mean + _FAR * std) for mean, std in zip(means, deviations, strict=True)]
    if all(least <= low and high <= most for least, most in reach):
        return
    mean, std = ("/".join(f"{value:.3g}" for value in values) for values in (source.mean, source.std))
    raise InvalidInput(
        f"{name} holds floating-point values from {low:.4g} to {high:.4g}.",
        why=f"they are taken as they are, and the network's pictures have mean {mean} and standard deviation {std}.",
        next="state mean and deviation of your pictures in the file's own unit: --normalisation MEAN/STD, or bands; or "
        "store integers, which are divided by the largest value of their type.",
    )


def _without_data(name: object, count: int) -> InvalidInput:
    return InvalidInput(
        f"{name} holds {count} pixels without data: NaN, infinite, or what the file says stands for none.",
        why="one such value spreads through a network over all that it computes around it.",
        next="cadsurgery run --memory 2GiB leaves such pixels of a raster out; or fill them first, e.g. by the mean of "
        "their band, or cut the picture.",
    )


def from_picture(
    picture: Image.Image,
    channels: int | None = 3,
    bands: Sequence[int] = (),
    *,
    name: object = "an image",
    size: tuple[int, int] | None = None,
    upright: bool = False,
) -> Tensor:
    """Convert a picture of Pillow, of any mode, to (channels, H, W) float32; see `read_image`.

    Args:
        picture: the picture; one that is opened and not loaded is read in all its bits.
        channels, bands, size: see `read_image`.
        name: its name, for messages.
        upright: rotate it by its EXIF orientation.

    Raises:
        FileError: its values have an unknown range, or more bits than can be read.
        InvalidInput: it has other bands than asked for.
    """
    if (deep := read_deep(picture, name)) is not None:
        pixels = tiff.turned(deep.values, picture.getexif().get(tiff.ORIENTATION, 1) if upright else 1)
        scaled = pixels.astype(np.float32) / np.float32(deep.largest)
        stored = torch.from_numpy(np.moveaxis(scaled, -1, 0).copy())
        image = as_channels(stored, channels, bands, name=name, has_alpha=deep.has_alpha)
    else:
        shown = ImageOps.exif_transpose(picture) if upright else picture
        no_data = getattr(picture, "tag_v2", {}).get(tiff.NO_DATA)
        if no_data is None or (is_lacking := tiff.without_data(np.array(shown), no_data)) is None:
            return _from_shallow(shown, channels, bands, picture, name, size)
        image = _from_shallow(shown, channels, bands, picture, name, None)
        image[:, torch.from_numpy(is_lacking.reshape(*is_lacking.shape[:2], -1).any(2))] = math.nan
    return resized(image, size)


def _from_shallow(
    picture: Image.Image,
    channels: int | None,
    bands: Sequence[int],
    file: Image.Image,
    name: object,
    size: tuple[int, int] | None,
) -> Tensor:
    """Convert a picture whose values Pillow keeps; `file` is the picture as it was opened, with its tags."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        # Pillow's conversion would clip values of more than 8 bits to 255.
        wide = Image.fromarray(_grey(np.array(picture), file, name))
        values = torch.from_numpy(np.array(_resized_picture(wide, size)))[None]
        return as_channels(values, channels, bands, name=name)
    stored = picture.convert(_BANDS_OF_MODE.get(picture.mode, "RGB"))
    has_alpha = stored.mode in ("LA", "RGBA")
    if has_alpha and not bands and channels != len(stored.getbands()):
        stored, has_alpha = stored.convert(stored.mode[:-1]), False
    if has_alpha:  # resized as a whole, colours would be weighted by transparency
        parts = [np.array(_resized_picture(part, size)) for part in stored.split()]
        values = torch.from_numpy(np.stack(parts))
    else:
        pixels = torch.from_numpy(np.array(_resized_picture(stored, size)))
        values = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return as_channels(values.float() / 255, channels, bands, name=name, has_alpha=has_alpha)


_GIVE = "give a PNG or JPEG."
# Modes in which the bands of a picture are read, by its own; any other is read as colour.
_BANDS_OF_MODE = {
    **dict.fromkeys(("1", "L"), "L"),
    **dict.fromkeys(("LA", "La"), "LA"),
    **dict.fromkeys(("RGBA", "RGBa", "PA"), "RGBA"),
}


def _resized_picture(picture: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    return picture if size is None else picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def resized(image: Tensor, size: Sequence[int] | None) -> Tensor:
    """Return an image (C, H, W) or images (B, C, H, W) of a size, in the memory layout that they have; as they are for
    None."""
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image
    if image.dim() == 3:
        return resized(image[None], size)[0]
    is_rows = image.is_contiguous(memory_format=torch.channels_last)
    small = functional.interpolate(image.float(), tuple(size), mode="bilinear", antialias=True).to(
        image.dtype
    )
    return small.contiguous(memory_format=torch.channels_last if is_rows else torch.contiguous_format)


def shown(image: Tensor) -> Tensor:
    """Return a picture (C, H, W) as it is drawn, (3, H, W) in 0..1.

    Grey is repeated; of more than three bands the first three are red, green and blue; of two both are mixed. Values
    beyond 0..1, or all below a quarter, as those of satellites are, are spread over the whole range.
    """
    image = image.detach().float()
    if len(image) not in (1, 3):
        image = image[:3] if len(image) > 3 else image.mean(0, keepdim=True)
    low, high = (float(value) for value in image.aminmax())
    if math.isfinite(low + high) and high > low and (low < -_BEYOND or high > 1 + _BEYOND or high < _DARK):
        image = (image - low) / (high - low)
    return as_channels(image, 3).clamp(0, 1)


_BEYOND, _DARK = 0.25, 0.25


def check_size(size: tuple[int, int] | None) -> None:
    """Refuse an image size without pixels, or with more than `limits.MOST_PIXELS`.

    Raises:
        InvalidInput: the size has too few or too many pixels.
    """
    if size is not None and min(size) < 1:
        raise InvalidInput(f"an image of {size[0]}x{size[1]} has no pixels.", next="give a positive size.")
    if size is not None and size[0] * size[1] > limits.MOST_PIXELS:
        raise InvalidInput(
            f"an image of {size[0]}x{size[1]} is too large.",
            why=f"at most {limits.MOST_PIXELS} pixels are made, e.g. {limits.SIDE}x{limits.SIDE}.",
            next="give a smaller size, or cut the image into tiles.",
        )


@contextlib.contextmanager
def _open(
    path: Path | str, what: str, next: str, content: bytes | None = None, named: tiff.Named | None = None
) -> Iterator[Image.Image]:
    """Open a file with a single picture, or a page of a TIFF file; errors in the block become a `FileError` that names
    the file."""
    if content is None and not files.exists(path):
        refusal = files.absent(path)
        raise FileError(refusal.what, next=f"{refusal.next} Then {next}")
    with (
        _as_file_error(path, what, next),
        open_large(path if content is None else io.BytesIO(content)) as file,
    ):
        if named is not None and file.format != "TIFF":
            kind = named[0]
            raise FileError(f"{path} has no {kind}s.", next=f"leave out {kind}=, which is for TIFF files.")
        if named is not None:
            file.seek(named[1])
        limits.check_pixels(path, file.height, file.width)
        count = 1 if named is not None else getattr(file, "n_frames", 1)
        if count > 1 and file.format not in _OF_FIRST:
            raise FileError(
                f"{path} holds {count} pictures.", next="store the one you mean in a file of its own."
            )
        yield file


def _as_file_error(path: Path | str, what: str, next: str) -> contextlib.AbstractContextManager[None]:
    """Turn errors of the block into a `FileError` that names the file."""

    def refuse(error: Exception) -> FileError:
        if is_out_of_memory(error):
            return FileError(
                f"there is not enough memory to read {path}.",
                why=str(error),
                next="give a smaller picture, or a TIFF file, which cadsurgery run --memory 1.5GiB reads in rows.",
            )
        refusal = FileError(f"{path} cannot be read as {what}.", why=str(error), next=next)
        return of_another_kind(path, PICTURE) or refusal

    return as_refusal(refuse)


# Tags of TIFF files: the bits of a value, and how values are to be shown, of which 0 means that 0 is white.
_BITS, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def _grey(values: np.ndarray[Any, Any], file: Image.Image, path: object) -> np.ndarray[Any, Any]:
    """Return a grey picture of more than 8 bits as (H, W) float32: integers in 0..1, of which 1 is white, and
    floating-point values as they are."""
    tags = getattr(file, "tag_v2", {})
    if file.mode == "F":
        return values.astype(np.float32)
    if not file.mode.startswith("I;") and file.format not in ("PNG", "PPM"):  # formats without 32-bit values
        raise FileError(
            f"{path} holds values from {values.min():g} to {values.max():g}, of mode {file.mode}.",
            why="which of them is black and which is white is not known.",
            next="store floating-point values in 0..1, or 8 or 16 bits.",
        )
    bits = int(tags.get(_BITS, (16,))[0])
    scaled = values.astype(np.float32) / np.float32(2.0**bits - 1)
    # Pillow inverts values of up to 8 bits itself.
    return 1 - scaled if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else scaled


def read_labels(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read a label file (grey or palette, of any whole numbers) as (H, W) int64, turned as `read_image` turns pictures,
    and resized to `size` (height, width) by nearest neighbour.

    Classes are the numbers that the file stores, however a viewer shows them; of one bit, 1 is what is shown white. Of
    a TIFF file the page is read that `read_image` reads.

    Raises:
        FileError: the file is missing, unreadable, or a colour picture.
    """
    (place, named), next = tiff.split_page(path), "give a PNG of one class per pixel."
    if tiff.is_tiff(place):
        with _as_file_error(path, "labels", next):
            read = tiff.read_stored(path)
        if not isinstance(read, int):
            return _as_labels(read, path, f"{read.shape[2]} bands of {read.dtype}", size)
        named = ("page", read)
    with _open(place, "labels", next, named=named) as file:
        if (deep := read_deep(file, path)) is not None:
            pixels, mode = tiff.turned(deep.values, file.getexif().get(tiff.ORIENTATION, 1)), file.mode
        else:
            shown = _SHOWN.fullmatch(_raw_mode(file))  # the file forgets it when it is read
            pixels, mode = np.array(ImageOps.exif_transpose(file)), file.mode
            if mode not in ("1", "L", "P") and not mode.startswith("I"):
                pixels = pixels.astype(np.float32)  # colour, which may have one band
            elif shown:  # PIL spreads values of few bits over 0..255, and inverts them where 0 is white
                values, bits = pixels.astype(np.int64), int(shown[1] or 8)
                pixels = (255 - values if shown[2] else values) // (255 // (2**bits - 1))
    return _as_labels(pixels.reshape(*pixels.shape[:2], -1), path, f"mode {mode}", size)


def _as_labels(pixels: np.ndarray[Any, Any], path: Path, kind: str, size: tuple[int, int] | None) -> Tensor:
    """Return stored values (H, W, 1) as labels (H, W) of a size.

    Raises:
        FileError: there are several bands, or values of another type.
    """
    if pixels.shape[2] > 1 or pixels.dtype.kind == "f":
        raise FileError(
            f"{path} is a picture of {kind}, not labels.",
            next="give a PNG with one channel, grey or palette, whose values are classes.",
        )
    labels = pixels[..., 0].astype(np.int64)
    if size is not None:  # by the middle of each pixel
        down, right = (
            (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, labels.shape, strict=True)
        )
        labels = labels[down[:, None], right]
    return torch.from_numpy(np.ascontiguousarray(labels))


# How PIL names the values of a grey file: their bits, if fewer than 8, and `I` where 0 is white.
_SHOWN = re.compile(r"L;?([24]?)(I?)R?")


def _raw_mode(file: Image.Image) -> str:
    """Return PIL's name of the values as they are stored; empty if it has none."""
    tile: Any = (getattr(file, "tile", None) or [("",) * 4])[0]
    return str(tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3])


def check_labels_fit(
    name: object,
    size: Sequence[int],
    labels: Sequence[int],
    next: str = "resize the labels (nearest neighbour).",
) -> None:
    """Refuse labels of another size than their image.

    Args:
        name: name of the image.
        size, labels: (height, width) of the image and of its labels.
        next: next step, unless both sizes are exchanged.

    Raises:
        InvalidInput: the sizes differ; the message says if one of both is turned.
    """
    if tuple(labels) == tuple(size):
        return
    sizes = ["x".join(map(str, shape)) for shape in (size, labels)]
    why = "each pixel needs its own label."
    if tuple(labels) == tuple(size)[::-1]:
        why = "height and width are exchanged: one of both is turned by 90 degrees."
        next = (
            "turn the labels or the image until both show the same. Both are read as the orientation in their files "
            "(EXIF) says: a photo taken upright often has one, and labels drawn on its stored pixels lack it."
        )
    raise InvalidInput(f"{name} has {sizes[0]} pixels and its labels have {sizes[1]}.", why=why, next=next)


def find_images(paths: Sequence[Path]) -> tuple[dict[Path, Path], list[dict[str, str]]]:
    """Find the image files among files and folders.

    Folders are searched recursively, without hidden files, and results keep their structure. If images differ only in
    their ending, the ending becomes part of the result's name. Whatever else a folder holds is named in a warning.

    Returns:
        The path of each image's result below an output folder, by image; and one failure row for each path that does
        not exist and each folder without images.

    Raises:
        FileError: no image was found at all.
    """
    failures: dict[str, FileError] = {}
    places = dict(stream_images([(str(path), path.name) for path in paths], failures))
    if not places:
        raise no_images(failures)
    rows = [{"image": path, **refusal.to_dict()} for path, refusal in failures.items()]
    return {Path(image): Path(place) for image, place in places.items()}, rows


def stream_images(
    sources: Iterable[tuple[str, str]], failures: dict[str, FileError], apart: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield the images among files, folders and addresses as `find_images` finds them, each with its result's path.

    Of a single folder no more is kept in memory than the names in one subfolder.

    Args:
        sources: each with the path that its result has below an output folder if it is an image.
        failures: gets the error of each source that does not exist, and of each folder without images.
        apart: a folder that is not searched: that of the results.
    """
    alone = isinstance(sources, Sequence) and len(sources) == 1
    shared, seen = dict[str, int](), set[str]()
    for path, name in sources:
        try:
            for image, place, used in _images_of(path, name, apart):
                if image not in seen:
                    yield image, _target(place, used if alone else shared)
                    seen.update(() if alone else [image])
        except FileError as refusal:
            failures[path] = refusal


def no_images(failures: Mapping[str, FileError]) -> FileError:
    """Return the error for sources without any image."""
    if not failures:
        return FileError("no images were given.", next="name files or folders.")
    (_, refusal), *others = failures.items()
    neither = f"neither is there anything in {', '.join(path for path, _ in others)}." if others else ""
    return FileError(refusal.what, why="; ".join(filter(None, (refusal.why, neither))), next=refusal.next)


def _images_of(path: str, name: str, apart: str) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Yield the images of a source, each with its relative path and the names that are used in its folder."""
    left_out: dict[str, list[str]] = {NO_PICTURES: [], _LINKS: [], _DANGLING: [], _UNREADABLE: []}
    if not (stores.is_remote(path) or files.is_folder(path)):
        if not files.exists(tiff.split_page(path)[0]):
            raise files.absent(path, "file or folder")
        yield path, name, {}
        return
    inside: Iterable[tuple[str, dict[str, int]]]
    if stores.is_remote(path):
        used: dict[str, int] = {}
        inside = ((place, used) for place in stores.list_files(path) if _is_image(place))
    else:
        inside = _images_inside(path, os.path.abspath(apart), left_out)
    is_empty = True
    for place, used in inside:
        is_empty = False
        yield os.path.join(path, place), place, used
    if is_empty:
        raise FileError(
            f"there are no images in {path}.",
            why=describe_left_out(left_out),
            next=f"accepted: {', '.join(SUFFIXES)}.",
        )
    warn_of_left_out(path, left_out)


_LINKS, _UNREADABLE = "links to folders, which are not followed", "folders that cannot be read"
_DANGLING = "links to what does not exist"


def _images_inside(
    folder: str, apart: str, left_out: dict[str, list[str]], parts: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the images in a folder and its subfolders by relative path, sorted by folder and name, each with the names
    that are used in its folder; note what is left out, by the reason."""
    used: dict[str, int] = {}
    try:
        with os.scandir(os.path.join(folder, *parts)) as entries:
            shown = sorted(
                (entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name
            )
    except OSError:
        left_out[_UNREADABLE].append(os.sep.join(parts) or ".")
        return
    for entry in shown:
        place = os.sep.join((*parts, entry.name))
        if entry.is_dir() and not entry.is_dir(follow_symlinks=False):
            left_out[_LINKS].append(place)
        elif entry.is_dir():
            if os.path.abspath(entry.path) != apart:
                yield from _images_inside(folder, apart, left_out, (*parts, entry.name))
        elif _is_image(entry.name) and entry.is_file():
            yield place, used
        else:
            left_out[NO_PICTURES if os.path.exists(entry.path) else _DANGLING].append(place)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not is_hidden(os.path.basename(name))


def _target(place: str, used: dict[str, int]) -> str:
    """Return the result path of an image at a relative path, with its ending in the name if another has that path.

    `used` gets every result path and, for a name that is used, the next number to try, so that many images of one name
    need no new search each.
    """
    stem, ending = os.path.splitext(place)
    target = f"{stem}.png"
    if target in used:
        base = f"{stem}_{ending[1:]}"
        count = used.get(base, 2)
        while (target := f"{base}{'' if count == 2 else count}.png") in used:
            count += 1
        used[base] = count + 1
    used[target] = 0
    return target


def normalise(image: Tensor, source: Source | None) -> Tensor:
    """Prepare an image (C, H, W) or batch (B, C, H, W) for a network: its channels, minus mean, over deviation.

    Colour becomes grey and grey becomes colour as the network reads it, see `as_channels`. Without a source the image
    keeps its channels, and mean and deviation are ImageNet's. If there are not as many means as channels, each channel
    has the average of the means and of the deviations.

    Args:
        image: floating-point values, in 0..1 for a picture.
        source: what is known of the network.

    Raises:
        InvalidInput: the image is no floating-point tensor of such a shape, or has a number of channels that no rule
            leads from to those of the network.
    """
    check_is_scaled(image)
    from cadsurgery.data.networks import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (source.mean, source.std) if source is not None else (IMAGENET_MEAN, IMAGENET_STD)
    if source is not None:
        image = as_channels(image, source.channels)
    shift, scale = (
        torch.tensor(per_channel(values, image.shape[-3]), device=image.device)[:, None, None]
        for values in (mean, std)
    )
    return (image - shift) / scale


def check_is_scaled(image: object) -> None:
    """Refuse what mean and deviation of a picture in 0..1 do not fit.

    Raises:
        InvalidInput: the image is no tensor (C, H, W) or (B, C, H, W) of floating-point values.
    """
    if isinstance(image, Tensor) and image.is_floating_point() and image.dim() in (3, 4):
        return
    if isinstance(image, Tensor):
        is_whole = not image.is_floating_point() and not image.is_complex() and image.dtype != torch.bool
        scaled = f"image / {torch.iinfo(image.dtype).max}" if is_whole else "image.float()"
        steps = f"{scaled}, with the axes (channels, height, width)"
    elif isinstance(image, np.ndarray):
        scaled = f" / {np.iinfo(image.dtype).max}" if image.dtype.kind in "ui" else ""
        order = {2: "[None]", 3: ".permute(2, 0, 1)"}.get(image.ndim, ".permute(0, 3, 1, 2)")
        steps = f"torch.from_numpy(image){order}{scaled}, colours as red, green, blue (OpenCV's are blue, green, red)"
    else:
        steps = "a picture of Pillow as cadsurgery.images.from_picture(picture), a file as read_image(path)"
    raise InvalidInput(
        f"an image to normalise is {describe(image)}.",
        why="mean and deviation are those of floating-point values in 0..1, channels first.",
        next=f"give {steps}.",
    )


SCENE_CLASSES = ("sky", "building", "ground", "road", "pole", "car")


def street_scene(height: int = 512, width: int = 1024, seed: int = 0, channels: int = 3) -> Tensor:
    """Generate a street scene, (channels, H, W) float32 in 0..1: smooth areas, edges and thin structures.

    One channel is grey; other numbers of bands lie between red, green and blue, evenly spread.
    """
    return labelled_scene(height, width, seed, channels)[0]


def labelled_scene(
    height: int = 512, width: int = 1024, seed: int = 0, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Generate a street scene, see `street_scene`, and its labels (H, W), int64 indices into `SCENE_CLASSES`.

    Raises:
        InvalidInput: see `check_size`.
    """
    check_size((height, width))
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
    return spread_bands(torch.from_numpy(pixels).permute(2, 0, 1).float(), channels), labels


def spread_bands(colour: Tensor, channels: int) -> Tensor:
    """Return a generated picture (3, H, W) in so many channels: grey, colour, or bands spread from red to blue."""
    if channels in (1, 3):
        return as_channels(colour, channels)
    rows = colour.flatten(1).T[:, None]  # linear interpolation is along the last axis
    spread = functional.interpolate(rows, channels, mode="linear", align_corners=True)
    return spread[:, 0].T.unflatten(1, colour.shape[1:]).contiguous()


def write_picture(picture: Image.Image, path: Path | str) -> None:
    """Write a picture atomically, in the format of the path's ending; the path may be an address in object storage.

    Raises:
        FileError: the path cannot be written, or its ending belongs to no known format.
    """
    kind = format_of(Path(path), FORMATS, "a picture")
    if kind != "PNG":  # only PNG keeps our palettes and transparency
        picture = picture.convert("RGB")
    if stores.is_remote(path):
        stores.write_bytes(str(path), encode_png(picture))
        return
    with write_whole(Path(path)) as temporary:
        picture.save(temporary, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))


def encode_png(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def check_picture(path: Path, option: str = "--output") -> None:
    """Refuse, before any work is done, a path that no picture can be written to.

    Raises:
        FileError: there is no such folder, or the ending belongs to no known format.
    """
    check_folder(path, option)
    format_of(path, FORMATS, "a picture")


def format_of(path: Path, formats: Mapping[str, str], what: str) -> str:
    """Return the format of a file to write, by its ending.

    Raises:
        FileError: the ending belongs to none of the formats.
    """
    if path.suffix.lower() not in formats:
        raise FileError(f"{path} does not end like {what}.", next=f"choose an ending: {', '.join(formats)}.")
    return formats[path.suffix.lower()]
