"""The recorded check of all networks: what is known without building one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cadsurgery.support.files import as_file_error

Row = dict[str, Any]
RECORDED = Path(__file__).with_name("zoo.jsonl")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file written by `check_networks`, without its first line.

    Raises:
        FileError: the file cannot be read.
    """
    what, next = (
        f"{path} cannot be read as checked networks.",
        "write it with python -m benchmarks.zoo.check.",
    )
    with as_file_error(what, next):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[1:]]


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
