"""An environment with some of the extras, without making one: of what is installed here, all else is hidden.

A hidden package is as if it were not installed: importing it raises ModuleNotFoundError, and neither
`importlib.util.find_spec` nor `importlib.metadata` finds it. What belongs to an environment is what `pyproject.toml`
asks for, and what the metadata of these packages ask for in turn.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    PackageNotFoundError,
    distributions,
    packages_distributions,
    requires,
)
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NEEDED: dict[str, Any] = tomllib.loads((ROOT / "docs" / "extras.toml").read_text())  # by commands and pages
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OF_EVERY_ENVIRONMENT = ("pip", "setuptools")  # as `python -m venv` makes it


@cache
def required(name: str, extra: str) -> tuple[str, ...]:
    """What a package requires, with an extra or without (""); nothing if it is not installed."""
    if name == NAME:
        return tuple(EXTRAS[extra] if extra else PROJECT["dependencies"])
    try:
        return tuple(requires(name) or ())
    except PackageNotFoundError:
        return ()


@cache
def belonging(extras: tuple[str, ...]) -> frozenset[str]:
    """Distributions of the environment that `pip install 'cadsurgery[extras]'` makes."""
    seen, open_pairs = set[tuple[str, str]](), [(NAME, extra) for extra in ("", *extras)]
    while open_pairs:
        if (pair := open_pairs.pop()) in seen:
            continue
        seen.add(pair)
        for requirement in map(Requirement, required(*pair)):
            if requirement.marker is None or requirement.marker.evaluate({"extra": pair[1]}):
                name = canonicalize_name(requirement.name)
                open_pairs += [(name, extra) for extra in ("", *requirement.extras)]
    return frozenset(name for name, _ in seen).union(OF_EVERY_ENVIRONMENT)


def lacking(extra: str) -> list[str]:
    """Packages of an extra that are not installed here, so that its environment cannot be had."""
    names = [Requirement(text).name for text in EXTRAS[extra]] if extra else []
    installed = {canonicalize_name(one) for several in owners().values() for one in several}
    return [name for name in names if name != NAME and canonicalize_name(name) not in installed]


@cache
def owners() -> dict[str, list[str]]:
    """The distributions that bring a module, for each module that is installed."""
    return {module: list(names) for module, names in packages_distributions().items()}


@cache
def places() -> frozenset[str]:
    """Folders in which packages are installed."""
    return frozenset(str(one.locate_file("")) for one in distributions())


class _Finder:
    """Finds what Python finds on its path, but for what is hidden."""

    def __init__(self) -> None:
        self.belonging: frozenset[str] | None = None  # distributions; None hides nothing
        self._hidden = frozenset[str]()

    def show(self, extras: Iterable[str] | None) -> None:
        """Hide what does not belong to an environment with these extras; nothing for None."""
        self.belonging, self._hidden = None, frozenset()
        if extras is None:
            return
        places()
        owned, kept = owners(), belonging(tuple(sorted(extras)))
        self._hidden = frozenset(
            module
            for module, names in owned.items()
            if module not in sys.stdlib_module_names and kept.isdisjoint(map(canonicalize_name, names))
        ) - {NAME}
        self.belonging = kept

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if (
            name in self._hidden and path is None
        ):  # a package may bring one of this name in a folder of its own
            path = [place for place in sys.path if place not in places()]
        return PathFinder.find_spec(name, path, target)

    def find_distributions(self, *context: DistributionFinder.Context) -> Iterator[Distribution]:
        for one in PathFinder.find_distributions(*context):
            if self.belonging is None or canonicalize_name(one.name) in {*self.belonging, NAME}:
                yield one

    def invalidate_caches(self) -> None:
        PathFinder.invalidate_caches()


_FINDER = _Finder()


def show(*extras: str) -> None:
    """Let this process have the packages of an environment with these extras, from now on."""
    if _FINDER not in sys.meta_path:
        sys.meta_path[sys.meta_path.index(PathFinder)] = _FINDER  # type: ignore[arg-type]
    _FINDER.show(extras)


def show_all() -> None:
    """Let this process have everything that is installed again."""
    _FINDER.show(None)
