"""Tuning by photos without labels: the network stays, the folder goes on, the budget keeps what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, images
from torch import Tensor, nn
from torchvision.utils import save_image

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.finetune import gain as module_of_gain
from cadsurgery.finetune import tuning as module
from cadsurgery.finetune.tuning import tune
from cadsurgery.masks import resolve_mask

SOURCE = """
import torch
from torch import nn

def tiny() -> nn.Module:
    torch.manual_seed(0)
    widths = (3, 8, 12, 12)
    layers = [
        layer
        for before, after, stride in zip(widths, widths[1:], (2, 2, 1))
        for layer in (nn.Conv2d(before, after, 3, stride, 1), nn.ReLU())
    ]
    head = nn.Conv2d(12, 4, 1, bias=False)
    nn.init.normal_(head.weight, std=10.0)  # that classes differ from pixel to pixel
    return nn.Sequential(*layers, head).eval()
"""
ARGUMENTS = (
    "tune",
    "usernets:tiny",
    "--images",
    "photos",
    "--steps",
    "2",
    "--minutes",
    "0.2",
    "--rounds",
    "1",
)


@pytest.fixture
def run(command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module_of_gain, "STEPS", 50)  # no law here is about how well it is fitted
    (tmp_path / "usernets.py").write_text(SOURCE)
    (tmp_path / "photos").mkdir()
    for place in range(10):
        picture = street_scene(64 + place % 2, 80, seed=place)
        save_image(picture, tmp_path / "photos" / f"{place}.png")
    return command_line


def test_one_command_gives_a_network_that_keeps_what_was_asked_for(run: Run, tmp_path: Path) -> None:
    result = run(*ARGUMENTS, "-o", "run", "--keep", "0.9", "--json")
    assert result.code == 0, result
    report = result.json
    rows = {row["mask"]: row for row in report["evaluation"]["rows"] if not row["anchor"]}
    assert len(rows) == 12 and report["evaluation"]["images"] == 2 and report["steps"] == 2
    enough = [row for row in rows.values() if row["pixel_accuracy"] >= 0.9]
    assert report["is_kept"] == bool(enough)
    assert rows[report["chosen"]]["macs"] == min(row["macs"] for row in enough)
    net = cs.load(tmp_path / "run" / "net.safetensors", trust=True)
    assert net.mask.spec() == resolve_mask(report["chosen"]).spec() and net.adapters is not None
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    image = images(1, 64, 80)
    from usernets import tiny  # type: ignore[import-not-found]

    original = cs.adaptify(tiny(), "all", verify_laws=False)
    assert torch.equal(net(image, mask="all"), original(image))


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_gives_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_gain", stop)
        assert run(*ARGUMENTS, "-o", "parted").code == 130
        patch.setattr(module, "calibrate_adapters", stop)  # nothing is done twice
        patch.setattr(module, "fit", stop)
        patch.setattr(module, "fit_gain", cs.finetune.fit_gain)
        parted = run(*ARGUMENTS, "-o", "parted", "--json")
    whole = run(*ARGUMENTS, "-o", "whole", "--json")
    assert parted.code == whole.code == 0
    for name in ("chosen", "before", "after", "steps"):
        assert parted.json[name] == whole.json[name]
    files = [(tmp_path / folder / "net.safetensors").read_bytes() for folder in ("parted", "whole")]
    one, two = (cs.load(tmp_path / folder / "net.safetensors", trust=True) for folder in ("parted", "whole"))
    assert len(files[0]) == len(files[1])
    image = images(2, 64, 80)
    assert torch.equal(one(image), two(image))
    for changed in ("--seed", "--steps"):
        refused = run(*ARGUMENTS, "-o", "parted", changed, "1", "--json")
        assert refused.code == 1 and "holds another run" in refused.json["what"]


@pytest.mark.slow
def test_what_no_budget_keeps_is_said(run: Run) -> None:
    result = run(*ARGUMENTS, "-o", "run", "--keep", "1", "--fractions", "0.1")
    assert (
        result.code == 0
        and "no budget keeps 100.00 %" in result.out
        and "wrote run/net.safetensors" in result.out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "minutes above 0"),
        ({"keep": 1.5}, "keep in 0..1"),
        ({"fractions": (0.0,)}, "budgets between 0 and 1"),
        ({"fractions": ()}, "budgets between 0 and 1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    net = cs.adaptify(Small().eval(), "edges", verify_laws=False)
    with pytest.raises(cs.InvalidInput, match=message):
        tune(net, tmp_path, output=tmp_path / "run", **options)


def test_few_photos_and_broken_folders_are_refused(tmp_path: Path) -> None:
    net = cs.adaptify(Small().eval(), "edges", verify_laws=False)
    (tmp_path / "photos").mkdir()
    save_image(street_scene(64, 80), tmp_path / "photos" / "0.png")
    with pytest.raises(cs.InvalidInput, match="every 8th is held out"):
        tune(net, tmp_path / "photos", output=tmp_path / "run")
    for place in range(1, 10):
        save_image(street_scene(64, 80, seed=place), tmp_path / "photos" / f"{place}.png")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tune.json").write_text("{")
    with pytest.raises(cs.FileError, match=r"tune\.json cannot be read"):
        tune(net, tmp_path / "photos", output=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "calibrated.safetensors").write_bytes(b"no file")
    with pytest.raises(cs.FileError, match="does not fit the network"):
        tune(net, tmp_path / "photos", output=tmp_path / "other")


class Small(nn.Module):
    """A strided convolution in the region."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = (
            nn.Conv2d(3, 6, 3, 2, 1),
            nn.Conv2d(6, 8, 3, 2, 1),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.down(self.stem(image)))


def test_tuning_is_a_function_of_the_package() -> None:
    assert cs.finetune.tune is tune
