"""Time of a training step of an adaptive ResNet-50 backbone against its dense twins, interleaved in one run.

    python benchmarks/training_speed.py [--size 256 512] [--batch 2] [--fraction 0.3] [--rounds 4] [--json]

Forward, a mean square as loss, backward; float32, channels_last, batch norm in training mode; random weights. Each
round runs every side once, in turn; the best round counts, because other processes can only increase the time.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

import cadsurgery as cs
from cadsurgery.support.provenance import setting
from cadsurgery.support.timing import interleaved


def backbone(*dilated: bool) -> nn.Module:
    """Build ResNet-50 without head, in training mode, channels_last."""
    torch.manual_seed(0)
    model = resnet50(weights=None, replace_stride_with_dilation=list(dilated))
    trunk = nn.Sequential(OrderedDict(list(model.named_children())[:-2]))
    return trunk.train().to(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor, **options: object) -> None:
    """Run forward and backward."""
    with torch.inference_mode(False), torch.enable_grad():
        model.zero_grad(set_to_none=True)
        model(x, **options).square().mean().backward()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    x = torch.randn(options.batch, 3, *options.size).to(memory_format=torch.channels_last)
    high, low = backbone(False, True, True), backbone(False, False, False)
    sides = {"dense OS 8": lambda: step(high, x), "dense OS 32": lambda: step(low, x)}
    for fill in ("nearest", "linear"):
        mask = cs.Budget("random:seed=0", options.fraction)
        net = cs.adaptify(low, mask, output_stride=(8, 32), fill=fill, verify_laws=False).train()
        sides[f"adaptive {options.fraction:g} {fill}"] = lambda net=net: step(net, x)
        sides[f"everything high {fill}"] = lambda net=net: step(net, x, mask="all")
    best = {name: time.best for name, time in interleaved(sides, options.rounds).items()}
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "ms": best}))
        return
    print(setting(x.device))
    print(f"ResNet-50 backbone, {options.batch} images of {options.size[0]}x{options.size[1]}, float32")
    for name, milliseconds in best.items():
        print(f"{name:24} {milliseconds:8.0f} ms   {best['dense OS 8'] / milliseconds:5.2f}x dense OS 8")


if __name__ == "__main__":
    main()
