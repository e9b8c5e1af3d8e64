"""Files in object storage, by any address that pyarrow's file systems read, e.g. `s3://bucket/photos`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cadsurgery.support.errors import FileError, InvalidInput, first_line, import_optional


def is_remote(path: object) -> bool:
    """True for an address with a scheme, such as `s3://bucket/photos`."""
    return "://" in str(path)


_STREAMS = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "udp", "mms", "mmsh")
_WEB = ("http", "https")


def refuse_stream(address: object) -> None:
    """Refuse the address of a stream, as of a network camera, or of a file on the web, where a path is expected.

    Raises:
        InvalidInput: see above; the message says how to get a file.
    """
    scheme, is_address, rest = str(address).partition("://")
    shown = f"{scheme.lower()}://{rest.rpartition('@')[2]}"  # without a password
    if is_address and scheme.lower() in _STREAMS:
        raise InvalidInput(
            f"{shown} is a stream, which has no end.",
            next="record a part of it and give that: ffmpeg -i ADDRESS -t 60 -c copy part.mkv. In Python: call the "
            "network on the frames of av.open(ADDRESS).decode(video=0), one by one.",
        )
    if is_address and scheme.lower() in _WEB:
        raise InvalidInput(
            f"{shown} is an address on the web, from which nothing is read.",
            next="save the file and give its path: curl -LO ADDRESS.",
        )


def read_bytes(address: str) -> bytes:
    """Return the content of a file.

    Raises:
        FileError: it cannot be read.
    """
    with _reaching(address, "read") as (files, path), files.open_input_stream(path) as file:
        return bytes(file.read())


def write_bytes(address: str, content: bytes) -> None:
    """Write a file, which appears whole or not at all, as object stores do.

    Raises:
        FileError: it cannot be written.
    """
    with _reaching(address, "written") as (files, path):
        files.create_dir(path.rpartition("/")[0], recursive=True)
        with files.open_output_stream(path) as file:
            file.write(content)


def list_files(address: str) -> list[str]:
    """Return the paths of files below a folder, relative to it and sorted by folder and name.

    Raises:
        FileError: it cannot be listed, or there is no such folder.
    """
    with _reaching(address, "listed") as (files, path):
        from pyarrow.fs import FileSelector

        selector = FileSelector(path, recursive=True)
        places = [info.path for info in files.get_file_info(selector) if info.is_file]
    return sorted((place.removeprefix(f"{path}/") for place in places), key=lambda place: place.split("/"))


@functools.cache
def _file_system(root: str) -> tuple[Any, str]:
    """Return the file system of a root, and the path of the root in it."""
    what = "object storage is read and written by pyarrow, which is not installed."
    arrow = import_optional("pyarrow.fs", what, "pip install 'cadsurgery[scale]'")
    files, path = arrow.FileSystem.from_uri(root)
    return files, path.rstrip("/")


@contextmanager
def _reaching(address: str, done: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a file and its path there; errors in the block become a `FileError`."""
    scheme, _, place = address.partition("://")
    host, _, path = place.partition("/")
    plain, _, options = place.partition("?")
    if "=" in options:
        raise FileError(
            f"{scheme}://{plain} is followed by options.",
            why="options behind ? are not read, and an address is printed and stored as it is given.",
            next="set them in the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY.",
        )
    try:
        files, base = _file_system(f"{scheme}://{host}/")
        yield files, f"{base}/{path.strip('/')}"
    except (OSError, ValueError) as error:
        raise FileError(
            f"{address} cannot be {done}.",
            why=first_line(error),
            next="check the address and the credentials, see pyarrow.fs.FileSystem.from_uri.",
        ) from error
