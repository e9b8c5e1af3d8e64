"""CamVid at every exit: accuracy, work and time, with confidence and without.

    python recipes/anytime_camvid/recipe.py DATA NET [--thresholds 0.9 0.9,0.85,0.95 ...] [--split val]
        [--every N] [--output results.json]

DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/`, NET what `train.py` wrote. A threshold is one number, or
one of each exit but the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.cli.options import read_threshold
from cadsurgery.tasks.exits import ExitReport, evaluate_exits
from recipes.camvid_mobilenetv2.network import build, images

THRESHOLDS = (0.85, 0.9, 0.95, (0.9, 0.85, 0.9), (0.9, 0.85, 0.95), (0.9, 0.9, 0.95))


def table(report: ExitReport) -> str:
    """Rows in Markdown: mIoU in per cent, MACs and milliseconds of the last exit with everything computed."""
    lines = ["| threshold | exit | mIoU | MACs | of whole | ms | of whole |", "|---|---|---|---|---|---|---|"]
    whole = [row for row in report.rows if row.threshold is None][-1]
    for row in report.rows:
        times = "|  |"
        if row.milliseconds is not None and whole.milliseconds is not None:
            times = f"{row.milliseconds:.0f} | {row.milliseconds / whole.milliseconds:.2f} |"
        figures = f"{100 * (row.miou or 0):.2f} | {row.macs:.3e} | {row.macs_of_whole:.3f}"
        lines.append(f"| {row.setting} | {row.exit} | {figures} | {times}")
    return "\n".join(lines)


def main() -> None:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("net", type=Path, nargs="?")
    parser.add_argument("--thresholds", nargs="*", type=read_threshold, default=THRESHOLDS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--every", type=int, default=1, help="take every N-th image")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--picture", type=Path, help="PNG of the curves")
    options = parser.parse_args()
    if not (options.data / "camvid").is_dir() or options.net is None or not options.net.is_file():
        print(f"skipped: {options.data} holds no camvid folder, or there is no file {options.net}")
        sys.exit(0)
    torch.set_num_threads(options.threads)
    net = cs.load(options.net, build(options.data))
    assert isinstance(net, cs.AnytimeModel)
    found = images(options.data, options.split)
    if options.every > 1:
        read, step = found.read, options.every
        names = found.names[::step]
        found = dataclasses.replace(found, names=names, read=lambda place: read(place * step))
    told = {"rounds": options.rounds, "output": options.output, "picture": options.picture}
    report = evaluate_exits(net, found, options.thresholds, network=str(options.net), **told)
    print(table(report))


if __name__ == "__main__":
    main()
