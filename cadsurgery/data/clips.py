"""Read clips, cameras and folders of frames one frame at a time, and write clips. Needs PyAV, except for folders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        frames: (3, H, W) float32 in 0..1, upright.
        count: number of frames; None if unknown.
        rate: frames per second.
    """

    frames: Iterator[Tensor]
    count: int | None
    rate: Fraction


def is_clip(path: Path) -> bool:
    """True for a clip, by its ending, and for the number of a camera."""
    return _is_camera(path) or (path.suffix.lower() in CLIP.endings and not files.is_folder(path))


def _is_camera(path: Path) -> bool:
    return str(path).isdecimal() and not files.exists(path)


@contextmanager
def open_clip(
    path: Path, size: tuple[int, int] | None = None, rate: float = 25.0, source: Source | None = None
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
        frames = (
            read_image(image, size) if source is None else read_picture_for(source, image, size)
            for image in images
        )
        yield Clip(frames, len(images), Fraction(rate))
        return
    av = pyav()
    place, options = str(path), {}
    if _is_camera(path):
        if not sys.platform.startswith("linux"):
            raise InvalidInput(
                f"camera {path} on {sys.platform}.",
                why="cameras are read on Linux.",
                next="record a clip first.",
            )
        place, options = f"/dev/video{path}", {"format": "v4l2"}
    elif not files.is_file(path):
        raise files.absent(path)
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
        yield Clip(
            _decode(container, stream, size, source),
            stream.frames or None,
            stream.average_rate or Fraction(rate),
        )


def _decode(
    container: Any, stream: Any, size: tuple[int, int] | None, source: Source | None
) -> Iterator[Tensor]:
    """Yield the frames of a stream, turned as the camera says."""
    done = 0
    try:
        for frame in container.decode(stream):
            picture = frame.to_image().rotate(frame.rotation, expand=True)
            channels, bands = (source.channels, source.bands) if source is not None else (3, ())
            yield from_picture(picture, channels, bands, name=container.name, size=size)
            done += 1
    except pyav().FFmpegError as error:
        raise FileError(
            f"{container.name} cannot be read after frame {done}.",
            why=first_line(error),
            next="cut the clip there, or convert it to MP4 anew.",
        ) from error


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


def is_written_here(path: Path) -> bool:
    """True for a clip that `write_clip` wrote, which says so in its file; False for anything else."""
    if not files.is_file(path):
        return False
    av = pyav()
    try:
        with av.open(str(path)) as container:
            comments = [value for name, value in container.metadata.items() if name.lower() == "comment"]
    except (av.FFmpegError, ValueError):
        return False
    return _WRITTEN_HERE in comments


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
