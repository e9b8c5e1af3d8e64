"""The folder of a run that can be continued: its JSON file, and the refusal of a folder that holds another run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cadsurgery.support.errors import FileError, InvalidInput, first_line
from cadsurgery.support.files import write_whole

Identity = dict[str, Any]  # plain values that are the same whenever a run is continued


def write_json(path: Path, values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write plain values as JSON, atomically.

    Raises:
        FileError: the path cannot be written.
    """
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote; empty if there is no such file.

    Raises:
        FileError: it cannot be read.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> FileError:
    """Return the error for a file of a run that holds something else."""
    return FileError(f"{path} cannot be read.", why=first_line(error), next="choose another output folder.")


def check_same_run(
    stored: Identity, now: Identity, folder: Path, why: str = "a run goes on exactly as it began."
) -> None:
    """Refuse to continue a run with other settings, another network or other data.

    Raises:
        InvalidInput: the runs differ; the message lists every difference.
    """
    if differences := _differences(stored, now, ""):
        raise InvalidInput(
            f"{folder} holds another run.",
            where="; ".join(differences),
            why=why,
            next="give it the same again, or choose another output folder.",
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
