"""The recorded check of all networks, their names and their plans: what is known without building a network.

Nothing here imports torch, which takes seconds, so that `cadsurgery list` answers at once, and `cadsurgery plan` where
it was asked the same before.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cadsurgery.support.errors import FileError, UnknownName
from cadsurgery.support.files import as_file_error, cache_folder, is_file, write_whole
from cadsurgery.support.plain import read_as
from cadsurgery.tasks.plan_report import PlanReport

Row = dict[str, Any]
RECORDED = Path(__file__).with_name("zoo.jsonl")
LIBRARIES = ("torchvision", "timm")
_PACKAGE = Path(__file__).parents[1]
_MOST_PLANS = 200  # kept in the cache folder, of some 100 kB each


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


def list_names(pattern: str = "*", library: str = "") -> list[str]:
    """Return what `cs.list_models` returns in a new process, without importing the libraries a second time.

    Their names are kept in the cache folder, by the versions of both libraries.

    Raises:
        UnknownName: no such library.
    """
    if library and library not in LIBRARIES:
        raise UnknownName("library", library, LIBRARIES)
    names = _names()
    chosen = [library] if library else LIBRARIES
    return sorted({name for library in chosen for name in fnmatch.filter(names[library], pattern)})


def planned(model: str, options: Mapping[str, Any], make: Callable[[], PlanReport]) -> PlanReport:
    """Return the report of a plan: the one that is kept of an earlier run, else that of `make`, which is then kept.

    Only plans of networks that torchvision or timm list are kept, because code of the user's can change. A kept plan
    is found by everything that it depends on: the network, the options, the code of this package, and the versions of
    Python, torch, torchvision and timm.

    Args:
        model: name, `module:function` or file.
        options: what else the plan depends on, as values that JSON can hold.
        make: makes the report; it may import torch.
    """
    depends = _depends(model, options) if _is_listed(model) else ""
    path = _plan_file(depends)
    if path is None:
        return make()
    if (kept := _kept_plan(path, depends)) is not None:
        return kept
    report = make()
    with contextlib.suppress(FileError, OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps({"depends": depends, **asdict(report)}), encoding="utf-8")
        for old in sorted(path.parent.glob("*.json"), key=lambda plan: plan.stat().st_mtime)[:-_MOST_PLANS]:
            old.unlink()
    return report


def _is_listed(model: str) -> bool:
    """True if a text names a network of torchvision or timm, and no file."""
    library, colon, name = model.rpartition(":")
    if is_file(model) or (colon and library not in LIBRARIES):
        return False
    return any(
        name in names for name_of_library, names in _names().items() if library in ("", name_of_library)
    )


def _depends(model: str, options: Mapping[str, Any]) -> str:
    """Return everything that a plan depends on as JSON; empty if a version is not known.

    The code counts as changed with any time or size of its files, which is what an editable installation needs.
    """
    try:
        versions = [platform.python_version(), *_versions(("cadsurgery", "torch", *LIBRARIES))]
    except PackageNotFoundError:
        return ""
    files = ((path, path.stat()) for path in sorted(_PACKAGE.rglob("*.py")))
    code = repr([(str(path), status.st_size, status.st_mtime_ns) for path, status in files])
    digest = hashlib.sha256(code.encode()).hexdigest()
    return json.dumps({"model": model, "options": options, "code": digest, "versions": versions})


def _plan_file(depends: str) -> Path | None:
    if not depends or (folder := cache_folder()) is None:
        return None
    return folder / "plans" / f"{hashlib.sha256(depends.encode()).hexdigest()[:32]}.json"


def _kept_plan(path: Path, depends: str) -> PlanReport | None:
    """Return the report of a file; None if there is none, or it is damaged, or depends on something else."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("depends", "") == depends:
            report: PlanReport = read_as(PlanReport, values, "the plan")
            json.loads(report.plan)
            return report
    return None


def _versions(packages: Sequence[str]) -> Iterator[str]:
    for package in packages:
        yield f"{package}-{version(package)}"


def _names() -> dict[str, list[str]]:
    """Return the names of networks by library."""
    names = _kept_names()
    if names is None:
        from cadsurgery.data.networks import list_models

        names = {name: list_models(library=name) for name in LIBRARIES}
        _keep_names(names)
    return names


def _names_file() -> Path | None:
    folder = cache_folder()
    try:
        versions = "-".join(_versions(LIBRARIES))
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
