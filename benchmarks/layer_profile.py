"""The time of an optimised network by kind of layer, against the fastest matrix product on this machine.

    python -m benchmarks.layer_profile [--model resnet50 ...] [--size 256x512] [--precision bfloat16] [--threads 1]

The rate of a kind is the MACs on the mask's elements divided by the time of its layers, which includes the norm,
activation and residual of a layer. The fastest product is torch.mm of 1024 x 1024 matrices.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import defaultdict

import torch
from torch import nn

import cadsurgery as cs
from benchmarks.slowest import layer_times
from cadsurgery.data.images import normalise, street_scene
from cadsurgery.support.provenance import describe_run

FRACTION = 0.34  # of the patches that are kept
MODELS = ("resnet50", "deeplabv3_resnet101", "mobilenet_v2", "convnext_tiny")


def fastest_product(size: int = 1024) -> float:
    """Return the GMAC/s of torch.mm."""
    a, b = torch.randn(2, size, size)
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        taken.append(time.perf_counter() - start)
    return size**3 / min(taken) / 1e9


def kind_of(module: nn.Module | None, layer: str) -> str:
    """Return the kind of a layer, for the table."""
    if isinstance(module, nn.Conv2d):
        side = "x".join(map(str, module.kernel_size))
        if module.groups == 1:
            return side
        return f"{side} depthwise" if module.groups == module.in_channels else f"{side} in groups"
    if isinstance(module, nn.Linear):
        return "1x1"
    return layer if layer.startswith("the mask") else "all else"


@torch.inference_mode()
def profile(name: str, size: tuple[int, int], precision: str) -> None:
    """Print the table of one network by kind of layer."""
    model = cs.build_model(name, "none")
    image = normalise(street_scene(*size), model.cad_source)[None]
    mask = f"edges:threshold=0.35,dilation=11 | budget:fraction={FRACTION}"
    net = cs.adaptify(model, mask, output_stride=(8, 32), verify_laws=False)
    dtype = getattr(torch, precision)
    fast, image = net.to(dtype).optimize(), image.to(dtype)
    for _ in range(3):
        fast(image)
    total, layers = layer_times(fast, lambda: fast(image), rounds=8)
    macs: dict[str, int] = defaultdict(int)
    decisions = {decision.node: decision for decision in net.plan.decisions}
    for layer in net.macs(image).layers:
        decision = decisions.get(layer.layer)
        macs[decision.path if decision is not None else layer.layer] += layer.mask
    modules = dict(model.named_modules())
    seconds: dict[str, float] = defaultdict(float)
    work: dict[str, int] = defaultdict(int)
    for layer, taken in layers.items():
        kind = kind_of(modules.get(layer), layer)
        seconds[kind] += taken
        work[kind] += macs.get(layer, 0)
    print(f"\n{name} in {precision}, {size[0]}x{size[1]}, fraction {FRACTION}: {total * 1e3:.1f} ms")
    print("| kind of layer | ms | of all | GMAC/s |\n|---|---|---|---|")
    for kind, taken in sorted(seconds.items(), key=lambda pair: -pair[1]):
        rate = f"{work[kind] / taken / 1e9:.1f}" if work[kind] else ""
        print(f"| {kind} | {taken * 1e3:.1f} | {taken / total:.0%} | {rate} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--size", default="256x512")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    height, width = map(int, args.size.split("x"))
    print(describe_run(torch.device("cpu")))
    print(f"fastest product of matrices: {fastest_product():.1f} GMAC/s with {args.threads} thread(s)")
    for name in args.model or MODELS:
        profile(name, (height, width), args.precision)


if __name__ == "__main__":
    main()
