"""The manifest of `cadsurgery run`: what happened to each picture, so that a run that was ended can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cadsurgery.data.hub import fetch, is_address
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.files import append_line, exists
from cadsurgery.support.launcher import world
from cadsurgery.tasks.run_folder import Identity, check_same_run, unreadable


class Manifest:
    """The rows of a folder of predictions, as JSON Lines: one for each picture that was written, or that failed.

    Each process appends to a file of its own, and all files are read together. The first line of each states what made
    the predictions. A row follows its prediction, so that a killed run leaves no row without a prediction.

    Attributes:
        classes: names of the classes in the predictions that were there when the run began.
    """

    def __init__(self, folder: Path, made_by: Identity, resume: bool) -> None:
        """Read the rows of earlier runs into a folder; the first process removes what a killed process wrote in part.

        Raises:
            InvalidInput: there are rows and `resume` is not set, or something else made the predictions.
            FileError: a file of the manifest is damaged.
        """
        self.folder, self.classes = folder, set[str]()
        self._made_by = json.loads(json.dumps(made_by, default=str))
        self._own = folder / _name(world().rank)
        self._sources: dict[str, str] = {}  # by prediction
        files, self._stale = sorted(folder.glob("manifest*.jsonl")), list[Path]()
        if not resume:  # what holds no prediction is begun anew
            self._stale, files = files, [file for file in files if b'"output":' in file.read_bytes()]
        if files and not resume:
            raise InvalidInput(
                f"{folder} holds the predictions of an earlier run.",
                why="they would be overwritten.",
                next="write only what is missing: --resume; or choose another folder: --output.",
            )
        self._begun = [file for file in files if self._read(file)]

    def _read(self, file: Path) -> int:
        """Read a file up to its last whole line; return the number of bytes up to there."""
        whole, number = 0, 0
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.endswith(b"\n"):
                        self._take(json.loads(line), number)
                        whole += len(line)
            if world().is_main and file.stat().st_size > whole:
                os.truncate(file, whole)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise unreadable(file, ValueError(f"line {number}: {error}")) from error
        return whole

    def _take(self, row: dict[str, Any], number: int) -> None:
        if number == 1:
            check_same_run(row, self._made_by, self.folder, "all predictions in a folder are made alike.")
        elif "output" in row:
            self._sources[row["output"]] = row["path"]
            self.classes |= row.get("classes", {}).keys()

    def is_written(self, source: Path, target: Path) -> bool:
        """True if the prediction of a picture is in place.

        Raises:
            InvalidInput: the prediction of another picture is in its place.
        """
        written = self._sources.get(self._place(target))
        if written is None or not exists(target):
            return False
        if written != os.path.abspath(source):
            raise InvalidInput(
                f"the prediction of {source} would replace that of {written}.",
                where=str(target),
                next="choose another --output.",
            )
        return True

    def begin(self) -> None:
        """Write the first line of this process's file, unless it is there; no process may still read."""
        of_others = {self.folder / _name(rank) for rank in range(world().size)} - {self._own}
        for file in self._stale:
            if file == self._own or (world().is_main and file not in of_others):
                file.unlink(missing_ok=True)
        if self._own not in self._begun:
            append_line(self._own, json.dumps(self._made_by))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append the row of a prediction that is in place."""
        self._append({**row, "output": self._place(Path(row["output"]))})

    def add_failure(self, failure: Mapping[str, str]) -> None:
        """Append the row of a picture that failed, with the reason."""
        reason = dict(failure)
        self._append({"image": reason.pop("image"), "error": reason})

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self._own, json.dumps({"path": os.path.abspath(row.pop("image")), **row}))

    def _place(self, target: Path) -> str:
        return target.relative_to(self.folder).as_posix()


def _name(rank: int) -> str:
    return f"manifest.{rank}.jsonl" if rank else "manifest.jsonl"


def fingerprint(file: str | Path) -> str:
    """Return the SHA-256 of a file, which may be on the Hugging Face Hub."""
    with (fetch(str(file)) if is_address(file) else Path(file)).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
