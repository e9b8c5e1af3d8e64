"""The processes of one machine, or of Ray, that share work. If a worker dies, its items are retried one at a time."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import torch

from cadsurgery.support.errors import CadError, InvalidInput, describe_error
from cadsurgery.support.launcher import world

STOPPED = threading.Event()  # set where a process of several is to end its large pictures
_WHY = "memory may not suffice: each process holds a copy of the network; or a library crashed."
_NEXT = "give fewer --workers, or a --size; --resume tries again."
Item = TypeVar("Item")
Result = TypeVar("Result")
Block = Sequence[Any]  # items that a process gets together
Do = Callable[[Block], list[Any]]  # returns the results of a block
Work = Callable[[], Do]  # prepares it, once in each process, to which it is sent
Submit = Callable[[Block], Future[bytes]]  # lets a process do a block, pickled
Pool = Callable[[bytes, int], AbstractContextManager[Submit]]  # starts so many processes for work, pickled


def refuse_launchers(command: str) -> None:
    """Refuse several processes of `torchrun` or another launcher, which would all do the same.

    Raises:
        InvalidInput: there are several.
    """
    if (size := world().size) > 1:
        raise InvalidInput(
            f"{command} was started in {size} processes by a launcher.",
            why="launchers are only for training; other work is shared among processes of its own.",
            next="start it once, with --workers N"
            + (", or with --ray on several machines." if command == "run" else "."),
        )


@contextmanager
def processes(work: bytes, count: int) -> Iterator[Submit]:
    """Start processes of this machine with a thread each, and a GPU of several each."""
    context = get_context("spawn")
    with ProcessPoolExecutor(count, context, _begin, (work, context.Value("i", 0))) as pool:
        yield lambda block: pool.submit(_do, block)


def share(
    items: Iterator[Item],
    work: Work,
    count: int,
    lost: Callable[[Item, CadError], Result],
    *,
    size: int = 1,
    pool: Pool = processes,
) -> Iterator[Result]:
    """Yield the results of all items, as they are done by `count` processes.

    If a process ends, the items in flight are tried again, one by one. Of an item that ends a process again, `lost`
    makes the result.

    Args:
        items: what is to be done.
        work: does them; it opens what it needs anew in each process.
        count: number of processes.
        lost: see above.
        size: number of items that a process gets at a time.
        pool: starts the processes.

    Raises:
        InvalidInput: the work cannot be sent to another process.
        CadError: no process can begin it.
    """
    try:
        sent = pickle.dumps(work)
    except Exception as error:  # objects of users decide what they raise
        raise InvalidInput(
            "this work cannot be sent to other processes.",
            why=describe_error(error),
            next="leave --workers out, or name the network and the data instead of passing objects.",
        ) from error
    blocks = iter(lambda: list(islice(items, size)), [])
    while ended := (yield from _share(blocks, sent, count, pool)):
        alone = ([item] for block in ended for item in block)
        while fatal := (yield from _share(alone, sent, 1, pool)):
            yield lost(fatal[0][0], CadError("the process was ended at this image.", why=_WHY, next=_NEXT))


def _share(
    blocks: Iterator[list[Any]], work: bytes, count: int, pool: Pool
) -> Generator[Any, None, list[list[Any]]]:
    """Yield the results of blocks until a process ends; return the blocks that were in flight then."""
    running, lost = dict[Future[bytes], list[Any]](), list[list[Any]]()
    with pool(work, count) as submit:
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
                    yield from pickle.loads(future.result())
                except BrokenExecutor:
                    lost.append(block)


def do_block(work: bytes, block: Block) -> bytes:
    """Return the results of a block, pickled: torch would send each tensor by an open file of its own."""
    return pickle.dumps(_begun(work)(block))


@functools.cache
def _begun(work: bytes) -> Do:
    begin: Work = pickle.loads(work)
    return begin()


_WORK = list[bytes]()  # of this process


def _do(block: Block) -> bytes:
    return do_block(_WORK[0], block)


def _begin(work: bytes, number: Any) -> None:
    """Leave Ctrl-C to the first process, which then sends no more, and end large pictures behind their band; end when
    that process ends, however."""
    signal.signal(signal.SIGINT, lambda *_: STOPPED.set())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with number.get_lock():
        number.value += 1
    if (devices := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(number.value % devices)
    _WORK.append(work)


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
