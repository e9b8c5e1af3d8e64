"""Read TIFF files that Pillow cannot read as they are: of many bands, of more than 8 bits in several bands, of signed
or floating-point values; planar or chunky, in strips or tiles."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data.limits import check_pixels
from cadsurgery.support.errors import FileError, first_line

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_REDUCED, _MASK = 1, 4  # kinds of further pictures: smaller copies, and masks of transparency
_UNSIGNED = 1
_ORIENTATION, _NO_DATA = 274, 42113  # tags; the second is GDAL's
_BAND_AXES = "SCQ"  # samples, channels, and an axis of an array without a name: bands of one picture
_SIGN_BITS = {"u": 0, "i": 1, "b": 0}  # of integers, by NumPy's letter for their kind
# Turns and mirrors an array (H, W, C) of an orientation so that it is shown upright.
_UPRIGHT: dict[int, Any] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


def is_tiff(path: Path | str, content: bytes | None = None) -> bool:
    """True if a file begins as TIFF files do."""
    if content is not None:
        return content[:4] in _MAGIC
    try:
        with open(path, "rb") as file:
            return file.read(4) in _MAGIC
    except (OSError, ValueError):  # no file can have this name
        return False


def read_bands(
    path: Path | str, content: bytes | None = None, *, upright: bool = True
) -> tuple[Tensor, bool] | None:
    """Read all bands of a TIFF file as (C, H, W) float32; None for a file that is left to Pillow.

    Integers are divided by the largest value of their type; where 0 is white, they are inverted. Floating-point values
    are returned as they are; those that GDAL's tag calls no data are NaN.

    Args:
        path: the file.
        content: its content, if it was read before.
        upright: turn the picture by its orientation.

    Returns:
        The bands, and True if the last one is transparency.

    Raises:
        FileError: the file holds several pictures, too many pixels, values of another kind, or is compressed by a
            method that needs another package.
    """
    import tifffile

    with tifffile.TiffFile(path if content is None else io.BytesIO(content)) as file:
        page: Any = file.pages.first
        series = [entry for entry in file.series if not _is_secondary(entry.pages[0])]
        axes = series[0].axes if len(series) == 1 else ""
        others = [axis for axis in axes if axis not in "YX"]
        is_one = bool(axes) and len(others) <= 1 and set(others) <= set(_BAND_AXES)
        if _is_for_pillow(page) and not (is_one and len(series[0].pages) > 1):
            return None
        if not is_one:
            count = len(series) if len(series) != 1 else len(series[0].pages)
            raise FileError(
                f"{path} holds {count} pictures.",
                next="store the one you mean in a file of its own; bands of one picture are samples of its pixels "
                "(in tifffile: planarconfig).",
            )
        check_pixels(path, page.imagelength, page.imagewidth)
        values = _decode(path, page, series[0])
    values = values[..., None] if not others else np.moveaxis(values, axes.index(others[0]), -1)
    scaled = _scale(values, page, path)
    orientation = int(page.tags.valueof(_ORIENTATION, 1))
    turned = _UPRIGHT.get(orientation if upright else 1, lambda pixels: pixels)(scaled)
    extras = tuple(page.extrasamples)
    is_colour = page.photometric in (_BLACK_IS_ZERO, _RGB)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(turned, -1, 0))), bool(
        is_colour and extras and int(extras[-1]) in (1, 2)
    )


def _is_for_pillow(page: Any) -> bool:
    """True for what Pillow reads as it is: grey of up to 16 bits, colour and palettes of 8 bits."""
    unsigned = int(page.sampleformat) == _UNSIGNED
    samples, bits, photometric = page.samplesperpixel, page.bitspersample, int(page.photometric)
    if not unsigned or bits > 16:
        return False
    if photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        return True  # palettes, CMYK, luma and chroma
    # A fourth sample of unknown meaning is a band, which Pillow would leave out.
    extras = tuple(map(int, page.extrasamples))
    usual = 3 if photometric == _RGB else 1
    is_usual = samples == usual or (samples == usual + 1 and extras in ((1,), (2,)))
    return is_usual and (bits <= 8 or samples == 1)


def _is_secondary(page: Any) -> bool:
    return bool(int(page.subfiletype) & (_REDUCED | _MASK))


def _decode(path: Path | str, page: Any, series: Any) -> np.ndarray[Any, Any]:
    from tifffile import TIFF

    lacks_codec = page.compression not in TIFF.DECOMPRESSORS or page.predictor not in TIFF.UNPREDICTORS
    try:
        values: np.ndarray[Any, Any] = series.asarray()
        return values
    except Exception as error:  # decoders raise errors of any type
        if lacks_codec:
            name = getattr(page.compression, "name", page.compression)
            raise FileError(
                f"{path} is compressed by {name}, which cannot be decoded here.",
                why="TIFF files of this kind are read by tifffile, which decodes this compression with the package "
                "imagecodecs.",
                next="pip install imagecodecs; or store the file without compression, or compressed by deflate "
                "without a predictor for floating-point values.",
            ) from error
        raise FileError(
            f"{path} cannot be read as an image.", why=first_line(error), next="write the file again."
        ) from error


def _scale(values: np.ndarray[Any, Any], page: Any, path: Path | str) -> np.ndarray[Any, Any]:
    """Return values as float32: integers divided by the largest value of their type, others as they are."""
    kind = values.dtype.kind
    if kind == "f":
        scaled = values.astype(np.float32)
        no_data = str(page.tags.valueof(_NO_DATA, "")).strip("\0 ")
        if no_data:
            with contextlib.suppress(ValueError):  # a tag that is no number
                scaled[values == values.dtype.type(float(no_data))] = np.nan
        return 1 - scaled if int(page.photometric) == _WHITE_IS_ZERO else scaled
    if kind not in _SIGN_BITS:
        raise FileError(
            f"{path} holds values of type {values.dtype}.", next="store integers or floating-point values."
        )
    bits = int(page.bitspersample) - _SIGN_BITS[kind]
    scaled = (values / (2.0**bits - 1)).astype(np.float32)
    return 1 - scaled if int(page.photometric) == _WHITE_IS_ZERO and kind != "i" else scaled
