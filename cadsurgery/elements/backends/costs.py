"""Measured costs: of a convolution on a dense map and on elements, and of each backend that can do a kind of work.

On elements a convolution does less work, but at a lower rate where there is no kernel for it. Where the whole fine map
is cheaper, the same result is computed on that. Where several backends can do a kind of work, the fastest does it.

Costs are measured once for each machine and each setting of its instruction sets, and kept in the user's cache folder.
Each way rounds differently: so that the same program gives the same bits wherever the costs are not those of this
machine's cache, they are pinned, by `pin` or by the environment variable CADSURGERY_COSTS, to those of a file: a report
that recorded them, or a cache's `costs.json`.
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
_MEASURING = threading.local()  # `on`: this thread measures for another, which holds the lock
# The three numbers of `Costs`, or the nanoseconds of a backend for a piece of a kind of work.
Numbers = tuple[float, ...]
_VARIABLE = "CADSURGERY_COSTS"
# The costs that decided so far, by kind; and those that alone may: by `pin`, or of the file that the variable names.
_KNOWN: dict[str, Numbers] = {}
_PINNED: Mapping[str, Numbers] | None = None
_OF_FILE: dict[str, Mapping[str, Numbers]] = {}
_FASTEST: dict[tuple[Hashable, ...], str] = {}
# How often costs were pinned: choices made before are made anew.
pins = 0


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
        """True if the whole map is cheaper.

        Args:
            work: multiply-accumulates per element.
            elements: of the output.
            pixels: of the whole map.
            channels: read and written.
        """
        moved = pixels * channels[0] + elements * channels[1]
        return pixels * work * self.dense + moved * self.moved < elements * work * self.sparse


# Decide for elements, whatever the sizes.
_NEVER_DENSE = Costs(1.0, 0.0, 0.0)


def costs(key: str, measure: Callable[[], Costs]) -> Costs:
    """The costs of one kind of convolution; `key` names everything they depend on but the machine.

    If costs are pinned, a kind that is not among them is computed on elements. What cannot be read from or written to
    the cache folder is measured anew in each process.

    Raises:
        FileError: see `read`.
    """
    return Costs(*(_numbers(key, measure, _NEVER_DENSE) or _NEVER_DENSE))


def fastest(kind: tuple[Hashable, ...], candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the candidate that takes the least time for a kind of work, measured when the kind is first met.

    The first one serves where no other is faster by more than measurements differ, and where costs are pinned and one
    of the candidates is not among them.

    Args:
        kind: all that their times depend on but the machine.
        candidates: for each name the work of a sample of the kind, the same for all.

    Raises:
        FileError: see `read`.
    """
    chosen = (*kind, *candidates, os.environ.get(isa.VARIABLE))
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
    """Nanoseconds of the best of several calls of each, one after the other: what disturbs one disturbs all."""
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
    """The numbers kept under a key, or measured now; if costs are pinned and lack it, what is said `otherwise`."""
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
    """Decide by these costs alone from now on, of a file or as `record` gives them; None: by those of the file that
    CADSURGERY_COSTS names, or as measured.

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
    """The costs that decided in this process until now, for a report: plain values that `read` takes, and a digest that
    is the same where they are."""
    return as_record({key: list(cost) for key, cost in _KNOWN.copy().items()})


def as_record(kinds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Numbers by kind and their digest, as `record` gives those of this process."""
    kinds = dict(sorted(kinds.items()))
    return {"digest": hashlib.sha256(json.dumps(kinds).encode()).hexdigest()[:12], "kinds": kinds}


def read(path: Path | str) -> dict[str, Numbers]:
    """The costs in a file: JSON with numbers for each kind, see `Numbers`, or a report under whose `costs` they are.

    Raises:
        FileError: it cannot be read, or has no costs.
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
    """One or three plain numbers, None for anything else."""
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
    """Nanoseconds of the best of many calls: other processes only ever add to it, often to several in a row."""
    begin, taken = time.perf_counter_ns(), list[int]()
    while len(taken) < _ROUNDS or (
        time.perf_counter_ns() - begin < _NANOSECONDS and len(taken) < _MOST_ROUNDS
    ):
        start = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - start)
    return float(min(taken))


def _all_kept() -> dict[str, Any]:
    """Return the file's content; nothing if there is none, it is damaged, or somebody else may have written it."""
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
    """Measure in a thread of its own with one thread of torch: waiting for other cores would be counted,
    and the costs relative to each other are those of many. The caller's number of threads stays as it is."""
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
