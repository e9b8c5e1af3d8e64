"""The cache folder: what is in it is whole, the user's own, and never the reason that a process ends."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from cadsurgery.elements.backends import costs
from cadsurgery.elements.backends.costs import Costs
from cadsurgery.support import files
from cadsurgery.support.files import cache_folder, keep_whole

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="permission bits and compiled code as on Linux"
)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc")), reason="there is no C compiler"
)
OLD = 10 * files._SECONDS_TO_LOCK

# Loads the compiled code and calls it.
USE = """
import torch
from cadsurgery.elements.backends.choose import mix
from cadsurgery.kernels.load import library
assert library() is not None
rows = torch.arange(6.0).view(3, 2)
out = mix(rows, torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([[0.5, 0.5]]))
assert out.tolist() == [[2.0, 3.0]], out
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user, and an empty place for temporary files."""
    for name in ("cache", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def run(code: str, **changed: str | None) -> None:
    """Run Python with other environment variables; None removes one."""
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = {
        key: value for key, value in {**os.environ, **paths, **changed}.items() if value is not None
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


# -- which folder --------------------------------------------------------------------------------------


def test_the_folder_is_the_users_alone(home: Path) -> None:
    found = cache_folder()
    assert found is not None and found.parent == home / "cache" / "cadsurgery"
    assert found.stat().st_mode & 0o777 == 0o700 and found == cache_folder()


@pytest.mark.parametrize("cache", ["file/below", "/proc/1/nothing"])
def test_a_cache_that_cannot_be_written_is_one_temporary_folder_of_the_user(
    home: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / cache))
    found = cache_folder()
    assert found is not None and found.parent == home / "tmp" and str(os.geteuid()) in found.name
    assert found.stat().st_mode & 0o777 == 0o700
    run(f"from cadsurgery.support.files import cache_folder; assert str(cache_folder()) == {str(found)!r}")
    assert list((home / "tmp").iterdir()) == [found]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(home: Path, mode: int) -> None:
    found = cache_folder()
    assert found is not None
    found.chmod(mode)
    other = cache_folder()
    assert other is not None and other.parent == home / "tmp"
    other.chmod(mode)
    assert cache_folder() is None


def test_a_folder_of_somebody_else_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cache_folder()
    assert found is not None
    monkeypatch.setattr(os, "geteuid", lambda: found.stat().st_uid + 1)
    assert cache_folder() is None


def test_a_link_is_not_used(home: Path) -> None:
    found = cache_folder()
    assert found is not None
    found.rename(home / "elsewhere")
    found.symlink_to(home / "elsewhere")
    other = cache_folder()
    assert other is not None and other.parent == home / "tmp"


def test_a_relative_cache_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(home / "own"))
    found = cache_folder()
    assert found is not None and found.parent == home / "own" / ".cache" / "cadsurgery"


@pytest.mark.slow
@needs_compiler
def test_without_home_and_passwd_entry_everything_works(home: Path) -> None:
    """A process whose user has no name and no home, as in containers; with and without a place for files."""
    nobody = "import os, pathlib\n"
    nobody += "def gone(*_): raise RuntimeError('Could not determine home directory.')\n"
    nobody += "pathlib.Path.home = gone\n"
    run(nobody + USE, XDG_CACHE_HOME=None, HOME=None)
    nowhere = "import tempfile\ndef none(): raise FileNotFoundError\ntempfile.gettempdir = none\n"
    use = "import torch\nfrom cadsurgery.elements.backends import costs\n"
    use += "assert costs.costs('a', lambda: costs.Costs(1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)\n"
    run(nobody + nowhere + use, XDG_CACHE_HOME=None, HOME=None)


def test_a_file_appears_whole_on_the_disk_and_private(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("sync") or sync(file))
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append("replace") or replace(self, to))
    with keep_whole(home / "kept") as folder:
        (folder / "successor").write_text("whole")
        assert folder.parent == home and not (home / "kept").exists()
    assert order == ["sync", "replace"]
    assert (home / "kept").read_text() == "whole" and (home / "kept").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ZeroDivisionError), keep_whole(home / "kept") as folder:
        (folder / "successor").write_text("half")
        raise ZeroDivisionError
    assert (home / "kept").read_text() == "whole" and not list(home.glob(".making*"))


@pytest.fixture
def worker(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of making a file."""
    code = "import sys, time\nfrom pathlib import Path\nfrom cadsurgery.support.files import keep_whole\n"
    code += "with keep_whole(Path(sys.argv[1])):\n    print('begun', flush=True)\n    time.sleep(600)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(home / "kept")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_a_killed_process_left_is_removed_by_the_next_and_not_before(
    home: Path, worker: subprocess.Popen[str]
) -> None:
    (left,) = home.glob(".making-*")

    def write() -> None:
        past = time.time() - OLD
        if left.exists():
            os.utime(left, (past, past))
        with keep_whole(home / "kept") as folder:
            (folder / "successor").write_text("whole")

    write()
    assert left.exists()  # its process is at work
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    write()
    assert not left.exists() and not list(home.glob(".making-*"))


def test_a_folder_that_was_made_just_now_is_left_alone(home: Path) -> None:
    for name, age in (("fresh", 0.0), ("old", OLD)):
        (home / f".making-{name}").mkdir()
        os.utime(home / f".making-{name}", (time.time() - age,) * 2)
    with keep_whole(home / "kept") as folder:
        (folder / "successor").write_text("whole")
    assert [path.name for path in home.glob(".making-*")] == [".making-fresh"]


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
