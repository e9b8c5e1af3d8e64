"""Predict images in several processes of this machine, each with one thread; one that dies is replaced."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection, get_context

from cadsurgery.support.errors import CadError
from cadsurgery.tasks.predictor import Item, Row, Settings

_BATCHES = 8  # that a process gets at a time


def predict_in_processes(items: Iterator[Item], settings: Settings, count: int) -> Iterator[tuple[int, Row]]:
    """Yield position and row of each image; `count` processes write the predictions.

    If a process dies, its images are tried again, each alone. An image that ends a process again is reported as failed.

    Raises:
        CadError: a process dies before it has opened the network.
    """
    blocks, alone = settings.in_blocks(items, _BATCHES), list[Item]()
    workers = [_Worker(settings) for _ in range(count)]
    try:
        while True:
            for worker in workers:
                if not worker.items:
                    worker.send([alone.pop()] if alone else next(blocks, []))
            busy = {worker.pipe: worker for worker in workers if worker.items}
            if not busy:
                return
            for pipe in connection.wait(busy):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    yield from worker.receive()
                except (EOFError, OSError):
                    workers[workers.index(worker)] = _Worker(settings)
                    error = worker.describe_end()
                    alone += worker.items if len(worker.items) > 1 else []
                    for item in worker.items if len(worker.items) == 1 else ():
                        yield item.position, {"image": item.source, **error.to_dict()}
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process with its pipe, and the images that it was sent and has not answered."""

    def __init__(self, settings: Settings) -> None:
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(settings, other), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process ends the pipe
        self.items, self._is_open = list[Item](), False

    def send(self, items: list[Item]) -> None:
        self.items = items
        with suppress(OSError):  # a dead process is noticed where its answer is read
            if items:
                self.pipe.send(items)

    def receive(self) -> list[tuple[int, Row]]:
        """Return the rows of its images; none when it has opened the network.

        Raises:
            EOFError, OSError: the process died.
            Exception: the process met an error that is none of an image.
        """
        answer: list[tuple[int, Row]] | Exception = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        self._is_open, self.items = True, self.items if not answer else []
        return answer

    def describe_end(self) -> CadError:
        """Return the error for an image that ended the process.

        Raises:
            CadError: it had not opened the network.
        """
        self.process.join()
        code = self.process.exitcode or 0
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        error = CadError(
            f"the process was ended by {end} {'at this image' if self._is_open else 'as it opened the network'}.",
            why="memory may not suffice: each process holds a copy of the network; or a library crashed.",
            next="give fewer --workers, or a --size; --resume tries again.",
        )
        if not self._is_open:
            raise error
        return error

    def end(self) -> None:
        self.pipe.close()
        if self.items:  # after an error
            self.process.terminate()
        self.process.join()


def _serve(settings: Settings, pipe: connection.Connection) -> None:
    """Predict images from a pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which then sends no more
    answer = list[tuple[int, Row]]()
    try:
        predictor = settings.with_one_thread()
        while True:
            pipe.send(answer)
            answer = list(predictor.rows(pipe.recv()))
    except (EOFError, ConnectionError):
        pass  # the first process ended
    except Exception as error:
        pipe.send(error)
