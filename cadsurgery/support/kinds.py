"""Kinds of files: what a file is, by its content or else its ending, and where it belongs. Nothing in a file is run."""

from __future__ import annotations

import contextlib
import mmap
import re
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cadsurgery.support import files
from cadsurgery.support.errors import FileError

CONVERTED_KEY = "cadsurgery"  # metadata key of converted networks in safetensors files
# Key of the metadata of ONNX files with this package's kernels, and its value, which is the document's text, too.
KERNELS_KEY = "cadsurgery.kernels"
HOW_TO_OPEN = (
    "This file calls kernels of the domain cadsurgery, whose library must be registered before an engine reads it: in "
    'ONNX Runtime by options.register_custom_ops_library(cadsurgery.kernels_for("onnxruntime")), in OpenVINO by '
    'core.add_extension(cadsurgery.kernels_for("openvino")). Without a library, export the network without kernels.'
)
_START = 1024  # bytes from which kinds are recognised


@dataclass(frozen=True)
class FileKind:
    """A kind of files.

    Attributes:
        words: the kind with its article, for messages.
        use: sentence that names the command and option for such a file; `{path}` stands for the file.
        endings: endings of such files, in lower case.
    """

    words: str
    use: str
    endings: tuple[str, ...] = ()


PICTURE = FileKind(
    "a picture",
    "cadsurgery mask {path} draws a mask on it; cadsurgery run NETWORK {path} runs a converted network on it.",
    (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"),
)
CLIP = FileKind(
    "a clip",
    "cadsurgery run NETWORK {path} runs a converted network on it; recommend --images, bench --images, eval --data "
    "clip:{path}, mask and --calibration take its frames.",
    (".mp4", ".mov", ".mkv", ".m4v", ".avi", ".webm", ".mpg", ".mpeg", ".ts", ".wmv"),
)
FOLDER = FileKind(
    "a folder",
    "of pictures, cadsurgery run NETWORK {path} runs a converted network on them; recommend --images, eval "
    "--data images:{path} and --calibration take it, too.",
)
WEIGHTS = FileKind(
    "a file of weights",
    "cadsurgery convert NAME --weights {path} converts the network NAME with them.",
    (".pth", ".pt", ".ckpt", ".bin"),
)
CONVERTED = FileKind(
    "a converted network",
    "cadsurgery run {path} IMAGES runs it; plan, macs, eval and export take it as it is, and mask as -m {path}.",
)
EXPORTED = FileKind(
    "a program exported by torch",
    "torch.export.load runs it; here give the file of cs.save that it was exported from.",
    (".pt2",),
)
TORCHSCRIPT = FileKind(
    "a TorchScript program",
    "torch.jit.load runs it; here give the network that it was made from, as module:function.",
)
ONNX = FileKind(
    "an ONNX file",
    "onnxruntime.InferenceSession or openvino.Core().read_model runs it; here give the file of cs.save that it was "
    "exported from.",
    (".onnx",),
)
OPENVINO = FileKind(
    "an OpenVINO file",
    "OpenVINO runs it; here give the network that it was made from.",
)
JSON = FileKind(
    "a JSON file",
    "cadsurgery finetune --config {path} reads settings of a training.",
    (".json", ".jsonl"),
)
PYTHON = FileKind(
    "a Python file",
    "name a function in it that returns a network as module:function, from the file's folder.",
    (".py",),
)
_BY_ENDING = (PICTURE, CLIP, WEIGHTS, EXPORTED, ONNX, JSON, PYTHON)


def kind_of_file(path: str | Path) -> FileKind | None:
    """Return the kind of a file or folder; None if there is none, or its kind is not known."""
    place = Path(path)
    if files.is_folder(place):
        return FOLDER
    if not files.is_file(place):
        return None
    by_content = None
    with contextlib.suppress(OSError):
        with place.open("rb") as file:
            start = file.read(_START)
        by_content = next((kind for kind, test in _BY_CONTENT if test(start, place)), None)
    if by_content is None and place.suffix == ".bin" and files.is_file(place.with_suffix(".xml")):
        return OPENVINO
    return by_content or kind_by_ending(place)


def kind_by_ending(path: str | Path) -> FileKind | None:
    """Return the kind of files that have the ending of a path; None if the ending says nothing."""
    ending = Path(path).suffix.lower()
    return next((kind for kind in _BY_ENDING if ending in kind.endings), None)


def of_another_kind(path: str | Path, *expected: FileKind, what: str = "") -> FileError | None:
    """Return the error for a file of a kind that is not expected; None for an expected, unknown or missing file.

    Args:
        path: the file or folder.
        expected: the kinds that are read here.
        what: what is expected, in words; default: the words of the kinds.
    """
    kind = kind_of_file(path)
    if kind is None or kind in expected:
        return None
    return kind_refused(path, kind, what or " or ".join(entry.words for entry in expected))


def check_kind(path: str | Path, *expected: FileKind, what: str = "") -> None:
    """Refuse a file of a kind that is not expected; see `of_another_kind`.

    Raises:
        FileError: the file is of another kind; the message says which, and which command and option read it.
    """
    if (refusal := of_another_kind(path, *expected, what=what)) is not None:
        raise refusal


def kind_refused(path: str | Path, kind: FileKind, what: str) -> FileError:
    """Return the error for a file of a kind where something else is expected, described by `what`."""
    use = kind.use.format(path=shlex.quote(str(path)))
    more = HOW_TO_OPEN if kind is ONNX and files.is_file(path) and has_kernels(Path(path)) else ""
    return FileError(f"{path} is {kind.words}, not {what}.", why=more, next=use)


def has_kernels(path: Path) -> bool:
    """True if an ONNX file calls this package's kernels."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(KERNELS_KEY.encode()) >= 0


# -- by content ----------------------------------------------------------------------------------------


def _is_picture(start: bytes, path: Path) -> bool:
    signatures = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
    is_bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_heif = start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"avif")
    is_netpbm = re.match(rb"P[1-6]\s+(#|\d)", start) is not None
    return start.startswith(signatures) or is_bitmap or is_webp or is_heif or is_netpbm


def _is_clip(start: bytes, path: Path) -> bool:
    signatures = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"0&\xb2u")
    is_avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    return start.startswith(signatures) or is_avi or start[4:8] in (b"ftyp", b"moov")


def _safetensors(start: bytes, path: Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file; None for any other file."""
    if start[8:9] != b"{":
        return None
    from safetensors import safe_open

    with contextlib.suppress(Exception), safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})
    return None


def _is_weights(start: bytes, path: Path) -> bool:
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before its archives
    return (
        start.startswith(legacy) or _holds(start, path, "data.pkl") or _safetensors(start, path) is not None
    )


def _holds(start: bytes, path: Path, *names: str) -> bool:
    """True for an archive with an entry of one of these names, in whatever folder."""
    if start[:4] != b"PK\x03\x04":
        return False
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return any(entry.rpartition("/")[2] in names for entry in archive.namelist())
    return False


def _is_onnx(start: bytes, path: Path) -> bool:
    """True if the first fields are the version of the format and the name of the producer."""
    return start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x3a") and 0 < start[1] < 64


_BY_CONTENT: tuple[tuple[FileKind, Callable[[bytes, Path], bool]], ...] = (
    *((PICTURE, _is_picture), (CLIP, _is_clip)),
    (CONVERTED, lambda start, path: CONVERTED_KEY in (_safetensors(start, path) or {})),
    (TORCHSCRIPT, lambda *file: _holds(*file, "constants.pkl")),
    (EXPORTED, lambda *file: _holds(*file, "archive_format", "serialized_exported_program.json")),
    *((WEIGHTS, _is_weights), (ONNX, _is_onnx)),
    (OPENVINO, lambda start, path: start.startswith(b"<?xml") and b"<net " in start),
)
