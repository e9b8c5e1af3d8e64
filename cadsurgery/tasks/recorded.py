"""The recorded check of all networks, and the names of networks: what is known without building one.

Nothing here imports torch, which takes seconds, so that `cadsurgery list` answers at once.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cadsurgery.support.errors import FileError, UnknownName, first_line
from cadsurgery.support.files import cache_folder, write_whole

Row = dict[str, Any]
RECORDED = Path(__file__).with_name("zoo.jsonl")
LIBRARIES = ("torchvision", "timm")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file written by `check_networks`, without its first line.

    Raises:
        FileError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[1:]]
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read as checked networks.",
            why=first_line(error),
            next="write it with cadsurgery list --check.",
        ) from error


def recorded() -> dict[str, Row]:
    """Return the rows of the full run that is part of the package, by name."""
    return {row["model"]: row for row in read_rows(RECORDED)} if RECORDED.exists() else {}


def outlook(row: Row) -> str:
    """Summarise a row in one line."""
    if row["result"] != "converts":
        why = (row.get("why") or row.get("what", "")).partition(";")[0]
        return f"{row['result']}{': ' if why else ''}{why}"
    high, low = row["output_stride"]
    part = f" ({row['part']})" if row["part"] else ""
    part += "" if row.get("effect", True) else ", without effect"
    dense = "".join(f"; dense: {end['operation']} ({end['why']})" for end in row["dense"][:1])
    return f"converts{part}, {high} to {low}, {row['share_in_region']:.0%} of the MACs in the region{dense}"


def summary(rows: Sequence[Row]) -> str:
    """Summarise how many networks have each result."""
    counts = Counter(row["result"] for row in rows)
    return f"{len(rows)} networks: " + ", ".join(
        f"{count} {result}" for result, count in counts.most_common()
    )


def list_names(pattern: str = "*", library: str = "") -> list[str]:
    """Return what `cs.list_models` returns in a new process, without importing the libraries a second time.

    Their names are kept in the cache folder, by the versions of both libraries.

    Raises:
        UnknownName: no such library.
    """
    if library and library not in LIBRARIES:
        raise UnknownName("library", library, LIBRARIES)
    names = _kept_names()
    if names is None:
        from cadsurgery.data.networks import list_models

        names = {one: list_models(library=one) for one in LIBRARIES}
        _keep_names(names)
    chosen = [library] if library else LIBRARIES
    return sorted({name for one in chosen for name in fnmatch.filter(names[one], pattern)})


def _names_file() -> Path | None:
    folder = cache_folder()
    try:
        versions = "-".join(f"{library}-{version(library)}" for library in LIBRARIES)
    except PackageNotFoundError:
        return None
    return folder / f"names-{versions}.json" if folder is not None else None


def _kept_names() -> dict[str, list[str]] | None:
    """Return the names by library; None if there is no file of these versions, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        names = json.loads(path.read_text(encoding="utf-8")) if (path := _names_file()) is not None else {}
        if all(names.get(library) for library in LIBRARIES):
            return dict(names)
    return None


def _keep_names(names: dict[str, list[str]]) -> None:
    if (path := _names_file()) is not None:
        with contextlib.suppress(FileError, OSError), write_whole(path) as temporary:
            temporary.write_text(json.dumps(names), encoding="utf-8")
