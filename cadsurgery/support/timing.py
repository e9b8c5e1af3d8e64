"""Wall-clock comparison that holds on a shared machine: all sides in turn, the best round counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one side over the counted rounds, in milliseconds.

    Attributes:
        best: what the work takes; other processes only ever add to it.
        median: what it usually took here.
    """

    best: float
    median: float


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 3,
    warmup: int = 1,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times of each side.

    Each round runs every side once, in turn, so that a change of the machine's speed meets all of them.

    Args:
        sides: what to run, by name.
        rounds: counted rounds, at least one.
        warmup: rounds before them.
        seconds: start no further round after this time, once one has counted.
        clock: seconds; `time.process_time` counts those of this process alone, of all its threads.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    with torch.inference_mode():
        for turn in range(warmup + rounds):
            if turn > warmup and time.perf_counter() - begin > seconds:
                break
            for name, run in sides.items():
                start = now(clock)
                run()
                if turn >= warmup:
                    taken[name].append(1e3 * (now(clock) - start))
    return {name: Timing(min(times), median(times)) for name, times in taken.items()}


def now(clock: Callable[[], float]) -> float:
    """The time of a clock once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()
