"""Does time follow work where exits are confident? Random weights, thresholds by which more and more is.

    python benchmarks/anytime.py [MODEL] [--size 256x512] [--thresholds 0.99 0.9 0.8 0.6] [--rounds 2]

Class scores are scaled so that some positions are confident. CPU time of the optimised copy, the best round, against
the same with everything computed; `realised`: what the time falls by, of what MACs fall by.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from cadsurgery.images import normalise, street_scene

import cadsurgery as cs
from cadsurgery.support.provenance import describe_run

SPREAD = 4.0  # standard deviation of class scores


def cpu_seconds(net: cs.AnytimeModel, x: torch.Tensor, threshold: float, rounds: int) -> float:
    """Of a call, the best of several after one more."""
    taken = []
    for _ in range(rounds + 1):
        start = time.process_time()
        net.logits(x, threshold=threshold)
        taken.append(time.process_time() - start)
    return min(taken[1:])


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="fcn_resnet50")
    parser.add_argument("--size", default="256x512")
    parser.add_argument("--thresholds", nargs="*", type=float, default=[0.99, 0.9, 0.8, 0.6])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    torch.manual_seed(0)
    net = cs.anytime(cs.build_model(options.model, "none"))
    x = normalise(street_scene(height, width), None)[None]
    with torch.inference_mode():
        heads: list[Any] = [*(head[-1] for head in net.heads), net.classifier[-1]]  # type: ignore[union-attr,index]
        for layer, scores in zip(heads, net.logits(x, threshold=1.0), strict=True):
            std, mean = torch.std_mean(scores, (0, 2, 3))
            layer.weight *= (SPREAD / std)[:, None, None, None]
            layer.bias.copy_(-SPREAD * mean / std)
        fast = net.optimize()
        whole, work = cpu_seconds(fast, x, 1.0, options.rounds), net.macs(x.to("meta"))[-1].dense
        told = describe_run(torch.device("cpu"))
        print(f"{options.model}, {options.size}, random weights, {told['device']}, commit {told['commit']}\n")
        print("| threshold | MACs | CPU ms | of whole | realised |\n|---|---|---|---|---|")
        print(f"| all computed | 1.000 | {1e3 * whole:.0f} | 1.00 | |")
        for threshold in options.thresholds:
            taken = cpu_seconds(fast, x, threshold, options.rounds) / whole
            macs = net.macs(x, threshold=threshold)[-1].macs / work
            realised = f"{(1 - taken) / (1 - macs):.2f}" if macs < 1 else ""
            print(f"| {threshold:g} | {macs:.3f} | {1e3 * taken * whole:.0f} | {taken:.2f} | {realised} |")


if __name__ == "__main__":
    main()
