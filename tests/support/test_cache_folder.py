"""The cache folder: what is in it is whole, the user's own, and never the reason that a process ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cadsurgery.support.files import cache_folder

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
