"""Which library is loaded: whole, of these sources, compiled once, or none with the reason."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from stand_ins import needs_compiler, posix, script
from torch.utils.flop_counter import FlopCounterMode

from cadsurgery.kernels import build, isa, library, load
from cadsurgery.support.errors import CadWarning
from cadsurgery.support.files import only_one

pytest_plugins = ["stand_ins"]
pytestmark = [posix, needs_compiler]
TORCH_SERVES = "Networks run on torch's operations, which is slower"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def in_cache(home: Path) -> list[Path]:
    return list(home.glob("cache/cadsurgery/kernels/*.so"))


def links(calls: Path) -> int:
    """How often the compiler linked a library."""
    return sum("-shared" in line or "-dynamiclib" in line for line in calls.read_text().splitlines())


# -- damage --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def shared(path: Path) -> None:
    path.chmod(0o666)


def linked(path: Path) -> None:
    path.rename(path.with_name("other.so"))
    path.symlink_to("other.so")


def missing(path: Path) -> None:
    path.unlink()


DAMAGES = [cut, empty, flipped, longer]


# -- the library in the package ------------------------------------------------------------------------


def test_the_library_of_the_package_is_used_and_nothing_is_compiled(packaged: Path, calls: Path) -> None:
    with silence():
        assert load.library() is not None
    assert isa.used() == isa.here()[-1] and calls.read_text() == ""


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_package_serves(packaged: Path) -> None:
    with silence():
        assert load.function("answer") is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_of_the_package_is_a_warning(
    packaged: Path, calls: Path, damage: Callable[[Path], None]
) -> None:
    damage(packaged)
    with pytest.warns(
        CadWarning, match=rf"kernels\.so is damaged\. {TORCH_SERVES}.*Install cadsurgery again"
    ):
        assert load.library() is None
    assert load.function("answer") is None and isa.used() == ""


def test_a_library_that_the_loader_refuses_is_a_warning_with_its_reason(packaged: Path) -> None:
    data = b"no library cadsurgery_sources=" + build.fingerprint(build.SOURCES).encode()
    packaged.write_bytes(data + hashlib.sha256(data).digest())
    with pytest.warns(CadWarning, match=f"cannot be loaded .*{TORCH_SERVES}"):
        assert load.library() is None


def test_a_library_that_cannot_be_read_is_a_warning(packaged: Path) -> None:
    packaged.unlink()
    packaged.mkdir()
    with pytest.warns(CadWarning, match=f"cannot be read .*{TORCH_SERVES}"):
        assert load.library() is None


def test_a_library_of_other_sources_is_not_used(packaged: Path, calls: Path, home: Path) -> None:
    """As in an editable installation whose C files were changed: they are compiled anew."""
    with (build.SOURCES / "maps.c").open("a") as file:
        file.write("int SUFFIX(added)(void) { return 1; }\n")
    with silence():
        assert load.function("added") is not None
    assert links(calls) == 1 and len(in_cache(home)) == 1


@pytest.mark.usefixtures("no_compiler")
def test_a_library_of_other_sources_without_a_compiler_is_a_warning(packaged: Path) -> None:
    with (build.SOURCES / "maps.c").open("a") as file:
        file.write("\n")
    with pytest.warns(CadWarning, match=f"other C files .*no C compiler.*{TORCH_SERVES}"):
        assert load.library() is None


@pytest.mark.usefixtures("no_compiler")
def test_without_c_files_the_library_of_the_package_is_trusted(packaged: Path) -> None:
    shutil.rmtree(build.SOURCES)
    with silence():
        assert load.function("answer") is not None


# -- the library in the cache --------------------------------------------------------------------------


def test_the_library_is_compiled_once_and_kept(home: Path, calls: Path) -> None:
    for _ in range(2):
        load.forget()
        with silence():
            assert load.function("answer") is not None
    assert links(calls) == 1
    (kept,) = in_cache(home)
    assert kept.stat().st_mode & 0o777 == 0o600 and not list(kept.parent.glob(".*"))


def test_the_file_in_the_cache_is_not_of_one_processor(
    home: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's home folder is shared: the other processor finds the library and its own forms in it."""
    load.library()
    load.forget()
    monkeypatch.setattr("cadsurgery.support.files.machine", lambda: "another")
    monkeypatch.setattr(isa, "_names", lambda features: ("scalar",))
    assert load.isa_of("answer") == "scalar" and links(calls) == 1


def test_another_compiler_makes_another_file(
    home: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load.library()
    load.forget()
    other = f'[ "$1" = --version ] && exec echo 99\nexec {home / "cc"} "$@"'
    monkeypatch.setenv("CC", str(script(home / "other", other)))
    assert load.library() is not None and len(in_cache(home)) == 2


def test_native_0_is_torch_and_no_compiler(
    packaged: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CADSURGERY_NATIVE", "0")
    with silence():
        assert load.library() is None
    assert calls.read_text() == ""


@pytest.mark.usefixtures("no_compiler")
def test_no_compiler_is_torch_without_a_word(home: Path) -> None:
    with silence():
        assert load.library() is None and load.function("answer") is None


def test_a_machine_without_a_compiler_uses_what_another_left(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load.library() is not None
    load.forget()
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CC", raising=False)
    with silence():
        assert load.library() is not None


@pytest.mark.parametrize("damage", [*DAMAGES, shared, linked, missing])
def test_what_is_not_whole_or_not_ours_is_not_loaded_but_made_anew(
    home: Path, calls: Path, damage: Callable[[Path], None]
) -> None:
    """A library that was cut off, once loaded, ends the process by SIGBUS."""
    load.library()
    (kept,) = in_cache(home)
    damage(kept)
    assert library.open_private(kept) is None
    load.forget()
    with silence():
        assert load.function("answer") is not None
    assert library.open_private(kept) is not None and links(calls) == 2


def test_a_library_of_somebody_else_is_not_loaded(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.open_private(built) is not None
    monkeypatch.setattr(os, "geteuid", lambda: built.stat().st_uid + 1)
    assert library.open_private(built) is None


def test_a_queue_in_the_place_of_the_library_does_not_block(home: Path) -> None:
    os.mkfifo(home / "queue", 0o600)
    assert library.open_private(home / "queue") is None


def test_what_is_loaded_is_the_file_and_no_other_that_had_its_number(built: Path, tmp_path: Path) -> None:
    """Descriptors are used again, and what was loaded by one before may be damaged by now."""
    other = Path(shutil.copy(built, tmp_path / "other.so"))
    first, second = library.open_private(other), library.open_private(built)
    assert first is not None and second is not None and first._handle != second._handle
    os.truncate(other, 0)
    assert second.processor_features is not None


# -- folders that cannot be used -----------------------------------------------------------------------


def test_a_folder_that_forbids_execution_is_passed_over(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbids = home / "cache"
    monkeypatch.setattr(library, "_forbids_execution", lambda folder: folder.is_relative_to(forbids))
    with silence():
        assert load.library() is not None
    assert not in_cache(home) and len(list(home.glob("tmp/*/*.so"))) == 1


def test_folders_that_all_forbid_execution_are_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mounted:
        f_flag = os.ST_NOEXEC if hasattr(os, "ST_NOEXEC") else 0

    if not Mounted.f_flag:
        pytest.skip("this system does not tell how file systems are mounted")
    monkeypatch.setattr(os, "statvfs", lambda folder: Mounted)
    with pytest.warns(CadWarning, match=rf"noexec.*noexec.*{TORCH_SERVES}.*XDG_CACHE_HOME"):
        assert load.library() is None


def test_where_the_loader_refuses_one_folder_another_is_tried(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = library.open_library

    def refuse(path: Path, is_own: bool) -> ctypes.CDLL:
        found = opened(path, is_own)
        if path.is_relative_to(home / "cache"):
            raise OSError("failed to map segment from shared object")
        return found

    monkeypatch.setattr(library, "open_library", refuse)
    with silence():
        assert load.library() is not None
    assert len(list(home.glob("tmp/*/*.so"))) == 1


@pytest.mark.parametrize("how", ["a file", "writable for all"])
def test_a_cache_that_cannot_be_used_is_replaced_by_the_temporary_folder(
    how: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "a file":
        (home / "cache").rmdir()
        (home / "cache").write_text("")
    else:
        (home / "cache" / "cadsurgery" / "kernels").mkdir(parents=True)
        (home / "cache" / "cadsurgery" / "kernels").chmod(0o777)
    with silence():
        assert load.library() is not None
    assert len(list(home.glob("tmp/*/*.so"))) == 1


def test_no_folder_at_all_is_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file" / "below"))
    monkeypatch.setattr(tempfile, "tempdir", str(home / "file"))
    with pytest.warns(CadWarning, match=f"neither the cache folder nor the temporary.*{TORCH_SERVES}"):
        assert load.library() is None


# -- builds that fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[ "$1" = --version ] && exec echo 1.0\necho "no header here" >&2\nexit 1', "says no header here"),
        ('[ "$1" = --version ] && exec echo 1.0\nexit 0', "gave no file"),
        ("exit 1", "does not tell its version"),
    ],
)
def test_a_compiler_that_fails_is_a_warning(
    text: str, why: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(script(home / "cc", text)))
    with pytest.warns(CadWarning, match=rf"{why}.*{TORCH_SERVES}.*CC=gcc.*CADSURGERY_NATIVE=0"):
        assert load.library() is None
    assert not in_cache(home)


def test_an_error_in_the_sources_is_a_warning_and_mended_when_they_are(home: Path) -> None:
    text = (build.SOURCES / "maps.c").read_text()
    (build.SOURCES / "maps.c").write_text("#error not today\n")
    with pytest.warns(CadWarning, match=r"error: .*not today.*maps\.c"):
        assert load.library() is None
    (build.SOURCES / "maps.c").write_text(text)
    load.forget()
    with silence():
        assert load.library() is not None


def test_waiting_for_another_process_has_an_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "WAIT_SECONDS", 0.2)
    folder = home / "cache" / "cadsurgery" / "kernels"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    with (
        only_one(folder / "lock", 1),
        pytest.warns(CadWarning, match=rf"another process kept .*lock.*{TORCH_SERVES}"),
    ):
        assert load.library() is None


def test_what_failed_while_a_process_waited_is_not_tried_again(
    home: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else twenty processes would each wait for all that came before, and fail."""

    @contextlib.contextmanager
    def wait(path: Path, seconds: float) -> Iterator[None]:
        (failure,) = [path.with_name(name).with_suffix(".failed") for name in names]
        failure.write_text("cc says error: not for you")
        yield

    names: list[str] = []
    once = library._build_once

    def note(target: Path, *more: Any) -> None:
        names.append(target.name)
        once(target, *more)

    monkeypatch.setattr(library, "only_one", wait)
    monkeypatch.setattr(library, "_build_once", note)
    with pytest.warns(CadWarning, match="could not be built: cc says error: not for you"):
        assert load.library() is None
    assert links(calls) == 0


START = """
import pathlib, sys, time, warnings
from cadsurgery.kernels import build, load
warnings.simplefilter("error")
build.SOURCES, build.LIBRARY = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
assert load.function("answer") is not None
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_processes_that_start_at_once_compile_once(count: int, home: Path, calls: Path) -> None:
    command = [sys.executable, "-c", START, str(build.SOURCES), str(build.LIBRARY)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert links(calls) == 1 and len(in_cache(home)) == 1


# -- threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["torch", "OpenMP", "nothing"])
@pytest.mark.parametrize(("count", "grain"), [(1000, 7), (5, 1), (3, 10), (0, 4), (8, 0)])
def test_work_is_done_once_whoever_shares_it(by: str, count: int, grain: int, packaged: Path) -> None:
    compiled, pointers = load.library(), (None, None)
    assert compiled is not None
    if by == "torch":
        pointers = (library._threads()[0], None)
    elif by == "OpenMP":
        folder = Path(torch.__file__).parent / "lib"
        found = [library._address(path, "GOMP_parallel") for path in folder.glob("libgomp*.so*")]
        pointers = (None, next(iter(found), None))
    if by != "nothing" and pointers == (None, None):
        pytest.skip(f"this torch does not give {by}")
    done: list[tuple[int, int]] = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_long, ctypes.c_long, ctypes.c_void_p)(
        lambda begin, end, _: done.append((begin, end))
    )
    compiled.use_threads(*pointers)
    try:
        compiled.cadsurgery_share(ctypes.c_long(count), ctypes.c_long(grain), body, None)
    finally:
        compiled.use_threads(*library._threads())
    step = max(grain, 1)
    assert sorted(done) == [(begin, min(begin + step, count)) for begin in range(0, count, step)]


def test_threads_are_those_of_torch() -> None:
    """One of the two is there in every torch that this package takes, with its wheels at least."""
    assert any(library._threads())


def test_compiled_code_is_not_used_where_torch_observes() -> None:
    assert not load.is_observed()
    with FlopCounterMode(display=False):
        assert load.is_observed()
