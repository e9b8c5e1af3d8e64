"""Work on many items, shared among processes; an item that fails is recorded, and the others are processed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch

from cadsurgery.support.errors import CadError, NotInstalled
from cadsurgery.support.launcher import world
from cadsurgery.support.processes import gather, in_order, shard
from cadsurgery.support.progress import Step, silent

Item = TypeVar("Item")
Result = TypeVar("Result")
Failure = dict[str, str]  # an error as plain values, with the item's name


class Failures:
    """Items that failed in this process.

    Attributes:
        kind: kind of the items, e.g. `image`; also the key of an item's name in a failure.
        noted: position of each failed item among all items, and its failure.
    """

    def __init__(self, kind: str, before: Sequence[Failure] = ()) -> None:
        """Start with failures known before any work; only the first process reports these."""
        self.kind, self._item = kind, (-1, "")
        self.noted: list[tuple[int, Failure]] = [(-1, failure) for failure in before if world().is_main]

    def at(self, position: int, name: str) -> None:
        """Set the item to which later failures belong."""
        self._item = position, name

    def note(self, error: CadError, name: str = "") -> None:
        """Add a failure of the current item, or of a part of it with a name of its own."""
        position, known = self._item
        self.noted.append((position, {self.kind: name or known, **error.to_dict()}))

    def gather(self, device: torch.device) -> list[Failure]:
        """Return the failures of all processes, in the order of the items; every process must call this."""
        return in_order(gather(self.noted, device))


def each(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    failures: Failures,
    *,
    name: Callable[[Item], str] = str,
    size: Callable[[Item], int] = lambda item: 1,
    step: Step = silent,
) -> Iterator[tuple[int, Result]]:
    """Yield the results for this process's share of the items, each with its position among all items.

    Args:
        items: the items of all processes.
        work: processes an item; a `CadError` is recorded, and the next item follows. `NotInstalled` ends the work: no
            other item would do better.
        failures: records failed items.
        name: returns the name of an item.
        size: number of things to count in an item, e.g. the images of a batch.
        step: progress callback; gets the position of each item, and the last part of its name.
    """
    starts = [0, *accumulate(map(size, items))]
    for position, item in shard(items):
        failures.at(position, name(item))
        text = f"{failures.kind} {starts[position + 1]} of {starts[-1]} ({Path(name(item)).name})"
        step(text, starts[position], starts[-1])
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
    device: torch.device,
    *,
    name: Callable[[Item], str] = str,
    size: Callable[[Item], int] = lambda item: 1,
    step: Step = silent,
) -> tuple[list[Result], list[Failure]]:
    """Process every item; every process gets all results and failures, in the order of the items.

    Args:
        items, work, failures, name, size, step: as in `each`.
        device: device of this process, which determines how the processes communicate.
    """
    done = list(each(items, work, failures, name=name, size=size, step=step))
    return in_order(gather(done, device)), failures.gather(device)
