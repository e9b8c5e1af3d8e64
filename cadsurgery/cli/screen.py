"""Output of the command line: results on standard output, progress on standard error."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from cadsurgery.support.errors import CadError, CadWarning, LeftOut
from cadsurgery.support.progress import elsewhere, time_in_words

if TYPE_CHECKING:
    from cadsurgery.tasks.report import Report

_LINE_EVERY = 30.0  # seconds between lines of progress, where there is no terminal


def _open_closed() -> None:
    """Let standard output and standard error lead to the null device where they are closed (`>&-`): the work is done,
    nothing is shown, and no file that is opened later stands in their place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _show_what_it_can() -> None:
    """Let standard output replace characters that its encoding lacks (a name in Chinese, the sign of plus or minus on a
    console of ASCII), as standard error does: after minutes of work no command ends at a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In UTF-8 that handler writes the bytes of file names as they are; elsewhere it knows nothing but these.
            is_utf = stream.encoding.lower().startswith("utf")
            if stream.errors == "strict" or (stream.errors == "surrogateescape" and not is_utf):
                stream.reconfigure(errors="replace")


_open_closed()
_show_what_it_can()
# A terminal has a width; pipes and files get long lines.
out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(width=None if sys.stderr.isatty() else 140, stderr=True)


class Current:
    """The current step: a `Step` callback that remembers its last call, and estimates the time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start before the first step; `clock` returns seconds."""
        self._clock = clock
        self._call = _Counting("starting", clock())

    def __call__(
        self, text: str, done: float | None = None, of: float | None = None, limit: float | None = None
    ) -> None:
        """Note the current step, see `Step`. Counting begins anew after another kind of step."""
        now, last = self._clock(), self._call
        new = _Counting(text, now, done, of, limit, done, now)
        if None not in (done, of, last.done) and of == last.of and done >= last.done:  # type: ignore[operator]
            new = replace(new, first=last.first, begin=last.begin)
        self._call = new  # in one go, because another thread reads it

    @property
    def share(self) -> float | None:
        """Share of the items that are done; None if nothing is counted."""
        call = self._call
        return call.done / call.of if call.done is not None and call.of else None

    @property
    def speed(self) -> float | None:
        """Items per second since counting began; None before the first is done."""
        call = self._call
        if call.done is None or call.first is None or call.done <= call.first or call.at <= call.begin:
            return None
        return (call.done - call.first) / (call.at - call.begin)

    @property
    def text(self) -> str:
        """The text of the step."""
        return self._call.text

    @property
    def words(self) -> str:
        """The text of the step, and the time that is left if it can be estimated."""
        call, speed = self._call, self.speed
        if speed is None or call.done is None or call.of is None:
            return call.text
        left = (call.of - call.done) / speed
        left = min(left, left if call.limit is None else call.limit) - (self._clock() - call.at)
        return f"{call.text}, about {time_in_words(left)} left" if left >= 1 else call.text


@dataclass(frozen=True)
class _Counting:
    """A call of `Current` at a time, and the number of items and the time at which this counting began."""

    text: str
    at: float
    done: float | None = None
    of: float | None = None
    limit: float | None = None
    first: float | None = None
    begin: float = 0.0


@contextmanager
def steps(command: str, *, every: float = _LINE_EVERY) -> Iterator[Current]:
    """Show the current step of a command on standard error, also with --json; only in the first process.

    A terminal shows a bar with the time left where items are counted, else a spinner. They vanish at the end and at
    Ctrl-C. A pipe or a file gets a line each half minute, and none from a command that ends earlier. The
    step at which Ctrl-C ends the work is said by `say_interrupted`.
    """
    now = Current()
    try:
        with _shown(command, now, every):
            yield now
    except KeyboardInterrupt:
        _ended_at[:] = [f"{command}, {now.text}"]
        raise


_ended_at: list[str] = []  # the step at which Ctrl-C ended a command; nothing if it ended by itself


def say_interrupted() -> None:
    """Print that Ctrl-C ended the command, and at which step."""
    err.print(": ".join(("interrupted", *_ended_at)), markup=False, highlight=False, soft_wrap=True)
    _ended_at.clear()


@contextmanager
def _shown(command: str, now: Current, every: float) -> Iterator[None]:
    if not is_first_process():
        yield
    elif err.is_interactive:
        from rich.live import Live

        drawn = partial(_draw, now, Spinner("line" if err.options.ascii_only else "dots"))
        # Standard output is not redirected: results printed there are for another program if it is a pipe.
        with (
            elsewhere(),
            Live(
                console=err, get_renderable=drawn, transient=True, refresh_per_second=5, redirect_stdout=False
            ),
        ):
            yield
    else:
        end = Event()
        thread = Thread(target=print_lines, args=(command, now, partial(end.wait, every)), daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


def _draw(now: Current, spinner: Spinner) -> RenderableType:
    """Return the line of a terminal: a bar or a spinner, and the words."""
    share = now.share
    line = Table.grid(Column(), Column(no_wrap=True, overflow="ellipsis"), padding=(0, 1, 0, 0))
    line.add_row(
        spinner if share is None else ProgressBar(total=1.0, completed=share, width=30), Text(now.words)
    )
    return line


def print_lines(command: str, now: Current, wait: Callable[[], bool]) -> None:
    """Print the current step of a command each time `wait` returns, until it returns True."""
    while not wait():
        err.print(f"{command}: {now.words}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print this package's warnings as lines on standard error, each once, also with --json; only in the first process.

    A command that converts a network for several pairs of output strides is warned of the same thing for each pair.
    What is left out of folders is said at the end, unless the command was refused.
    """
    printed: set[str] = set()
    at_end: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", CadWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, CadWarning):
                others(message, category, *place, **more)
            elif is_first_process() and str(message) not in printed:
                printed.add(str(message))
                at_end.append(str(message)) if issubclass(category, LeftOut) else _print_warning(str(message))

        warnings.showwarning = show
        try:
            yield
        except CadError:
            at_end.clear()
            raise
        finally:
            for message in at_end:
                _print_warning(message)


def _print_warning(message: str) -> None:
    err.print(f"warning: {message}", style="yellow", markup=False, highlight=False)


def is_first_process() -> bool:
    """True for the only process, or for the first process of a launcher, which prints."""
    from cadsurgery.support.launcher import world

    return world().rank == 0


def show(values: Any, renderable: Any, as_json: bool) -> None:
    """Print a result as JSON or as text; only in the first process."""
    if not is_first_process():
        return
    if as_json:
        print_json(values)
    else:
        out.print(renderable)


def show_report(report: Report, as_json: bool) -> None:
    """Print the report of a task.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the work early.
        Exit: with code 1, if an item failed.
    """
    show(report.to_dict(), report.render(), as_json)
    if not as_json and is_first_process():
        for line in report.apart():
            err.print(line, highlight=False)
    if report.interrupted:
        raise KeyboardInterrupt
    if report.failed:
        raise typer.Exit(1)


def print_json(values: Any) -> None:
    """Print values as JSON."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")
