"""Predict pictures that do not fit into memory: rows of a TIFF file are read, computed and written, band by band."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data import tiff
from cadsurgery.data.areas import read_area
from cadsurgery.data.channels import as_channels
from cadsurgery.data.images import check_values, normalise, open_large
from cadsurgery.data.rasters import add_overviews, open_rows
from cadsurgery.data.stores import is_remote
from cadsurgery.data.tiff import split_page
from cadsurgery.elements.sizes import divide_up
from cadsurgery.network.boxes import Box
from cadsurgery.support.errors import CadError, FileError, InvalidInput, NotInstalled
from cadsurgery.support.files import as_file_error, make_folder, write_whole
from cadsurgery.support.memory import bytes_of
from cadsurgery.support.progress import Step, silent
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.figures import CLASSES, palette
from cadsurgery.tasks.journal import Identity, Journal, state_of
from cadsurgery.tasks.pieces import Blocks, PartOfPicture, Piece, block_side, find_pieces, step_of

_ROWS = 256  # that are filled or looked at together
_SEEN = 1 << 22  # pixels that are searched for such without data at a time
SMALL = 2_000_000  # pixels of pictures whose maps are taken to fit
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
            next="give --memory again, of any amount, to resume; or delete this file.",
        )
    if not memory or is_remote(source) or is_remote(target):
        return target
    try:
        file = open_rows(source)
    except FileError:  # what cannot be read in rows may still be read whole
        return target
    file.close()
    is_large = is_plain or 4 * file.shape[0] * file.shape[1] * file.shape[2] > bytes_of(memory)
    return str(Path(target).with_suffix(".tif")) if is_large else target


def header_of(path: str) -> tuple[tuple[int, int], bool] | None:
    """Return the (height, width) of a picture by the header of its file, and whether that says where it lies on the
    earth; None where it does not tell a size."""
    if is_remote(path):
        return None
    with suppress(FileError, NotInstalled):
        file = open_rows(path)
        file.close()
        return (file.shape[1], file.shape[2]), bool(file.position)
    with (
        suppress(Exception),
        open_large(split_page(path)[0]) as picture,
    ):  # what is no picture is reported later
        return (picture.height, picture.width), False
    return None


def memory_of_whole(net: Any, channels: int, size: tuple[int, int]) -> int:
    """Return the bytes that a picture (height, width) takes at most where it is computed whole: its maps, where all of
    it is kept high, and the picture itself; 0 if that is not known."""
    height, width = (-(-side // MULTIPLES[-1]) * MULTIPLES[-1] for side in size)
    try:
        image = torch.zeros(()).expand(1, channels, height, width)
        walks = net.optimize(memory=sys.maxsize).plan_memory(image, mask="all")
    except CadError:  # it is not computed in bands
        return 0
    return int(walks.peak) + 3 * 4 * channels * height * width  # as read, normalised, and as masks see it


def memory_of_levels(net: Any, size: tuple[int, int]) -> int:
    """Return the bytes of the level map of a picture (height, width), which stays beside the maps."""
    if net.mask.uniform_level(net.geometry.max_level) is not None:
        return 0
    return math.prod(divide_up(side, net.plan.strides[0]) for side in size)


def _part_of(target: Path) -> Path:
    """Return the file in which rows are written before the prediction is whole."""
    return target.with_name(f".{target.name}.part")


class LargePicture:
    """A picture (C, H, W) of a TIFF file as a network takes it, of which rows are read where it is sliced."""

    def __init__(
        self,
        path: str,
        source: Any,
        dtype: torch.dtype | None = None,
        options: RunOptions | None = None,
    ) -> None:
        """Open a file.

        Args:
            path: the file.
            source: the network's source.
            dtype: type of the network's pictures.
            options: of a run; a size and another view than the usual need the whole picture.

        Raises:
            FileError: see `TiffRows`.
            InvalidInput: the picture is to be resized, or drawn upon.
        """
        how = options or RunOptions()
        for name, is_asked in (("--size", how.size is not None), ("--view", how.view not in ("", CLASSES))):
            if is_asked:
                raise InvalidInput(
                    f"{name} for {path}, which is read in rows.",
                    why="the picture takes more memory than --memory.",
                    next="leave it out, or give more memory.",
                )
        self.file, self.path, self._source, self._dtype = open_rows(path), path, source, dtype
        self._bands = how.bands or (source.bands if source is not None else ())
        self.size = (self.file.shape[1], self.file.shape[2])
        self.shape: tuple[int, ...] = (self._read(0, 1)[0].shape[0], *self.size)
        self._lacking = self._bits(lambda *part: self._read(*part)[1][0]) if self.file.may_lack else None
        self._unwanted, self.asked = self._lacking, 0
        if how.within:
            area = read_area(how.within, self.size, path, self.file.position)
            outside = self._bits(lambda first, end, left, right: ~area(first, end)[:, left:right])
            self.asked = self.size[0] * self.size[1] - _count(outside)
            both = [bits for bits in (self._lacking, outside) if bits is not None]
            self._unwanted = np.bitwise_or.reduce(both) if both else None

    def _bits(self, marks: Callable[[int, int, int, int], Tensor]) -> np.ndarray[Any, Any] | None:
        """Return which pixels are marked in windows (top, bottom, left, right), eight in a byte; None if none is."""
        (height, width), (tall, wide) = self.size, self.file.block
        tall *= max(1, _ROWS // tall)
        wide *= max(1, _SEEN // (tall * wide))  # whole blocks, and so whole bytes
        marked = np.zeros((height, -(-width // 8)), np.uint8)
        for top, left in product(range(0, height, tall), range(0, width, wide)):
            window = marks(top, min(top + tall, height), left, min(left + wide, width))
            marked[top : top + tall, left // 8 : (left + wide) // 8] = np.packbits(window.numpy(), axis=1)
        return marked if marked.any() else None

    @property
    def lacks(self) -> bool:
        """True if some pixels have no data."""
        return self._lacking is not None

    @property
    def is_partial(self) -> bool:
        """True if the result has no data somewhere: the picture has none there, or it is not asked for."""
        return self._unwanted is not None

    @property
    def without_data(self) -> int:
        """The number of pixels without data."""
        return _count(self._lacking)

    def lacking(self, first: int, end: int, size: tuple[int, int], *, or_outside: bool = False) -> Tensor:
        """Return which samples of rows [first, end) of a map (height, width) lie on pixels without data, (rows, W),
        or on such that are not asked for."""
        marked = self._unwanted if or_outside else self._lacking
        if marked is None:
            return torch.zeros(end - first, size[1], dtype=torch.bool)
        rows, columns = (
            np.minimum((np.arange(*part) + 0.5) * step_of(whole, length), whole - 1)
            for part, length, whole in zip(((first, end), (0, size[1])), size, self.size, strict=True)
        )
        unpacked = np.unpackbits(marked[rows.astype(int)], axis=1)
        return torch.from_numpy(unpacked[:, columns.astype(int)].astype(bool))

    def wanted(self, side: int) -> Blocks:
        """Return which blocks of so many pixels a side, (rows, columns), have pixels with data that are asked for."""
        height, width = self.size
        found = np.ones((-(-height // side), -(-width // side)), bool)
        if self._unwanted is None:
            return found
        for number, blocks in enumerate(found):
            band = np.unpackbits(self._unwanted[number * side : (number + 1) * side], axis=1, count=width)
            there = np.pad((band == 0).any(0), (0, -width % side))
            blocks[:] = there.reshape(-1, side).any(1)
        return found

    def pad_to(self, multiple: int) -> bool:
        """Let its sides be multiples of so many pixels, by zeros at the right and below, which stand for the mean
        colour; False if they are."""
        before, height, width = self.shape
        self.shape = (before, *(-(-side // multiple) * multiple for side in self.size))
        return self.shape != (before, height, width)

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        """Return rows (C, rows, columns), of all columns or of some.

        Raises:
            FileError, InvalidInput: as `read_picture_for`.
        """
        first, last, _ = place[1].indices(self.shape[1])
        left, right, _ = (*place, slice(None))[2].indices(self.shape[2])
        end, stop = min(last, self.size[0]), min(right, self.size[1])
        if first >= end or left >= stop:
            return torch.zeros(self.shape[0], max(0, last - first), max(0, right - left), dtype=self._dtype)
        rows, lacking = self._read(first, end, left, stop)
        normalised = (
            normalise(rows, self._source).masked_fill(lacking, 0).to(self._dtype)
        )  # the mean: no signal
        is_padded = right > stop or last > end
        return F.pad(normalised, (0, right - stop, 0, last - end)) if is_padded else normalised

    def _read(self, first: int, end: int, left: int = 0, right: int | None = None) -> tuple[Tensor, Tensor]:
        """Return rows (C, rows, columns) before they are normalised, and where they lack data, (1, rows, columns)."""
        channels = None if self._source is None else self._source.channels
        stored = self.file.rows(first, end, left, right)
        rows = as_channels(stored, channels, self._bands, name=self.path, has_alpha=self.file.has_alpha)
        lacking = rows.isnan().any(0, keepdim=True)
        if self.file.has_alpha:
            lacking = lacking | (stored[-1:] == 0)
        if (there := rows[:, ~lacking[0]]).numel():
            check_values(there[..., None], self._source, self.path)
        return rows, lacking


class WrittenRows:
    """The prediction of a picture as far as it is written: its plain rows beside its place, and their journal."""

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
        next = f"give it the same again, choose another --output, or delete {self.file}, to begin again."
        self._journal = Journal(place, asked, resume, what=str(self.file), next=next)
        rows = self._journal.rows
        self.size: tuple[int, int] = (rows[0]["size"][0], rows[0]["size"][1]) if rows else (0, 0)
        self.milliseconds, self.counts = 0.0, Counter[int]()
        self._done = dict[Box, int]()  # of each piece the row behind those that are there
        for row in rows[1:]:
            self._done[Box(*row["piece"])] = row["rows"]
            self.milliseconds += row["milliseconds"]
            self.counts.update({int(number): count for number, count in row["counts"].items()})
        self.rows = [0, *self._done.values()][-1]
        self._kind: np.dtype[Any] = np.dtype(np.uint8)
        self._piece = Box(0, 0, 0, 0)

    @property
    def start(self) -> int:
        """The row to go on with; of a prediction whose rows are all there the last one."""
        return max(0, min(self.rows, self.size[0] - 1))

    def begin(self, size: tuple[int, int], channels: int, lacks: bool) -> float:
        """Make the file, unless there are rows in it: classes; of one channel its values. Return the value of pixels
        without data, of which there are some if it `lacks`, and which it is filled with."""
        self._kind = np.dtype(
            np.float32 if channels == 1 else np.uint8 if channels + lacks <= 256 else np.uint16
        )
        self.size, without = size, math.nan if channels == 1 else int(np.iinfo(self._kind).max)
        if not self._done:
            make_folder(self.target.parent)
            with self._written(), self.file.open("wb") as file:
                for first in range(0, size[0], _ROWS) if lacks else ():
                    file.write(np.full((min(_ROWS, size[0] - first), size[1]), without, self._kind).tobytes())
            self._journal.remove()
            self._journal.begin()
            self._journal.add({"size": [*size]})
        return without

    def turn_to(self, piece: Box) -> int:
        """Let the rows that are written next be those of a piece; return the first that is not there."""
        self._piece = piece
        return self._done.get(piece, piece.top)

    def _written(self) -> AbstractContextManager[None]:
        return as_file_error(f"{self.target} cannot be written.", "choose another --output.")

    def write(self, first: int, values: Tensor, counts: Counter[int], milliseconds: float) -> None:
        """Write rows (rows, columns) of the piece, and then that they are there."""
        (*_, left, right), item = self._piece, self._kind.itemsize
        self.rows, self.milliseconds = first + len(values), self.milliseconds + milliseconds
        self.counts += counts
        self._done[self._piece] = self.rows
        together = values.numpy().astype(self._kind)
        with self._written():
            with self.file.open("r+b") as file:
                # Whole rows lie behind each other.
                for number, row in enumerate([together] if right - left == self.size[1] else together):
                    file.seek(((first + number) * self.size[1] + left) * item)
                    file.write(row.tobytes())
            row_of_journal = {"piece": [*self._piece], "rows": self.rows}
            self._journal.add({**row_of_journal, "milliseconds": milliseconds, "counts": counts})

    def finish(self, position: Sequence[Any], block: tuple[int, int], overviews: bool = False) -> None:
        """Write the whole prediction to its place, in compressed tiles of a size: classes with their colours."""
        width = self.size[1]

        def rows(first: int, end: int) -> np.ndarray[Any, Any]:
            file.seek(first * width * self._kind.itemsize)
            return np.fromfile(file, self._kind, (end - first) * width).reshape(-1, width)

        colours = palette().T.astype(np.uint16) * 257 if self._kind == np.uint8 else None
        with self._written():
            with self.file.open("rb") as file, write_whole(self.target) as whole:
                tiff.write_tiled(whole, self.size, self._kind, rows, colours, position, block)
                if overviews:
                    add_overviews(whole, block, is_classes=self._kind.kind != "f")
            self.file.unlink()
            self._journal.remove()


def cut_back(maps: Tensor, padded: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return what maps (B, ..., h, w) of padded images hold of the images."""
    height, width = _sides_of(maps.shape[-2:], padded, size)
    return maps[..., :height, :width]


def _sides_of(sides: Sequence[int], padded: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Return the part of a map's sides that belongs to the image, of a size, in a padded one."""
    ends = (
        math.ceil(pixels / step_of(whole, samples))
        for samples, pixels, whole in zip(sides, size, padded, strict=True)
    )
    return next(ends), next(ends)


def _without_cells(net: Any, picture: LargePicture, levels: Tensor) -> Any:
    """Return the levels of a picture whose cells without any data have the lowest one; None for a picture that is
    computed as given."""
    if not any(levels.stride()):
        return None
    if not picture.lacks:
        return levels
    levels, side = levels.clone(), net.geometry.sides[-1]
    height, width = levels.shape[1:]
    tall = side * max(1, _ROWS // side)
    for first in range(0, height, tall):
        band = levels[:, first : first + tall]
        lacking = picture.lacking(first, first + band.shape[1], (height, width))
        beyond = (0, -width % side, 0, -len(lacking) % side)
        cells = (
            F.pad(lacking, beyond, value=True).unflatten(1, (-1, side)).unflatten(0, (-1, side)).all(3).all(1)
        )
        lowest = cells.repeat_interleave(side, 0).repeat_interleave(side, 1)[: len(lacking), :width]
        band.masked_fill_(lowest, net.geometry.max_level)
    return levels


def _rows_of(net: Any, picture: LargePicture, start: int, mask: Any = None) -> Any:
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
            return net.rows(picture, start=start, mask=mask, sizes=[picture.size] if multiple > 1 else None)
        except NotInstalled:
            raise
        except CadError as error:
            if error.where == "memory":  # which more padding does not mend
                raise
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _count(marked: np.ndarray[Any, Any] | None) -> int:
    """Return the number of pixels that are marked in bits."""
    return 0 if marked is None else int(sum(np.unpackbits(row).sum(dtype=np.int64) for row in marked))


def _shares_of(levels: Tensor, picture: LargePicture, max_level: int) -> list[float]:
    """Return the share of each level among the samples of a level map (1, h, w): of all, or of those asked for."""
    levels, size = levels[0], (levels.shape[1], levels.shape[2])
    is_uniform = not any(levels.stride())
    levels = levels[:1, :1] if is_uniform else levels
    found = torch.zeros(max_level + 1, dtype=torch.int64)
    for first in range(0, len(levels), _ROWS):
        rows = levels[first : first + _ROWS]
        if picture.asked and not is_uniform:
            rows = rows[~picture.lacking(first, first + len(rows), size, or_outside=True)]
        found += torch.bincount(rows.flatten().long(), minlength=max_level + 1)
    shares: list[float] = (found / max(1, int(found.sum()))).tolist()
    return shares


def predict_large(
    net: Any,
    picture: LargePicture,
    part: WrittenRows,
    count: Count,
    stopped: threading.Event,
    step: Step = silent,
    overviews: bool = False,
) -> dict[str, Any]:
    """Predict a picture in rows and write the classes of its pixels; of a network with one channel its values.

    Once `stopped` is set it ends behind the band that is computed, and the row says `interrupted`. `step` is told the
    rows that are done, from which the time that is left follows.

    Rows that are in the part are not computed again. With `overviews` the file has smaller copies, see `add_overviews`.

    Returns:
        Fields of its row, with the number of pixels of each class.

    Raises:
        CadError: the picture cannot be read, computed or written.
    """
    with torch.inference_mode():
        start = time.perf_counter()
        result = _rows_of(net, picture, part.start)
        whole, padded = result.shape, picture.shape[1:]
        channels, size = whole[0], _sides_of(whole[1:], padded, picture.size)
        steps = step_of(padded[0], whole[1]), step_of(padded[1], whole[2])
        without = part.begin(size, channels, picture.is_partial)
        mask = _without_cells(net, picture, result.levels) if picture.is_partial else None
        levels = result.levels if mask is None else mask
        if mask is not None:
            result = None  # with its levels, which take as much memory as all of those of the mask
        name = Path(picture.path).name
        step(f"{name}, row {part.rows} of {size[0]}", part.rows, size[0])
        # Rectangles of the result, of which one follows the other; see `find_pieces`.
        pieces = [Piece(Box(0, size[0], 0, size[1]))]
        if picture.is_partial:
            wanted = picture.wanted(block_side(picture.shape[1]))
            pieces = find_pieces(net, picture, wanted, size, steps, mask)
        for piece in pieces:
            (_, bottom, left, right), begin = piece.box, part.turn_to(piece.box)
            if begin >= bottom:
                continue
            if piece.part is not None:
                own = PartOfPicture(picture, piece.part)
                rows_of = net.rows(own, start=begin - piece.offset[0], mask=piece.mask)
            elif result is not None and begin == part.start:
                rows_of = result
            else:
                rows_of = _rows_of(net, picture, begin, mask)
            down, across = piece.offset
            for at, computed in rows_of:
                first = max(at + down, begin)
                rows = computed[:, first - at - down : bottom - at - down, left - across : right - across]
                values = rows[0].float() if channels == 1 else rows.float().argmax(0)
                lacking = picture.lacking(first, first + len(values), size, or_outside=True)[:, left:right]
                now, there = time.perf_counter(), values[~lacking]
                values = values.masked_fill(lacking, without) if picture.is_partial else values
                part.write(first, values, count(there, channels), 1e3 * (now - start))
                start = now
                step(f"{name}, row {part.rows} of {size[0]}", part.rows, size[0])
                if stopped.is_set() and (part.rows < bottom or piece is not pieces[-1]):
                    return {"interrupted": True, "rows": [part.rows, size[0]]}
                if part.rows >= bottom:
                    break
    position = tiff.moved_position(picture.file.position, steps)
    if picture.is_partial:
        position = (*position, (tiff.NO_DATA, 2, None, f"{without}", True))
    part.finish(position, picture.file.block, overviews)
    shares = _shares_of(cut_back(levels, padded, picture.size), picture, net.geometry.max_level)
    return {
        "output": str(part.target),
        "size": [*picture.size],
        "active_fraction": shares[0],
        "levels": shares,
        "milliseconds": part.milliseconds,
        "counts": part.counts,
        **({"without_data": picture.without_data} if picture.lacks else {}),
        **({"asked": picture.asked} if picture.asked else {}),
        **({"padded_to": [*padded]} if padded != picture.size else {}),
    }
