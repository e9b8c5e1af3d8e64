"""Files that releases wrote: today's loader reads them, and what they compute is what the release computed.

`tests/data/of_0_2_0` was written by version 0.2.0 (commit d9365690, torch 2.14.1, without compiled kernels).
`outputs.safetensors` has the images in 8 bits and what each network gave then.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import cadsurgery as cs
from cadsurgery.network.storage import read_metadata

FOLDER = ROOT / "tests" / "data" / "of_0_2_0"


def strided() -> nn.Module:
    """A classifier's trunk: batch norm, a pooling, a grouped convolution."""
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    second = [nn.Conv2d(8, 8, 3, 2, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Conv2d(12, 5, 1))


class Dilated(nn.Module):
    """A segmentation network with a dilated branch, a head and a resize to the image; it returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
        self.stem = nn.Sequential(*first, nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        wide = nn.Conv2d(8, 8, 3, 1, 4, dilation=4)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 2, dilation=2), nn.ReLU(), wide)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        y = self.head(torch.relu(y + self.body(y)))
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


MAKE: dict[str, Callable[[], nn.Module]] = {"strided": strided, "dilated": Dilated, "own_mask": strided}


@pytest.mark.parametrize("name", MAKE)
def test_a_file_of_a_release_loads_and_computes_what_it_did(name: str) -> None:
    path, known = FOLDER / f"{name}.safetensors", load_file(FOLDER / "outputs.safetensors")
    assert read_metadata(path)["versions"]["cadsurgery"] == "0.2.0"
    net = cs.load(path, MAKE[name]().eval())
    found = net(known["image"] / 255)
    scores = found["out"][..., ::4, ::4] if isinstance(found, dict) else found
    torch.testing.assert_close(scores, known[name])
    assert net.macs(known["image"] / 255).of_given != 1


def test_every_file_of_a_release_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {*MAKE, "outputs"}
