"""Progress of commands: bars and spinners on a terminal, lines in a pipe, and the time that is left."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from conftest import ROOT, Run, covering, slow
from networks import unverified
from PIL import Image
from rich.console import Console
from rich.status import Status
from torch import nn

import cadsurgery as cs
from cadsurgery.cli import screen
from cadsurgery.cli.main import main
from cadsurgery.finetune.objectives import OBJECTIVES, list_objectives
from cadsurgery.masks.provider import PROVIDERS, list_masks
from cadsurgery.support import progress
from cadsurgery.support.errors import LeftOut
from cadsurgery.support.folders import warn_of_left_out
from cadsurgery.surgery.treatment import _RULES, first_line


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown_in(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    """What commands write to standard error, which is a terminal or a pipe."""
    stream = io.StringIO()
    monkeypatch.setattr(screen, "err", Console(file=stream, width=100, force_terminal=terminal))
    return stream


def passing(clock: Clock, seconds: float, ends: float, work: Callable[[float], None]) -> Callable[[], bool]:
    """A wait for half minutes: the work goes on a second at a time, and the command ends at a time."""

    def wait() -> bool:
        until = clock.now + seconds
        while clock.now < min(until, ends):
            clock.now += 1
            work(clock.now - 100)
        return clock.now >= ends

    return wait


def test_a_pipe_gets_a_line_each_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = shown_in(monkeypatch, terminal=False), Clock()
    now = screen.Current(clock)
    now("image 1 of 500", 0, 500)

    def work(passed: float) -> None:  # an image takes two seconds
        if passed % 2 == 0:
            now(f"image {passed / 2 + 1:.0f} of 500", passed / 2, 500)

    screen.print_lines("eval", now, passing(clock, 30, 100 + 100, work))
    assert stream.getvalue().splitlines() == [
        "eval: image 16 of 500, about 16 min left",
        "eval: image 31 of 500, about 16 min left",
        "eval: image 46 of 500, about 15 min left",
    ]


def test_further_processes_of_a_launcher_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown_in(monkeypatch, terminal=True)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with screen.steps("eval", every=0.001) as step:
        step("image 1 of 2", 0, 2)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_where_items_are_counted_and_a_spinner_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, console = Clock(), Console(file=io.StringIO(), width=100, force_terminal=True)
    now = screen.Current(clock)
    spinner = screen.Spinner("dots")

    def drawn() -> str:
        with console.capture() as captured:
            console.print(screen._draw(now, spinner))
        return captured.get()

    now("tracing [x]")
    assert "tracing [x]" in drawn() and "━" not in drawn()
    now("image 1 of 4", 0, 4)
    assert "━" in drawn() and "left" not in drawn()
    clock.now += 60
    now("image 2 of 4", 1, 4)
    assert "━" in drawn() and "image 2 of 4, about 3 min left" in drawn()
    clock.now += 60
    assert "about 2 min left" in drawn()  # it runs on between the steps
    assert max(map(len, screen.Text.from_ansi(drawn()).plain.splitlines())) <= 100


def test_results_stay_on_standard_output_while_a_terminal_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = shown_in(monkeypatch, terminal=True)
    with screen.steps("macs") as step:
        step("counting")
        screen.print_json({"macs": 1})
    assert "macs" in capsys.readouterr().out and '"macs"' not in stream.getvalue()


def test_an_interrupted_command_says_so_in_one_line(
    command_line: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cadsurgery.tasks.convert_model.make_or_read_plan", interrupted)
    done = command_line("plan", "resnet18", "--json")
    assert done.code == 130 and done.err == "interrupted: plan, planning\n" and done.out == ""


def test_the_time_left_is_that_of_the_items_that_are_counted_now() -> None:
    clock = Clock()
    now = screen.Current(clock)
    now("image 5 of 10", 4, 10)  # an earlier run did four
    clock.now += 10
    now("image 6 of 10", 5, 10)
    assert now.words == "image 6 of 10, about 50 s left" and now.share == 0.5 and now.speed == 0.1
    now("image 6 of 10", 5, 10, 20.0)
    assert now.words == "image 6 of 10, about 20 s left"
    now("round 1 of 10", 0, 10)  # other items, as many
    clock.now += 3
    assert now.words == "round 1 of 10" and now.speed is None
    now("round 2 of 10", 1, 10)
    assert now.words == "round 2 of 10, about 27 s left"
    clock.now += 40  # the third takes longer than was to be expected
    assert now.words == "round 2 of 10"
    now("writing")
    assert now.words == "writing" and now.share is None
    now("nothing", 0, 0)
    assert now.words == "nothing" and now.share is None


@pytest.mark.parametrize(("end", "lines"), [(None, 2), (typer.Exit(1), 2), (cs.FileError("no"), 1)])
def test_what_is_left_out_of_folders_is_said_at_the_end_unless_the_command_is_refused(
    monkeypatch: pytest.MonkeyPatch, end: Exception | None, lines: int
) -> None:
    stream = shown_in(monkeypatch, terminal=False)
    with contextlib.suppress(typer.Exit, cs.CadError), screen.warnings_as_lines():
        warn_of_left_out("photos", {"no pictures": [f"{number}.txt" for number in range(7)], "links": []})
        warnings.warn("slow", cs.CadWarning, stacklevel=1)
        if end is not None:
            raise end
    left_out = "warning: left out of photos: no pictures: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more."
    assert stream.getvalue().splitlines() == ["warning: slow", left_out][:lines]


@pytest.mark.parametrize("arguments", [("--help",), slow(("list", "resnet1*", "--json"))])
def test_a_closed_output_is_no_error(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """`cadsurgery list >&-`: the work is done, and nothing is shown."""
    command = " ".join(("exec", sys.executable, "-m", "cadsurgery", *arguments, ">&-"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_warning_names_the_line_outside_the_package(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_left_out(tmp_path, {"no pictures": ["a.txt"]})
        exec(
            compile("called(where, what)", "<a line of the user>", "exec"),
            {"called": warn_of_left_out, "where": tmp_path, "what": {"no pictures": ["b.txt"]}},
        )
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name, "<a line of the user>"]
    assert all(one.category is LeftOut for one in caught)


# -- what a console cannot show is replaced, never raised ----------------------------------------------


def _console(encoding: str, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="\n")


def _printed(stream: Any) -> str:
    stream.flush()
    return bytes(stream.buffer.getvalue()).decode(stream.encoding)


COMMANDS = {
    "a plan": "plan networks:strided",
    "predictions": "run net.safetensors pictures -o out --trust",
    "a file that is not there": "plan \u4e00\u00b1.safetensors",
    "help": "recommend --help",
}


@pytest.mark.parametrize(
    ("words", "encoding", "errors"),
    covering([*COMMANDS.values()], ["ascii", "cp1252", "utf-8"], ["strict", "surrogateescape"]),
)
def test_a_console_replaces_what_it_cannot_show(
    words: str, encoding: str, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cs.save(unverified(cs.build_model("networks:strided"), "edges"), "net.safetensors")
    Path("pictures").mkdir()
    for name in ("\u00e9\u4e00", "plain"):
        noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"pictures/{name}.png")
    out, err = _console(encoding, errors), _console(encoding, "backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["cadsurgery", *words.split()])
    screen._show_what_it_can()
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == ("\u4e00" in words)
    assert _printed(out) or _printed(err)
    if encoding == "utf-8":
        assert "?.png" not in _printed(out)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_reports_are_tables_on_every_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    table = Table("setting", "change \u00b1")
    table.add_row("\u4e00", "-0.38 \u00b10.01")
    stream = _console(encoding, "strict")
    monkeypatch.setattr(sys, "stdout", stream)
    screen._show_what_it_can()
    screen.out.print(table)
    assert "setting" in _printed(stream) and "0.38" in _printed(stream)


def test_texts_for_users_are_there_without_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONOPTIMIZE=2 drops them: reasons of rules, summaries of masks and objectives."""
    rules = list(dict.fromkeys(_RULES.values()))

    def texts() -> list[Any]:
        return [list(map(first_line, rules)), list_masks(), list_objectives()]

    before = texts()
    for documented_one in (*rules, *PROVIDERS.values(), *OBJECTIVES.values()):
        monkeypatch.setattr(documented_one, "__doc__", None)
    assert texts() == before and all(before[0])


# -- long calls in Python show a line on a terminal ----------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest replaces sys.stderr itself
    monkeypatch.setattr(progress, "_PATIENCE", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def wait(stream: Terminal, text: str) -> None:
    end = time.monotonic() + 10
    while text not in stream.getvalue() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_long_call_shows_its_steps_on_a_line_that_disappears(terminal: Terminal) -> None:
    with progress.waiting() as step:
        step("tracing")
        wait(terminal, "tracing")
        step("verifying")
    shown = terminal.getvalue()
    assert "cadsurgery: tracing ..." in shown and "cadsurgery: verifying ..." in shown
    assert shown.endswith("\x1b[2K")


def test_a_short_call_and_one_on_a_screen_of_its_own_show_nothing(terminal: Terminal) -> None:
    with progress.waiting() as step:
        step("tracing")
    with progress.elsewhere(), progress.waiting() as step:
        step("tracing")
        time.sleep(0.1)
    time.sleep(0.1)
    assert terminal.getvalue() == ""


def test_a_conversion_and_an_optimised_copy_say_what_they_do(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(Status, "update", lambda status, text: texts.append(text))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)).eval()
    image = torch.rand(1, 3, 64, 64)
    net = cs.adaptify(model, "none", example_input=image)
    assert any("verifying" in text for text in texts)
    net.optimize()
    assert any("optimising" in text for text in texts)
