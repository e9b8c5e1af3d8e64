"""Share images among processes, of this machine or of Ray; what a process leaves when it ends is tried again, alone."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from multiprocessing import get_context, parent_process

from cadsurgery.support.errors import CadError
from cadsurgery.tasks.predictor import STOPPED, Item, PredictionSettings, Predictor, Row

_BATCHES = 16  # that a process gets at a time
_WHY = "memory may not suffice: each process holds a copy of the network; or a library crashed."
_NEXT = "give fewer --workers, or a --size; --resume tries again."
Block = list[Item]
Rows = list[tuple[int, Row]]
Submit = Callable[[Block], Future[Rows]]  # lets a process call `predict_block`
Pool = Callable[[PredictionSettings, int], AbstractContextManager[Submit]]  # starts so many processes


@contextmanager
def processes(settings: PredictionSettings, count: int) -> Iterator[Submit]:
    """Start processes of this machine."""
    with ProcessPoolExecutor(count, get_context("spawn"), _begin) as pool:
        yield lambda block: pool.submit(predict_block, settings, block)


def predict_in_processes(
    items: Iterator[Item], settings: PredictionSettings, count: int, pool: Pool = processes
) -> Iterator[tuple[int, Row]]:
    """Yield position and row of each image; `count` processes write the predictions.

    If a process ends, the images in flight are tried again, one by one. An image that ends a process again is reported
    as failed.

    Raises:
        CadError: no process can open the network.
    """
    blocks = iter(lambda: list(islice(items, _BATCHES * settings.batch)), [])
    while lost := (yield from _share(blocks, settings, count, pool)):
        alone = ([item] for block in lost for item in block)
        while fatal := (yield from _share(alone, settings, 1, pool)):
            error = CadError("the process was ended at this image.", why=_WHY, next=_NEXT)
            yield fatal[0][0].position, {"image": fatal[0][0].source, **error.to_dict()}


def _share(
    blocks: Iterator[Block], settings: PredictionSettings, count: int, pool: Pool
) -> Generator[tuple[int, Row], None, list[Block]]:
    """Yield the rows of blocks until a process ends; return the blocks that were in flight then."""
    running, lost = dict[Future[Rows], Block](), list[Block]()
    with pool(settings, count) as submit:
        opened = [submit([]) for _ in range(count)]
        if any(isinstance(future.exception(), BrokenExecutor) for future in opened):
            raise CadError("the process was ended as it opened the network.", why=_WHY, next=_NEXT)
        while True:
            with suppress(BrokenExecutor):  # which just broke
                for block in islice(blocks, 0 if lost else count - len(running)):
                    lost.append(block)
                    future = submit(block)
                    running[future] = lost.pop()
            if not running:
                return lost
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                block = running.pop(future)
                try:
                    yield from future.result()
                except BrokenExecutor:
                    lost.append(block)


def predict_block(settings: PredictionSettings, block: Block) -> Rows:
    """Return position and row of each image; the process opens the network once."""
    return list(_predictor(settings).rows(block))


@functools.cache
def _predictor(settings: PredictionSettings) -> Predictor:
    return settings.with_one_thread()


def _begin() -> None:
    """Leave Ctrl-C to the first process, which then sends no more, and end large pictures behind their band; end when
    that process ends, however."""
    signal.signal(signal.SIGINT, lambda *_: STOPPED.set())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
