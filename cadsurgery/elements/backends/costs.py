"""What a convolution costs here, dense and on elements: measured once per machine, kept in the user's cache folder.

On elements a convolution does less work, but at a lower rate where there is no compiled kernel for it (other groups,
other types, no compiler). Where the whole fine map is cheaper, the same result is computed on that.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadsurgery.support.files import cache_folder, is_private, kept_whole
from cadsurgery.support.plain import as_tuples, fits

_FILE = "costs.json"
_ROUNDS, _MOST_ROUNDS, _NANOSECONDS = 7, 50, 100_000_000
_LOCK = threading.Lock()
_KNOWN: dict[str, Costs] = {}


class Costs(NamedTuple):
    """Nanoseconds per multiply-accumulate of one kind of convolution, and per value moved.

    Attributes:
        dense: of an ordinary convolution of a whole map.
        sparse: of one on elements.
        moved: of reading and writing one value when a map is made of elements or elements of a map.
    """

    dense: float
    sparse: float
    moved: float

    def prefer_dense(self, work: int, elements: int, pixels: int, channels: tuple[int, int]) -> bool:
        """Whether the whole map is cheaper.

        Args:
            work: multiply-accumulates per element.
            elements: of the output.
            pixels: of the whole map.
            channels: read and written.
        """
        moved = pixels * channels[0] + elements * channels[1]
        return pixels * work * self.dense + moved * self.moved < elements * work * self.sparse


def costs(key: str, measure: Callable[[], Costs]) -> Costs:
    """The costs of one kind of convolution; `key` names everything they depend on but the machine.

    What cannot be read from or written to the cache folder is measured anew in each process.
    """
    key = f"{key}, torch {torch.__version__}"
    if key not in _KNOWN:
        with _LOCK:
            if key not in _KNOWN:
                _KNOWN[key] = _kept(key) or _measured(key, measure)
    return _KNOWN[key]


def best_time(run: Callable[[], Tensor]) -> float:
    """Nanoseconds of the best of many calls: other processes only ever add to it, often to several in a row."""
    begin, taken = time.perf_counter_ns(), list[int]()
    while len(taken) < _ROUNDS or (
        time.perf_counter_ns() - begin < _NANOSECONDS and len(taken) < _MOST_ROUNDS
    ):
        start = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - start)
    return float(min(taken))


def _kept(key: str) -> Costs | None:
    found = as_tuples(_all_kept().get(key))
    if fits(found, tuple[float, float, float]) and all(0 <= cost < math.inf for cost in found):
        return Costs(*map(float, found))
    return None


def _all_kept() -> dict[str, Any]:
    """What the file holds; nothing if there is none, it is damaged, or somebody else may have written it."""
    path = _path()
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        if path is not None and is_private(path.lstat()):
            return dict(json.loads(path.read_text()))
    return {}


def _measured(key: str, measure: Callable[[], Costs]) -> Costs:
    with ThreadPoolExecutor(1) as alone:
        found = alone.submit(_on_one_core, measure).result()
    path = _path()
    with contextlib.suppress(OSError):
        if path is not None:
            with kept_whole(path) as folder:
                (folder / "successor").write_text(json.dumps({**_all_kept(), key: list(found)}, indent=1))
    return found


def _on_one_core(measure: Callable[[], Costs]) -> Costs:
    """What is measured in a thread of its own with one thread of torch: waiting for other cores would be counted,
    and the costs relative to each other are those of many. The caller's number of threads stays as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return measure()
    finally:
        torch.set_num_threads(before)


def _path() -> Path | None:
    folder = cache_folder()
    return folder / _FILE if folder is not None else None
