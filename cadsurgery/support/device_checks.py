"""Checks of values that live on a GPU, read together: a program waits for the device once an image, not once a check.

On the CPU, and outside `together`, a check is made at once. While a CUDA graph is captured no value can be read, and no
check is made: the calls before the capture made them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LOCAL = threading.local()
_Check = tuple[Tensor, Callable[[], Exception | None]]


def is_capturing(device: torch.device) -> bool:
    """Return True while a CUDA graph is captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def together() -> Iterator[None]:
    """Collect the checks of a block; `read` makes them, and the end of the block those that are left.

    Raises:
        Exception: what the first check that fails gives.
    """
    if _pending() is not None:  # the outer block makes them
        yield
        return
    _LOCAL.pending = []
    try:
        yield
        read(())
    finally:
        _LOCAL.pending = None


def check(is_wrong: Tensor, error: Callable[[], Exception | None]) -> None:
    """Raise what `error` gives if a tensor of one truth value is true: now on the CPU, with the others on a GPU.

    Args:
        is_wrong: one truth value.
        error: called only if it is true; what it returns is raised, unless it is None.
    """
    pending = _pending()
    if is_capturing(is_wrong.device):
        return
    if pending is not None and is_wrong.device.type == "cuda":
        pending.append((is_wrong, error))
    elif is_wrong:
        _raise(error)


def read(numbers: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return whole numbers of a GPU as Python's, in one transfer with the checks that were collected, which are made.

    Raises:
        Exception: what the first check that fails gives.
    """
    pending = _pending() or []
    checks, pending[:] = list(pending), []
    asked = [*(is_wrong for is_wrong, _ in checks), *numbers]
    if not asked:
        return ()
    results = torch.stack([value.reshape(()).long() for value in asked]).tolist()
    for (_, error), is_wrong in zip(checks, results, strict=False):
        if is_wrong:
            _raise(error)
    return tuple(results[len(checks) :])


def _pending() -> list[_Check] | None:
    return getattr(_LOCAL, "pending", None)


def _raise(error: Callable[[], Exception | None]) -> None:
    refusal = error()
    if refusal is not None:
        raise refusal
