"""Compare wall-clock times on a shared machine: the candidates run in turn, and the best round counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from cadsurgery.support.progress import Step, silent


@dataclass(frozen=True)
class Timing:
    """Times of one candidate over the counted rounds, in milliseconds.

    Attributes:
        best: the shortest time; other processes can only lengthen a round.
        median: the median time, as usual on this machine.
    """

    best: float
    median: float


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 3,
    warmup: int = 1,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    step: Step = silent,
) -> dict[str, Timing]:
    """Measure the time of each candidate.

    Each round runs every candidate once, so that a change of the machine's speed affects all of them.

    Args:
        sides: the functions to time, by name.
        rounds: number of counted rounds, at least one.
        warmup: number of uncounted rounds before them.
        seconds: time limit; no further round starts after it, once one has been counted.
        clock: function that returns seconds; `time.process_time` counts the CPU time of this process only.
        step: progress callback; gets the round and the candidate.
    """
    durations: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    with torch.inference_mode():
        for turn in range(warmup + rounds):
            if turn > warmup and time.perf_counter() - begin > seconds:
                break
            words = f"round {turn - warmup + 1} of {rounds}" if turn >= warmup else "warming up"
            for place, (name, run) in enumerate(sides.items()):
                done, of = turn * len(sides) + place, (warmup + rounds) * len(sides)
                step(f"{words} ({name})", done, of, max(0.0, seconds - (time.perf_counter() - begin)))
                start = now(clock)
                run()
                if turn >= warmup:
                    durations[name].append(1e3 * (now(clock) - start))
    return {name: Timing(min(times), median(times)) for name, times in durations.items()}


def now(clock: Callable[[], float]) -> float:
    """Return the time of a clock after waiting for the GPU's queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()
