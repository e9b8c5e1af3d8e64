"""Refinements: nothing far from what is downsampled, better where it was fitted, the same in every copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, random_levels, some
from networks import made_once, randomise, strided, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.elements.refinement import REACH, Refinement
from cadsurgery.finetune import fit_refinement
from cadsurgery.network.macs import layer_work
from cadsurgery.support.errors import InvalidInput


class Scores(nn.Module):
    """Class scores as they are, or brought to the size of the image."""

    def __init__(self, resized: bool, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(12, 12, 3, stride, 1), nn.BatchNorm2d(12), nn.ReLU())
        if stride == 1:  # as networks that were dilated for segmentation
            self.body.append(nn.Conv2d(12, 12, 3, 1, 2, 2))
        self.last = nn.Conv2d(12, 5, 1)
        self.resized = resized

    def forward(self, image: Tensor) -> Tensor:
        scores = self.last(self.body(self.stem(image)))
        if not self.resized:
            return scores
        return F.interpolate(scores, size=image.shape[-2:], mode="bilinear", align_corners=False)


class TwoHeads(Scores):
    """Two maps, by name."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.body(self.stem(image))
        return {"out": self.last(x), "features": x}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fine": lambda: Scores(False),
    "resized": lambda: Scores(True),
    "resized from the fine size": lambda: Scores(True, stride=1),
    "two heads": lambda: TwoHeads(False),
}
TYPES = (torch.float32, torch.float64)


@made_once
def convert(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> cs.AdaptiveModel:
    model = randomise(NETWORKS[name]()).to(dtype)
    strides = (4, 8) if name == "resized from the fine size" else (2, 8)
    options = {"output_stride": strides, "outputs": "fine", **options}
    return unverified(model, "edges", example_input=images(1, 64, 96, dtype), **options)


def learn(net: cs.AdaptiveModel) -> cs.AdaptiveModel:
    """With refinements that add something."""
    for part in net.add_refinement(8).modules():
        if isinstance(part, Refinement):
            nn.init.normal_(part.missing.weight)
    return net


def leaves(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def levels_of(net: cs.AdaptiveModel, image: Tensor) -> Tensor:
    net(image, mask="none")
    return random_levels(len(image), tuple(net.levels.shape[1:]), (2,) * net.plan.max_level)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), covering(list(NETWORKS), TYPES))
@torch.no_grad()
def test_nothing_changes_but_near_what_is_downsampled(name: str, dtype: torch.dtype) -> None:
    net, image = convert(name, dtype), images(2, 71, 93, dtype)
    levels = levels_of(net, image)
    levels[0, :, 12:] = 0
    masks: tuple[Any, ...] = ("all", "none", levels)
    before, state = [leaves(net(image, mask=mask)) for mask in masks], copy.deepcopy(net.state_dict())
    adapters = net.add_refinement(8)
    assert len(adapters) == len(before[0])
    for mask, outputs in zip(masks, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(leaves(net(image, mask=mask)), outputs, strict=True))
    learn(net)
    after = [leaves(net(image, mask=mask)) for mask in masks]
    assert all(torch.equal(*pair) for pair in zip(after[0], before[0], strict=True))
    low = F.max_pool2d((net.levels > 0).to(dtype), 2 * REACH + 1, 1, REACH) > 0
    assert not low.all() and list(net.state_dict()) == list(state)
    for refined, plain in zip(after[2], before[2], strict=True):
        assert not torch.equal(refined, plain)
        if refined.shape[2:] == low.shape[1:]:
            far = ~low[:, None].expand_as(refined)
            assert torch.equal(refined[far], plain[far])


@pytest.mark.parametrize("name", some(list(NETWORKS)))
@torch.no_grad()
def test_every_copy_gives_the_same(name: str, tmp_path: Path) -> None:
    net, image = learn(convert(name)), images(2, 67, 81)
    with pytest.raises(InvalidInput, match="has no map that could be refined"):
        net.optimize().add_refinement()
    cs.save(net, tmp_path / "net.safetensors")
    loaded = cs.load(tmp_path / "net.safetensors", NETWORKS[name]())
    for mask in ("none", levels_of(net, image)):
        expected = leaves(net(image, mask=mask))
        for other in (loaded, copy.deepcopy(net)):
            assert all(
                torch.equal(*pair) for pair in zip(leaves(other(image, mask=mask)), expected, strict=True)
            )
        assert_same(leaves(net.optimize()(image, mask=mask)), expected)


def test_its_work_counts_where_it_is_done() -> None:
    net, image = convert("fine"), images(1, 64, 80)
    before = {mask: net.macs(image, mask=mask).mask for mask in ("all", "none")}
    learn(net)
    positions = 32 * 40
    per_position = 8 * (8 + 5 + 2) + 8 * 9 + 8 * 8 + 8 * 9 + 5 * 8
    assert net.macs(image, mask="all").mask == before["all"]
    assert net.macs(image, mask="none").mask == before["none"] + positions * per_position
    layers = layer_work(net, image)
    assert layers is not None
    for mask in ("all", "none", "random:seed=1"):
        report = net.macs(image, mask=mask)
        net(image, mask=mask)
        assert sum(layer.on(net.lattice) for layer in layers) == report.mask


class Photos:
    """Street scenes of several sizes, without labels."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return street_scene(64 + index % 2, 80, seed=index)


@pytest.mark.slow
def test_fitting_brings_it_nearer_to_full_resolution_and_is_the_same_twice() -> None:
    fits, nets = [], []
    for _ in range(2):
        torch.manual_seed(0)
        net = convert("fine")
        fits.append(fit_refinement(net, Photos(), steps=60, seed=3))
        nets.append(net)
    one, two = fits
    assert one.is_better and one.after < one.before and one.images == 12 and one.held_out == 2
    assert (one.before, one.after) == (two.before, two.after)
    image = street_scene(96, 112, seed=9)[None]
    with torch.no_grad():
        assert torch.equal(nets[0](image, mask="none"), nets[1](image, mask="none"))
        high = nets[0](image, mask="all")
        plain = convert("fine")
        plain.load_state_dict(nets[0].state_dict())
        assert torch.equal(high, plain(image, mask="all"))
    assert cs.finetune.RefinementFit(**one.to_dict()) == one


@pytest.mark.slow
def test_what_does_not_become_better_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cadsurgery.finetune.adapter_fitting._RATE", 50.0)
    net, image = convert("fine"), images(1, 64, 80)
    before = net(image, mask="none")
    assert not fit_refinement(net, Photos(), steps=5).is_better
    assert torch.equal(net(image, mask="none"), before)


def test_what_cannot_be_refined_is_refused() -> None:
    vector = nn.Sequential(*strided(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # no map
    with pytest.raises(InvalidInput, match="has no map that could be refined"):
        unverified(vector, "edges", example_input=images(1, 64, 96)).add_refinement()
    with pytest.raises(InvalidInput, match="nothing to fit"):
        fit_refinement(convert("fine"), Photos(), steps=0)
    with pytest.raises(InvalidInput, match="has no refinement that could be fitted"):
        fit_refinement(nn.Identity(), Photos())  # type: ignore[arg-type]
