"""Small C files in the place of the kernels: they compile in no time, and their forms say which they are."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cadsurgery.kernels import build, dispatch

COMPILER = build.find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
posix = pytest.mark.skipif(sys.platform == "win32", reason="no kernels are compiled on Windows")

# The functions of the stand-ins, without elements and with.
ANSWER = "int SUFFIX(answer)(void) { return 42; }\n"
OF_ELEMENTS = "int SUFFIX(size)(void) { return sizeof(ELEMENT); }\n"


def write_stand_ins(folder: Path) -> Path:
    """A folder of sources: the real processor.c, and stand-ins for three files of the table."""
    folder.mkdir()
    for name in ("processor.c", "parallel.h"):
        shutil.copy(build.SOURCES / name, folder)
    (folder / "int8.c").write_text(ANSWER)
    (folder / "maps.c").write_text(ANSWER.replace("answer", "cells"))
    (folder / "warp.c").write_text(OF_ELEMENTS)
    return folder


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return write_stand_ins(tmp_path / "c")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the stand-ins."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("built")
    build.build(COMPILER, folder / "kernels.so", sources=write_stand_ins(folder / "c"))
    return folder / "kernels.so"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has loaded nothing: stand-ins as sources, no library in the package."""
    (tmp_path / "package").mkdir()
    for name in ("CADSURGERY_NATIVE", "CADSURGERY_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "SOURCES", write_stand_ins(tmp_path / "c"))
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "package" / "kernels.so")
    dispatch.forget()
    yield tmp_path
    monkeypatch.undo()
    dispatch.forget()


@pytest.fixture
def packaged(home: Path, built: Path) -> Path:
    """The library inside the package."""
    return Path(shutil.copy(built, build.LIBRARY))
