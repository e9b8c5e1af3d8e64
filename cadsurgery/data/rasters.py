"""Read rasters that GDAL reads, some rows at a time by rasterio: JPEG 2000, virtual mosaics and so on."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data.images import FORMATS
from cadsurgery.data.tiff import TILE, TiffRows, block_of, is_tiff, position_of, split_page
from cadsurgery.support.errors import FileError, import_optional
from cadsurgery.support.files import as_file_error

ENDINGS = (".vrt", ".img", ".jp2", ".asc", ".nc", ".grd", ".dt2", ".hgt")  # of rasters that need rasterio
_DECODED_BY_GDAL = ("compressed", "YCBCR", "PALETTE")  # in refusals of TIFF files that rasterio reads
_SMALLEST_TILE, _CACHE = 128, 64  # pixels a side of tiles with overviews; MB that GDAL keeps of them
_INSTALL = "pip install 'cadsurgery[raster]'"


def open_rows(path: Path | str) -> TiffRows | RasterRows:
    """Open a picture of which some rows are read at a time: a TIFF file by tifffile where that decodes it, else by
    rasterio if it is there.

    Raises:
        FileError: it cannot be read in rows.
        NotInstalled: it is a raster of another kind, and rasterio is not installed.
    """
    has_rasterio, place = find_spec("rasterio") is not None, split_page(path)[0]
    if is_tiff(place):
        try:
            return TiffRows(path)
        except FileError as refusal:
            if not (has_rasterio and any(word in refusal.why for word in _DECODED_BY_GDAL)):
                raise
            return RasterRows(path)
    ending = Path(place).suffix.lower()
    if ending in ENDINGS or (has_rasterio and ending not in FORMATS):
        return RasterRows(path)
    raise FileError(f"{path} cannot be read in rows.", next="store it as a TIFF file, in tiles.")


class RasterRows:
    """A raster, of which some rows are read at a time; it has the attributes of `TiffRows`. A palette is three bands,
    the colours that it stands for."""

    def __init__(self, path: Path | str) -> None:
        """Open a file, or a smaller copy of its picture: `FILE,level=N`; see `close`.

        Raises:
            FileError: GDAL does not read it, there is no such copy, or it holds complex numbers.
            NotInstalled: rasterio is not installed.
        """
        rasterio = import_optional("rasterio", "rasters of this kind are read by rasterio.", _INSTALL)
        place, named = split_page(path)
        options: dict[str, Any] = {}
        if named is not None and named[0] == "page":
            if not is_tiff(place):
                raise FileError(f"{place} has no pages.", next="leave out page=, which is for TIFF files.")
            place = f"GTIFF_DIR:{named[1] + 1}:{place}"
        elif named is not None and named[1]:
            options = {"overview_level": named[1] - 1}
        with _reading(path), warnings.catch_warnings(action="ignore"):  # it lies nowhere on the earth
            self._file = rasterio.open(place, **options)
        file, self._path = self._file, path
        self._kind = np.dtype(file.dtypes[0])
        if self._kind.kind not in "uif" or not file.count:
            self.close()
            raise FileError(
                f"{path} holds values of type {self._kind}, in {file.count} bands.",
                next="store integers or floating-point values; of files with several rasters name one: GDAL's "
                "FORMAT:FILE:NAME.",
            )
        colours = [colour.name for colour in file.colorinterp]
        self.has_alpha = colours[-1] == "alpha"
        is_palette = colours[: len(colours) - self.has_alpha] == ["palette"] and self._kind.kind == "u"
        self._palette = _palette_of(file, self._kind) if is_palette else None
        bands = file.count if self._palette is None else self._palette.shape[1] + self.has_alpha
        self.shape = (bands, file.height, file.width)
        self._is_masked = any(
            "all_valid" not in {flag.name for flag in flags} for flags in file.mask_flag_enums
        )
        has_gaps = self._palette is not None and bool(np.isnan(self._palette).any())
        self.may_lack = self._is_masked or self._kind.kind == "f" or has_gaps
        self.position = _position_of(file)
        self.block = block_of(*file.block_shapes[0])

    def rows(self, first: int, end: int, left: int = 0, right: int | None = None) -> Tensor:
        """Return rows [first, end) and columns [left, right), (C, rows, columns) float32: integers divided by the
        largest value of their type; NaN where a band has no data.

        Raises:
            FileError: they cannot be read.
        """
        window = ((first, end), (left, self.shape[2] if right is None else right))
        with _reading(self._path):
            values = self._file.read(window=window)
            there = self._file.read_masks(window=window) > 0 if self._is_masked else None
        scaled = values.astype(np.float32)
        if self._kind.kind != "f":
            scaled = (values / float(np.iinfo(self._kind).max)).astype(np.float32)
        if self._palette is not None:
            scaled = np.concatenate([np.moveaxis(self._palette[values[0]], -1, 0), scaled[1:]])
        if there is not None:
            colours = scaled[: len(scaled) - self.has_alpha]
            colours[np.broadcast_to(~there[: len(there) - self.has_alpha], colours.shape)] = np.nan
        return torch.from_numpy(scaled)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _palette_of(file: Any, kind: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return the colour (entries, 3) of each value of a raster's palette, float32; NaN where it is transparent."""
    found = np.zeros((np.iinfo(kind).max + 1, 3), np.float32)
    for value, (*colour, alpha) in file.colormap(1).items():
        found[value] = np.divide(colour, 255) if alpha else np.nan
    return found


def check_overviews() -> None:
    """Refuse to write overviews where rasterio is not installed.

    Raises:
        NotInstalled: it is not.
    """
    import_optional("rasterio", "overviews are made by rasterio.", _INSTALL)


def add_overviews(path: Path, block: tuple[int, int], is_classes: bool) -> None:
    """Turn a tiled TIFF file of a temporary folder into a cloud-optimised one (COG): the same values, tags and palette,
    and smaller copies down to one tile. A pixel of these has the most frequent class of its area, or the mean of the
    values there."""
    import rasterio
    import rasterio.shutil

    side = block[0] if block[0] == block[1] and block[0] >= _SMALLEST_TILE else TILE
    other = path.with_name(f"{path.name}.cog")
    quiet = warnings.catch_warnings(action="ignore")  # of rasters that lie nowhere on the earth
    with _reading(path), rasterio.Env(GDAL_CACHEMAX=_CACHE), quiet:
        rasterio.shutil.copy(
            path,
            other,
            driver="COG",
            compress="DEFLATE",
            predictor="YES",
            blocksize=side,
            bigtiff="IF_SAFER",
            overview_resampling="MODE" if is_classes else "AVERAGE",
        )
    other.replace(path)


def _reading(path: Path | str) -> AbstractContextManager[None]:
    return as_file_error(f"{path} cannot be read as a raster.", "gdalinfo says what GDAL finds in it.")


def _position_of(file: Any) -> tuple[Any, ...]:
    """Return the position of a raster as tags of GeoTIFF, which GDAL writes for a picture of one pixel."""
    import tifffile
    from rasterio.io import MemoryFile

    gcps, crs_of_gcps = file.gcps
    where = {"gcps": gcps, "crs": crs_of_gcps} if gcps else {"transform": file.transform, "crs": file.crs}
    if not gcps and (file.transform.is_degenerate or (file.crs is None and file.transform.is_identity)):
        return ()  # GDAL gives no numbers at all for PGM and PPM
    profile = {"driver": "GTiff", "height": 1, "width": 1, "count": 1, "dtype": "uint8"}
    with MemoryFile() as memory:
        with memory.open(**profile, **where) as one:
            one.write(np.zeros((1, 1, 1), np.uint8))
        memory.seek(0)
        with tifffile.TiffFile(memory) as written:
            return position_of(written.pages.first)
