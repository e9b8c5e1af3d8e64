"""Networks whose picture is mostly empty: time with floors against the straight line between the extremes.

    python -m benchmarks.floor_speed [--networks unet resnet50_pyramid] [--size 512] [--coarsest 16 32]

The kept cells form clusters, as content does. *Line* is the time divided by that of the straight line between the
network as given (torch, channels_last, batch norm folded) and everything at the floor. Weights are random, which times
do not depend on.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import cadsurgery as cs
from benchmarks import networks
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

SHARES = (0.1, 0.3, 0.6)


def clustered(share: float, size: int, cell: int) -> Tensor:
    """Return a bool map (1, size, size) that keeps a share of the cells, in a few clusters."""
    torch.manual_seed(0)
    heights = F.interpolate(torch.rand(1, 1, 4, 4), size=(size // cell,) * 2, mode="bicubic")[:, 0]
    limit = heights.flatten().sort().values[int((1 - share) * heights.numel())]
    return (heights >= limit).repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def main() -> None:
    """Print a row for each floor and share."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["unet"], help="functions of benchmarks.networks")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--coarsest", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(describe_run(torch.device("cpu")))
    image = torch.rand(1, 3, options.size, options.size).contiguous(memory_format=torch.channels_last)
    for name in options.networks:
        for cell in options.coarsest:
            measure(name, cell, image, options.rounds)


def measure(name: str, cell: int, image: Tensor, rounds: int) -> None:
    """Print the rows of a network and a floor."""
    net = cs.adaptify(getattr(networks, name)().eval(), "none", coarsest=cell, verify_laws=False)
    fast, given = net.optimize(), dense_twin(net, 0, image)
    masks: dict[str, tuple[float, object]] = {"all": (1.0, "all"), "none": (0.0, "none")}
    masks |= {f"{share} high": (share, clustered(share, image.shape[2], cell)) for share in SHARES}
    runs = {key: partial(fast, image, mask=mask) for key, (_, mask) in masks.items()}
    timings = interleaved({"given": partial(given, image), **runs}, rounds)
    times = {key: timing.best for key, timing in timings.items()}
    print(f"{name}, floor {cell}: as given {times['given']:.1f} ms")
    for key, (share, mask) in masks.items():
        line = times["none"] + share * (times["given"] - times["none"])
        work, ratio = net.macs(image, mask=mask).of_given, times[key] / times["given"]
        print(f"  {key:9} MACs {work:5.2f}  {times[key]:8.1f} ms", end="")
        print(f", {ratio:.2f} of given, {times[key] / line:.2f} of the line")


if __name__ == "__main__":
    main()
