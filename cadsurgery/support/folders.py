"""List visible files and report skipped ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cadsurgery.support.errors import LeftOut, warn

_SYSTEM = ("thumbs.db", "desktop.ini")  # of Windows; of other systems hidden files begin with a dot
_NAMED = 5  # entries that a message names
NO_PICTURES = "no pictures"


def is_hidden(name: str) -> bool:
    """True for files that systems keep in folders out of sight, such as `._a.png`, `.DS_Store` and `Thumbs.db`."""
    return name.startswith(".") or name.lower() in _SYSTEM


def visible(folder: Path) -> list[Path]:
    """Return the entries of a folder by name, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def describe_left_out(left_out: Mapping[str, Sequence[str]]) -> str:
    """Describe what is left out of a folder in words.

    Args:
        left_out: names by the reason, which is a plural noun, e.g. `no pictures`.
    """
    parts = []
    for reason, names in left_out.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts += [f"{reason}: {', '.join(names[:_NAMED])}{more}"] if names else []
    return "; ".join(parts)


def warn_of_left_out(folder: Path | str, left_out: Mapping[str, Sequence[str]]) -> None:
    """Warn of what is left out of a folder, by the reason; of nothing if nothing is."""
    if words := describe_left_out(left_out):
        warn(f"left out of {folder}: {words}.", LeftOut)
