"""Output of the command line: results on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from cadsurgery.support.errors import CadWarning

if TYPE_CHECKING:
    from rich.progress import Task

    from cadsurgery.tasks.report import Report

# A terminal has a width; pipes and files get long lines.
out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(width=None if sys.stderr.isatty() else 140, stderr=True)


@contextmanager
def _bar(total: int, silent: bool) -> Iterator[tuple[Task, Callable[..., None]]]:
    """Show a progress bar on standard error; silent with --json and in further processes. Yields task and update."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    time = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (BarColumn(), MofNCompleteColumn(), time, TextColumn("{task.description}"))
    with Progress(*columns, console=err, disable=silent or not is_first_process()) as bar:
        number = bar.add_task("starting", total=total)
        yield bar.tasks[number], partial(bar.update, number)


@contextmanager
def progress(total: int, silent: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a progress bar with the last network and its result."""
    with _bar(total, silent) as (_, update):
        yield lambda row: update(advance=1, description=f"{row['model']}: {row['result']}")


@contextmanager
def training(
    steps: int, images: int, silent: bool
) -> Iterator[tuple[Callable[[dict[str, float | None]], None], Callable[[str], None]]]:
    """Show a progress bar with the last row of the log; yields callbacks for rows and for steps."""
    with _bar(steps, silent) as (task, update):

        def on_step(row: dict[str, float | None]) -> None:
            words = [
                f"{name} {value:.3g}" for name, value in row.items() if name != "step" and value is not None
            ]
            words += [f"{task.speed * images:.1f} images/s"] if task.speed else []
            update(completed=row["step"], description=", ".join(words))

        yield on_step, lambda text: update(description=text)


@contextmanager
def steps(silent: bool) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the current step on standard error; silent with --json and in further processes."""
    if silent or not is_first_process():
        yield lambda text: None
        return
    with err.status("starting") as status:
        yield status.update


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print this package's warnings as lines on standard error, also with --json; only in the first process."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CadWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, CadWarning):
                others(message, category, *place, **more)
            elif is_first_process():
                err.print(f"warning: {message}", style="yellow", markup=False, highlight=False)

        warnings.showwarning = show
        yield


def is_first_process() -> bool:
    """True for the only process, or for the first process of a launcher, which prints."""
    from cadsurgery.support.processes import world

    return world().is_main


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
        Exit: with code 1, if an item failed.
    """
    show(report.to_dict(), report.render(), as_json)
    if not as_json and is_first_process():
        for line in report.apart():
            err.print(line, highlight=False)
    if report.failed:
        raise typer.Exit(1)


def print_json(values: Any) -> None:
    """Print values as JSON."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")
