"""Read clips, cameras and folders of frames one frame at a time, or some frames of a clip by their number, and write
clips. Needs PyAV, except for folders."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from cadsurgery.data.images import find_images, format_of, from_picture, read_image, read_picture_for
from cadsurgery.support import files
from cadsurgery.support.errors import FileError, InvalidInput, first_line, import_optional
from cadsurgery.support.files import write_whole
from cadsurgery.support.kinds import CLIP, of_another_kind

if TYPE_CHECKING:
    from cadsurgery.data.networks import Source

WRITTEN = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # formats of clips that are written, by ending

_USUAL_RATE = Fraction(25)  # frames per second of a clip that states none
_FINEST = Fraction(1, 60_000)  # seconds: MPEG-4 counts in no smaller ones
# MP4 and MOV state when the first frame is shown in these parts of a second.
_PARTS_OF_A_SECOND = {"movie_timescale": "90000"}


@dataclass(frozen=True)
class Clip:
    """The frames of a clip, which are read as they are asked for.

    Attributes:
        timed: the second at which each frame is shown, and the frame: (C, H, W) float32 in 0..1, upright.
        count: number of frames; None if unknown.
        rate: frames per second, on average.
        time_base: seconds of which the times are multiples.
    """

    timed: Iterator[tuple[Fraction, Tensor]]
    count: int | None
    rate: Fraction
    time_base: Fraction

    @property
    def frames(self) -> Iterator[Tensor]:
        """The frames that were not read yet, without their times."""
        return (frame for _, frame in self.timed)


def is_camera(path: Path) -> bool:
    """True for the number of a camera."""
    return str(path).isdecimal() and not files.exists(path)


def is_clip(path: Path) -> bool:
    """True for a clip, by its ending, and for the number of a camera."""
    return is_camera(path) or (path.suffix.lower() in CLIP.endings and not files.is_folder(path))


@contextmanager
def open_clip(
    path: Path,
    size: tuple[int, int] | None = None,
    rate: float = float(_USUAL_RATE),
    source: Source | None = None,
) -> Iterator[Clip]:
    """Open a clip, a camera by its number, or a folder of frames, whose order is that of their names.

    Args:
        path: the source.
        size: (height, width) to which frames are resized, or None.
        rate: frames per second of a folder, or of a clip that does not state its own.
        source: source of the network whose channels the frames get, from its bands; default: colour.

    Raises:
        FileError: the source cannot be read, or holds no pictures; or a frame cannot be read, as it is asked for.
        InvalidInput: cameras cannot be read on this system.
    """
    if files.is_folder(path):
        images, _ = find_images([path])
        shown = Fraction(rate)
        read = read_image if source is None else partial(read_picture_for, source)
        timed = ((number / shown, read(image, size)) for number, image in enumerate(images))
        yield Clip(timed, len(images), shown, 1 / shown)
        return
    with _opened(path) as (container, stream):
        channels, bands = (source.channels, source.bands) if source is not None else (3, ())
        average = stream.average_rate or Fraction(rate)
        timed = (
            (time, from_picture(frame, channels, bands, name=path, size=size))
            for time, frame in _decode(container, stream, None, average, from_zero=is_camera(path))
        )
        yield Clip(timed, stream.frames or None, average, stream.time_base)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a clip or a camera with PyAV, and its pictures."""
    av = pyav()
    place, options = str(path), {}
    if is_camera(path):
        if not sys.platform.startswith("linux"):
            raise InvalidInput(
                f"camera {path} on {sys.platform}.",
                why="cameras are read on Linux.",
                next="record a clip first.",
            )
        place, options = f"/dev/video{path}", {"format": "v4l2"}
    elif not files.is_file(path):
        raise files.absent(path)
    else:
        _refuse_cut(path)
    try:
        container = av.open(place, **options)
    except (av.FFmpegError, ValueError) as error:
        next = "check the number of the camera." if options else "convert it to MP4."
        refusal = FileError(f"{place} cannot be read as a clip.", why=first_line(error), next=next)
        raise of_another_kind(path, CLIP) or refusal from error
    with container:
        if not container.streams.video:
            raise FileError(f"{path} holds no pictures.", next="give a clip with a video stream.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _refuse_cut(path: Path) -> None:
    """Refuse a clip that ends before the data that it states, or without its index.

    Raises:
        FileError: see above.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        stated, has_index = _stated_length(file, size)
    lacking = [f"at least {stated - size:,} bytes"] if stated > size else []
    lacking += [] if has_index else ["the index, without which no frame can be found"]
    if not lacking:
        return
    next = "get the whole file."
    if has_index:
        next = f"get the whole file, or keep the frames that are there: ffmpeg -i {path} -c copy kept.mkv."
    raise FileError(
        f"{path} is a clip that was cut short.",
        why=f"missing: {' and '.join(lacking)}, as after a recording or a download that was interrupted.",
        next=next,
    )


# Of Matroska: what begins the whole of a file, and a length that is left open.
_SEGMENT, _OPEN_END = b"\x18\x53\x80\x67", 2**56 - 1


def _stated_length(file: IO[bytes], size: int) -> tuple[int, bool]:
    """Return the length in bytes that a clip states, `size` if it states none, and whether it has the index that its
    format needs. Read are the lengths of MP4, Matroska and AVI."""
    head = file.read(64)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little"), True
    if head[:4] == b"\x1a\x45\xdf\xa3":
        rest = head.partition(_SEGMENT)[2]
        length = int.from_bytes(rest[:8]) & _OPEN_END if rest[:1] == b"\x01" else _OPEN_END
        return size if length == _OPEN_END else len(head) - len(rest) + 8 + length, True
    if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return size, True
    at, has_index = 0, False
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4]), head[4:8]
        length = {0: size - at, 1: int.from_bytes(head[8:])}.get(length, length)
        has_index |= kind == b"moov"
        at += max(8, length)
    return at, has_index


def _decode(
    container: Any,
    stream: Any,
    numbers: Container[int] | None,
    rate: Fraction = _USUAL_RATE,
    from_zero: bool = False,
) -> Iterator[tuple[Fraction, Image.Image]]:
    """Yield the wanted frames of a stream, turned and mirrored as players show them, each with its second.

    Times rise: a frame without one follows the frame before it by `rate`, one that is not later by a tick. With
    `from_zero` they count from the first frame.
    """
    done, last, first = 0, Fraction(-1), None
    try:
        for frame in container.decode(stream):
            time = None if frame.pts is None else frame.pts * frame.time_base
            if first is None:
                time = time or Fraction(0)
                first = time if from_zero else Fraction(0)
            elif time is None or time <= last:
                time = last + (1 / rate if time is None or last - time > 1 / rate else stream.time_base)
            last = time
            if numbers is None or done in numbers:
                yield time - first, _as_shown(frame)
            done += 1
    except pyav().FFmpegError as error:
        raise FileError(
            f"{container.name} cannot be read after frame {done}.",
            why=first_line(error),
            next="cut the clip there, or convert it to MP4 again.",
        ) from error


# How a picture is turned, by its display matrix: True if rows become columns, and the signs of the axes x and y.
_TURNS = {
    (False, -1, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, 1, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, -1, -1): Image.Transpose.ROTATE_180,
    (True, 1, 1): Image.Transpose.TRANSPOSE,
    (True, -1, -1): Image.Transpose.TRANSVERSE,
    (True, -1, 1): Image.Transpose.ROTATE_270,
    (True, 1, -1): Image.Transpose.ROTATE_90,
}


def _as_shown(frame: Any) -> Image.Image:
    """Return a frame as a picture, with the matrix applied to it by which a player shows it."""
    picture: Image.Image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # The pixel (x, y) is shown at (a x + c y, b x + d y); the other five numbers are about its place and depth.
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(straight, crossed) > _OBLIQUE * max(1, min(straight, crossed)):
        is_turned = crossed > straight
        across, down = (c, b) if is_turned else (a, d)
        turn = _TURNS.get((is_turned, 1 if across > 0 else -1, 1 if down > 0 else -1))
        return picture if turn is None else picture.transpose(turn)
    if a * d == b * c:  # no picture would be left
        return picture
    if a * d < b * c:  # mirrored before it is rotated
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        a, b = -a, -b
    return picture.rotate(-math.degrees(math.atan2(b, a)), expand=True)


_OBLIQUE = 1000  # an axis that is longer by this factor than the other lies along a side


class ChosenFrames:
    """Some frames of a clip, by their positions among these.

    A clip is decoded from its beginning to its end: reading goes on from the frame before, and begins anew for an
    earlier one.
    """

    def __init__(self, path: Path, numbers: Sequence[int]) -> None:
        """Choose frames by their numbers, rising; the first frame of the clip is 0."""
        self._path, self._numbers, self._stack = path, numbers, ExitStack()
        self._frames: Iterator[tuple[Fraction, Image.Image]] | None = None
        self._at = -1  # position of the frame that was read last

    def __reduce__(self) -> tuple[type[ChosenFrames], tuple[Path, Sequence[int]]]:
        """Send the choice to another process, without the open file."""
        return ChosenFrames, (self._path, self._numbers)

    def __getitem__(self, position: int) -> Image.Image:
        """Return a frame as a picture in colour.

        Raises:
            FileError: the clip cannot be read, or ends before the frame.
        """
        if position < self._at:
            self._stack.close()
            self._frames, self._at = None, -1
        if self._frames is None:
            self._frames = _decode(*self._stack.enter_context(_opened(self._path)), self._numbers)
        while self._at < position:
            frame = next(self._frames, None)
            if frame is None:
                raise FileError(
                    f"{self._path} ends before frame {self._numbers[position]}.",
                    next="leave out what follows, or convert the clip to MP4 again.",
                )
            self._last, self._at = frame[1], self._at + 1
        return self._last


def length_of(path: Path) -> tuple[int, Fraction]:
    """Return the number of frames of a clip, and how many are shown in a second.

    Raises:
        FileError: see `open_clip`.
    """
    with _opened(path) as (container, stream):
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return count, stream.average_rate or _USUAL_RATE


class AddFrame(Protocol):
    """Appends a picture to a clip."""

    def __call__(self, picture: Image.Image, time: Fraction | None = None) -> None:
        """Append a picture that is shown at a second; default: by the rate of the clip."""
        ...


@contextmanager
def write_clip(path: Path, rate: Fraction, time_base: Fraction | None = None) -> Iterator[AddFrame]:
    """Yield a function that appends a picture to a clip; it appears at the end of the block, whole or not at all.

    Codecs need even sizes: the last row or column of an odd picture is repeated.

    Args:
        path: the clip.
        rate: frames per second.
        time_base: seconds of which the times of pictures are multiples; default: those between two pictures.

    Raises:
        FileError: the path cannot be written, or its ending belongs to no format that is written.
    """
    av, format = pyav(), format_of(path, WRITTEN, "a clip")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    base = time_base or 1 / rate
    base = base if codec == "libx264" or base.denominator <= 1 / _FINEST else _FINEST
    options = {} if format == WRITTEN[".mkv"] else _PARTS_OF_A_SECOND
    with (
        write_whole(path) as temporary,
        av.open(str(temporary), "w", format=format, options=options) as container,
    ):
        stream = container.add_stream(codec, rate=rate, pix_fmt="yuv420p")
        # Frames are encoded in the order in which they are shown.
        stream.codec_context.time_base, stream.codec_context.max_b_frames = base, 0
        count, ticks = 0, -1

        def add(picture: Image.Image, time: Fraction | None = None) -> None:
            nonlocal count, ticks
            pixels = np.asarray(picture.convert("RGB"))
            height, width = pixels.shape[:2]
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels)
            ticks = max(ticks + 1, round((count / rate if time is None else time) / base))
            frame.pts, frame.time_base, count = ticks, base, count + 1
            container.mux(stream.encode(frame))

        yield add
        container.mux(stream.encode())


def pyav() -> Any:
    """Import PyAV.

    Raises:
        NotInstalled: it is not installed.
    """
    return import_optional("av", "clips and cameras need PyAV.", "pip install 'cadsurgery[video]'")
