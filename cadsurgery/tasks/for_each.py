"""Work on many items: shared among processes; what cannot be done is noted, and the others are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from cadsurgery.support.errors import CadError
from cadsurgery.support.processes import gather, in_order, shard, world

Item = TypeVar("Item")
Result = TypeVar("Result")
Failure = dict[str, str]  # an error as plain values, and what it befell
Step = Callable[[str], None]  # is told what is being done


def silent(text: str) -> None:
    """The step of who does not want to know."""


class Failures:
    """Items that could not be done in this process.

    Attributes:
        kind: of the items, e.g. `image`: the key of an item's name in a failure.
        noted: position of the item among all, and the failure.
    """

    def __init__(self, kind: str, before: Sequence[Failure] = ()) -> None:
        """Start with what was known before any work, which the first process tells."""
        self.kind, self._item = kind, (-1, "")
        self.noted: list[tuple[int, Failure]] = [(-1, failure) for failure in before if world().is_main]

    def at(self, position: int, name: str) -> None:
        """From now on failures befall this item."""
        self._item = position, name

    def note(self, error: CadError) -> None:
        """Add a failure."""
        position, name = self._item
        self.noted.append((position, {self.kind: name, **error.to_dict()}))

    def gather(self, device: torch.device) -> list[Failure]:
        """Those of all processes, in the order of the items; all must call it."""
        return in_order(gather(self.noted, device))


def each(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    failures: Failures,
    *,
    name: Callable[[Item], str] = str,
    step: Step = silent,
) -> Iterator[tuple[int, Result]]:
    """Results of the work on the items of this process's share, each with its position among all.

    Args:
        items: of all processes.
        work: on one item; a `CadError` is noted, and the next item is done.
        failures: where it is noted.
        name: of an item.
        step: told the last part of the name, and how far it is.
    """
    for position, item in shard(items):
        failures.at(position, name(item))
        step(f"{Path(name(item)).name} ({position + 1} of {len(items)})")
        try:
            result = work(item)
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
    step: Step = silent,
) -> tuple[list[Result], list[Failure]]:
    """Work on every item; every process gets the results and the failures of all, in the order of the items.

    Args:
        items, work, failures, name, step: as of `each`.
        device: this process computes on; it decides how the processes talk.
    """
    done = list(each(items, work, failures, name=name, step=step))
    return in_order(gather(done, device)), failures.gather(device)
