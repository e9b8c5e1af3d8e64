"""Time of an adaptive ResNet-50 backbone under a budget: eager, eager with static shapes, compiled; interleaved.

    python benchmarks/compiled_speed.py [--size 256 512] [--fraction 0.34] [--fill nearest linear] [--rounds 7] [--json]

All sides are float32, channels_last, with batch norm folded; random weights and a random image. Each round runs every
side once, in turn; the best round counts, because other processes can only increase the time.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import resnet50

import cadsurgery as cs
from cadsurgery.masks.masking import Masking
from cadsurgery.support.provenance import setting
from cadsurgery.support.timing import interleaved


def backbone() -> nn.Module:
    """Build ResNet-50 without head, batch norm folded, channels_last."""
    torch.manual_seed(0)
    model = resnet50(weights=None)
    trunk = nn.Sequential(OrderedDict(list(model.named_children())[:-2])).eval()
    return fuse(trunk).to(memory_format=torch.channels_last)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512))
    parser.add_argument("--fraction", type=float, default=0.34)
    parser.add_argument("--fill", nargs="+", default=("nearest", "linear"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mode", default="default", help="mode of torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    x = torch.randn(1, 3, *options.size, device=options.device).to(memory_format=torch.channels_last)
    sides: dict[str, Callable[[], Any]] = {}
    for fill in options.fill:
        mask = cs.Budget("edges", options.fraction)
        net = cs.adaptify(backbone(), mask, output_stride=(8, 32), fill=fill, verify_laws=False)
        net.to(options.device)
        static = Masking(net.mask, net.geometry, net.plan.strides[0], static=True)
        sides[f"eager {fill}"] = lambda net=net: net(x)
        sides[f"static {fill}"] = lambda net=net, static=static: net.run(static, x)
        fast = torch.compile(net, mode=options.mode, fullgraph=True)
        sides[f"compiled {fill}"] = lambda fast=fast: fast(x)
    best = {name: time.best for name, time in interleaved(sides, options.rounds, warmup=3).items()}
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "ms": best}))
        return
    height, width = options.size
    print(setting(x.device))
    print(f"ResNet-50 backbone, {height}x{width}, fraction {options.fraction}")
    for name, milliseconds in best.items():
        eager = best[f"eager {name.split()[1]}"]
        print(f"{name:20} {milliseconds:8.1f} ms   {eager / milliseconds:5.2f}x eager")


if __name__ == "__main__":
    main()
