"""The cost of level adapters: optimised networks with and without adapters, interleaved in one run.

    python benchmarks/adapter_cost.py [--size 512 1024] [--fraction 0.34] [--rounds 9] [--threads 1]

Random weights, adapters with random values; float32, `detail` under a budget. The table has the best round of each,
and the ratio.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cadsurgery as cs  # noqa: E402
from cadsurgery.data.networks import build_model  # noqa: E402
from cadsurgery.support.provenance import setting  # noqa: E402
from cadsurgery.support.timing import interleaved  # noqa: E402
from cadsurgery.tasks.open import example_batch  # noqa: E402

NETWORKS = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:convnext_tiny")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024))
    parser.add_argument("--fraction", type=float, default=0.34)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{setting(torch.device('cpu'))}, {options.size[0]}x{options.size[1]}, fraction {options.fraction:g}\n"
    )
    print("| network | adapters | without, ms | with, ms | ratio | of medians |\n|---|---|---|---|---|---|")
    for name in options.networks:
        model = build_model(name, "none").eval()
        mask = f"detail | budget:fraction={options.fraction}"
        net = cs.adaptify(model, mask, output_stride=(8, 32), verify_laws=False)
        x = example_batch(None, size=tuple(options.size))
        plain = net.optimize()
        with torch.no_grad():
            for value in net.add_adapters().parameters():
                value.normal_(0.0, 0.1)
        adapted = net.optimize()
        sides = {
            "without": partial(plain, x),
            "with": partial(adapted, x),
        }
        times = interleaved(sides, options.rounds, warmup=2)
        best = [times[side].best for side in sides]
        ratios = best[1] / best[0], times["with"].median / times["without"].median
        count = len(net.adapters or ())
        figures = f"{best[0]:.0f} | {best[1]:.0f} | {ratios[0]:.3f} | {ratios[1]:.3f}"
        print(f"| {name.partition(':')[2]} | {count} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
