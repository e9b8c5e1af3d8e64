"""The manifest of `cadsurgery run`: what happened to each picture, so that work that was ended can go on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from cadsurgery.data import stores
from cadsurgery.data.hub import fetch, is_address
from cadsurgery.data.tiff import split_page
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.files import append_line, exists, make_folder
from cadsurgery.tasks.run_folder import Identity, check_same_run, unreadable

Row = dict[str, Any]
_ALIKE = "all rows of a manifest are made alike."
_NAME, _NAMES = (
    "manifest.jsonl",
    "manifest*.jsonl",
)  # earlier versions wrote one for each process of a launcher
_BETWEEN_UPLOADS = 60.0  # seconds, of a manifest in object storage


class Predictions:
    """The manifest of a folder of predictions, as JSON Lines: a row for each picture that was written, or that failed.

    The first line states what made the rows. A row follows its result, so that a killed process leaves no row without a
    result.

    Attributes:
        is_new: True if the folder had no manifest.
        classes: names of the classes in the predictions that were there when the run began.
    """

    def __init__(self, output: Path | str, made_by: Identity, resume: bool) -> None:
        """Read the rows of earlier runs into a folder, which may be in object storage.

        Raises:
            InvalidInput: something else made the rows, or there are predictions and `resume` is not set; what holds
                none is begun anew.
            FileError: the manifest is damaged.
        """
        self.classes = set[str]()
        self._sources: dict[str, str] = {}  # by prediction
        self._states: dict[
            str, list[int] | None
        ] = {}  # of the pictures, by prediction, when they were predicted
        self._read_as: dict[str, list[int]] = {}  # by picture that is being predicted
        self._output, self._uploaded = str(output), time.monotonic()
        self._made_by = json.loads(json.dumps(made_by, default=str))
        self._folder = self._download() if stores.is_remote(output) else Path(output)
        self._own = self._folder / _NAME
        files = sorted(self._folder.glob(_NAMES))
        self.is_new, self._stale = not files, [] if resume else files
        if any(b'"output":' in file.read_bytes() for file in self._stale):
            raise InvalidInput(
                f"{output} holds the predictions of an earlier run.",
                why="they would be overwritten.",
                next="write only what is missing: --resume; or choose another folder: --output.",
            )
        for file in files if resume else ():
            self._read(file)

    def _read(self, file: Path) -> None:
        """Read whole lines, and remove a line that a killed process wrote in part."""
        whole, number = 0, 0
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.endswith(b"\n"):
                        break
                    if number > 1:
                        self._note(json.loads(line))
                    else:
                        check_same_run(json.loads(line), self._made_by, Path(self._output), _ALIKE)
                    whole += len(line)
            os.truncate(file, whole)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise unreadable(file, ValueError(f"line {number}: {error}")) from error

    def _note(self, row: Row) -> None:
        if "output" in row:
            self._sources[row["output"]], self._states[row["output"]] = row["path"], row.get("file")
            self.classes |= row.get("classes", {}).keys()

    def is_written(self, source: str, target: str) -> bool:
        """True if the prediction of a picture is in place, and the picture's file has the size and the time of change
        that it had then; in object storage, if a row says so.

        Raises:
            InvalidInput: the prediction of another picture, or a file that no run has written, would be replaced.
        """
        written = self._sources.get(self._place(target))
        is_there = exists(target) or (written is not None and stores.is_remote(target))
        replaced = "a file that no run has written" if self.is_new else ""
        if written not in (None, _whole(source)):
            replaced = f"that of {written}"
        if is_there and replaced:
            raise InvalidInput(
                f"the prediction of {source} would replace {replaced}.",
                where=target,
                next="choose another --output.",
            )
        is_done = is_there and written is not None
        return is_done and self._states.get(self._place(target)) in (None, _state_of(source))

    def note_start(self, source: str) -> None:
        """Note the state of a picture's file before it is read, for its row."""
        if (state := _state_of(source)) is not None:
            self._read_as[source] = state

    def begin(self) -> None:
        """Write the first line, unless it is there."""
        make_folder(self._folder)
        for file in self._stale:
            file.unlink(missing_ok=True)
        if not self._own.exists() or not self._own.stat().st_size:
            append_line(self._own, json.dumps(self._made_by))

    def add_prediction(self, row: Row) -> None:
        """Append the row of a prediction that is in place, or of a picture that failed, with the reason."""
        source = row["image"]
        path, state = _whole(source), self._read_as.pop(source, None)
        row = {name: value for name, value in row.items() if name != "image"}
        if "output" not in row:
            self._add({"path": path, "error": row})
        else:
            file = {} if state is None else {"file": state}
            self._add({"path": path, **file, **row, "output": self._place(row["output"])})

    def _add(self, row: Row) -> None:
        append_line(self._own, json.dumps(row))
        if time.monotonic() - self._uploaded > _BETWEEN_UPLOADS:
            self.__exit__()

    def _place(self, target: str) -> str:
        return target.removeprefix(self._output.rstrip("/")).lstrip("/")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Upload the rows into object storage."""
        if stores.is_remote(self._output):
            stores.write_bytes(f"{self._output}/{self._own.name}", self._own.read_bytes())
        self._uploaded = time.monotonic()

    def _download(self) -> Path:
        """Return a temporary folder with the manifest's files in object storage."""
        self._temporary = tempfile.TemporaryDirectory()
        with suppress(FileError):  # there is no such folder yet
            for place in stores.list_files(self._output):
                if fnmatch(place, _NAMES):
                    content = stores.read_bytes(f"{self._output}/{place}")
                    (Path(self._temporary.name) / place).write_bytes(content)
        return Path(self._temporary.name)


def _state_of(source: str) -> list[int] | None:
    """Return size and time of change (ns) of a picture's file; None in object storage."""
    with suppress(OSError, ValueError):
        status = os.stat(split_page(source)[0])
        return [status.st_size, status.st_mtime_ns]
    return None


def _whole(path: str) -> str:
    return path if stores.is_remote(path) else os.path.abspath(path)


def fingerprint(file: str | Path) -> str:
    """Return the SHA-256 of a file, which may be on the Hugging Face Hub."""
    with (fetch(str(file)) if is_address(file) else Path(file)).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
