"""Read TIFF files that Pillow cannot read as they are: of many bands, of more than 8 bits in several bands, of signed
or floating-point values; planar or chunky, in strips or tiles. Files that do not fit into memory are read and written
some rows at a time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
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
        others = _band_axes(series)
        if _is_for_pillow(page) and not (others is not None and len(series[0].pages) > 1):
            return None
        if others is None:
            raise _of_several(path, series)
        check_pixels(path, page.imagelength, page.imagewidth)
        with _decoding(path, page):
            values: np.ndarray[Any, Any] = series[0].asarray()
    values = values[..., None] if not others else np.moveaxis(values, series[0].axes.index(others), -1)
    scaled = _scale(values, page, path)
    orientation = int(page.tags.valueof(_ORIENTATION, 1))
    turned = _UPRIGHT.get(orientation if upright else 1, lambda pixels: pixels)(scaled)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(turned, -1, 0))), _has_alpha(page)


def _band_axes(series: Sequence[Any]) -> str | None:
    """Return the axis of the bands of a file's only picture, empty for one band; None for several pictures."""
    axes = series[0].axes if len(series) == 1 else ""
    others = "".join(axis for axis in axes if axis not in "YX")
    return others if axes and len(others) <= 1 and set(others) <= set(_BAND_AXES) else None


def _of_several(path: Path | str, series: Sequence[Any]) -> FileError:
    count = len(series) if len(series) != 1 else len(series[0].pages)
    return FileError(
        f"{path} holds {count} pictures.",
        next="store the one you mean in a file of its own; bands of one picture are samples of its pixels "
        "(in tifffile: planarconfig).",
    )


def _has_alpha(page: Any) -> bool:
    extras = tuple(page.extrasamples)
    is_colour = page.photometric in (_BLACK_IS_ZERO, _RGB)
    return bool(is_colour and extras and int(extras[-1]) in (1, 2))


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


@contextlib.contextmanager
def _decoding(path: Path | str, page: Any) -> Iterator[None]:
    """Turn errors of the block, which decodes values of a page, into a `FileError`."""
    from tifffile import TIFF

    lacks_codec = page.compression not in TIFF.DECOMPRESSORS or page.predictor not in TIFF.UNPREDICTORS
    try:
        yield
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


# -- pictures that do not fit into memory --------------------------------------------------------------

_MOST_DECODED = 2**28  # bytes of the strips or tiles that lie beside each other, which are decoded as a whole


class TiffRows:
    """The picture of a TIFF file, of which some rows are read at a time.

    Attributes:
        shape: (C, H, W) with all bands of the file.
        has_alpha: True if the last band is transparency.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a file; see `close`.

        Raises:
            FileError: it holds several pictures, or one that is turned, has a palette, or is not stored in small
                pieces.
        """
        import tifffile

        self._path = path
        try:
            self._file = tifffile.TiffFile(path)
        except Exception as error:  # of any type, where a file is cut short
            raise FileError(f"{path} cannot be read as a TIFF.", why=first_line(error)) from error
        page: Any = self._file.pages.first
        series = [entry for entry in self._file.series if not _is_secondary(entry.pages[0])]
        self._page, samples = page, int(page.samplesperpixel)
        self.shape, self.has_alpha = (samples, int(page.imagelength), int(page.imagewidth)), _has_alpha(page)
        self._is_planar = samples > 1 and int(page.planarconfig) != 1
        is_plain = (
            page.is_contiguous and page.compression == 1 and page.predictor == 1 and page.dtype is not None
        )
        self._is_raw = bool(is_plain and page.bitspersample == 8 * page.dtype.itemsize)
        self._height = int(page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength))
        self._decoded = dict[int, np.ndarray[Any, Any]]()
        if (refusal := self._refusal(series)) is not None:
            self.close()
            raise refusal

    def _refusal(self, series: Sequence[Any]) -> FileError | None:
        """Return why the file cannot be read in rows, if so."""
        page, path = self._page, self._path
        if _band_axes(series) is None or len(series[0].pages) > 1:
            return _of_several(path, series)
        if page.dtype is None:
            why = f"its values have {page.bitspersample} bits."
        elif int(page.tags.valueof(_ORIENTATION, 1)) != 1:
            why = "its orientation says that it is shown turned or mirrored."
        elif int(page.photometric) not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
            why = f"its values are of kind {getattr(page.photometric, 'name', page.photometric)}."
        elif not self._is_raw and self._height * self._row_bytes > _MOST_DECODED:
            why = f"it is stored in pieces of {self._height} rows, which are decoded as a whole."
        else:
            return None
        return FileError(
            f"{path} cannot be read in rows.",
            why=why,
            next="store it upright in grey or colour, in tiles (in tifffile: tile=(512, 512)).",
        )

    @property
    def _row_bytes(self) -> int:
        return self.shape[0] * self.shape[2] * int(self._page.dtype.itemsize)

    def rows(self, first: int, end: int) -> Tensor:
        """Return rows [first, end), (C, end - first, W) float32, with values as `read_bands` gives them.

        Raises:
            FileError: they cannot be decoded.
        """
        with _decoding(self._path, self._page):
            values = self._stored(first, end) if self._is_raw else self._pasted(first, end)
        return torch.from_numpy(
            np.ascontiguousarray(np.moveaxis(_scale(values, self._page, self._path), -1, 0))
        )

    def _stored(self, first: int, end: int) -> np.ndarray[Any, Any]:
        """Read rows (rows, W, C) of values that are stored one after the other."""
        page, (samples, height, width), file = self._page, self.shape, self._file.filehandle
        kind = np.dtype(f"{self._file.byteorder}{page.dtype.char}")
        together, planes = (1, samples) if self._is_planar else (samples, 1)
        values = np.empty((end - first, width, samples), page.dtype)
        for plane in range(planes):
            row = width * together
            file.seek(page.dataoffsets[0] + (plane * height + first) * row * kind.itemsize)
            read = np.frombuffer(file.read((end - first) * row * kind.itemsize), kind)
            values[:, :, plane : plane + together] = read.reshape(end - first, width, together)
        return values

    def _pasted(self, first: int, end: int) -> np.ndarray[Any, Any]:
        """Put rows (rows, W, C) together from strips or tiles."""
        values = np.empty((end - first, self.shape[2], self.shape[0]), self._page.dtype)
        for number in range(first // self._height, -(-end // self._height)):
            top = number * self._height
            part = self._across(number)
            begin, stop = max(first, top), min(end, top + len(part))
            values[begin - first : stop - first] = part[begin - top : stop - top]
        return values

    def _across(self, number: int) -> np.ndarray[Any, Any]:
        """Return the rows of the strips or tiles that lie beside each other; the last two of these are remembered."""
        if number in self._decoded:
            return self._decoded[number]
        page, (samples, height, width) = self._page, self.shape
        down = -(-height // self._height)
        across = -(-width // int(page.tilewidth)) if page.is_tiled else 1
        top = number * self._height
        values = np.zeros((min(self._height, height - top), width, samples), page.dtype)
        for plane in range(samples if self._is_planar else 1):
            for column in range(across):
                index = (plane * down + number) * across + column
                self._file.filehandle.seek(page.dataoffsets[index])
                stored = self._file.filehandle.read(page.databytecounts[index]) or None
                part, (*_, left, _), _ = page.decode(stored, index, jpegtables=page.jpegtables)
                if part is None:  # a tile of which nothing is stored
                    continue
                part = part[0][: len(values), : width - left]
                values[: len(part), left : left + part.shape[1], plane : plane + part.shape[2]] = part
        if len(self._decoded) > 1:
            del self._decoded[next(iter(self._decoded))]
        self._decoded[number] = values
        return values

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def make_empty(path: Path | str, size: tuple[int, int], dtype: Any, colours: Any = None) -> int:
    """Write a grey TIFF of zeros (height, width), or with a palette (3, 256) of 16 bits; return the offset of its first
    row. Rows follow each other without compression, so that others can be written there."""
    import tifffile

    kind = (
        {"photometric": "minisblack"} if colours is None else {"photometric": "palette", "colormap": colours}
    )
    written: Any = tifffile.imwrite(path, shape=size, dtype=dtype, returnoffset=True, metadata=None, **kind)
    return int(written[0])
