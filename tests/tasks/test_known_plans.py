"""Plans that are known: the second answer equals the first, without torch, and only where nothing has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run

from cadsurgery.tasks import recorded
from cadsurgery.tasks.plan_report import PlanReport, PlanRow
from cadsurgery.tasks.recorded import planned

MODEL = "resnet18"
OPTIONS = {"output_stride": None, "region": "auto", "outputs": "fine", "size": None}
ROWS = (PlanRow("conv1", "Conv2d 7x7/2", "dense", "2", "1.0e+08", "runs before the region"),)
Ask = Callable[..., int]

# Runs the command line, and says at the end whether torch was imported.
CODE = """
import sys
from cadsurgery.cli.main import main
sys.argv = ["cadsurgery", *sys.argv[1:]]
try: main()
except SystemExit: pass
print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the code of the package, beside an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(recorded, "_names", lambda: {"torchvision": [MODEL], "timm": [MODEL, "other"]})
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "rules.py").write_text("A = 1\n")
    monkeypatch.setattr(recorded, "_PACKAGE", folder)
    return folder


@pytest.fixture
def ask(package: Path) -> Ask:
    """Asks for a plan; how often it was made so far."""
    made: list[PlanReport] = []

    def make() -> PlanReport:
        made.append(PlanReport(json.dumps({"number": len(made)}), "a summary", ROWS, "why"))
        return made[-1]

    def call(model: str = MODEL, **options: Any) -> int:
        assert planned(model, {**OPTIONS, **options}, make) in made
        return len(made)

    return call


def kept(package: Path) -> list[Path]:
    return sorted((package.parent / "cache").rglob("plans/*.json"))


def test_a_plan_is_made_once(ask: Ask, package: Path) -> None:
    assert (ask(), ask(), len(kept(package))) == (1, 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"output_stride": (8, 16)},
        {"region": ["layer3"]},
        {"outputs": "native"},
        {"size": (256, 320)},
        {"model": "timm:resnet18"},
        {"model": "other"},
    ],
    ids=str,
)
def test_another_network_or_option_has_a_plan_of_its_own(ask: Ask, change: dict[str, Any]) -> None:
    assert (ask(), ask(**change), ask(), ask(**change)) == (1, 2, 2, 2)


@pytest.mark.parametrize("package_name", ["cadsurgery", "torch", "torchvision", "timm"])
def test_another_version_makes_the_plan_again(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, package_name: str
) -> None:
    assert ask() == 1
    version = recorded.version
    monkeypatch.setattr(recorded, "version", lambda name: "0" if name == package_name else version(name))
    assert (ask(), ask()) == (2, 2)


def test_another_python_makes_the_plan_again(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask() == 1
    monkeypatch.setattr(recorded.platform, "python_version", lambda: "3.99.0")
    assert (ask(), ask()) == (2, 2)


def test_changed_code_makes_the_plan_again(ask: Ask, package: Path) -> None:
    assert ask() == 1
    (package / "rules.py").write_text("A = 2\nB = 3\n")
    assert (ask(), ask()) == (2, 2)
    (package / "another.py").write_text("")
    assert (ask(), ask()) == (3, 3)


def test_a_package_without_a_version_keeps_nothing(
    ask: Ask, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise recorded.PackageNotFoundError(name)

    monkeypatch.setattr(recorded, "version", unknown)
    assert (ask(), ask(), kept(package)) == (1, 2, [])


@pytest.mark.parametrize("model", ["usernets:segmenter", "hf:owner/name", "net.safetensors", "resnt18", ""])
def test_nothing_is_kept_of_code_and_files_of_the_user(ask: Ask, package: Path, model: str) -> None:
    assert (ask(model), ask(model), kept(package)) == (1, 2, [])


def test_a_file_with_the_name_of_a_network_is_a_file(
    ask: Ask, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask() == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).write_bytes(b"a converted file")
    assert (ask(), ask(), len(kept(package))) == (2, 3, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: "",
        lambda values: "{",
        lambda values: "[]",
        lambda values: "[" * 100_000,
        lambda values: '"text"',
        lambda values: json.dumps({**values, "depends": "something else"}),
        lambda values: json.dumps({**values, "plan": "{"}),
        lambda values: json.dumps({**values, "plan": 1}),
        lambda values: json.dumps({**values, "rows": [["conv1"]]}),
        lambda values: json.dumps({**values, "rows": [[1, 2, 3, 4, 5, 6]]}),
        lambda values: json.dumps({**values, "more": 1}),
        lambda values: json.dumps({name: value for name, value in values.items() if name != "summary"}),
    ],
)
def test_a_damaged_or_foreign_file_is_replaced(
    ask: Ask, package: Path, damage: Callable[[dict[str, Any]], str]
) -> None:
    assert ask() == 1
    (file,) = kept(package)
    file.write_text(damage(json.loads(file.read_text())))
    assert (ask(), ask()) == (2, 2)


def test_the_oldest_plans_make_room(ask: Ask, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_MOST_PLANS", 3)
    for side in range(32, 192, 32):
        ask(size=(side, side))
        for age, file in enumerate(
            sorted(kept(package), key=lambda one: one.stat().st_mtime_ns, reverse=True)
        ):
            os.utime(file, (0, 1000 - age))
    assert len(kept(package)) == 3 and ask(size=(160, 160)) == 5 and ask(size=(32, 32)) == 6


def test_without_a_cache_folder_plans_are_made_each_time(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "cache_folder", lambda: None)
    assert (ask(), ask()) == (1, 2)


@pytest.mark.slow
def test_the_second_answer_equals_the_first_and_needs_no_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}

    def answer(*more: str) -> tuple[str, str]:
        command = [sys.executable, "-c", CODE, "plan", MODEL, "--size", "64x96", *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        return done.stdout, done.stderr.split()[-1]

    first, imported = answer()
    assert "Conv2d 7x7/2" not in first and "layer4_1_conv2" in first and imported == "True"
    assert answer() == (first, "False")
    everything, values = answer("--all"), answer("--json")
    assert "Conv2d 7x7/2" in everything[0] and everything[1] == values[1] == "False"
    assert json.loads(values[0])["example_shape"][2:] == [64, 96]
    for file in tmp_path.rglob("plans/*.json"):
        file.unlink()
    assert answer("--all") == (everything[0], "True")
    assert answer("--json") == (values[0], "False")


def test_the_plan_of_a_user_is_made_anew_after_a_change(run_user: Run, tmp_path: Path) -> None:
    def output_stride() -> list[int]:
        sys.modules.pop("ownnet", None)
        return run_user("plan", "ownnet:build", "--json").json["output_stride"]

    (tmp_path / "ownnet.py").write_text(NETWORK.format(depth=4))
    before = output_stride()
    (tmp_path / "ownnet.py").write_text(NETWORK.format(depth=5))
    assert before != output_stride()


NETWORK = """
from torch import nn


def build():
    return nn.Sequential(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range({depth})))
"""


@pytest.fixture
def run_user(command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return command_line
