"""Manifests of `cadsurgery run` and `eval`: what happened to each picture, so that work that was ended can go on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from cadsurgery.data import stores
from cadsurgery.data.hub import fetch, is_address
from cadsurgery.support.errors import FileError, InvalidInput
from cadsurgery.support.files import append_line, exists, make_folder
from cadsurgery.support.launcher import world
from cadsurgery.tasks.run_folder import Identity, check_same_run, unreadable

Row = dict[str, Any]
_BETWEEN_UPLOADS = 60.0  # seconds, of a manifest in object storage


class Manifest:
    """Rows of work on many pictures, as JSON Lines, so that what was ended can go on.

    Each process appends to a file of its own, and all files are read together. The first line of each states what made
    the rows. A row follows its result, so that a killed process leaves no row without a result.
    """

    def __init__(self, output: Path | str, made_by: Identity, take: Callable[[Row], None]) -> None:
        """Read the rows of earlier runs into a folder; the first process removes what a killed process wrote in part.

        Args:
            output: the folder, which may be in object storage.
            made_by: what makes the rows.
            take: gets each row.

        Raises:
            InvalidInput: something else made the rows.
            FileError: a file of the manifest is damaged.
        """
        self._output, self._uploaded, self._take = str(output), 0.0, take
        self._is_remote = stores.is_remote(output)
        self.folder = self._download() if self._is_remote else Path(output)
        self._made_by = json.loads(json.dumps(made_by, default=str))
        self._own = self.folder / _name(world().rank)
        files, self._stale = self._files()
        self._begun = [file for file in files if self._read(file)]

    def _files(self) -> tuple[list[Path], list[Path]]:
        """Return the files to go on with, and those to remove."""
        return sorted(self.folder.glob("manifest*.jsonl")), []

    def _read(self, file: Path) -> int:
        """Read a file up to its last whole line; return the number of bytes up to there."""
        whole, number = 0, 0
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.endswith(b"\n"):
                        self._take_line(json.loads(line), number)
                        whole += len(line)
            if world().is_main and file.stat().st_size > whole:
                os.truncate(file, whole)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise unreadable(file, ValueError(f"line {number}: {error}")) from error
        return whole

    def _take_line(self, row: Row, number: int) -> None:
        if number == 1:
            check_same_run(row, self._made_by, self.folder, "all rows of a manifest are made alike.")
        else:
            self._take(row)

    def begin(self) -> None:
        """Write the first line of this process's file, unless it is there; no process may still read."""
        make_folder(self.folder)
        of_others = {self.folder / _name(rank) for rank in range(world().size)} - {self._own}
        for file in self._stale:
            if file == self._own or (world().is_main and file not in of_others):
                file.unlink(missing_ok=True)
        if self._own not in self._begun:
            append_line(self._own, json.dumps(self._made_by))

    def add(self, row: Row) -> None:
        """Append a row, whose result is in place."""
        append_line(self._own, json.dumps(row))
        if self._is_remote and time.monotonic() - self._uploaded > _BETWEEN_UPLOADS:
            self._upload()

    def add_failure(self, failure: Mapping[str, Any]) -> None:
        """Append the row of a picture that failed, with the reason."""
        reason = dict(failure)
        self.add({"path": reason.pop("image"), "error": reason})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_remote:
            self._upload()

    def _download(self) -> Path:
        """Return a temporary folder with the manifest's files in object storage."""
        self._temporary = tempfile.TemporaryDirectory()
        with suppress(FileError):  # there is no such folder yet
            for place in stores.list_files(self._output):
                if fnmatch(place, "manifest*.jsonl"):
                    content = stores.read_bytes(stores.join(self._output, place))
                    (Path(self._temporary.name) / place).write_bytes(content)
        return Path(self._temporary.name)

    def _upload(self) -> None:
        stores.write_bytes(stores.join(self._output, self._own.name), self._own.read_bytes())
        self._uploaded = time.monotonic()


class Predictions(Manifest):
    """The manifest of a folder of predictions: a row for each picture that was written, or that failed.

    Attributes:
        classes: names of the classes in the predictions that were there when the run began.
    """

    def __init__(self, output: Path | str, made_by: Identity, resume: bool) -> None:
        """Read the rows of earlier runs.

        Raises:
            InvalidInput: there are predictions and `resume` is not set; or see `Manifest`.
            FileError: see `Manifest`.
        """
        self._resume, self.classes = resume, set[str]()
        self._sources: dict[str, str] = {}  # by prediction
        super().__init__(output, made_by, self._note)

    def _files(self) -> tuple[list[Path], list[Path]]:
        files, stale = super()._files()
        self._is_new = not files
        if self._resume:
            return files, stale
        if any(b'"output":' in file.read_bytes() for file in files):
            raise InvalidInput(
                f"{self.folder} holds the predictions of an earlier run.",
                why="they would be overwritten.",
                next="write only what is missing: --resume; or choose another folder: --output.",
            )
        return [], files  # what holds no prediction is begun anew

    def _note(self, row: Row) -> None:
        if "output" in row:
            self._sources[row["output"]] = row["path"]
            self.classes |= row.get("classes", {}).keys()

    def is_written(self, source: str, target: str) -> bool:
        """True if the prediction of a picture is in place; in object storage, if a row says so.

        Raises:
            InvalidInput: the picture, the prediction of another one, or a file that no run has written is in its place.
        """
        written, whole = self._sources.get(self._place(target)), _whole(stores.without_options(source))
        is_there = written is not None if self._is_remote else exists(target)
        replaced = f"that of {written}" if is_there and written not in (None, whole) else ""
        if _whole(stores.without_options(target)) == whole or (is_there and self._is_new):
            replaced = "a file that no run has written"
        if replaced:
            raise InvalidInput(
                f"the prediction of {source} would replace {replaced}.",
                where=target,
                next="choose another --output.",
            )
        return is_there and written is not None

    def add_prediction(self, row: Row) -> None:
        """Append the row of a prediction that is in place, or of a picture that failed."""
        row = {**row, "image": _whole(row["image"])}
        if "output" not in row:
            self.add_failure(row)
        else:
            self.add({"path": row.pop("image"), **row, "output": self._place(row["output"])})

    def _place(self, target: str) -> str:
        folder = stores.without_options(stores.join(self._output, "")).rstrip("/")
        return stores.without_options(target).removeprefix(folder).lstrip("/")


def _whole(path: str) -> str:
    return path if stores.is_remote(path) else os.path.abspath(path)


def _name(rank: int) -> str:
    return f"manifest.{rank}.jsonl" if rank else "manifest.jsonl"


def fingerprint(file: str | Path) -> str:
    """Return the SHA-256 of a file, which may be on the Hugging Face Hub."""
    with (fetch(str(file)) if is_address(file) else Path(file)).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
