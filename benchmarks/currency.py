"""Measure how a loss of fidelity relates to a loss of mIoU, on trained networks and labelled pictures.

    python -m benchmarks.currency DATA FOLDER [--networks espnet-8] [--pictures 30] [--minutes 10]

DATA is the folder with the data and weights that the recipes name. Each network gets a run of `recommend` in FOLDER,
which an interrupted run goes on with. Printed are, for each network, the settings with both losses, and the fit of

    lost share of mIoU = a (1 - fidelity)^p

over all other networks, with the error that it makes on the network left out. Conversions with floors lose more of the
mIoU for the same loss of fidelity: they are printed apart and not fitted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.trained import NETWORKS, spread
from cadsurgery.tasks.recommend import Recommendation, recommend

FEWEST = 10  # pictures of a setting that was dropped
LEFT = 0.02  # of mIoU: how much settings of the same fidelity differ


class Point(NamedTuple):
    """One setting of a network: 1 - fidelity, and the lost share of mIoU with its standard error."""

    setting: str
    lack: float
    lost: float
    error: float


def points(report: Recommendation, has_floor: bool) -> list[Point]:
    """Return the settings of a report with floors, or without, also those that were dropped after some pictures."""
    given = report.rows[0].quality.value
    return [
        Point(row.name, 1 - row.balanced_fidelity, -row.quality.change / given, row.quality.error / given)
        for row in report.rows[1:]
        if row.balanced_fidelity is not None and row.balanced_fidelity < 1 and row.quality.images >= FEWEST
        if (row.setting.coarsest > 0) == has_floor
    ]


def fit(some: Sequence[Point]) -> tuple[float, float]:
    """Return a and p with the least weighted squared error, p among quarters from 1 to 4."""
    lacks, losses, errors = (np.array([one[at] for one in some]) for at in (1, 2, 3))
    weights = 1 / (errors**2 + LEFT**2)
    best = (math.inf, 0.0, 1.0)
    for power in np.arange(1, 4.1, 0.25):
        raised = lacks**power
        factor = max(0.0, float((weights * raised) @ losses / max(1e-12, (weights * raised) @ raised)))
        error = float(weights @ (factor * raised - losses) ** 2)
        best = min(best, (error, factor, float(power)))
    return best[1], best[2]


def missed(some: Sequence[Point], factor: float, power: float) -> tuple[float, float]:
    """Return the root mean square of what a fit misses, weighted as in `fit`, and of the points' own errors."""
    weights = np.array([1 / (one.error**2 + LEFT**2) for one in some])
    squares = np.array([(factor * one.lack**power - one.lost) ** 2 for one in some])
    own = np.array([one.error**2 for one in some])
    return tuple(float(np.sqrt(weights @ values / weights.sum())) for values in (squares, own))  # type: ignore[return-value]


def main() -> None:
    """Run all networks and print the fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--pictures", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    found: dict[str, list[Point]] = {}
    for name in options.networks:
        model, data = NETWORKS[name](options.data)
        data = spread(data, options.pictures)
        report = recommend(
            model,
            data,
            limit=options.pictures,
            minutes=options.minutes,
            output=options.folder / name,
            step=lambda text, *_, name=name: print(name, text, flush=True),
        )
        found[name] = points(report, has_floor=False)
        for row in points(report, has_floor=True):
            print(f"{name}, {row.setting:40s} {row.lack:.3f} lost {row.lost:+.4f} ±{row.error:.4f}")
    for name, rows in found.items() if len(found) > 1 else ():
        factor, power = fit([row for other, some in found.items() if other != name for row in some])
        here, own = missed(rows, factor, power)
        print(
            f"\n{name}: fitted on the others a={factor:.3f}, p={power:g}; root mean square of what is missed here "
        )
        print(f"{here:.4f} of mIoU; of the errors of what is measured {own:.4f}")
        for row in rows:
            predicted = factor * row.lack**power
            print(
                f"  {row.setting:58s} {row.lack:.3f} lost {row.lost:+.4f} ±{row.error:.4f}, predicted {predicted:+.4f}"
            )
    if len(found) > 1:
        factor, power = fit([row for some in found.values() for row in some])
        print(f"\nall: a={factor:.3f}, p={power:g}")


if __name__ == "__main__":
    main()
