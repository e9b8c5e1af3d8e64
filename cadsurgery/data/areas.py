"""Read areas of interest: which pixels of a picture are asked for.

An area is a picture (what is not 0 is inside), boxes in JSON, or polygons in GeoJSON: in the coordinate system of the
raster, or in pixels of a picture that lies nowhere on the earth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data.images import read_image
from cadsurgery.data.tiff import coordinates_of, split_page
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.files import absent, as_file_error, exists

_JSON = (".json", ".geojson")
_KINDS = (
    "a picture (not 0 is inside), boxes as JSON ([[x0, y0, x1, y1], ...] in pixels), or polygons as GeoJSON"
)
_WITH_PARTS = {"FeatureCollection": "features", "Feature": "geometry", "GeometryCollection": "geometries"}
_EPSG = re.compile(r"EPSG:.*?(\d+)$|EPSG/.*?(\d+)$", re.IGNORECASE)
_LONGITUDES = "urn:ogc:def:crs:OGC:1.3:CRS84"  # of GeoJSON files that name no coordinate system
_WGS_84 = 4326
Ring = np.ndarray[Any, np.dtype[np.float64]]  # corners (k, 2), x and y in pixels
Rows = Callable[[int, int], Tensor]  # from first and end to which pixels of rows [first, end) are asked for


def read_area(
    path: Path | str, size: tuple[int, int], picture: object = "the picture", position: Sequence[Any] = ()
) -> Rows:
    """Read the area of interest of a picture; return which pixels of its rows [first, end) are inside, (rows, W).

    Args:
        path: the area's file.
        size: (height, width) of the picture.
        picture: its name, for messages.
        position: where it lies on the earth, see `TiffRows`.

    Raises:
        FileError: the file is missing, or holds no area.
        InvalidInput: it has another size or coordinate system than the picture, or no pixel of it is inside.
    """
    place = split_page(path)[0]
    if not exists(place):
        raise absent(place, "file")
    is_json = Path(place).suffix.lower() in _JSON
    area = _of_json(path, size, picture, position) if is_json else _of_picture(path, size, picture)
    if not any(bool(area(first, min(first + 256, size[0])).any()) for first in range(0, size[0], 256)):
        raise InvalidInput(
            f"no pixel of {picture} is inside the area.",
            where=str(path),
            why=_why_outside(path, size, position) if is_json else "all of it is 0.",
            next=f"give {_KINDS}.",
        )
    return area


def _of_picture(path: Path | str, size: tuple[int, int], picture: object) -> Rows:
    inside = (read_image(path, channels=None) != 0).any(0)
    (height, width), own = size, (inside.shape[0], inside.shape[1])
    if abs(own[0] * width - own[1] * height) > max(width, height):  # sides of a smaller copy are rounded
        raise InvalidInput(
            f"the area has {own[1]} x {own[0]} pixels, and {picture} has {width} x {height}.",
            where=str(path),
            next="give one of the same size, or a smaller copy of the same sides.",
        )
    columns = torch.arange(width) * own[1] // width

    def rows(first: int, end: int) -> Tensor:
        return inside[torch.arange(first, end) * own[0] // height][:, columns]

    return rows


def _of_json(path: Path | str, size: tuple[int, int], picture: object, position: Sequence[Any]) -> Rows:
    with as_file_error(f"{path} is no JSON file.", f"give {_KINDS}."):
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    is_geometry = isinstance(stored, dict) and "type" in stored
    to_pixels = _to_pixels(stored, path, picture, position) if is_geometry else None
    boxes: Any = stored.get("boxes") if isinstance(stored, dict) and not is_geometry else stored
    with as_file_error(f"{path} holds no area.", f"give {_KINDS}."):
        if to_pixels is not None:
            polygons = [[to_pixels(_ring(ring)) for ring in rings] for rings in _polygons(stored)]
        else:
            polygons = [[_outward(*map(float, box))] for box in boxes]
    return lambda first, end: _inside(polygons, first, end, size[1])


def _outward(x0: float, y0: float, x1: float, y1: float) -> Ring:
    """Return the corners of a box, whose fractions of pixels are rounded outwards."""
    if not (np.isfinite([x0, y0, x1, y1]).all() and x0 <= x1 and y0 <= y1):
        raise ValueError(f"{[x0, y0, x1, y1]} is no box x0, y0, x1, y1: left, top, right, bottom.")
    (left, top), (right, bottom) = np.floor([x0, y0]), np.ceil([x1, y1])
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def _ring(corners: Any) -> Ring:
    found = np.asarray(corners, np.float64)
    if found.ndim != 2 or found.shape[1] < 2 or len(found) < 3 or not np.isfinite(found).all():
        raise ValueError("a polygon has fewer than three corners, or one that is no x and y.")
    return found[:, :2]


def _polygons(stored: Any) -> Iterator[Any]:
    """Yield the polygons of GeoJSON, each as its rings: the outer one, and holes."""
    kind = stored["type"]
    if kind in _WITH_PARTS:
        parts = stored[_WITH_PARTS[kind]]
        for part in parts if isinstance(parts, list) else [parts]:
            yield from _polygons(part)
    elif kind in ("Polygon", "MultiPolygon"):
        yield from [stored["coordinates"]] if kind == "Polygon" else stored["coordinates"]
    else:
        raise ValueError(f"{kind} is no area: polygons are.")


def _to_pixels(
    stored: Any, path: Path | str, picture: object, position: Sequence[Any]
) -> Callable[[Ring], Ring]:
    """Return what turns coordinates of a GeoJSON file into pixels.

    Raises:
        InvalidInput: they are in another coordinate system than the picture, which has one.
    """
    transform, system = coordinates_of(position)
    if transform is None:
        if position:
            raise InvalidInput(
                f"{picture} is placed by control points or polynomials.",
                where=str(path),
                why="coordinates of its pixels do not follow from these exactly.",
                next="warp it first (gdalwarp), or give a picture of the area or boxes in pixels.",
            )
        return lambda ring: ring
    named = stored.get("crs")
    name = str((named.get("properties") or {}).get("name", "")) if isinstance(named, dict) else ""
    found = _EPSG.search(name)
    own = _WGS_84 if name == _LONGITUDES else int(found[1] or found[2]) if found else None
    if own is not None and system is not None and own != system:
        raise InvalidInput(
            f"the area is in the coordinate system EPSG:{own}, and {picture} in EPSG:{system}.",
            where=str(path),
            next=f"convert it: ogr2ogr -t_srs EPSG:{system} area-there.geojson {path}.",
        )
    (a, b, c), (d, e, f) = transform
    inverse = np.linalg.inv(np.array([[a, b], [d, e]]))
    return lambda ring: (ring - (c, f)) @ inverse.T


def _why_outside(path: Path | str, size: tuple[int, int], position: Sequence[Any]) -> str:
    transform, system = coordinates_of(position)
    if transform is None:
        return f"it has {size[1]} x {size[0]} pixels, and coordinates are counted in them from its top left corner."
    corners = [(0, 0), (size[1], 0), (0, size[0]), (size[1], size[0])]
    x, y = zip(*((a * u + b * v + c for a, b, c in transform) for u, v in corners), strict=True)
    words = f"it reaches from {min(x):.6g}, {min(y):.6g} to {max(x):.6g}, {max(y):.6g}"
    return f"{words} in its coordinate system{f', EPSG:{system}' if system else ''}; GeoJSON is read in that one."


def _inside(polygons: Sequence[Sequence[Ring]], first: int, end: int, width: int) -> Tensor:
    """Return the pixels of rows whose middle is inside a polygon and outside its holes, (rows, W)."""
    found = np.zeros((end - first, width), bool)
    for rings in polygons:
        starts = np.concatenate(rings)
        ends = np.concatenate([np.roll(ring, -1, 0) for ring in rings])
        low, high = np.minimum(starts[:, 1], ends[:, 1]), np.maximum(starts[:, 1], ends[:, 1])
        top, bottom = max(first, int(np.floor(low.min()))), min(end, int(np.ceil(high.max())))
        for row in range(top, bottom):
            middle = row + 0.5
            crossed = (low <= middle) & (middle < high)
            (x, y), (u, v) = starts[crossed].T, ends[crossed].T
            places = np.sort(x + (middle - y) * (u - x) / (v - y))
            # The first pixel whose middle is behind each crossing.
            columns = np.clip(np.ceil(places - 0.5), 0, width).astype(int)
            for begin, stop in zip(columns[::2], columns[1::2], strict=True):
                found[row - first, begin:stop] = True
    return torch.from_numpy(found)
