"""Measure how a loss of fidelity relates to a loss of mIoU, on trained networks and labelled pictures.

    python -m benchmarks.currency DATA FOLDER [--pictures 30] [--minutes 10]

DATA is the folder with the data and weights that the recipes name. Each network gets a run of `recommend` in FOLDER,
which an interrupted run goes on with. Printed are, for each network, the settings with both losses, and the fit of

    lost share of mIoU = a (1 - fidelity)^p

over all other networks, with the error that it makes on the network left out.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.trained import NETWORKS, spread
from cadsurgery.tasks.recommend import Recommendation, recommend


def points(report: Recommendation) -> list[tuple[str, float, float, float]]:
    """Return for each setting but the network as given: name, 1 - fidelity, lost share of mIoU, and its error."""
    given = report.rows[0].quality.value
    return [
        (row.name, 1 - (row.fidelity or 0.0), -row.quality.change / given, row.quality.error / given)
        for row in report.rows[1:]
        if row.is_complete
    ]


def fit(lacks: list[float], losses: list[float]) -> tuple[float, float]:
    """Return a and p with the least squared error, p among halves from 1 to 4."""
    best = (math.inf, 0.0, 1.0)
    for power in np.arange(1, 4.1, 0.5):
        raised = np.array(lacks) ** power
        factor = float(raised @ np.array(losses) / max(1e-12, raised @ raised))
        error = float(((factor * raised - losses) ** 2).mean())
        best = min(best, (error, factor, float(power)))
    return best[1], best[2]


def main() -> None:
    """Run all networks and print the fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for name, build in NETWORKS.items():
        model, data = build(options.data)
        data = spread(data, options.pictures)
        report = recommend(
            model,
            data,
            limit=options.pictures,
            minutes=options.minutes,
            output=options.folder / name,
            step=partial(print, name, flush=True),
        )
        found[name] = points(report)
    for name, rows in found.items():
        others = [row for other, some in found.items() if other != name for row in some]
        factor, power = fit([row[1] for row in others], [row[2] for row in others])
        missed = [factor * lack**power - lost for _, lack, lost, _ in rows]
        print(
            f"\n{name}: fitted on the others a={factor:.3f}, p={power:g}; root mean square of what is missed here "
        )
        print(f"{float(np.sqrt(np.mean(np.square(missed)))):.4f} of mIoU")
        for (setting, lack, lost, error), miss in zip(rows, missed, strict=True):
            print(f"  {setting:58s} {lack:.3f} lost {lost:+.4f} ±{error:.4f}, predicted {lost + miss:+.4f}")
    everything = [row for rows in found.values() for row in rows]
    print(
        "\nall: a={:.3f}, p={:g}".format(*fit([row[1] for row in everything], [row[2] for row in everything]))
    )


if __name__ == "__main__":
    main()
