"""Work on many items, one by one; an item that fails is recorded, and the others are processed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from cadsurgery.support.errors import CadError, NotInstalled
from cadsurgery.support.progress import Step, silent

Item = TypeVar("Item")
Result = TypeVar("Result")
Failure = dict[str, str]  # an error as plain values, with the item's name


@contextmanager
def noted(row: dict[str, Any]) -> Iterator[None]:
    """Add the error in the block to a row; `NotInstalled` ends the work: no other item would do better."""
    try:
        yield
    except NotInstalled:
        raise
    except CadError as error:
        row |= error.to_dict()


class Failures:
    """Items that failed.

    Attributes:
        kind: kind of the items, e.g. `image`; also the key of an item's name in a failure.
        noted: position of each failed item among all items, and its failure.
    """

    def __init__(self, kind: str, before: Sequence[Failure] = ()) -> None:
        """Start with failures known before any work."""
        self.kind, self._item = kind, (-1, "")
        self.noted: list[tuple[int, Failure]] = [(-1, failure) for failure in before]

    def at(self, position: int, name: str) -> None:
        """Set the item to which later failures belong."""
        self._item = position, name

    def note(self, error: CadError, name: str = "") -> None:
        """Add a failure of the current item, or of a part of it with a name of its own."""
        position, known = self._item
        self.noted.append((position, {self.kind: name or known, **error.to_dict()}))


def each(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    failures: Failures,
    *,
    name: Callable[[Item], str] = str,
    step: Step = silent,
) -> Iterator[tuple[int, Result]]:
    """Yield the results, each with the position of its item.

    Args:
        items: the items.
        work: processes an item; a `CadError` is recorded, and the next item follows. `NotInstalled` ends the work: no
            other item would do better.
        failures: records failed items.
        name: returns the name of an item.
        step: progress callback; gets the position of each item, and the last part of its name.
    """
    for position, item in enumerate(items):
        failures.at(position, name(item))
        text = f"{failures.kind} {position + 1} of {len(items)} ({Path(name(item)).name})"
        step(text, position, len(items))
        try:
            result = work(item)
        except NotInstalled:
            raise
        except CadError as error:
            failures.note(error)
        else:
            yield position, result


def for_each(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    failures: Failures,
    *,
    name: Callable[[Item], str] = str,
    step: Step = silent,
) -> tuple[list[Result], list[Failure]]:
    """Process every item; return all results and failures, in the order of the items."""
    done = [result for _, result in each(items, work, failures, name=name, step=step)]
    return done, [failure for _, failure in failures.noted]
