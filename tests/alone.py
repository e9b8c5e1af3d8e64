"""Programs in a process of their own, as users start them, but that torch is imported before: it takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def _run(path: str, folder: str, argv: list[str]) -> None:
    """Run a program in a folder; what it prints goes to a file. Nothing of the tests can be imported."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("printed.txt", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    others = [place for place in sys.path if not Path(place or TESTS).resolve().is_relative_to(TESTS)]
    sys.path[:], sys.argv = [str(Path(path).parent), *others], [path, *argv]
    runpy.run_path(path, run_name="__main__")


def run_alone(path: Path, folder: Path, *argv: object) -> tuple[int | None, str]:
    """Run a program in a folder; return its exit code, and what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "timm"])
    process = context.Process(target=_run, args=(str(path), str(folder), [*map(str, argv)]))
    process.start()
    process.join()
    return process.exitcode, (folder / "printed.txt").read_text(encoding="utf-8")
