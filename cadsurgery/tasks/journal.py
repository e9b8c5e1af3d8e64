"""The journal of work that can be resumed: what was asked, in its first line, and a line for everything that is done.

It is a file of JSON Lines that only grows. A line follows its result, so that a killed process leaves no line without
one, and at most a part of its last line.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from cadsurgery.data import stores
from cadsurgery.data.hub import fetch, is_address
from cadsurgery.data.tiff import split_page
from cadsurgery.support.errors import FileError, InvalidInput, first_line
from cadsurgery.support.files import append_line, exists, make_folder
from cadsurgery.support.progress import Step

Identity = dict[str, Any]  # plain values that are the same whenever a run is resumed
Row = dict[str, Any]  # what happened to an image or a clip, as plain values; a failure has no `output`
NAME = "manifest.jsonl"  # of a folder's journal
_BETWEEN_UPLOADS = 60.0  # seconds, of a journal in object storage
_NEXT = "give it the same again, or choose another --output."


class Journal:
    """What was done by earlier runs, and by this one.

    Attributes:
        is_new: True if there was no journal.
        rows: what earlier runs have noted.
    """

    def __init__(
        self,
        file: Path | str,
        asked: Identity,
        resume: bool = True,
        *,
        what: str = "",
        next: str = _NEXT,
        is_replaced: bool = False,
    ) -> None:
        """Read what earlier runs have noted; nothing is written yet.

        Args:
            file: the journal, which may be in object storage.
            asked: what the work depends on.
            resume: False to refuse results of an earlier run instead of resuming it; a journal without results is
                begun anew.
            what: the name of the work in errors; default: the folder.
            next: what to do about another run.
            is_replaced: True to begin anew instead of refusing.

        Raises:
            InvalidInput: other work was asked for, with all differences; or there are results and `resume` is not set.
            FileError: the journal is damaged.
        """
        self.rows: list[Row] = []
        self._asked: Identity = json.loads(json.dumps(asked, default=str))
        self._address, self._uploaded = str(file), time.monotonic()
        self._what = what or os.path.dirname(self._address)
        self._file = Path(file)
        if stores.is_remote(file):  # a temporary copy
            self._temporary = tempfile.TemporaryDirectory()
            self._file = Path(self._temporary.name) / NAME
            with suppress(FileError):  # there is none yet
                self._file.write_bytes(stores.read_bytes(self._address))
        self.is_new, self._is_begun = not exists(self._file), resume
        if self.is_new:
            return
        if not resume and not is_replaced and has_results(self._file):
            raise InvalidInput(
                f"{self._what} holds the results of an earlier run.",
                why="they would be overwritten.",
                next="write only what is missing: --resume; or choose another folder: --output.",
            )
        if resume:
            self._read(next)

    def _read(self, next: str) -> None:
        """Read whole lines, and remove a line that a killed process wrote in part."""
        whole, number = 0, 0
        try:
            with self._file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.endswith(b"\n"):
                        break
                    if number > 1:
                        self.note(json.loads(line))
                    else:
                        check_same_run(json.loads(line), self._asked, self._what, next=next)
                    whole += len(line)
            os.truncate(self._file, whole)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            why = first_line(ValueError(f"line {number}: {error}"))
            raise FileError(
                f"{self._file} cannot be read.", why=why, next="choose another output folder."
            ) from error

    def note(self, row: Row) -> None:
        """Take in a row of an earlier run."""
        self.rows.append(row)

    def begin(self) -> None:
        """Write the first line, unless it is there."""
        make_folder(self._file.parent)
        if not self._is_begun:
            self.remove()
        if not exists(self._file) or not self._file.stat().st_size:
            append_line(self._file, json.dumps(self._asked))

    def add(self, row: Row) -> None:
        """Append a row."""
        append_line(self._file, json.dumps(row))
        if time.monotonic() - self._uploaded > _BETWEEN_UPLOADS:
            self.__exit__()

    def remove(self) -> None:
        """Remove the file, so that the next `begin` begins anew."""
        self._file.unlink(missing_ok=True)
        self._is_begun = True

    def __enter__(self) -> Self:
        """Write the first line, unless it is there."""
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        """Upload the rows into object storage."""
        if stores.is_remote(self._address):
            stores.write_bytes(self._address, self._file.read_bytes())
        self._uploaded = time.monotonic()


class Item(NamedTuple):
    """An image, its position among all, the path or address of its prediction, and its content if that was read."""

    position: int
    source: str
    target: str = ""
    content: bytes | None = None


class Results(Journal):
    """A journal of files that are made of pictures: of each its place, the picture and the state of that, or the error.

    A result counts as long as it is in its place and the picture has the size and the time of change that it had
    when it was read; in object storage it counts if a row says so.

    Attributes:
        classes: names of the classes in the predictions that are there.
    """

    def __init__(self, file: Path | str, asked: Identity, resume: bool = True, **options: Any) -> None:
        """As of `Journal`; results are in the folder of the file."""
        self.classes = set[str]()
        self._made_of: dict[str, tuple[str, list[int] | None]] = {}  # picture and its state, by result
        self._read_as: dict[str, list[int] | None] = {}  # state by picture that is in work
        self._folder = os.path.dirname(str(file))
        super().__init__(file, asked, resume, **options)

    def note(self, row: Row) -> None:
        """Take in a row of an earlier run."""
        if "output" in row:
            self._made_of[row["output"]] = row["path"], row.get("file")
            self.classes |= row.get("classes", {}).keys()

    def is_written(self, source: str, target: str) -> bool:
        """True if the result of a picture is in place, and was made of the picture as it is now.

        Raises:
            InvalidInput: the result of another picture, or a file that no run has written, would be replaced.
        """
        of, state = self._made_of.get(self._place(target), (None, None))
        is_there = exists(target) or (of is not None and stores.is_remote(target))
        replaced = "a file that no run has written" if self.is_new else ""
        if of not in (None, _whole(source)):
            replaced = f"that of {of}"
        if is_there and replaced:
            raise InvalidInput(
                f"the result for {source} would replace {replaced}.",
                where=target,
                next="choose another --output.",
            )
        return is_there and of is not None and state == state_of(source)

    def left(self, items: Iterable[Item], skip: Callable[[Item], None]) -> Iterator[Item]:
        """Yield the items whose results are to be made, and `skip` those whose results are there."""
        for item in items:
            if self.is_written(item.source, item.target):
                skip(item)
            else:
                self._read_as[item.source] = state_of(item.source)  # before it is read
                yield item

    def taken_in(
        self, answers: Iterable[tuple[int, Row]], number: int | None, step: Step
    ) -> Iterator[tuple[int, Row]]:
        """Yield the positions and rows of so many pictures, after each is noted and shown."""
        step(f"image 1 of {number or '?'}", 0, number)
        for count, (position, row) in enumerate(answers, 1):
            if not row.get("interrupted"):
                self._add_result(row)
            self.classes |= row.get("classes", {}).keys()
            step(f"image {count} of {number or '?'} ({Path(row['image']).name})", count, number)
            yield position, row

    def _add_result(self, row: Row) -> None:
        """Append the row of a result that is in place, or of a picture that failed, with the reason."""
        source = row["image"]
        state = self._read_as.pop(source, None)
        row = {name: value for name, value in row.items() if name != "image"}
        if "output" not in row:
            self.add({"path": _whole(source), "error": row})
        else:
            file = {} if state is None else {"file": state}
            self.add({"path": _whole(source), **file, **row, "output": self._place(row["output"])})

    def _place(self, target: str) -> str:
        return target.removeprefix(self._folder.rstrip("/")).lstrip("/")


def has_results(file: Path) -> bool:
    """True if a journal has a line after the first one that is not of a failure."""
    if not exists(file):
        return False
    with file.open("rb") as lines:
        next(lines, b"")
        return any(line.endswith(b"\n") and b'"error":' not in line for line in lines)


def state_of(source: str | Path) -> list[int] | None:
    """Return size and time of change (ns) of a picture's file; None in object storage, and for what is no file."""
    with suppress(OSError, ValueError):
        status = os.stat(split_page(str(source))[0])
        return [status.st_size, status.st_mtime_ns]
    return None


def digest_of(files: Iterable[str | Path]) -> str:
    """Return a short hash that changes if a file does, by size or time of change."""
    return hashlib.sha256(json.dumps([state_of(file) for file in files]).encode()).hexdigest()[:12]


def _whole(path: str) -> str:
    return path if stores.is_remote(path) else os.path.abspath(path)


def fingerprint(file: str | Path) -> str:
    """Return the SHA-256 of a file, which may be on the Hugging Face Hub."""
    with (fetch(str(file)) if is_address(file) else Path(file)).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_same_run(
    stored: Identity,
    now: Identity,
    what: Path | str,
    why: str = "a run is resumed exactly as it began.",
    next: str = _NEXT,
) -> None:
    """Refuse to resume work with other settings, another network or other data.

    Raises:
        InvalidInput: the runs differ; the message lists every difference.
    """
    if differences := _differences(stored, now, ""):
        raise InvalidInput(
            f"{what} holds another run.",
            where="; ".join(differences),
            why=why,
            next=next,
        )


def _differences(stored: Any, now: Any, path: str) -> list[str]:
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        names = sorted(stored.keys() | now.keys())
        parts = (_differences(stored.get(n), now.get(n), f"{path}.{n}" if path else n) for n in names)
        return [difference for some in parts for difference in some]
    return [] if stored == now else [f"{path}: {_short(stored)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
