"""Programs in a process of their own, as users start them, but that torch is imported before: it takes seconds.

They may have the packages of some extras alone, see `environments`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import sys
from collections.abc import Iterable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import environments

TESTS = Path(__file__).parent

SMALLER = (
    (r"((?:steps|every)\W{1,4}\d+)0\b(?!\*)", r"\1"),  # a tenth of the steps of training
    (r"\(512, 1024\)|\(256, 512\)", "(128, 192)"),
    (r"\b160, 224\b", "128, 160"),
    ("height=192,width=256", "height=128,width=192"),
    (r"scene:(48|64),", "scene:16,"),
    (r"scene:8,\{spec\}", "scene:6,{spec}"),
    (r"minutes=0\.2\b", "minutes=0.05"),
    (r"number in range\(16\)", "number in range(4)"),
    (r"(fasterrcnn_mobilenet_v3_large_320_fpn\()", r"\1min_size=64, max_size=96, "),
)
# LR-ASPP takes long to convert, export and compile; that it converts is what other tests prove.
LARGE = r"model = [\w.]+\.lraspp_mobilenet_v3_large\([^)]*\)(\.eval\(\))?\n"
SMALL = """import torch


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        pairs = ((3, 8), (8, 8), (8, 8), (8, 8), (8, 8))
        layers = []
        for a, b in pairs:
            layers += [torch.nn.Conv2d(a, b, 3, 2, 1), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]
        self.backbone, self.classifier = torch.nn.Sequential(*layers), torch.nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        scores = self.classifier(self.backbone(x))
        return {"out": torch.nn.functional.interpolate(scores, x.shape[2:], mode="bilinear")}


model = Small().eval()
"""
# A minute too: `examples/deploy/compile.py` calls it, and its test runs what it writes.
AHEAD_OF_TIME = r".*\baoti_\w+\(.*\n"


def _small(large: re.Match[str]) -> str:
    classes = re.search(r"num_classes=(\d+)", large[0])
    return SMALL.replace("CLASSES", classes[1] if classes else "21")


def smaller(code: str) -> str:
    """Code of a page or a notebook that takes shorter: other numbers, and the networks that compilers take long for."""
    code = re.sub(AHEAD_OF_TIME, "", re.sub(LARGE, _small, code))
    for pattern, replacement in SMALLER:
        code = re.sub(pattern, replacement, code)
    return code


def _run(path: str, folder: str, argv: list[str], extras: list[str] | None, paths: str | None) -> None:
    """Run a program in a folder; what it prints goes to a file. Nothing of the tests can be imported."""
    os.chdir(folder)
    _set_path(paths)
    environments.show_all() if extras is None else environments.show(*extras)
    sys.stdout = sys.stderr = open("printed.txt", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    others = [place for place in sys.path if not Path(place or TESTS).resolve().is_relative_to(TESTS)]
    sys.path[:], sys.argv = [str(Path(path).parent), *others], [path, *argv]
    runpy.run_path(path, run_name="__main__")


def _set_path(paths: str | None) -> None:
    if paths is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = paths


@cache
def _server() -> Any:
    """Start the process that has torch, from which programs are forked."""
    context, paths = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(["preloaded"])
    _set_path(os.pathsep.join(filter(None, (str(TESTS), paths))))
    try:
        forkserver.ensure_running()
    finally:
        _set_path(paths)
    return context


def run_alone(
    path: Path, folder: Path, *argv: object, extras: Iterable[str] | None = None
) -> tuple[int | None, str]:
    """Run a program in a folder; return its exit code, and what it printed.

    Args:
        path: the program.
        folder: where it runs.
        argv: its arguments.
        extras: all it has besides the base packages; None for everything that is installed.
    """
    arguments = (str(path), str(folder), [*map(str, argv)], None if extras is None else [*extras])
    process = _server().Process(target=_run, args=(*arguments, os.environ.get("PYTHONPATH")))
    process.start()
    process.join()
    return process.exitcode, (folder / "printed.txt").read_text(encoding="utf-8")
