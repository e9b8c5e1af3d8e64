"""Time of an optimised adaptive ResNet-50 backbone against torchvision's own dense networks, interleaved in one run.

    python benchmarks/cpu_speed.py [--size 512 1024] [--fractions 1 0.5 0.34 0.1 0] [--rounds 5] [--json]

All sides are float32, channels_last, with batch norm folded; random weights (times do not depend on them).
Each round runs every side once, in turn; the best round counts, because other processes can only increase the time.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import resnet50

import cadsurgery as cs
from cadsurgery.support.provenance import setting
from cadsurgery.support.timing import interleaved

BLOCK = 4  # side of a patch in fine pixels: R_K of the stages 8 -> 16 -> 32


def backbone(*dilated: bool) -> nn.Module:
    """Build ResNet-50 without head, batch norm folded, channels_last."""
    torch.manual_seed(0)
    model = resnet50(weights=None, replace_stride_with_dilation=list(dilated))
    trunk = nn.Sequential(OrderedDict(list(model.named_children())[:-2])).eval()
    return fuse(trunk).to(memory_format=torch.channels_last)


def block_levels(size: tuple[int, int], fraction: float) -> Tensor:
    """Draw levels (1, h, w): exactly the given share of 4x4 blocks at level 0, in random places, the rest at level
    2."""
    rows, columns = size[0] // (8 * BLOCK), size[1] // (8 * BLOCK)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    levels = torch.full((rows * columns,), 2)
    levels[order[: round(fraction * rows * columns)]] = 0
    levels = levels.view(1, rows, columns)
    return levels.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024))
    parser.add_argument("--fractions", type=float, nargs="+", default=(1.0, 0.5, 0.34, 0.1, 0.0))
    parser.add_argument("--fill", nargs="+", default=("nearest", "linear"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    size = tuple(options.size)
    x = torch.randn(1, 3, *size).to(memory_format=torch.channels_last)
    dense = {"dense OS 8": backbone(False, True, True), "dense OS 16": backbone(False, False, True)}
    dense["dense OS 32"] = trunk = backbone(False, False, False)
    sides: dict[str, Callable[[], object]] = {
        name: lambda model=model: model(x) for name, model in dense.items()
    }
    for fill in options.fill:
        net = cs.adaptify(trunk, output_stride=(8, 32), patch="block", fill=fill).optimize()
        for fraction in options.fractions:
            levels = block_levels(size, fraction)
            sides[f"adaptive {fraction:.2f} {fill}"] = lambda net=net, levels=levels: net(x, mask=levels)
    best = {name: time.best for name, time in interleaved(sides, options.rounds).items()}
    twin = best["dense OS 8"]
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "ms": best}))
        return
    print(setting(x.device))
    print(f"ResNet-50 backbone, {size[0]}x{size[1]}, float32, folded batch norm")
    for name, milliseconds in best.items():
        print(f"{name:24} {milliseconds:8.0f} ms   {twin / milliseconds:5.2f}x dense OS 8")


if __name__ == "__main__":
    main()
