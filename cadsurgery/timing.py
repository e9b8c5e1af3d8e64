"""Wall-clock comparison that holds on a shared machine: all sides in turn, the best round counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int = 3, warmup: int = 1, seconds: float = float("inf")
) -> dict[str, float]:
    """Best time of each side in milliseconds.

    Each round runs every side once, in turn, so that a change of the machine's speed meets all of them.

    Args:
        sides: what to run, by name.
        rounds: counted rounds.
        warmup: rounds before them.
        seconds: start no further round after this time, once one has counted.
    """
    best = dict.fromkeys(sides, float("inf"))
    begin = _now()
    with torch.inference_mode():
        for turn in range(warmup + rounds):
            if turn > warmup and _now() - begin > seconds:
                break
            for name, run in sides.items():
                start = _now()
                run()
                if turn >= warmup:
                    best[name] = min(best[name], 1e3 * (_now() - start))
    return best


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
