"""Progress: long work says which step it is at, and how many of how many items are done."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


class Step(Protocol):
    """A callback that long work calls at the beginning of each step.

    Where items are counted, it is called before each of them, first with `done=0`, or with the number of items that an
    earlier run finished. How long an item takes, and how much time is left, follows from these calls.
    """

    def __call__(
        self, text: str, done: float | None = None, of: float | None = None, limit: float | None = None
    ) -> None:
        """Note the current step.

        Args:
            text: what is being done, e.g. "image 120 of 500".
            done: number of items that are finished; None if there is nothing to count.
            of: number of all items.
            limit: seconds after which the work ends even if items are left.
        """


def silent(*_: Any, **__: Any) -> None:
    """Ignore a step."""


_PATIENCE = 2.0  # seconds before a line is shown
_shown_elsewhere = 0  # screens that show the steps of a command, which are shown once


@contextmanager
def elsewhere() -> Iterator[None]:
    """Show no line of `waiting` in the block, because the steps are shown on a screen of their own."""
    global _shown_elsewhere
    _shown_elsewhere += 1
    try:
        yield
    finally:
        _shown_elsewhere -= 1


@contextmanager
def waiting(step: Step = silent) -> Iterator[Step]:
    """Yield a progress callback; on a terminal, steps that take seconds are shown beside a spinner until the end.

    Args:
        step: a callback of the caller, which is yielded as it is, unless it is `silent`.
    """
    if step is not silent or _shown_elsewhere or not sys.stderr.isatty():
        yield step
        return
    from rich.console import Console
    from rich.markup import escape

    status = Console(file=sys.stderr).status("")

    def show(text: str, *_: Any, **__: Any) -> None:
        status.update(f"cadsurgery: {escape(text)} ...")

    timer = threading.Timer(_PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()  # it may be starting the status
        status.stop()


def within(step: Step, heading: str) -> Step:
    """Return a callback that begins the text of every step with a heading."""

    def inner(text: str, *counts: Any, **more: Any) -> None:
        step(f"{heading}, {text}", *counts, **more)

    return inner


def counted(
    items: Sequence[Item],
    step: Step,
    text: str,
    then: str = "",
    *,
    name: Callable[[Item], str] | None = None,
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Yield items, each after a call of `step` with its position.

    Args:
        items: the items.
        step: progress callback.
        text: text before the position, e.g. "calibrating, image".
        then: the step after the last item; empty for none.
        name: returns the name of an item, which follows its position.
        size: number of things to count in an item, e.g. the images of a batch.
    """
    done, of = 0, sum(map(size, items))
    for item in items:
        named = f" ({name(item)})" if name is not None else ""
        step(f"{text} {done + size(item)} of {of}{named}", done, of)
        yield item
        done += size(item)
    if then:
        step(then)


def time_in_words(seconds: float) -> str:
    """Return a rough duration such as `40 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
