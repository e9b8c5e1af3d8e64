"""Read pictures whose values Pillow would round to 8 bits or to another range: PNG of 16 bits in several bands, PGM and
PPM of any range. Other formats of more than 8 bits in colour are refused."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

from cadsurgery.support.errors import FileError

_HEAD = 2**16  # bytes among which the depth of a format is stated
_ALPHA = (2, 4)  # bands of a PNG whose last one is transparency
# Magic number, width, height and largest value of a PGM or PPM; comments may stand between them.
_PNM = re.compile(rb"P([2356])" + rb"(?:\s|#[^\r\n]*)+(\d+)" * 3 + rb"\s")


_OPENING = threading.Lock()


def open_large(source: Path | str | IO[bytes]) -> Image.Image:
    """Open a picture without PIL's limit of 179 million pixels; the limit stays for everybody else."""
    with _OPENING, mock.patch.object(Image, "MAX_IMAGE_PIXELS", None):
        return Image.open(source)


class DeepPicture(NamedTuple):
    """The values of a picture as its file stores them.

    Attributes:
        values: (H, W, C) integers.
        largest: the value that stands for white.
        has_alpha: True if the last band is transparency.
    """

    values: np.ndarray[Any, Any]
    largest: int
    has_alpha: bool


def read_deep(picture: Image.Image, name: object) -> DeepPicture | None:
    """Return the stored values of a picture that Pillow has opened and not decoded; None if Pillow keeps them.

    Raises:
        FileError: the format has values of more than 8 bits, which Pillow would round.
    """
    file: IO[bytes] | None = getattr(picture, "fp", None)
    tiles: Any = getattr(picture, "tile", None)
    if file is None or not tiles:  # decoded before, or made in memory
        return None
    raw = str(tiles[0][3])
    if picture.format == "PNG" and ";16B" in raw and len(picture.getbands()) > 1:
        return _png(_content(file), raw)
    if picture.format == "PPM":
        return _pnm(_content(file))
    if picture.format == "TIFF":
        depth = 16 if ";16" in raw else 8
    else:
        depth = _DEPTHS.get(picture.format or "", lambda head: 8)(_content(file, _HEAD))
    is_kept = depth <= 8 or (
        picture.mode.startswith("I") and picture.format in ("TIFF", "JPEG2000") and depth == 16
    )
    if not is_kept:
        raise FileError(
            f"{name} is of format {picture.format} with more than 8 bits for each colour.",
            why="its values would be rounded.",
            next="store it as PNG or TIFF of 16 bits in grey or red, green and blue; or in 8 bits.",
        )
    return None


def _content(file: IO[bytes], most: int = -1) -> bytes:
    """Return what a file begins with, and stay where it is read."""
    place = file.tell()
    file.seek(0)
    content = file.read(most)
    file.seek(place)
    return content


def _png(content: bytes, raw: str) -> DeepPicture:
    """Decode a PNG of 16 bits in several bands by Pillow, whose modes hold a byte of each value."""
    if raw == "LA;16B":  # both bytes of both values, as four bands
        pair = _decoded(content, "RGBA")
        high, low = pair[..., ::2], pair[..., 1::2]
    else:
        high, low = _decoded(content, raw), _decoded(content, raw.replace("16B", "16L"))
    values = high.astype(np.uint16) << 8 | low
    return DeepPicture(values, np.iinfo(values.dtype).max, values.shape[2] in _ALPHA)


def _decoded(content: bytes, raw: str) -> np.ndarray[Any, Any]:
    """Return the pixels of a picture (H, W, C), unpacked as a raw mode of Pillow says."""
    picture: Any = open_large(io.BytesIO(content))
    codec, box, offset, _ = picture.tile[0]
    picture.tile = [(codec, box, offset, raw)]
    return np.array(picture)


def _pnm(content: bytes) -> DeepPicture | None:
    """Read a PGM or PPM, plain or binary; None where Pillow keeps the values: of one bit, and up to 255."""
    found = _PNM.match(content)
    largest = int(found[4]) if found else 255
    if found is None or largest == 255:
        return None
    width, height, bands = int(found[2]), int(found[3]), 3 if found[1] in b"36" else 1
    count, body = width * height * bands, content[found.end() :]
    if found[1] in b"23":
        values = np.array(re.sub(rb"#[^\r\n]*", b"", body).split()[:count], np.int64)
    else:
        kind = np.dtype(">u2" if largest > 255 else "u1")
        values = np.frombuffer(body[: count * kind.itemsize], kind).astype(np.int64)
    if len(values) < count or not 0 < largest < 2**16:
        raise ValueError(f"it ends after {len(values)} of {count} values, of at most {largest}.")
    if values.max(initial=0) > largest:
        raise ValueError(f"it holds the value {values.max()}, and says that {largest} is the largest.")
    return DeepPicture(values.reshape(height, width, bands), largest, has_alpha=False)


def _jpeg_2000(head: bytes) -> int:
    """Return the bits of the first band: behind the sizes in the marker segment SIZ."""
    start = head.find(b"\xff\x4f\xff\x51") + 42
    return (head[start] & 0x7F) + 1 if 42 <= start < len(head) else 0


def _avif(head: bytes) -> int:
    """Return 10 for a picture of 10 or 12 bits, by the flag in its box `av1C`."""
    start = head.find(b"av1C") + 6
    return 10 if 6 <= start < len(head) and head[start] & 0x40 else 0


# Bits of the formats that Pillow rounds without a word, by what the file begins with.
_DEPTHS: dict[str, Callable[[bytes], int]] = {
    "JPEG2000": _jpeg_2000,
    "AVIF": _avif,
    "SGI": lambda head: 8 * head[3],
}
