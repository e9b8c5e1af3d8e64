"""Does time follow work where gates are open? Random weights, gates opened at given shares of positions.

    python benchmarks/sampling.py [MODEL] [--size 512x1024] [--densities 0.5 0.3] [--pattern areas] [--rounds 5]
        [--choice] [--output results.json]

The scores of gates are computed as usual, which is part of the time, but they are open at a given share of their
positions: in areas (smooth noise above a quantile) or scattered. CPU time of the optimised copy, all densities in
turn, best round. `line`: the straight line in MACs between all closed (except the grid) and all open. `before`: time
of the dense network, also optimised. With --choice, the time of filling whole maps in place and of computing chosen
positions
is printed for each density instead: they are equal at `WHOLE_FROM` in `methods/sampling/run.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import cadsurgery as cs
from cadsurgery.images import normalise, street_scene
from cadsurgery.methods.sampling import run
from cadsurgery.methods.sampling.gates import PATTERNS, Opened
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--densities", nargs="*", type=float, default=[0.5, 0.3])
    parser.add_argument("--pattern", default="areas", choices=PATTERNS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--choice", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    torch.manual_seed(0)
    model = cs.build_model(options.model, "none").eval()
    net = cs.sample(model).optimize()
    x = normalise(street_scene(height, width), None)[None]
    densities = [0.0, *sorted(options.densities), 1.0]
    opened = {density: Opened(density, options.pattern) for density in densities}

    def at(density: float, whole_from: float = run.WHOLE_FROM) -> None:
        net.score_override = opened[density]
        with mock.patch.object(run, "WHOLE_FROM", whole_from):
            net(x)

    def before() -> None:
        net.dense(x)

    details = describe_run(torch.device("cpu"))
    print(
        f"{options.model}, {options.size}, {options.pattern}, random weights, {details['device']}, "
        f"{details['commit']}\n"
    )
    if options.choice:
        print("| density | whole maps, ms | chosen positions, ms |\n|---|---|---|")
        for density in options.densities:
            both = {"whole": partial(at, density, 0.0), "chosen": partial(at, density, 2.0)}
            taken = interleaved(both, options.rounds, clock=time.process_time)
            print(f"| {density} | {taken['whole'].best:.0f} | {taken['chosen'].best:.0f} |", flush=True)
        return
    times = interleaved(
        {"before": before, **{str(density): partial(at, density) for density in densities}},
        options.rounds,
        clock=time.process_time,
    )
    macs = {}
    for density in densities:
        net.score_override = opened[density]
        macs[density] = net.macs(x)
    low, high = (times[str(d)].best for d in (0.0, 1.0))
    least, most = (macs[d].total for d in (0.0, 1.0))
    print(f"before: {times['before'].best:.0f} ms\n")
    print("| density | MACs | of dense | CPU ms | line | of line |\n|---|---|---|---|---|---|")
    rows = []
    for density in densities:
        count = macs[density].total
        line = low + (high - low) * (count - least) / (most - least)
        best = times[str(density)].best
        rows.append({"density": density, "macs": count, "ms": best, "line": line})
        print(
            f"| {density} | {count:.3e} | {count / macs[density].dense:.3f} | {best:.0f} | {line:.0f} | "
            f"{best / line:.2f} |"
        )
    if options.output:
        report = {
            **details,
            "before": times["before"].best,
            "rows": rows,
            "options": {**vars(options), "output": ""},
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
