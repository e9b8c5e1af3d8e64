"""CamVid at every exit: accuracy, work and time, with and without confidence thresholds.

    python recipes/anytime_camvid/recipe.py DATA NET [--thresholds 0.9 0.9,0.85,0.95 ...] [--split val]
        [--every N] [--output results.json]

DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/`, NET the output of `train.py`. A threshold is one
number, or one number for each exit but the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import source_of
from cadsurgery.methods.anytime.exit_sides import in_words
from cadsurgery.support.fields import read_threshold
from cadsurgery.support.timing import interleaved
from recipes.camvid_mobilenetv2.network import build, images

THRESHOLDS = (0.85, 0.9, 0.95, (0.9, 0.85, 0.9), (0.9, 0.85, 0.95), (0.9, 0.9, 0.95))


def table(report: cs.EvaluationReport, times: Mapping[str, float]) -> str:
    """Format rows in Markdown: mIoU in per cent, MACs, and milliseconds until the last prediction."""
    lines = [
        "| threshold | exit | mIoU | MACs | of whole | CPU ms | of whole |",
        "|---|---|---|---|---|---|---|",
    ]
    whole, last = next(iter(times.values()), 0.0), max(row.exit for row in report.rows)
    for row in report.rows:
        figures = f"{100 * (row.miou or 0):.2f} | {row.macs:.3e} | {row.macs_of_whole:.3f}"
        timed = row.exit == last and row.setting in times
        taken = f"{times[row.setting]:.0f} | {times[row.setting] / whole:.2f}" if timed else " | "
        lines.append(f"| {row.setting} | {row.exit} | {figures} | {taken} |")
    return "\n".join(lines)


def cpu_times(
    net: cs.AnytimeModel, batches: list[Tensor], thresholds: list[Any], rounds: int
) -> dict[str, float]:
    """Measure CPU milliseconds per image of the optimised copy, by threshold.

    All thresholds are timed in turn; the value is the best round, averaged over images.
    """
    fast = net.eval().optimize()
    settings = {"all computed": net.everything, **{in_words(one): one for one in thresholds}}
    calls = {
        (words, number): partial(fast, batch.contiguous(memory_format=torch.channels_last), threshold=one)
        for number, batch in enumerate(batches)
        for words, one in settings.items()
    }
    found = interleaved({str(key): call for key, call in calls.items()}, rounds, clock=time.process_time)
    return {
        words: sum(found[str((words, number))].best for number in range(len(batches))) / len(batches)
        for words in settings
    }


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("net", type=Path, nargs="?")
    parser.add_argument("--thresholds", nargs="*", type=read_threshold, default=THRESHOLDS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--every", type=int, default=1, help="take every N-th image")
    parser.add_argument("--timed", type=int, default=6, help="number of images to time")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds")
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
    report = cs.evaluate(net, found, thresholds=options.thresholds, rounds=0, picture=options.picture)
    timed = [found.read(place * len(found.names) // options.timed)[0] for place in range(options.timed)]
    batches = [normalise(image.unsqueeze(0), source_of(net)) for image in timed]
    times = cpu_times(net, batches, options.thresholds, options.rounds) if batches else {}
    if options.output:
        details = {"weights": f"weights in {options.net.name}", "images_timed": len(batches)}
        values = {**report.to_dict(), **details, "cpu_milliseconds": times}
        options.output.write_text(json.dumps(values, indent=1) + "\n")
    print(table(report, times))


if __name__ == "__main__":
    main()
