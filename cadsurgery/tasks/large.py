"""Predict pictures that do not fit into memory: rows of a TIFF file are read, computed and written, band by band."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.data import tiff
from cadsurgery.data.channels import as_channels
from cadsurgery.data.images import check_values, normalise
from cadsurgery.data.stores import is_remote
from cadsurgery.support.errors import FileError, InvalidInput, warn
from cadsurgery.support.files import as_file_error, make_folder
from cadsurgery.support.memory import bytes_of
from cadsurgery.support.progress import Step, silent
from cadsurgery.tasks.figures import CLASSES, palette
from cadsurgery.tasks.journal import Identity, Journal, state_of

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
            next="give --memory again, of any amount, to resume; or delete this file.",
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
        self.shape = (self[:, :1].shape[0], *self.file.shape[1:])

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        """Return rows (C, rows, W).

        Raises:
            FileError, InvalidInput: as `read_picture_for`.
        """
        first, end, _ = place[1].indices(self.file.shape[1])
        channels = None if self._source is None else self._source.channels
        stored = self.file.rows(first, end)
        rows = as_channels(stored, channels, self._bands, name=self.path, has_alpha=self.file.has_alpha)
        check_values(rows, self._source, self.path)
        return normalise(rows, self._source).to(self._dtype)


class WrittenRows:
    """The prediction of a picture as far as it is written: a TIFF file beside its place, and its journal."""

    def __init__(self, picture: str, target: Path, made_by: Identity, resume: bool) -> None:
        """Read what a run that was ended has written.

        Raises:
            InvalidInput: it is of another picture, or by other settings; or `resume` is not set.
            FileError: the journal is damaged.
        """
        self.target, self.file = target, _part_of(target)
        asked = {"path": os.path.abspath(picture), "file": state_of(picture), "by": made_by}
        place = target.with_name(f".{target.name}.jsonl")
        if not self.file.exists():
            place.unlink(missing_ok=True)  # there is nothing to resume
        next = f"give it the same again, choose another --output, or delete {self.file}, to start again."
        self._journal = Journal(place, asked, resume, what=str(self.file), next=next)
        rows = self._journal.rows
        self._offset = int(rows[0]["offset"]) if rows else 0
        self.rows = max((row["rows"] for row in rows[1:]), default=0)
        self.milliseconds = sum(row["milliseconds"] for row in rows[1:])
        self.counts = Counter[int]()
        for row in rows[1:]:
            self.counts.update({int(number): count for number, count in row["counts"].items()})
        self._kind: np.dtype[Any] = np.dtype(np.uint8)

    def begin(self, size: tuple[int, int], channels: int, position: Sequence[Any]) -> None:
        """Make the file at a position, unless there are rows in it: classes with their colours; one channel as its
        values."""
        self._kind = np.dtype(np.float32 if channels == 1 else np.uint8 if channels <= 256 else np.uint16)
        if not self.rows:
            make_folder(self.target.parent)
            colours = palette().T.astype(np.uint16) * 257 if self._kind == np.uint8 else None
            with as_file_error(f"{self.target} cannot be written.", "choose another --output."):
                self._offset = tiff.make_empty(self.file, size, self._kind, colours, position)
            self._journal.remove()
            self._journal.begin()
            self._journal.add({"offset": self._offset})

    def write(self, first: int, values: Tensor, counts: Counter[int], milliseconds: float) -> None:
        """Write rows (rows, W), and then that they are there."""
        missing = values[max(self.rows - first, 0) :]  # others are those of a run that was ended
        self.rows, self.milliseconds = first + len(values), self.milliseconds + milliseconds
        self.counts += counts
        with as_file_error(f"{self.target} cannot be written.", "choose another --output."):
            with self.file.open("r+b") as file:
                file.seek(self._offset + (self.rows - len(missing)) * values.shape[1] * self._kind.itemsize)
                file.write(missing.numpy().astype(self._kind).tobytes())
            self._journal.add({"rows": self.rows, "milliseconds": milliseconds, "counts": counts})

    def finish(self) -> None:
        """Put the whole file in its place."""
        with as_file_error(f"{self.target} cannot be written.", "choose another --output."):
            self.file.replace(self.target)
            self._journal.remove()


def predict_large(
    net: Any,
    picture: LargePicture,
    part: WrittenRows,
    count: Count,
    stopped: threading.Event,
    step: Step = silent,
) -> dict[str, Any]:
    """Predict a picture in rows and write the classes of its pixels; of a network with one channel its values.

    Once `stopped` is set it ends behind the band that is computed, and the row says `interrupted`. `step` is told the
    rows that are done, from which the time that is left follows.

    Rows that are in the part are not computed again.

    Returns:
        Fields of its row, with the number of pixels of each class.

    Raises:
        CadError: the picture cannot be read, computed or written.
    """
    height, width = picture.shape[1:]
    position = picture.file.position
    with torch.inference_mode():
        start = time.perf_counter()
        result = net.rows(picture, start=part.rows)
        channels = result.shape[0]
        size = (result.shape[1], result.shape[2])
        if position and size != (height, width):
            sizes = f"it has {size[1]} x {size[0]} pixels, and the picture {width} x {height}."
            next = "give it that of the picture, in larger pixels: gdal_translate -a_srs, -a_ullr."
            warn_of_position(picture.path, sizes, next)
            position = ()
        part.begin(size, channels, position)
        name = Path(picture.path).name
        step(f"{name}, row {part.rows} of {size[0]}", part.rows, size[0])
        for first, rows in result:
            values = rows[0].float() if channels == 1 else rows.float().argmax(0)
            new = values[max(part.rows - first, 0) :]
            now = time.perf_counter()
            part.write(first, values, count(new, channels), 1e3 * (now - start))
            start = now
            step(f"{name}, row {part.rows} of {size[0]}", part.rows, size[0])
            if stopped.is_set() and part.rows < size[0]:
                return {"interrupted": True, "rows": [part.rows, size[0]]}
    part.finish()
    levels = result.levels if any(result.levels.stride()) else result.levels.flatten()[:1]
    shares = [int((levels == level).sum()) / levels.numel() for level in range(net.geometry.max_level + 1)]
    return {
        "output": str(part.target),
        "size": [height, width],
        "active_fraction": shares[0],
        "levels": shares,
        "milliseconds": part.milliseconds,
        "counts": part.counts,
    }
