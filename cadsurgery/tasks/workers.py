"""Predict images in several processes of this machine, each with one thread; one that dies is replaced."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection, get_context

from cadsurgery.support.errors import CadError
from cadsurgery.support.pipeline import DEPTH
from cadsurgery.tasks.predictor import Item, Row, Settings

_Answer = tuple[int, Row] | Exception | None  # None: the network is open


def predict_in_processes(items: Iterator[Item], settings: Settings, count: int) -> Iterator[tuple[int, Row]]:
    """Yield position and row of each image as it is finished; `count` processes write the predictions.

    If a process dies, its images are tried again, each alone. An image that ends a process again is reported as failed.

    Raises:
        CadError: a process dies before it has opened the network.
    """
    suspects, workers = deque[Item](), [_Worker(settings) for _ in range(count)]
    try:
        while True:
            for worker in workers:
                worker.feed(items, suspects)
            busy = {worker.pipe: worker for worker in workers if worker.items or not worker.is_open}
            if not any(worker.items for worker in workers):
                return
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    answer: _Answer = worker.pipe.recv()
                except (EOFError, OSError):
                    yield from worker.give_up(suspects)
                    workers[workers.index(worker)] = _Worker(settings)
                else:
                    yield from worker.take(answer)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process with its pipe, and the images that it was sent and has not answered.

    More images are sent than wait between reading and writing, so that the process never runs out of them.
    """

    def __init__(self, settings: Settings) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(settings, other), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process ends the pipe
        self.items, self.is_open, self._is_trial = dict[int, Item](), False, False
        self._most = 2 * (2 * DEPTH + settings.batch)

    def feed(self, items: Iterator[Item], suspects: deque[Item]) -> None:
        """Send as many images as the process can have, or one that was sent to a process that died."""
        if suspects and not self.items:
            self._send(suspects.popleft())
            self._is_trial = True
        while not self._is_trial and len(self.items) < self._most and (item := next(items, None)):
            self._send(item)
        if self.items and (self._is_trial or len(self.items) < self._most):
            self._tell(None)  # nothing follows for now: what waits is finished

    def _send(self, item: Item) -> None:
        self.items[item.position] = item
        self._tell(item)

    def _tell(self, message: Item | None) -> None:
        with suppress(OSError):  # a dead process is noticed where its answer is read
            self.pipe.send(message)

    def take(self, answer: _Answer) -> Iterator[tuple[int, Row]]:
        """Yield the row of an answer, if it has one.

        Raises:
            Exception: the process met an error that is none of an image.
        """
        if isinstance(answer, Exception):
            raise answer
        self.is_open = True
        if answer is not None:
            del self.items[answer[0]]
            self._is_trial = False
            yield answer

    def give_up(self, suspects: deque[Item]) -> Iterator[tuple[int, Row]]:
        """Pass the images of a process that died on to others; yield the row of an image that it was sent alone."""
        self.process.join()
        error = CadError(
            f"the process that predicted it was ended by {_describe_end(self.process.exitcode)}.",
            why="memory may not suffice for it, or a library crashed.",
            next="give it --size, or fewer --workers; --resume tries it again.",
        )
        if not self.is_open:
            raise CadError(
                f"a worker was ended by {_describe_end(self.process.exitcode)} before it had opened the network.",
                next="give fewer --workers: each holds a copy of the network.",
            )
        if self._is_trial:
            yield from (
                (item.position, {"image": item.source, **error.to_dict()}) for item in self.items.values()
            )
        else:
            suspects.extend(self.items.values())

    def end(self) -> None:
        """End the process, which finishes what it has."""
        self.pipe.close()
        if self.items:  # after an error
            self.process.terminate()
        self.process.join()


def _describe_end(code: int | None) -> str:
    with suppress(ValueError):
        return signal.Signals(-(code or 0)).name
    return f"exit code {code}"


def _serve(settings: Settings, pipe: connection.Connection) -> None:
    """Predict images from a pipe until it is closed; at `None` finish those that wait."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which then sends no more
    with suppress(EOFError, OSError):  # the first process ended
        try:
            predictor = settings.with_one_thread()
            pipe.send(None)
            while True:
                for answer in predictor.rows(iter(pipe.recv, None)):
                    pipe.send(answer)
        except (EOFError, OSError):
            raise
        except Exception as error:
            pipe.send(error)
