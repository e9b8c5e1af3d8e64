"""Overlap steps of work on a stream: a thread reads ahead or writes behind while the caller computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
DEPTH = 2  # results that wait for the caller


def ahead(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield the result for each item, in order; a thread works on up to `DEPTH` items while the caller uses others."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque[Future[Result]]()
        for item in items:
            waiting.append(thread.submit(work, item))
            if len(waiting) > DEPTH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
