"""Check what `recommend` names without labels by labels that it did not see.

    python -m benchmarks.recommend_check DATA FOLDER [--photos 30] [--others 60]

For each network `recommend` chooses a setting on photos without their labels; its time is that of a user. Then all
settings are measured with labels on other pictures of the same data. Printed are what was named, the change of its
mIoU on these with its standard error, the setting that labels would have named there, and the time of both relative
to the network as given. An interrupted run goes on in FOLDER.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.trained import NETWORKS, divided
from cadsurgery.tasks.recommend import Recommendation, recommend


def words(report: Recommendation, name: str) -> str:
    """Return the change of mIoU of a setting in points, and its time relative to the network as given."""
    given = report.rows[0]
    for row in report.rows:
        if row.name == name:
            change = f"{100 * row.quality.change:+.2f} (±{100 * row.quality.error:.2f}) points"
            return f"{change}, {row.milliseconds / given.milliseconds:.2f} of the time"
    return "not measured"


def main() -> None:
    """Run both for each network and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=30)
    parser.add_argument("--others", type=int, default=60)
    options = parser.parse_args()
    for name in ("camvid-8", "espnet-8", "voc-16"):
        model, data = NETWORKS[name](options.data)
        photos, others = divided(data, options.photos, options.others)
        begin = time.perf_counter()
        chosen = recommend(model, photos.unlabelled(), minutes=8, output=options.folder / f"{name}-photos")
        taken = time.perf_counter() - begin
        seen = recommend(
            model,
            others,
            minutes=60,
            output=options.folder / f"{name}-labels",
        )
        print(f"{name}: {chosen.images} photos in {taken:.0f} s: {chosen.chosen.name}")
        print(f"  by labels of {seen.images} other pictures: {words(seen, chosen.chosen.name)}")
        print(f"  labels would name: {seen.chosen.name}: {words(seen, seen.chosen.name)}", flush=True)


if __name__ == "__main__":
    main()
