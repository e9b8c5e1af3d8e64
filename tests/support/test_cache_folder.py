"""The cache folder: what is in it is whole, the user's own, and never the reason that a process ends."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cadsurgery.elements.backends import costs
from cadsurgery.elements.backends.costs import Costs
from cadsurgery.support.files import cache_folder, keep_whole

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="permission bits and compiled code as on Linux"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# -- which folder --------------------------------------------------------------------------------------


def test_the_folder_is_the_users_alone(home: Path) -> None:
    found = cache_folder()
    assert found is not None and found.parent == home / "cache" / "cadsurgery"
    assert found.stat().st_mode & 0o777 == 0o700 and found == cache_folder()


@pytest.mark.parametrize("cache", ["file/below", "/proc/1/nothing"])
def test_a_cache_that_cannot_be_written_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / cache))
    assert cache_folder() is None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(home: Path, mode: int) -> None:
    folder = cache_folder()
    assert folder is not None
    folder.chmod(mode)
    assert cache_folder() is None


def test_a_folder_of_somebody_else_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_folder()
    assert folder is not None
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert cache_folder() is None


def test_a_link_is_not_used(home: Path) -> None:
    folder = cache_folder()
    assert folder is not None
    folder.rename(home / "elsewhere")
    folder.symlink_to(home / "elsewhere")
    assert cache_folder() is None


def test_a_cached_file_appears_whole_and_private(home: Path) -> None:
    with keep_whole(home / "kept") as folder:
        (folder / "successor").write_text("whole")
        assert folder.parent == home and not (home / "kept").exists()
    with pytest.raises(ZeroDivisionError), keep_whole(home / "kept") as folder:
        (folder / "successor").write_text("half")
        raise ZeroDivisionError
    assert (home / "kept").read_text() == "whole" and (home / "kept").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in home.iterdir()] == ["kept"]


def test_without_a_folder_costs_are_measured_in_each_process(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "cache").write_text("")
    assert costs.costs("no folder", lambda: Costs(1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)


# -- costs ---------------------------------------------------------------------------------------------


@pytest.fixture
def measured(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Asks for a cost as a new process would; how often it was measured until now."""
    calls: list[int] = []

    def ask() -> int:
        monkeypatch.setattr(costs, "_KNOWN", {})
        assert costs.costs("a", lambda: calls.append(0) or Costs(1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)
        return len(calls)

    return ask


@pytest.mark.parametrize(
    "found",
    [[1, 2], [1, 2, math.nan], [1, 2, math.inf], [1, 2, -1], "123", 3, None, {"a": 1}, [[1], 2, 3]],
    ids=str,
)
def test_costs_that_are_none_are_measured_anew(
    home: Path, measured: Callable[[], int], found: object
) -> None:
    assert measured() == 1 == measured()
    (path,) = home.glob("cache/cadsurgery/*/costs.json")
    path.write_text(json.dumps({f"a, torch {torch.__version__}": found}))
    assert measured() == 2 == measured()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\x00"], ids=lambda text: text[:3])
def test_a_damaged_file_of_costs_is_replaced(home: Path, measured: Callable[[], int], text: str) -> None:
    measured()
    (path,) = home.glob("cache/cadsurgery/*/costs.json")
    path.write_text(text)
    assert measured() == 2 == measured()
    assert list(path.parent.iterdir()) == [path]


def test_costs_that_others_can_write_are_measured_anew(home: Path, measured: Callable[[], int]) -> None:
    measured()
    (path,) = home.glob("cache/cadsurgery/*/costs.json")
    path.chmod(0o666)
    assert measured() == 2 == measured()
    assert path.stat().st_mode & 0o777 == 0o600
