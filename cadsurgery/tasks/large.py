"""Predict pictures that do not fit into memory: rows of a TIFF file are read, computed and written, band by band."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data import tiff
from cadsurgery.data.channels import as_channels
from cadsurgery.data.images import check_values, normalise
from cadsurgery.data.stores import is_remote
from cadsurgery.support.errors import CadError, FileError, InvalidInput, NotInstalled, warn
from cadsurgery.support.files import as_file_error, make_folder, write_whole
from cadsurgery.support.memory import bytes_of
from cadsurgery.support.progress import Step, silent
from cadsurgery.tasks.figures import CLASSES, palette

MULTIPLES = (1, 8, 16, 32, 64, 128)  # of pixels, to which pictures that a network refuses are padded
Count = Callable[[Tensor, int], Counter[int]]  # the pixels of each class of rows (rows, W) of so many classes


def target_for(source: str, target: str, memory: str, *, is_plain: bool = True) -> str:
    """Return where the prediction of a picture goes: with a memory for maps, into a TIFF file if the picture can be
    read in rows, however much the memory is, so that a run goes on with more or less of it.

    Args:
        is_plain: False if pictures are resized or drawn upon. Then only those are read in rows that take more than the
            memory as float32, and refused.

    Raises:
        InvalidInput: there is no memory, and a run with one has begun this picture.
    """
    if (
        not memory
        and not is_remote(target)
        and (begun := _part_of(Path(target).with_suffix(".tif"))).exists()
    ):
        raise InvalidInput(
            f"the prediction of {source} was begun in rows, with --memory.",
            where=str(begun),
            next="give --memory again, of any amount, to go on; or delete this file.",
        )
    if not memory or is_remote(source) or is_remote(target) or not tiff.is_tiff(tiff.split_page(source)[0]):
        return target
    try:
        file = tiff.TiffRows(source)
    except FileError:  # what cannot be read in rows may still be read whole
        return target
    file.close()
    is_large = is_plain or 4 * file.shape[0] * file.shape[1] * file.shape[2] > bytes_of(memory)
    return str(Path(target).with_suffix(".tif")) if is_large else target


def warn_of_position(source: str, why: str, next: str) -> None:
    """Warn that the prediction of a picture will not say where it lies on the earth, as its TIFF file does."""
    warn(
        f"the prediction of {source} is written without its position and coordinate system (GeoTIFF).\n"
        f"  Why: {why}\n  Next: {next}"
    )


def _part_of(target: Path) -> Path:
    """Return the file in which rows are written before the prediction is whole."""
    return target.with_name(f".{target.name}.part")


class LargePicture:
    """A picture (C, H, W) of a TIFF file as a network takes it, of which rows are read where it is sliced."""

    def __init__(
        self,
        path: str,
        source: Any,
        bands: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        view: str = "",
    ) -> None:
        """Open a file.

        Args:
            path: the file.
            source: the network's source.
            bands: the bands to take instead of the source's.
            dtype: type of the network's pictures.
            size, view: as of a run; others than the usual need the whole picture.

        Raises:
            FileError: see `TiffRows`.
            InvalidInput: the picture is to be resized, or drawn upon.
        """
        for name, value, usual in (("--size", size, None), ("--view", view or CLASSES, CLASSES)):
            if value != usual:
                raise InvalidInput(
                    f"{name} for {path}, which is read in rows.",
                    why="the picture takes more memory than --memory.",
                    next="leave it out, or give more memory.",
                )
        self.file, self.path, self._source, self._dtype = tiff.TiffRows(path), path, source, dtype
        self._bands = bands or (source.bands if source is not None else ())
        self.size = (self.file.shape[1], self.file.shape[2])
        self.shape = (0, *self.size)
        self.shape = (self[:, :1].shape[0], *self.size)

    def pad_to(self, multiple: int) -> bool:
        """Let its sides be multiples of so many pixels, by zeros at the right and below, which stand for the mean
        colour; False if they are."""
        before, height, width = self.shape
        self.shape = (before, *(-(-side // multiple) * multiple for side in self.size))
        return self.shape != (before, height, width)

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        """Return rows (C, rows, W).

        Raises:
            FileError, InvalidInput: as `read_picture_for`.
        """
        first, last, _ = place[1].indices(self.shape[1])
        end = min(last, self.size[0])
        if first >= end:
            return torch.zeros(self.shape[0], max(0, last - first), self.shape[2], dtype=self._dtype)
        channels = None if self._source is None else self._source.channels
        stored = self.file.rows(first, end)
        rows = as_channels(stored, channels, self._bands, name=self.path, has_alpha=self.file.has_alpha)
        check_values(rows, self._source, self.path)
        normalised, beyond = normalise(rows, self._source).to(self._dtype), self.shape[2] - self.size[1]
        return F.pad(normalised, (0, beyond, 0, last - end)) if beyond or last > end else normalised


class _WrittenRows:
    """The prediction of a picture as far as it is written: its plain rows beside its place, and what is known of it."""

    def __init__(self, target: Path, made_of: dict[str, Any]) -> None:
        self.target, self._made_of = target, made_of
        self.file = _part_of(target)
        self._known = target.with_name(f".{target.name}.json")
        self.rows, self.counts, self.milliseconds = 0, Counter[int](), 0.0
        self.size = (0, 0)
        self._kind: np.dtype[Any] = np.dtype(np.uint8)
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # nothing was written yet
            known = json.loads(self._known.read_text())
            counts = Counter({int(number): count for number, count in known["counts"].items()})
            found = known["rows"], tuple(known["size"]), known["milliseconds"]
            if self.file.exists() and known["made of"] == made_of:
                self.rows, self.size, self.milliseconds = found
                self.counts = counts

    @property
    def start(self) -> int:
        """The row to go on with; of a prediction whose rows are all there the last one."""
        return max(0, min(self.rows, self.size[0] - 1))

    def begin(self, size: tuple[int, int], channels: int) -> None:
        """Make the file, unless there are rows in it: classes; of one channel its values."""
        self._kind = np.dtype(np.float32 if channels == 1 else np.uint8 if channels <= 256 else np.uint16)
        self.size = size
        if not self.rows:
            make_folder(self.target.parent)
            with self._written():
                self.file.write_bytes(b"")

    def _written(self) -> AbstractContextManager[None]:
        return as_file_error(f"{self.target} cannot be written.", "choose another --output.")

    def write(self, first: int, values: Tensor, counts: Counter[int], milliseconds: float) -> None:
        """Write rows (rows, W), and then that they are there."""
        missing = values[max(self.rows - first, 0) :]  # others are those of a run that was ended
        self.rows, self.milliseconds = first + len(values), self.milliseconds + milliseconds
        self.counts += counts
        with self._written():
            with self.file.open("r+b") as file:
                file.seek((self.rows - len(missing)) * self.size[1] * self._kind.itemsize)
                file.write(missing.numpy().astype(self._kind).tobytes())
            known = {"made of": self._made_of, "rows": self.rows, "size": self.size}
            known |= {"milliseconds": self.milliseconds, "counts": self.counts}
            with write_whole(self._known) as path:
                path.write_text(json.dumps(known))

    def finish(self, position: Sequence[Any]) -> None:
        """Write the whole prediction to its place, in compressed tiles: classes with their colours."""
        width = self.size[1]

        def rows(first: int, end: int) -> np.ndarray[Any, Any]:
            file.seek(first * width * self._kind.itemsize)
            return np.fromfile(file, self._kind, (end - first) * width).reshape(-1, width)

        colours = palette().T.astype(np.uint16) * 257 if self._kind == np.uint8 else None
        with self._written():
            with self.file.open("rb") as file, write_whole(self.target) as whole:
                tiff.write_tiled(whole, self.size, self._kind, rows, colours, position)
            self.file.unlink()
            self._known.unlink(missing_ok=True)


def cut_back(maps: Tensor, padded: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return what maps (B, ..., h, w) of padded images hold of the images."""
    height, width = _sides_of(maps.shape[-2:], padded, size)
    return maps[..., :height, :width]


def _sides_of(sides: Sequence[int], padded: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Return the part of a map's sides that belongs to the image, of a size, in a padded one."""
    ends = (math.ceil(length * side / whole) for length, side, whole in zip(sides, size, padded, strict=True))
    return next(ends), next(ends)


def _rows_of(net: Any, picture: LargePicture, start: int) -> Any:
    """Return the network's result in rows; a picture whose size the network does not take is padded to multiples that
    it takes.

    Raises:
        CadError: it takes none of them.
    """
    refusal: CadError | None = None
    for multiple in MULTIPLES:
        if not picture.pad_to(multiple) and multiple > 1:
            continue
        try:
            return net.rows(picture, start=start, sizes=[picture.size] if multiple > 1 else None)
        except NotInstalled:
            raise
        except CadError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def predict_large(
    net: Any,
    picture: LargePicture,
    target: str,
    made_by: dict[str, Any],
    count: Count,
    stopped: threading.Event,
    step: Step = silent,
) -> dict[str, Any]:
    """Predict a picture in rows and write the classes of its pixels; of a network with one channel its values.

    Once `stopped` is set it ends behind the band that is computed, and the row says `interrupted`. `step` is told the
    rows that are done, from which the time that is left follows.

    What a run that was ended has written of the same picture, by the same settings, is not computed again.

    Returns:
        Fields of its row, with the number of pixels of each class.

    Raises:
        CadError: the picture cannot be read, computed or written.
    """
    status = os.stat(tiff.split_page(picture.path)[0])
    made_of = {"path": os.path.abspath(picture.path), "bytes": status.st_size, "changed": status.st_mtime_ns}
    part = _WrittenRows(Path(target), made_of | {"by": json.loads(json.dumps(made_by, default=str))})
    with torch.inference_mode():
        start = time.perf_counter()
        result = _rows_of(net, picture, part.start)
        channels, padded = result.shape[0], picture.shape[1:]
        size = _sides_of(result.shape[1:], padded, picture.size)
        part.begin(size, channels)
        name = Path(picture.path).name
        step(f"{name}, row {part.rows} of {size[0]}", part.rows, size[0])
        for first, with_padding in result:
            if first >= size[0]:  # all of it is padding
                break
            rows = with_padding[:, : max(0, size[0] - first), : size[1]]
            values = rows[0].float() if channels == 1 else rows.float().argmax(0)
            new = values[max(part.rows - first, 0) :]
            now = time.perf_counter()
            part.write(first, values, count(new, channels), 1e3 * (now - start))
            start = now
            step(f"{name}, row {part.rows} of {size[0]}", part.rows, size[0])
            if stopped.is_set() and part.rows < size[0]:
                return {"interrupted": True, "rows": [part.rows, size[0]]}
    part.finish(tiff.moved_position(picture.file.position, picture.size, part.size))
    levels = cut_back(result.levels, padded, picture.size)
    levels = levels if any(levels.stride()) else levels.flatten()[:1]
    shares = [int((levels == level).sum()) / levels.numel() for level in range(net.geometry.max_level + 1)]
    return {
        "output": target,
        "size": [*picture.size],
        "active_fraction": shares[0],
        "levels": shares,
        "milliseconds": part.milliseconds,
        "counts": part.counts,
        **({"padded_to": [*padded]} if padded != picture.size else {}),
    }
