"""Measured costs: of convolutions on dense maps and on elements, and of each backend that supports a kind of work.

A convolution on elements does less work, but at a lower rate if there is no kernel for it. The whole fine map is
convolved if that is cheaper. If several backends support a kind of work, the fastest is used.

Costs are measured once per machine and setting of its instruction sets, and kept in the user's cache folder. Backends
round differently, so results depend on the costs. To get the same bits on another machine or with another cache, pin
the costs with `pin` or the environment variable CADSURGERY_COSTS to a file: a report that recorded them, or the
`costs.json` of a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cadsurgery.kernels import isa
from cadsurgery.support.errors import FileError, first_line
from cadsurgery.support.files import cache_folder, is_private, keep_whole
from cadsurgery.support.plain import read_as

_FILE = "costs.json"
_ROUNDS, _MOST_ROUNDS, _NANOSECONDS = 7, 50, 100_000_000
_NANOSECONDS_OF_CANDIDATES, _NOISE = 30_000_000, 0.05
_LOCK = threading.Lock()
_MEASURING = threading.local()  # `on`: this thread measures on behalf of a thread that holds the lock
# The three numbers of `Costs`, or the nanoseconds that a backend takes for a sample of a kind of work.
Numbers = tuple[float, ...]
_VARIABLE = "CADSURGERY_COSTS"
# The costs used so far, by kind; then the pinned costs, set by `pin` or read from the file that the variable names.
_KNOWN: dict[str, Numbers] = {}
_PINNED: Mapping[str, Numbers] | None = None
_OF_FILE: dict[str, Mapping[str, Numbers]] = {}
_FASTEST: dict[tuple[Hashable, ...], str] = {}
# How often costs were pinned. A change invalidates earlier choices.
pins = 0


class Costs(NamedTuple):
    """Nanoseconds per multiply-accumulate of one kind of convolution, and per value moved.

    Attributes:
        dense: cost of an ordinary convolution of a whole map, per MAC.
        sparse: cost of a convolution on elements, per MAC.
        moved: cost of reading and writing one value in a conversion between elements and dense maps.
    """

    dense: float
    sparse: float
    moved: float

    def prefer_dense(self, work: int, elements: int, pixels: int, channels: tuple[int, int]) -> bool:
        """Return True if convolving the whole map is cheaper.

        Args:
            work: multiply-accumulates per element.
            elements: number of output elements.
            pixels: number of pixels of the whole map.
            channels: numbers of input and output channels.
        """
        moved = pixels * channels[0] + elements * channels[1]
        return pixels * work * self.dense + moved * self.moved < elements * work * self.sparse


# Costs that always prefer elements, for all sizes.
_NEVER_DENSE = Costs(1.0, 0.0, 0.0)


def costs(key: str, measure: Callable[[], Costs]) -> Costs:
    """Return the costs of one kind of convolution; `key` names everything except the machine that they depend on.

    If costs are pinned and this kind is missing, the costs prefer elements. If the cache folder cannot be read or
    written, costs are measured again in each process.

    Raises:
        FileError: see `read`.
    """
    return Costs(*(_numbers(key, measure, _NEVER_DENSE) or _NEVER_DENSE))


def fastest(kind: tuple[Hashable, ...], candidates: Mapping[str, Callable[[], object]]) -> str:
    """Return the name of the fastest candidate for a kind of work; times are measured on first use of the kind.

    The first candidate is returned if no other is faster by more than the measurement noise, or if costs are pinned
    and lack one of the candidates.

    Args:
        kind: everything except the machine that the times depend on.
        candidates: for each name a function that runs a sample of the kind, the same sample for all.

    Raises:
        FileError: see `read`.
    """
    chosen = (*kind, *candidates, isa.cap())
    if chosen not in _FASTEST:
        keys = {name: f"{', '.join(map(str, kind))}, {name}" for name in candidates}
        times: dict[str, float] = {}

        def time_of(name: str) -> Numbers:
            if name not in times:
                times.update(_best_times(candidates))
            return (times[name],)

        found = {name: _numbers(key, partial(time_of, name)) for name, key in keys.items()}
        first, *others = candidates
        known = {name: numbers[0] for name, numbers in found.items() if numbers is not None}
        if len(known) == len(candidates):
            known[first] *= 1 - _NOISE
            first = min((first, *others), key=known.__getitem__)
        _FASTEST[chosen] = first
    return _FASTEST[chosen]


def _best_times(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return each function's best time in nanoseconds. Calls alternate, so that disturbances affect all alike."""
    for run in runs.values():
        run()  # packs weights
    taken: dict[str, list[int]] = {name: [] for name in runs}
    begin = time.perf_counter_ns()
    for _ in range(_MOST_ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter_ns()
            run()
            taken[name].append(time.perf_counter_ns() - start)
        if time.perf_counter_ns() - begin > _NANOSECONDS_OF_CANDIDATES and len(taken[name]) >= _ROUNDS:
            break
    return {name: float(min(times)) for name, times in taken.items()}


def _numbers(key: str, measure: Callable[[], Numbers], otherwise: Numbers | None = None) -> Numbers | None:
    """Return the numbers stored under a key, or measure them now; `otherwise` if costs are pinned and lack the key."""
    of_torch = f"{key}, torch {torch.__version__}"
    key = f"{of_torch}, {isa.in_words()}"
    is_inner = getattr(_MEASURING, "on", False)
    with contextlib.nullcontext() if is_inner else _LOCK:
        if key not in _KNOWN:
            pinned = _pinned_costs()
            found: Numbers | None
            if pinned is None:
                found = _numbers_of(_all_kept().get(key)) or _measure_and_keep(key, measure)
            else:  # older files do not name instruction sets
                found = pinned.get(key) or pinned.get(of_torch) or otherwise
            if found is None:
                return None
            _KNOWN[key] = found
        return _KNOWN[key]


def pin(source: Path | str | Mapping[str, Numbers] | None) -> None:
    """Use only these costs from now on: a file, or the values of `record`. None returns to the file that
    CADSURGERY_COSTS names or, without that variable, to measured costs.

    Raises:
        FileError: see `read`.
    """
    global _PINNED, pins
    pinned = read(source) if isinstance(source, Path | str) else source
    with _LOCK:
        _PINNED, pins = pinned, pins + 1
        _KNOWN.clear()
        _FASTEST.clear()


def record() -> dict[str, Any]:
    """Return the costs used in this process so far, for a report: plain values that `read` accepts, and a digest that
    is equal for equal costs."""
    return as_record({key: list(cost) for key, cost in _KNOWN.copy().items()})


def as_record(kinds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return numbers by kind and their digest in the format of `record`."""
    kinds = dict(sorted(kinds.items()))
    return {"digest": hashlib.sha256(json.dumps(kinds).encode()).hexdigest()[:12], "kinds": kinds}


def read(path: Path | str) -> dict[str, Numbers]:
    """Read costs from a JSON file: numbers for each kind (see `Numbers`), or a report with such an entry `costs`.

    Raises:
        FileError: the file cannot be read, or has no costs.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("costs", "kinds"):
            document = document.get(name, document) if isinstance(document, dict) else document
        if not isinstance(document, dict):
            raise ValueError("the file holds no object of JSON.")
        table = {key: cost for key, value in document.items() if (cost := _numbers_of(value)) is not None}
        if wrong := [key for key in document if key not in table]:
            raise ValueError(f"{wrong[0]!r:.60} has neither one nor three numbers from zero up.")
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            "costs of convolutions cannot be read.",
            where=str(path),
            why=first_line(error),
            next=f"give the JSON report of a bench or convert, or unset {_VARIABLE}.",
        ) from error
    return table


def _pinned_costs() -> Mapping[str, Numbers] | None:
    path = os.environ.get(_VARIABLE, "")
    if _PINNED is not None or not path:
        return _PINNED
    if path not in _OF_FILE:
        _OF_FILE[path] = read(path)
    return _OF_FILE[path]


def _numbers_of(value: object) -> Numbers | None:
    """Convert one or three plain numbers; None for anything else."""
    try:
        numbers = read_as(tuple[float, ...], value, "a measurement")
    except ValueError:
        return None
    return (
        tuple(map(float, numbers))
        if len(numbers) in (1, 3) and all(0 <= one < math.inf for one in numbers)
        else None
    )


def best_time(run: Callable[[], object]) -> float:
    """Return the best time of many calls in nanoseconds; other processes only add time, often to consecutive calls."""
    begin, taken = time.perf_counter_ns(), list[int]()
    while len(taken) < _ROUNDS or (
        time.perf_counter_ns() - begin < _NANOSECONDS and len(taken) < _MOST_ROUNDS
    ):
        start = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - start)
    return float(min(taken))


def _all_kept() -> dict[str, Any]:
    """Return the content of the cache file; empty if it is missing, damaged, or writable by other users."""
    path = _path()
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        if path is not None and is_private(path.lstat()):
            return dict(json.loads(path.read_text()))
    return {}


def _measure_and_keep(key: str, measure: Callable[[], Numbers]) -> Numbers:
    with ThreadPoolExecutor(1) as alone:
        cost = alone.submit(_on_one_core, measure).result()
    path = _path()
    with contextlib.suppress(OSError):
        if path is not None:
            with keep_whole(path) as folder:
                (folder / "successor").write_text(json.dumps({**_all_kept(), key: list(cost)}, indent=1))
    return cost


def _on_one_core(measure: Callable[[], Numbers]) -> Numbers:
    """Measure with one torch thread: with several, waiting for other cores would count, and the ratios of the costs
    are the same. Runs in a separate thread, so that the caller's number of threads is unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _MEASURING.on = True
    try:
        with torch.no_grad():
            return measure()
    finally:
        torch.set_num_threads(before)


def _path() -> Path | None:
    folder = cache_folder()
    return folder / _FILE if folder is not None else None
