"""Which library is loaded: the one of the package if it is of these sources, else none, with the reason."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stand_ins import needs_compiler, posix
from torch.utils.flop_counter import FlopCounterMode

from cadsurgery.kernels import build, dispatch, isa, load
from cadsurgery.support.errors import CadWarning
from cadsurgery.support.running import running

pytest_plugins = ["stand_ins"]
pytestmark = [posix, needs_compiler]
TORCH_SERVES = r"Networks run on torch's operations.*Install cadsurgery again.*CADSURGERY_NATIVE=0"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- the library in the package ------------------------------------------------------------------------


def test_the_library_of_the_package_is_used(packaged: Path) -> None:
    with silence():
        assert dispatch.function("answer") is not None
    assert isa.used() == isa.here()[-1] and load.open_kernels().path == packaged


def test_without_a_library_torch_serves_and_one_warning_says_so(home: Path) -> None:
    """Whether or not there is a compiler: nothing is compiled after the installation."""
    with pytest.warns(CadWarning, match=f"not compiled when the package was installed.*{TORCH_SERVES}"):
        assert load.library() is None
    with silence():
        assert load.library() is None and dispatch.function("answer") is None and isa.used() == ""
    assert not build.LIBRARY.exists()


def test_native_0_is_torch_without_a_word(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADSURGERY_NATIVE", "0")
    with silence():
        assert load.library() is None


@pytest.mark.parametrize("text", [b"", b"no library cadsurgery_sources=%s"], ids=["empty", "no library"])
def test_a_library_that_cannot_be_used_is_a_warning_with_its_reason(home: Path, text: bytes) -> None:
    build.LIBRARY.write_bytes(text % build.fingerprint(build.SOURCES).encode() if text else text)
    with pytest.warns(CadWarning, match=f"(cannot be loaded|other C files).*{TORCH_SERVES}"):
        assert load.library() is None


def test_a_library_that_cannot_be_read_is_a_warning(home: Path) -> None:
    build.LIBRARY.mkdir()
    with pytest.warns(CadWarning, match=f"cannot be read .*{TORCH_SERVES}"):
        assert load.library() is None


def test_a_library_of_other_sources_is_not_used(packaged: Path) -> None:
    """As in an editable installation whose C files were changed."""
    with (build.SOURCES / "maps.c").open("a") as file:
        file.write("\n")
    with pytest.warns(CadWarning, match=f"other C files .*{TORCH_SERVES}"):
        assert load.library() is None


def test_without_c_files_the_library_of_the_package_is_trusted(packaged: Path) -> None:
    shutil.rmtree(build.SOURCES)
    with silence():
        assert dispatch.function("answer") is not None


# -- threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["torch", "OpenMP", "nothing"])
@pytest.mark.parametrize(("count", "grain"), [(1000, 7), (5, 1), (3, 10), (0, 4), (8, 0)])
def test_work_is_done_once_whoever_shares_it(by: str, count: int, grain: int, packaged: Path) -> None:
    compiled, pointers = load.library(), (None, None)
    assert compiled is not None
    if by == "torch":
        pointers = (load._threads()[0], None)
    elif by == "OpenMP":
        folder = Path(torch.__file__).parent / "lib"
        found = [load._address(path, "GOMP_parallel") for path in folder.glob("libgomp*.so*")]
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
        compiled.use_threads(*load._threads())
    step = max(grain, 1)
    assert sorted(done) == [(begin, min(begin + step, count)) for begin in range(0, count, step)]


def test_threads_are_those_of_torch() -> None:
    """One of the two is there in every torch that this package takes, with its wheels at least."""
    assert any(load._threads())


def test_compiled_code_is_not_used_where_torch_observes() -> None:
    assert not running.is_observed
    with FlopCounterMode(display=False):
        assert running.is_observed
