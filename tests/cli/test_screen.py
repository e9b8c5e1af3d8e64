"""Progress of commands: bars and spinners on a terminal, lines in a pipe, and the time that is left."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from conftest import ROOT, Run, slow
from rich.console import Console

import cadsurgery as cs
from cadsurgery.cli import screen
from cadsurgery.support.errors import LeftOut
from cadsurgery.support.folders import warn_of_left_out


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
        exec(compile("called(where, what)", "<a line of the user>", "exec"), _names(tmp_path))
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name, "<a line of the user>"]
    assert all(one.category is LeftOut for one in caught)


def _names(folder: Path) -> dict[str, object]:
    return {"called": warn_of_left_out, "where": folder, "what": {"no pictures": ["b.txt"]}}
