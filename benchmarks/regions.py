"""Measure networks in boxes of the picture: the share of the work and of the time of the whole picture.

    python -m benchmarks.regions --rounds 3

Networks with random weights, as given (`mask="all"` under floors) and as inference copies; a box in the middle of the
picture has so large a share of it. Calls in its boxes and of the whole picture are timed in turns. *Error* is the
largest difference in the box relative to the largest value of the whole call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.segmentation import fcn_resnet50

import cadsurgery as cs
from benchmarks import large_pictures, networks
from cadsurgery.support.provenance import setting
from cadsurgery.timing import interleaved

SHARES = (0.01, 0.05, 0.1, 0.25)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the side of the picture
    "unet_16": (partial(networks.UNet, 16), 1024),
    "unet_64": (partial(networks.UNet, 64), 2048),
    "fcn_resnet50": (
        lambda: large_pictures.Returned(fcn_resnet50(weights=None, weights_backbone=None), "out"),
        2048,
    ),
    "deeplabv3_resnet101": (large_pictures.NETWORKS["deeplabv3_resnet101"], 2048),
}


def box_in_the_middle(side: int, share: float) -> Tensor:
    """Return a box (1, 4) with a share of a picture of a side."""
    length = max(1, round(side * share**0.5))
    first = (side - length) // 2
    return torch.tensor([[first, first, first + length, first + length]])


@torch.no_grad()
def measured(name: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a network: its boxes and the whole picture, timed in turns."""
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    model, image = make().eval(), torch.randn(1, 3, side, side)
    net = cs.adaptify(model, "all", coarsest=32, example_input=image[:, :, :256, :256], verify_laws=False)
    fast, boxes = net.optimize(), {share: [box_in_the_middle(side, share)] for share in SHARES}
    whole, errors = fast(image), {}
    for share, box in boxes.items():
        ((part,),) = cs.read_within(fast, image, box)
        left, top, right, bottom = box[0][0].tolist()
        errors[share] = float((part - whole[:, :, top:bottom, left:right]).abs().max() / whole.abs().max())
    del part, whole
    calls: dict[str, Callable[[], object]] = {"whole": lambda: fast(image)}
    calls |= {f"{share}": partial(cs.read_within, fast, image, box) for share, box in boxes.items()}
    times = {call: timing.best / 1e3 for call, timing in interleaved(calls, rounds).items()}
    rows = []
    for share, box in boxes.items():
        macs, time = fast.macs(image, within=box).of_whole, times[f"{share}"] / times["whole"]
        rows.append(
            {
                "network": name,
                "side": side,
                "share": share,
                "of_macs": macs,
                "seconds": {"box": times[f"{share}"], "whole": times["whole"]},
                "of_time": time,
                "time_of_macs": time / macs,
                "error": errors[share],
            }
        )
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(setting(torch.device("cpu")))
    for name in NETWORKS:
        for row in measured(name, asked.rounds):
            print(
                f"{name:20} {row['side']:5} px, box of {row['share']:.0%}: {row['of_macs']:.3f} of the MACs, "
                f"{row['of_time']:.3f} of the time ({row['time_of_macs']:.2f} of the share of MACs), "
                f"error {row['error']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
