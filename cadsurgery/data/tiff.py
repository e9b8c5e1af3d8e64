"""Read TIFF files: the picture among their pages, with any number of bands, of integer or floating-point values; planar
or chunky, in strips or tiles. What only Pillow decodes is left to it. Files that do not fit into memory are read and
written some rows at a time."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data.limits import check_pixels
from cadsurgery.support import files
from cadsurgery.support.errors import FileError

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _OF_MASK = 0, 1, 2, 4
_PLAIN = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _OF_MASK)  # kinds of values that are read as they are
_REDUCED, _MASK = 1, 4  # kinds of further pictures: smaller copies, and masks of transparency
_UNSIGNED = 1
ORIENTATION, NO_DATA = 274, 42113  # tags; the second is GDAL's
_BAND_AXES = "SC"  # samples and channels: bands of one picture
TILE = 512  # pixels a side, of files that are written
_SLIDE = "Baseline"  # tifffile's name of the slide in files of slide scanners
_NAMED = re.compile(r"(.+),(page|level)=(\d+)")
# Which picture of a file is meant: ("page", 2), or ("level", 1) of its smaller copies.
Named = tuple[str, int]
_LISTED = 8  # pages in a message
_SIGN_BITS = {"u": 0, "i": 1, "b": 0}  # of integers, by NumPy's letter for their kind


def is_tiff(path: Path | str, content: bytes | None = None) -> bool:
    """True if a file begins as TIFF files do."""
    if content is not None:
        return content[:4] in _MAGIC
    try:
        with open(path, "rb") as file:
            return file.read(4) in _MAGIC
    except (OSError, ValueError):  # no file can have this name
        return False


def split_page(path: Path | str) -> tuple[Path | str, Named | None]:
    """Split `FILE,page=N` or `FILE,level=N` into the file and what is named: a page, from 0 on, or the picture in full
    (0) and its smaller copies, the largest first; None for a path without either."""
    named = _NAMED.fullmatch(str(path))
    if named is None or files.exists(path):
        return path, None
    return named[1], (named[2], int(named[3]))


def read_bands(
    path: Path | str, content: bytes | None = None, *, upright: bool = True
) -> tuple[Tensor, bool] | int:
    """Read all bands of a TIFF file as (C, H, W) float32.

    Integers are divided by the largest value of their type; where 0 is white, they are inverted. Floating-point values
    are returned as they are. Values that GDAL's tag calls no data are NaN.

    Args:
        path: the file, a page of it, `FILE,page=N`, or a smaller copy of its picture, `FILE,level=N`.
        content: its content, if it was read before.
        upright: turn the picture by its orientation.

    Returns:
        The bands, and True if the last one is transparency; or the number of the page, if it is left to Pillow.

    Raises:
        FileError: the file holds several pictures, too many pixels, values of another kind, or is compressed by a
            method that needs another package.
    """
    stored = _read(path, content)
    if isinstance(stored, int):
        return stored
    values, picture = stored
    page = picture.page
    if int(page.photometric) not in _PLAIN:
        raise FileError(
            f"{path} holds values of kind {_name(page.photometric)}.", next="store it in grey or in colour."
        )
    scaled = turned(_scale(values, picture, path), _orientation_of(page) if upright else 1)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(scaled, -1, 0))), _has_alpha(page)


def count_masked(path: Path | str, content: bytes | None = None) -> int:
    """Return the number of pixels that the mask of a TIFF file says have no data."""
    with _opened(path, content) as (_, picture):
        mask = _mask_of(path, picture, content)
    if mask is None:
        return 0
    with contextlib.closing(mask):
        return int((mask.rows(0, mask.shape[1]).amin(0) == 0).sum())


def read_stored(path: Path | str) -> np.ndarray[Any, Any] | int:
    """Return the values of a TIFF file (H, W, C) as it stores them, upright; see `read_bands`."""
    read = _read(path, None)
    return read if isinstance(read, int) else turned(read[0], _orientation_of(read[1].page))


def _read(path: Path | str, content: bytes | None) -> tuple[np.ndarray[Any, Any], _PagesPicture] | int:
    with _opened(path, content) as (file, picture):
        page = picture.page
        if picture.is_one_page and isinstance(page.index, int) and _is_for_pillow(page, file):
            return page.index
        check_pixels(path, page.imagelength, page.imagewidth)
        if _lacks_codec(page):
            raise FileError(
                f"{path} is compressed by {_name(page.compression)}, which cannot be decoded here.",
                why="TIFF files of this kind are read by tifffile, which decodes this compression with the package "
                "imagecodecs.",
                next="pip install imagecodecs; or store the file without compression, or compressed by deflate "
                "without a predictor for floating-point values.",
            )
        with _decoding(path):
            values: np.ndarray[Any, Any] = picture.read().reshape(picture.shape)
    bands = picture.bands
    return values[..., None] if not bands else np.moveaxis(values, picture.axes.index(bands), -1), picture


def turned(pixels: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Return pixels (H, W, C) as they are shown, by the number of an orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    down, across = (-1 if orientation in mirrored else 1 for mirrored in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return pixels[::down, ::across]


def _orientation_of(page: Any) -> int:
    return int(page.tags.valueof(ORIENTATION, 1))


@dataclass(frozen=True)
class _PagesPicture:
    """A picture of a TIFF file.

    Attributes:
        page: its page, or the first one, which has its tags.
        axes: letters of its axes but rows and columns only if they are longer than 1.
        shape: their lengths.
        read: returns its values.
        original: the page of the picture in full, whose tags hold for a smaller copy, too.
        mask: number of the page that says which pixels have data; None if there is none.
    """

    page: Any
    axes: str
    shape: tuple[int, ...]
    read: Callable[[], Any]
    original: Any
    mask: int | None

    @classmethod
    def of(cls, stored: Any, original: Any, file: Any) -> _PagesPicture:
        """Return that of a page or a series of tifffile; `original` is the page of the picture in full. Its mask is the
        page that GDAL writes."""
        axes = zip(stored.axes, stored.shape, strict=True)
        kept = [(axis, count) for axis, count in axes if axis in "YX" or count > 1]
        letters, shape = "".join(axis for axis, _ in kept), tuple(count for _, count in kept)
        page = _page_of(stored)
        alike = () if _is_mask(page) else (one for one in _pages_of(file) if _size_of(one) == _size_of(page))
        mask = next((one.index for one in alike if _is_mask(one)), None)
        return cls(page, letters, shape, stored.asarray, original, mask)

    @property
    def no_data(self) -> object:
        """What GDAL's tag states for pixels without data; None if it states nothing."""
        stated = self.page.tags.valueof(NO_DATA)
        return self.original.tags.valueof(NO_DATA) if stated is None else stated

    @property
    def position(self) -> tuple[Any, ...]:
        """Tags that say where it lies on the earth; empty if there are none."""
        sizes = zip(_size_of(self.original), _size_of(self.page), strict=True)
        return moved_position(position_of(self.original), [length / own for length, own in sizes])

    @property
    def bands(self) -> str:
        """The axis of the bands; empty for one band."""
        return self.axes.strip("YX")

    @property
    def is_one_page(self) -> bool:
        """True if all of it is in one page."""
        return math.prod(self.shape) == int(self.page.size)

    @property
    def is_flat(self) -> bool:
        """True for a picture, or several bands of one; False for a volume or a stack of pictures."""
        return set(self.axes) >= {*"YX"} and len(self.bands) <= 1 and set(self.bands) <= set(_BAND_AXES)


@contextlib.contextmanager
def _opened(path: Path | str, content: bytes | None) -> Iterator[tuple[Any, _PagesPicture]]:
    """Open a TIFF file, or its content if that was read before, and find the picture that a path names."""
    import tifffile

    place, named = split_page(path)
    with tifffile.TiffFile(place if content is None else io.BytesIO(content)) as file:
        yield file, _picture_of(file, place, named)


def _picture_of(file: Any, path: Path | str, named: Named | None) -> _PagesPicture:
    """Return the picture of a page, or the only one of its file, in full or a smaller copy: copies that are marked as
    reduced, masks, and what makers of slide scanners write beside the slide (labels, thumbnails) are none.

    Raises:
        FileError: there is no such page or copy, or there are several pictures.
    """
    kind, number = named or ("level", 0)
    if kind == "page":
        if number >= len(file.pages):
            raise _of_several(path, file, f"{path} has no page {number}")
        page = file.pages[number].aspage()
        picture = _PagesPicture.of(page, _original_of(page, file), file)
    else:
        parts = _pictures_in(file)
        count = sum(len(full) for _, full in parts)
        entry, full = parts[0]
        if len(parts) > 1 or len(full) not in (1, len(entry.pages)):
            raise _of_several(path, file, f"{path} holds {count} pictures")
        levels = [full[0] if count == 1 and len(entry.pages) > 1 else entry]
        levels += entry.levels[1:] or _copies_of(full[0], file)
        if number >= len(levels):
            sizes = ", ".join("{1} x {0}".format(*_size_of(_page_of(one))) for one in levels)
            raise FileError(
                f"{path} has no level {number}.",
                why=f"its picture is stored in {sizes} pixels.",
                next=f"name 0 for the picture in full, to {len(levels) - 1}.",
            )
        picture = _PagesPicture.of(levels[number], _page_of(levels[0]), file)
    if not picture.is_flat:
        page = picture.page
        count = math.prod(picture.shape) // int(page.imagelength * page.imagewidth * page.samplesperpixel)
        raise _of_several(path, file, f"{path} holds {count} pictures")
    return picture


def _pictures_in(file: Any) -> list[tuple[Any, list[Any]]]:
    """Return tifffile's series that hold pictures in full, and their pages that do."""
    all_series = [entry for entry in file.series if entry.name == _SLIDE] or file.series
    parts = [(entry, [page for page in entry.pages if not _is_secondary(page)]) for entry in all_series]
    return [part for part in parts if part[1]] or [(entry, [*entry.pages]) for entry in all_series]


def _original_of(page: Any, file: Any) -> Any:
    """Return the page of which one is a smaller copy; itself if it is none."""
    full = [one for _, pages in _pictures_in(file) for one in pages] if _is_secondary(page) else []
    return full[0].aspage() if len(full) == 1 and _is_copy(page, full[0]) else page


def _copies_of(full: Any, file: Any) -> list[Any]:
    """Return the smaller copies of a page, the largest first."""
    marked = (page for page in _pages_of(file) if _is_secondary(page) and not _is_mask(page))
    copies = [page for page in marked if _is_copy(page, full)]
    return sorted(copies, key=_size_of, reverse=True)


def _is_copy(page: Any, full: Any) -> bool:
    """True for a page with the sides of another one, each divided by the same number and rounded."""
    (height, width), (whole_height, whole_width) = _size_of(page), _size_of(full.aspage())
    return abs(width * whole_height - height * whole_width) <= 2 * max(whole_height, whole_width)


def _size_of(page: Any) -> tuple[int, int]:
    return int(page.imagelength), int(page.imagewidth)


def _of_several(path: Path | str, file: Any, what: str) -> FileError:
    """Return the error for a file whose picture has to be named, which lists its pages."""
    pages = [
        f"page {number}: {page.imagewidth} x {page.imagelength}, {page.samplesperpixel} of {page.dtype}"
        for number, page in enumerate(itertools.islice(_pages_of(file), _LISTED))
    ]
    more = [f"and {len(file.pages) - _LISTED} more"] * (len(file.pages) > _LISTED)
    return FileError(
        f"{what}: {'; '.join([*pages, *more])}.",
        next=f"name a page: {path},page=0; or store the picture in a file of its own. Bands of one picture are samples "
        "of its pixels (in tifffile: planarconfig).",
    )


def _has_alpha(page: Any) -> bool:
    extras = tuple(page.extrasamples)
    is_colour = page.photometric in (_BLACK_IS_ZERO, _RGB)
    return bool(is_colour and extras and int(extras[-1]) in (1, 2))


def _is_for_pillow(page: Any, file: Any) -> bool:
    """True for what only Pillow decodes as it is shown: palettes, other colours than red, green and blue, values packed
    in bytes, and compressions that tifffile lacks."""
    unsigned = int(page.sampleformat) == _UNSIGNED
    samples, bits, photometric = page.samplesperpixel, page.bitspersample, int(page.photometric)
    if not unsigned or bits > 16 or photometric == _OF_MASK or (file.is_bigtiff and file.byteorder == ">"):
        return False
    if photometric not in _PLAIN:
        return True  # palettes, CMYK, luma and chroma
    # A fourth sample of unknown meaning is a band, which Pillow would leave out.
    extras = tuple(map(int, page.extrasamples))
    usual = 3 if photometric == _RGB else 1
    is_usual = samples == usual or (samples == usual + 1 and extras in ((1,), (2,)))
    is_read = is_usual and (bits <= 8 or samples == 1)
    return is_read and (bits % 8 > 0 or extras == (1,) or _lacks_codec(page))


def _is_secondary(page: Any, kinds: int = _REDUCED | _MASK) -> bool:
    return bool(int(getattr(page, "subfiletype", 0)) & kinds)  # some pages are as the first one


def _is_mask(page: Any) -> bool:
    return _is_secondary(page, _MASK)


def _pages_of(file: Any) -> Iterator[Any]:
    return (entry.aspage() for entry in file.pages)


def _page_of(stored: Any) -> Any:
    """Return a page, or the first one of a series."""
    return getattr(stored, "keyframe", stored)


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))


def _lacks_codec(page: Any) -> bool:
    from tifffile import TIFF

    return page.compression not in TIFF.DECOMPRESSORS or page.predictor not in TIFF.UNPREDICTORS


def _decoding(path: Path | str) -> contextlib.AbstractContextManager[None]:
    return files.as_file_error(f"{path} cannot be read as an image.", "write the file again.")


def _scale(values: np.ndarray[Any, Any], picture: _PagesPicture, path: Path | str) -> np.ndarray[Any, Any]:
    """Return values as float32: integers divided by the largest value of their type, others as they are; those without
    data are NaN."""
    page, kind = picture.page, values.dtype.kind
    if kind == "f":
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, and refused like NaN
            scaled = values.astype(np.float32)
    elif kind in _SIGN_BITS:
        bits = int(page.bitspersample) - _SIGN_BITS[kind]
        scaled = (values / (2.0**bits - 1)).astype(np.float32)
    else:
        raise FileError(
            f"{path} holds values of type {values.dtype}.", next="store integers or floating-point values."
        )
    if (is_lacking := without_data(values, picture.no_data)) is not None:
        scaled[is_lacking] = np.nan
    return 1 - scaled if int(page.photometric) == _WHITE_IS_ZERO and kind != "i" else scaled


def _mask_of(path: Path | str, picture: _PagesPicture, content: bytes | None = None) -> TiffRows | None:
    """Return the mask of a picture, 0 where it has no data: a page of its file, or GDAL's file beside it."""
    place, named = split_page(path)
    if picture.mask is not None:
        return TiffRows(f"{place},page={picture.mask}", content)
    beside = f"{place}.msk"
    if not is_tiff(beside) or (named is not None and named[0] == "page"):
        return None
    mask = TiffRows(beside if named is None else f"{beside},level={named[1]}")
    if mask.shape[1:] == _size_of(picture.page):
        return mask
    mask.close()
    return None


def without_data(values: np.ndarray[Any, Any], stated: object) -> np.ndarray[Any, Any] | None:
    """Return where values are the one that GDAL's tag states for pixels without data; None if it states none."""
    try:
        number = float(str(stated).strip("\0 "))
    except ValueError:  # no tag, or one that is no number
        return None
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return values == values.dtype.type(number)
    limits = np.iinfo(np.uint8 if values.dtype.kind == "b" else values.dtype)
    if not number.is_integer() or not limits.min <= number <= limits.max:
        return None  # no value of this type
    return values == values.dtype.type(int(number))


# -- pictures that do not fit into memory --------------------------------------------------------------

_MOST_DECODED = 2**28  # bytes of the strips or tiles that lie beside each other, which are decoded as a whole


class TiffRows:
    """The picture of a TIFF file, of which some rows are read at a time.

    Attributes:
        shape: (C, H, W) with all bands of the file.
        has_alpha: True if the last band is transparency.
        may_lack: True if some pixels may have no data: values that are not finite, or transparent ones, mark them.
        position: tags that say where the picture lies on the earth, as `write_tiled` takes them.
        block: (height, width) of its tiles, for files that are written; of strips those of a usual tile.
    """

    def __init__(self, path: Path | str, content: bytes | None = None) -> None:
        """Open a file, `FILE,page=N` or `FILE,level=N`, or its content, if that was read before; see `close`.

        Raises:
            FileError: it holds several pictures, or one that is turned, has a palette, or is not stored in small
                pieces.
        """
        self._path, self._decoded = path, dict[int, np.ndarray[Any, Any]]()
        with contextlib.ExitStack() as opened:
            with files.as_file_error(f"{path} cannot be read as a TIFF.", "write the file again."):
                self._file, picture = opened.enter_context(_opened(path, content))
            self._picture, self._page = picture, picture.page
            page, samples = picture.page, int(picture.page.samplesperpixel)
            self.shape, self.has_alpha = (samples, *_size_of(page)), _has_alpha(page)
            self.position = picture.position
            self.block = (
                block_of(int(page.tilelength), int(page.tilewidth)) if page.is_tiled else (TILE, TILE)
            )
            self._is_planar = samples > 1 and int(page.planarconfig) != 1
            is_whole = page.dtype is not None and page.bitspersample == 8 * page.dtype.itemsize
            self._is_raw = bool(
                is_whole and page.is_contiguous and page.compression == 1 and page.predictor == 1
            )
            self._height = int(page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength))
            if (refusal := self._refusal(picture)) is not None:
                raise refusal
            self._mask = _mask_of(path, picture)
            if self._mask is not None:
                opened.callback(self._mask.close)
            self._opened = opened.pop_all()
        is_stated = picture.no_data is not None or self.has_alpha or self._mask is not None
        self.may_lack = is_stated or page.dtype.kind == "f"

    def _refusal(self, picture: _PagesPicture) -> FileError | None:
        """Return why the file cannot be read in rows, if so."""
        page, (samples, _, width) = self._page, self.shape
        if not picture.is_one_page:
            why = "its bands are in several pages."
        elif _lacks_codec(page):
            why = f"it is compressed by {_name(page.compression)}, which needs the package imagecodecs."
        elif page.dtype is None:
            why = f"its values have {page.bitspersample} bits."
        elif _orientation_of(page) != 1:
            why = "its orientation says that it is shown turned or mirrored."
        elif int(page.photometric) not in _PLAIN:
            why = f"its values are of kind {_name(page.photometric)}."
        elif not self._is_raw and self._height * width * samples * page.dtype.itemsize > _MOST_DECODED:
            why = f"it is stored in pieces of {self._height} rows, which are decoded as a whole."
        else:
            return None
        return FileError(
            f"{self._path} cannot be read in rows.",
            why=why,
            next="store it upright in grey or colour, in tiles (in tifffile: tile=(512, 512)).",
        )

    def rows(self, first: int, end: int, left: int = 0, right: int | None = None) -> Tensor:
        """Return rows [first, end) and columns [left, right), (C, rows, columns) float32, with values as `read_bands`
        gives them.

        Raises:
            FileError: they cannot be decoded.
        """
        with _decoding(self._path):
            columns = slice(left, right)
            values = (
                self._stored(first, end)[:, columns] if self._is_raw else self._pasted(first, end, columns)
            )
        scaled = _scale(values, self._picture, self._path)
        if self._mask is not None:
            scaled[self._mask.rows(first, end, left, right).numpy().min(0) == 0] = np.nan
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(scaled, -1, 0)))

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

    def _pasted(self, first: int, end: int, columns: slice) -> np.ndarray[Any, Any]:
        """Put rows (rows, columns, C) together from strips or tiles."""
        left, right, _ = columns.indices(self.shape[2])
        values = np.empty((end - first, right - left, self.shape[0]), self._page.dtype)
        for number in range(first // self._height, -(-end // self._height)):
            top = number * self._height
            part = self._across(number)
            begin, stop = max(first, top), min(end, top + len(part))
            values[begin - first : stop - first] = part[begin - top : stop - top, columns]
        return values

    def _across(self, number: int) -> np.ndarray[Any, Any]:
        """Return the rows of the strips or tiles that lie beside each other; the last two of these are remembered."""
        if number in self._decoded:
            return self._decoded[number]
        page, (samples, height, width) = self._page, self.shape
        down = -(-height // self._height)
        across = -(-width // int(page.tilewidth)) if page.is_tiled else 1
        top = number * self._height
        values = np.full((min(self._height, height - top), width, samples), page.nodata, page.dtype)
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
        self._opened.close()


_LARGEST_TILE, _TILE_UNIT = 4096, 16  # pixels a side, of tiles that are written as they are in a picture


def block_of(height: int, width: int) -> tuple[int, int]:
    """Return the size of the tiles to write for a picture whose blocks have a size: the same if TIFF files may have
    it."""
    is_kept = all(0 < side <= _LARGEST_TILE and side % _TILE_UNIT == 0 for side in (height, width))
    return (height, width) if is_kept else (TILE, TILE)


# Tags of GeoTIFF and of GDAL: scale of pixels, tie points, a transform, coordinate system, rational polynomials.
_SCALE, _TIE_POINTS, _TRANSFORM, _KEYS, _POLYNOMIALS = 33550, 33922, 34264, 34735, 50844
_POSITION = (_SCALE, _TIE_POINTS, _TRANSFORM, _KEYS, 34736, 34737, _POLYNOMIALS)
_SYSTEMS, _OWN_SYSTEM = (
    (3072, 2048),
    32767,
)  # keys of a projected and a geographic system; number of one's own
_RASTER_TYPE, _POINT = 1025, 2  # the key that says whether coordinates are those of the middle of pixels
_METADATA = 42112  # GDAL's own, as XML; items of a band describe its values


def position_of(page: Any) -> tuple[Any, ...]:
    """Return the tags of a page that say where its picture lies; empty if there are none."""
    tags = [tag for code in _POSITION if (tag := page.tags.get(code)) is not None]
    found = [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in tags]
    if found and (stated := page.tags.valueof(_METADATA)) is not None:
        kept = re.sub(r"\s*<Item[^>]*\ssample=[^>]*>.*?</Item>", "", str(stated), flags=re.DOTALL)
        found.append((_METADATA, 2, None, kept, True))
    return tuple(found)


def position_at(path: Path | str) -> tuple[Any, ...]:
    """Return what a TIFF file says of where its picture lies on the earth, see `TiffRows`; empty for other files."""
    place = split_page(path)[0]
    if not str(place).lower().endswith((".tif", ".tiff")) or not is_tiff(place):
        return ()
    with contextlib.suppress(Exception), _opened(path, None) as (_, picture):  # reported where it is read
        return picture.position
    return ()


def coordinates_of(
    position: Sequence[Any],
) -> tuple[tuple[tuple[float, float, float], tuple[float, float, float]] | None, int | None]:
    """Return what a position, see `TiffRows`, says of coordinates: the two rows (a, b, c) of the transform that turns
    column x and row y of a pixel's corner into a x + b y + c, and the EPSG number of the coordinate system; None for
    what it does not state."""
    values = {code: value for code, _, _, value, _ in position}
    keys = {key: value for key, place, _, value in _rows_of(values.get(_KEYS, ()), 4) if not place}
    middle = 0.5 if keys.get(_RASTER_TYPE) == _POINT else 0.0
    system = next((keys[key] for key in _SYSTEMS if 0 < keys.get(key, 0) < _OWN_SYSTEM), None)
    if _TRANSFORM in values:
        a, b, _, c, d, e, _, f = values[_TRANSFORM][:8]
    elif _SCALE in values and len(values.get(_TIE_POINTS, ())) == 6:
        (x, y, _, east, north, _), (across, down, *_) = values[_TIE_POINTS], values[_SCALE]
        (a, b, c), (d, e, f) = (across, 0.0, east - x * across), (0.0, -down, north + y * down)
    else:
        return None, system
    return ((a, b, c - middle * (a + b)), (d, e, f - middle * (d + e))), system


def moved_position(position: Sequence[Any], steps: Sequence[float]) -> tuple[Any, ...]:
    """Return the tags of a position, see `TiffRows`, for pixels as large as so many of them, down and across."""
    keys = next((value for code, _, _, value, _ in position if code == _KEYS), ())
    is_point = any(key == _RASTER_TYPE and value == _POINT for key, *_, value in _rows_of(keys, 4))
    middle = 0.5 if is_point else 0.0
    down, across = (1 / step for step in steps)

    def at(place: float, factor: float, middle: float) -> float:
        """Return the coordinate among pixels that are `factor` times as many; `middle` is that of pixel 0."""
        return (place + middle) * factor - middle

    def moved(code: int, value: Any) -> Any:
        if code == _SCALE:
            return (value[0] / across, value[1] / down, *value[2:])
        if code == _TIE_POINTS:
            points = (
                (at(x, across, middle), at(y, down, middle), *rest) for x, y, *rest in _rows_of(value, 6)
            )
            return tuple(itertools.chain.from_iterable(points))
        if code == _TRANSFORM:
            first = at(0, 1 / across, middle), at(0, 1 / down, middle)
            rows = (
                (x / across, y / down, z, x * first[0] + y * first[1] + start)
                for x, y, z, start in _rows_of(value, 4)
            )
            return (*itertools.chain.from_iterable(itertools.islice(rows, 3)), *value[12:])
        if code == _POLYNOMIALS:  # of lines and samples, counted from the middle of the first pixel
            line, sample = at(value[2], down, 0.5), at(value[3], across, 0.5)
            return (*value[:2], line, sample, *value[4:7], value[7] * down, value[8] * across, *value[9:])
        return value

    return tuple((code, kind, count, moved(code, value), once) for code, kind, count, value, once in position)


def _rows_of(values: Sequence[Any], length: int) -> Iterator[Sequence[Any]]:
    return (values[first : first + length] for first in range(0, len(values), length))


def write_tiled(
    path: Path | str,
    size: tuple[int, int],
    dtype: Any,
    rows: Callable[[int, int], np.ndarray[Any, Any]],
    colours: Any = None,
    position: Sequence[Any] = (),
    block: tuple[int, int] = (TILE, TILE),
) -> None:
    """Write a grey TIFF (height, width), or with a palette (3, 256) of 16 bits, in tiles compressed by deflate, with a
    predictor where tifffile has the one for the type; as BigTIFF where it takes that. No more than the rows of a tile
    are asked for at a time, by `rows(first, end)`. `position` is that of a picture, see `TiffRows`."""
    import tifffile

    (height, width), (down, across) = size, block

    def tiles() -> Iterator[np.ndarray[Any, Any]]:
        for first in range(0, height, down):
            band = rows(first, min(first + down, height))
            yield from (
                np.ascontiguousarray(band[:, left : left + across]) for left in range(0, width, across)
            )

    predictor = 2 if np.dtype(dtype).kind in "ui" else 3
    tifffile.imwrite(
        path,
        tiles(),
        shape=size,
        dtype=dtype,
        tile=block,
        photometric="minisblack" if colours is None else "palette",
        colormap=colours,
        compression="zlib",
        predictor=predictor if predictor in tifffile.TIFF.PREDICTORS else None,
        metadata=None,
        extratags=position,
    )
