"""What tests of `cadsurgery run` share: how they call it, a small network in a file, and where a raster lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import unverified

import cadsurgery as cs
from cadsurgery.support.progress import silent
from cadsurgery.tasks import run
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.report import FilesReport

ZONE = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 25832)  # UTM zone 32N
# Tags of a TIFF file: metres a pixel, east and north of its corner.
NORTH_UP: list[Any] = [
    (33550, 12, 3, (0.2, 0.2, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 5.2e6, 0.0), True),
]


def predict(file: Path, images: Any, output: Any, **options: Any) -> FilesReport:
    """Run a file on an image or a list of some, in this process."""
    step = options.pop("step", silent)
    options = {"output": str(output), "workers": 1, "trust": True, **options}
    return run.predict(
        file, images if isinstance(images, list) else [images], RunOptions(**options), step=step
    )


def save_convolutions(folder: Path, monkeypatch: pytest.MonkeyPatch, channels: int, larger: int) -> Path:
    """Save two convolutions, whose output has a quarter of the picture's side unless it is enlarged; in this folder
    from then on."""
    monkeypatch.chdir(folder)
    (folder / "net.py").write_text(
        "import torch\nfrom torch import nn\ndef network():\n    torch.manual_seed(0)\n"
        f"    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, {channels}, 3, 2, 1),\n"
        f"        nn.Upsample(scale_factor={larger})).eval()\n"
    )
    net = unverified(
        cs.build_model("net.py:network"), "edges", coarsest=8, example_input=torch.rand(1, 3, 64, 64)
    )
    path = folder / f"net{channels}.safetensors"
    cs.save(net, path)
    return path
