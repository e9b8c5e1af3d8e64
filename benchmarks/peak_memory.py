"""Peak memory of an adaptive ResNet-101 trunk against its dense twin at output stride 8.

    python benchmarks/peak_memory.py [--size 1024 2048] [--json]

Each side runs in a process of its own; the figure is how far one forward pass raises the peak of the
resident set above what it was with the network and the image in memory. Random weights, float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models import resnet101

import cadsurgery as cs

SIDES = {
    "dense OS 8": None,
    "adaptive, everything high": {"mask": "all"},
    "adaptive, blocks .29 high, linear": {"mask": "random:fraction=0.29,seed=0", "patch": "block"},
    "adaptive, blocks .29 high, nearest": {
        "mask": "random:fraction=0.29,seed=0",
        "patch": "block",
        "fill": "nearest",
    },
    "adaptive, everything low": {"mask": "none"},
}


def measure(name: str, size: tuple[int, int]) -> float:
    """MiB by which one forward pass raises the peak resident set of this process."""
    options = SIDES[name]
    model = resnet101(weights=None, replace_stride_with_dilation=[False, options is None, options is None])
    net: nn.Module = nn.Sequential(OrderedDict(list(model.named_children())[:-2])).eval()
    if options is not None:
        net = cs.adaptify(net, **options, output_stride=(8, 32), verify_laws=False)
    net.to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, *size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        net(x[:, :, :64, :64])  # what the libraries allocate once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        net(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.side:
        print(measure(options.side, tuple(options.size)))
        return
    found = {}
    for name in SIDES:
        command = [sys.executable, __file__, "--side", name, "--size", *map(str, options.size)]
        found[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if options.json:
        print(json.dumps(found))
        return
    print(f"ResNet-101 trunk, {options.size[0]}x{options.size[1]}, float32, torch {torch.__version__}")
    for name, size in found.items():
        print(f"{name:36} {size:7.0f} MiB   {size / found['dense OS 8']:.2f} of dense OS 8")


if __name__ == "__main__":
    main()
