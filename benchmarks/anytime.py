"""Does time follow work where exits are confident? Random weights, masks that leave a share of the positions
undecided.

    python benchmarks/anytime.py [MODEL] [--size 512x1024] [--left 0.5 0.3] [--pattern areas] [--gaps gaussian]
        [--rounds 3] [--output results.json]

MODEL: a name of torchvision or timm; `w18` or `w48`, the networks of recipes/anytime_hrnet; or `mobilenetv2`, that of
recipes/camvid_mobilenetv2. The confidence of exits is computed as usual, which is part of the time, but a given share
of the positions is left undecided: areas (smooth noise above a quantile) or scattered positions. CPU time of the
optimised copy, all shares in turn, best round, relative to the same copy with everything computed. `realised`: the
saving in time relative to the saving in MACs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.images import normalise, street_scene

sys.path.insert(0, str(Path(__file__).parents[1]))

import cadsurgery as cs
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved
from recipes.anytime_hrnet import recipe
from recipes.camvid_mobilenetv2.network import Segmenter

AREA = 16  # grid points of the smooth noise along the shorter axis


def build(name: str, gaps: Any) -> cs.AnytimeModel:
    """Build a network with exits and random weights."""
    if name in ("w18", "w48"):
        net = recipe.build(name)  # type: ignore[arg-type]
        if gaps != "gaussian":
            raise SystemExit("the published networks fill with the Gaussian")
        return net
    exits: Any = "auto"
    if name == "mobilenetv2":
        model, exits = Segmenter().eval(), [f"backbone.blocks.{number}" for number in (2, 4, 5)]
    else:
        model = cs.build_model(name, "none").eval()
    return cs.anytime(model, exits, fill=gaps)


def noise(height: int, width: int, pattern: str) -> Tensor:
    """Draw noise (1, 1, H, W) in 0..1, smooth or independent for each position."""
    generator = torch.Generator().manual_seed(0)
    if pattern == "scattered":
        return torch.rand((1, 1, height, width), generator=generator)
    coarse = torch.rand((1, 1, AREA, max(2, AREA * width // height)), generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)


def leave(net: cs.AnytimeModel, share: float, field: Tensor) -> None:
    """Make all exits leave a share of the positions undecided; their confidence is still computed."""
    undecided_mask = type(net).undecided_mask

    def leave_share(logits: Tensor, *args: Any) -> Tensor:
        undecided_mask(net, logits, *args)
        values = F.interpolate(field, logits.shape[2:])[:, 0]
        return values > values.quantile(1 - share)

    net.undecided_mask = leave_share  # type: ignore[method-assign]


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="fcn_resnet50")
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--left", nargs="*", type=float, default=[0.7, 0.5, 0.3, 0.1])
    parser.add_argument("--pattern", default="areas", choices=("areas", "scattered"))
    parser.add_argument("--gaps", default="gaussian", choices=("gaussian", "interpolated", "zeros"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    torch.manual_seed(0)
    net = build(options.model, options.gaps).optimize()
    x = normalise(street_scene(height, width), None)[None].contiguous(memory_format=torch.channels_last)
    field = noise(height, width, options.pattern)

    def at(share: float) -> None:
        leave(net, share, field)
        net.logits(x, threshold=1.0 if share == 1 else 0.5)

    shares = [1.0, *options.left]
    times = interleaved(
        {str(share): partial(at, share) for share in shares}, options.rounds, clock=time.process_time
    )
    details = describe_run(torch.device("cpu"))
    named = f"{options.model}, {options.size}, {options.pattern}, {options.gaps}, random weights"
    print(f"{named}, {details['device']}, commit {details['commit']}\n")
    print("| left | MACs | CPU ms | of whole | realised |\n|---|---|---|---|---|")
    whole, rows = times["1.0"].best, []
    for share in shares:
        leave(net, share, field)
        counted = net.macs(x, threshold=1.0 if share == 1 else 0.5)[-1]
        macs, taken = counted.macs / counted.dense, times[str(share)].best
        realised = (1 - taken / whole) / (1 - macs) if macs < 1 else None
        rows.append({"left": share, "macs": macs, "ms": taken, "realised": realised})
        ratio = "" if realised is None else f"{realised:.2f}"
        print(f"| {share:g} | {macs:.3f} | {taken:.0f} | {taken / whole:.2f} | {ratio} |")
    if options.output:
        report = {**details, "options": {**vars(options), "output": ""}, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
