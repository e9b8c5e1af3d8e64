"""Compare this package's counter of multiply-accumulates with torch's on the networks of the zoo.

    python benchmarks/counter.py [PATTERN]

Prints the networks whose counts differ, and how many were compared. timm networks are built on the meta device.
"""

from __future__ import annotations

import sys
import warnings
from fnmatch import fnmatch

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cadsurgery.support.counting import MacCounter
from cadsurgery.tasks.recorded import Row, recorded


def build(row: Row) -> tuple[nn.Module, Tensor]:
    """Return a network of the zoo, with random weights or on the meta device, and an input."""
    name, of_timm = row["model"], row["family"].startswith("timm")
    if of_timm:
        with torch.device("meta"):
            return timm.create_model(name).eval(), torch.empty(1, *row["image"][1:])
    try:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    except TypeError:
        model = torchvision.models.get_model(name, weights=None).eval()
    return model, torch.rand(1, 3, 224, 224)


def count(model: nn.Module, x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Return the multiply-accumulates counted by the package and by torch, and operations without a rule."""
    with torch.no_grad(), MacCounter() as ours:
        model(x)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        model(x)
    return ours.macs, theirs.get_total_flops() // 2, dict(ours.not_counted)


def main(pattern: str = "*") -> None:
    """Print the differences."""
    warnings.simplefilter("ignore")
    compared = equal = 0
    for row in recorded().values():
        if not fnmatch(row["model"], pattern) or row["result"] != "converts":
            continue
        ours, theirs, unknown = count(*build(row))
        compared, equal = compared + 1, equal + (ours == theirs)
        if ours != theirs or unknown:
            print(f"{row['model']}: {ours:,} here, {theirs:,} by torch, not counted: {unknown or 'nothing'}")
    print(f"{equal} of {compared} networks have the same count")


if __name__ == "__main__":
    main(*sys.argv[1:])
