"""Several processes: what a launcher says, and what it does not; and work that is shared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch import nn

import cadsurgery as cs
from cadsurgery.support import launcher
from cadsurgery.support.progress import silent
from cadsurgery.tasks import run
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.keypoints import extract
from cadsurgery.tasks.workers import share

ALONE = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` sets in the one process that it starts."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "2"}, {"ACCELERATE_USE_CPU": "False"}], ids=str)
def test_nothing_is_refused_in_any_other_case(
    monkeypatch: pytest.MonkeyPatch, alone: None, given: dict[str, str]
) -> None:
    if not given:
        monkeypatch.delenv("MASTER_ADDR")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launcher.world().size == int(given.get("WORLD_SIZE", 1))


COMMANDS: dict[str, Callable[[Path], object]] = {
    "run": lambda out: run.predict("net.safetensors", ["a.png"], RunOptions(output=str(out)), step=silent),
    "eval": lambda out: cs.evaluate("resnet18", "images:photos", output=out),
    "keypoints extract": lambda out: extract("resnet18", [Path("a.png")], out),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_several_processes_of_a_launcher_are_refused_by_all_but_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cs.InvalidInput, match=f"(?s){command} was started in 2 processes.*--workers"):
        COMMANDS[command](tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_sent_to_another_process_is_refused() -> None:
    network = nn.Conv2d(3, 3, 1)
    network.hook = lambda: None
    with pytest.raises(cs.InvalidInput, match=r"(?s)cannot be sent.*--workers"):
        list(share(iter([1]), partial(list, network), 2, lambda item, error: None))


@pytest.mark.parametrize("kind", [cs.CadError, *cs.CadError.__subclasses__()])
def test_a_failure_can_be_raised_again_as_the_error_it_was(kind: type[cs.CadError]) -> None:
    error = kind.__new__(kind)
    cs.CadError.__init__(error, "what", where="where", why="why", next="next")
    again = cs.CadError.from_dict({"image": "a.png", **error.to_dict()})
    assert type(again) is kind and str(again) == str(error) and again.to_dict() == error.to_dict()
