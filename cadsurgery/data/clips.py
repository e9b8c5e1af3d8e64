"""Read clips, cameras and folders of frames one frame at a time, or some frames of a clip by their number, and write
clips. Needs PyAV, except for folders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from cadsurgery.data.images import find_images, from_picture, read_image, read_picture_for
from cadsurgery.support import files
from cadsurgery.support.errors import FileError, InvalidInput, first_line, import_optional
from cadsurgery.support.files import write_whole
from cadsurgery.support.kinds import CLIP, of_another_kind

if TYPE_CHECKING:
    from cadsurgery.data.networks import Source

WRITTEN = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # formats of clips that are written, by ending

_WRITTEN_HERE = "a prediction, written by cadsurgery"


@dataclass(frozen=True)
class Clip:
    """The frames of a clip, which are read as they are asked for.

    Attributes:
        frames: (C, H, W) float32 in 0..1, upright.
        count: number of frames; None if unknown.
        rate: frames per second.
    """

    frames: Iterator[Tensor]
    count: int | None
    rate: Fraction


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
    rate: float = 25.0,
    source: Source | None = None,
    numbers: Container[int] | None = None,
) -> Iterator[Clip]:
    """Open a clip, a camera by its number, or a folder of frames, whose order is that of their names.

    Args:
        path: the source.
        size: (height, width) to which frames are resized, or None.
        rate: frames per second of a folder, or of a clip that does not state its own.
        source: source of the network whose channels the frames get, from its bands; default: colour.
        numbers: of the frames that are wanted, the first is 0; None for all. `count` counts all.

    Raises:
        FileError: the source cannot be read, or holds no pictures; or a frame cannot be read, as it is asked for.
        InvalidInput: cameras cannot be read on this system.
    """
    if files.is_folder(path):
        images, _ = find_images([path])
        wanted = (image for number, image in enumerate(images) if numbers is None or number in numbers)
        frames = (
            read_image(image, size) if source is None else read_picture_for(source, image, size)
            for image in wanted
        )
        yield Clip(frames, len(images), Fraction(rate))
        return
    with _opened(path) as (container, stream):
        channels, bands = (source.channels, source.bands) if source is not None else (3, ())
        frames = (
            from_picture(frame, channels, bands, name=path, size=size)
            for frame in _decode(container, stream, numbers)
        )
        yield Clip(frames, stream.frames or None, stream.average_rate or Fraction(rate))


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
    if stated <= size and has_index:
        return
    lacking = [f"at least {stated - size:,} bytes"] if stated > size else []
    lacking += [] if has_index else ["the index, without which no frame can be found"]
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


def _decode(container: Any, stream: Any, numbers: Container[int] | None) -> Iterator[Image.Image]:
    """Yield the wanted frames of a stream, turned as the camera says."""
    done = 0
    try:
        for frame in container.decode(stream):
            if numbers is None or done in numbers:
                yield frame.to_image().rotate(frame.rotation, expand=True)
            done += 1
    except pyav().FFmpegError as error:
        raise FileError(
            f"{container.name} cannot be read after frame {done}.",
            why=first_line(error),
            next="cut the clip there, or convert it to MP4 anew.",
        ) from error


class ChosenFrames:
    """Some frames of a clip, by their positions among these.

    A clip is decoded from its beginning to its end: reading goes on from the frame before, and begins anew for an
    earlier one.
    """

    def __init__(self, path: Path, numbers: Sequence[int]) -> None:
        """Choose frames by their numbers, rising; the first frame of the clip is 0."""
        self._path, self._numbers, self._stack = path, numbers, ExitStack()
        self._frames: Iterator[Image.Image] | None = None
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
                    next="leave out what follows, or convert the clip to MP4 anew.",
                )
            self._last, self._at = frame, self._at + 1
        return self._last


def length_of(path: Path) -> tuple[int, Fraction]:
    """Return the number of frames of a clip, and how many are shown in a second.

    Raises:
        FileError: see `open_clip`.
    """
    with _opened(path) as (container, stream):
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return count, stream.average_rate or Fraction(25)


@contextmanager
def write_clip(path: Path, rate: Fraction) -> Iterator[Callable[[Image.Image], None]]:
    """Yield a function that appends a picture to a clip; it appears at the end of the block, whole or not at all.

    Codecs need even sizes: the last row or column of an odd picture is repeated.

    Raises:
        FileError: the path cannot be written, or its ending belongs to no format that is written.
    """
    av, format = pyav(), check_clip(path)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with write_whole(path) as temporary, av.open(str(temporary), "w", format=format) as container:
        container.metadata["comment"] = _WRITTEN_HERE
        stream = container.add_stream(codec, rate=rate, pix_fmt="yuv420p")

        def add(picture: Image.Image) -> None:
            pixels = np.asarray(picture.convert("RGB"))
            height, width = pixels.shape[:2]
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))

        yield add
        container.mux(stream.encode())


def join_clips(parts: Sequence[Path], path: Path, rate: Fraction, made_by: str) -> None:
    """Write clips that `write_clip` wrote, one after the other, as one clip, without encoding them anew.

    Args:
        parts: the clips.
        path: the clip to write, whole or not at all.
        rate: frames per second.
        made_by: what made it, which `comment_of` returns.

    Raises:
        FileError: the path cannot be written, or its ending belongs to no format that is written.
    """
    av, format, begin = pyav(), check_clip(path), Fraction(0)
    with write_whole(path) as temporary, av.open(str(temporary), "w", format=format) as joined:
        joined.metadata["comment"] = f"{_WRITTEN_HERE} {made_by}"
        stream = None
        for part in parts:
            with av.open(str(part)) as container:
                own = container.streams.video[0]
                stream = stream or joined.add_stream_from_template(own)
                shift = round(begin / own.time_base)
                for packet in container.demux(own):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        joined.mux(packet)
                begin += own.frames / rate


def comment_of(path: Path) -> str:
    """Return the comment in a clip; "" for a clip without one and for anything else."""
    if not files.is_file(path):
        return ""
    av = pyav()
    try:
        with av.open(str(path)) as container:
            comments = [value for name, value in container.metadata.items() if name.lower() == "comment"]
    except (av.FFmpegError, ValueError):
        return ""
    return str(comments[0]) if comments else ""


def is_written_here(path: Path) -> bool:
    """True for a clip that a run wrote, which says so in its file; False for anything else."""
    return comment_of(path).startswith(_WRITTEN_HERE)


def check_clip(path: Path) -> str:
    """Return the format of a clip to write.

    Raises:
        FileError: the ending belongs to no format that is written.
    """
    if path.suffix.lower() not in WRITTEN:
        raise FileError(f"{path} does not end like a clip.", next=f"choose an ending: {', '.join(WRITTEN)}.")
    return WRITTEN[path.suffix.lower()]


def pyav() -> Any:
    """Import PyAV.

    Raises:
        NotInstalled: it is not installed.
    """
    return import_optional("av", "clips and cameras need PyAV.", "pip install 'cadsurgery[video]'")
