"""The parts of a clip that is being written, so that a run that was killed goes on where its last part ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from cadsurgery.data.clips import Clip, comment_of, join_clips, write_clip
from cadsurgery.support import files
from cadsurgery.support.files import make_folder
from cadsurgery.tasks.run_folder import Identity, check_same_run, read_json, write_json

FRAMES = 250  # of a part: at most so many are predicted twice


@dataclass
class Seen:
    """What is known of the frames of a clip that are done.

    Attributes:
        frames: their number.
        sums: of the fields of their rows that are numbers.
        classes: number of pixels of each class.
        last: fields of the last row.
        size: (height, width) of the frames.
    """

    frames: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)
    last: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "classes": {str(index): count for index, count in self.classes.items()}}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Seen:
        """Return what `to_dict` gave, or nothing seen for an empty dictionary."""
        if not values:
            return Seen()
        classes = Counter({int(index): count for index, count in values["classes"].items()})
        return Seen(values["frames"], Counter(values["sums"]), classes, values["last"], tuple(values["size"]))


class ClipParts:
    """The parts of a clip, in a hidden folder beside it, each of which is there whole or not at all.

    Attributes:
        seen: what the parts hold.
    """

    def __init__(self, target: Path, made_by: Identity, source: Path, resume: bool) -> None:
        """Take the parts of an earlier run if it goes on, else remove them.

        Raises:
            InvalidInput: the earlier run was another one.
            FileError: its folder is damaged.
        """
        status = source.stat() if files.is_file(source) else None
        file = [status.st_size, status.st_mtime_ns] if status else []
        self._made_by = json.loads(json.dumps({**made_by, "source": os.path.abspath(source), "file": file}))
        self._target, self._folder = target, target.with_name(f".{target.name}.parts")
        self._state = self._folder / "parts.json"
        self.seen, self._parts = (
            Seen(),
            dict[str, str](),
        )  # names of parts, and the seconds at which they begin
        if not resume:
            self.remove()
        elif known := read_json(self._state):
            check_same_run(known["made_by"], self._made_by, target)
            self.seen = Seen.from_dict(known["seen"])
            self._parts = dict(known["parts"])

    @property
    def is_whole(self) -> bool:
        """True if the clip is there, as this run would make it, and no part is left."""
        return not self._parts and comment_of(self._target).endswith(self._digest)

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._made_by, sort_keys=True).encode()).hexdigest()[:16]

    @contextmanager
    def next(self, clip: Clip) -> Iterator[Callable[[Image.Image, Fraction], None]]:
        """Yield a function that appends a picture, shown at a second, to a new part, which is noted with `seen` at the
        end of the block."""
        path, begin = make_folder(self._folder) / f"{len(self._parts):06d}.mp4", None
        with write_clip(path, clip.rate, clip.time_base) as append:

            def add(picture: Image.Image, time: Fraction) -> None:
                nonlocal begin
                begin = time if begin is None else begin
                append(picture, time - begin)

            yield add
        self._parts[path.name] = str(begin)
        values = {"made_by": self._made_by, "seen": self.seen.to_dict(), "parts": self._parts}
        write_json(self._state, values)

    def join(self) -> None:
        """Write the clip of all parts."""
        parts = [(self._folder / name, Fraction(begin)) for name, begin in self._parts.items()]
        join_clips(parts, self._target, self._digest)

    def remove(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self._folder, ignore_errors=True)
