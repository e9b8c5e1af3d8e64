"""Does time follow work where gates are open? Random weights, gates opened at so many positions.

    python benchmarks/sampling.py [MODEL] [--size 512x1024] [--densities 0.5 0.3] [--pattern areas] [--rounds 5]
        [--choice] [--output results.json]

Gates are asked as ever, which is part of the time, but open at a given share of their positions: in areas (smooth
noise above a quantile) or scattered. CPU time of the optimised copy, all densities in turn, the best round; `line`: the
straight line in MACs between all closed (but the grid) and all open; `before`: of the dense network, optimised alike.
With --choice instead the time of whole maps that are filled in place, and that of chosen positions, at each density:
where they meet is `WHOLE_FROM` in `methods/sampling/run.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from cadsurgery.images import normalise, street_scene
from torch import Tensor

import cadsurgery as cs
from cadsurgery.methods.sampling import run
from cadsurgery.methods.sampling.gates import Gate, scores
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

FAR = 10.0  # a score of which no doubt is left
AREA = 8  # positions between the nodes of smooth noise


def open_at(density: float, pattern: str) -> Callable[..., list[Tensor]]:
    """What stands for `gates.scores`: it takes as long, and opens a share of the positions."""
    fields: dict[tuple[int, ...], Tensor] = {}

    def forced(x: Tensor, gates: Sequence[Gate], strides: Sequence[int]) -> list[Tensor]:
        out = []
        for number, score in enumerate(scores(x, gates, strides)):
            key = (*score.shape, id(gates[number]))
            if key not in fields:
                fields[key] = field(score, density, pattern, number)
            out.append(fields[key])
        return out

    return forced


def field(score: Tensor, density: float, pattern: str, number: int) -> Tensor:
    """Scores of the shape of others, above zero at a share of the positions."""
    generator = torch.Generator().manual_seed(number)
    if pattern == "areas":
        size = [max(2, length // AREA + 1) for length in score.shape[1:]]
        noise = torch.rand((len(score), 1, *size), generator=generator)
        noise = F.interpolate(noise, score.shape[1:], mode="bilinear", align_corners=True)[:, 0]
    else:
        noise = torch.rand(score.shape, generator=generator)
    if density in (0, 1):
        return torch.full_like(score, FAR if density else -FAR)
    return torch.where(noise > noise.quantile(1 - density), FAR, -FAR).to(score)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--densities", nargs="*", type=float, default=[0.5, 0.3])
    parser.add_argument("--pattern", default="areas", choices=("areas", "scattered"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--choice", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    torch.manual_seed(0)
    model = cs.build_model(options.model, "none").eval()
    net = cs.sample(model).optimize()
    x = normalise(street_scene(height, width), None)[None]
    asked = [0.0, *sorted(options.densities), 1.0]
    forced = {density: open_at(density, options.pattern) for density in asked}

    def at(density: float, whole_from: float = run.WHOLE_FROM) -> None:
        with (
            mock.patch.object(run, "scores", forced[density]),
            mock.patch.object(run, "WHOLE_FROM", whole_from),
        ):
            net(x)

    def before() -> None:
        net.dense(x)

    told = describe_run(torch.device("cpu"))
    print(
        f"{options.model}, {options.size}, {options.pattern}, random weights, {told['device']}, {told['commit']}\n"
    )
    if options.choice:
        print("| density | whole maps, ms | chosen positions, ms |\n|---|---|---|")
        for density in options.densities:
            both = {"whole": partial(at, density, 0.0), "chosen": partial(at, density, 2.0)}
            taken = interleaved(both, options.rounds, clock=time.process_time)
            print(f"| {density} | {taken['whole'].best:.0f} | {taken['chosen'].best:.0f} |", flush=True)
        return
    times = interleaved(
        {"before": before, **{str(density): partial(at, density) for density in asked}},
        options.rounds,
        clock=time.process_time,
    )
    macs = {}
    for density in asked:
        with mock.patch.object(run, "scores", forced[density]):
            macs[density] = net.macs(x)
    low, high = (times[str(d)].best for d in (0.0, 1.0))
    least, most = (macs[d].total for d in (0.0, 1.0))
    print(f"before: {times['before'].best:.0f} ms\n")
    print("| density | MACs | of dense | CPU ms | line | of line |\n|---|---|---|---|---|---|")
    rows = []
    for density in asked:
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
            **told,
            "before": times["before"].best,
            "rows": rows,
            "options": {**vars(options), "output": ""},
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
