"""Laws of networks that torch.fx cannot follow whole: their backbone is adaptive, everything else is theirs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_same, slow, thorough
from networks import build, randomise, strided
from subjects import adaptive_detector
from subjects import detector as detector_of_subjects
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import cadsurgery as cs

DETECTORS = [
    *("retinanet", thorough("ssdlite320_mobilenet_v3_large"), thorough("fasterrcnn_resnet50_fpn")),
    *(thorough("retinanet_resnet50_fpn"), thorough("fcos_resnet50_fpn"), thorough("maskrcnn_resnet50_fpn")),
    *(thorough("keypointrcnn_resnet50_fpn"), thorough("ssd300_vgg16")),
]


def detector(name: str) -> nn.Module:
    """With random weights, for small images, and thresholds that let detections through."""
    if name == "retinanet":
        return retinanet()
    options: dict[str, Any] = {} if "ssd" in name else {"min_size": 128, "max_size": 192}
    options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0
    return randomise(torchvision.models.get_model(name, weights=None, weights_backbone=None, **options))


def retinanet() -> nn.Module:
    """On a narrow ResNet-18 and for few classes, for what holds for any detector."""
    backbone = BackboneWithFPN(
        build("resnet18", by=8),
        {f"layer{number}": str(number) for number in (2, 3, 4)},
        [16, 32, 64],
        32,
        LastLevelP6P7(32, 32),
    )
    return randomise(RetinaNet(backbone, num_classes=5, min_size=64, max_size=96, score_thresh=0.0))


def pictures() -> list[Tensor]:
    return [torch.rand(3, 128, 160), torch.rand(3, 150, 131)]


def run(model: nn.Module, *args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return model(*args, **kwargs)


def assert_same_detections(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() and len(theirs["boxes"]) > 0
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_converts_in_one_call_and_detects_the_same_at_none(name: str) -> None:
    """Law 1: at the network's own resolution it is the original, detection for detection."""
    model, images = detector(name), pictures()
    expected, before = run(model, images), copy.deepcopy(model.state_dict())
    net = cs.adaptify(model, "none")
    assert_same_detections(run(net, images), expected)
    assert net.plan.part == "backbone" and net.active_fraction == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert net.state_dict().keys() == before.keys()
    assert [check.passed for check in net.checks] and all(check.passed for check in net.checks)
    every = {d.leaves for d in net.plan.decisions if d.leaves}
    assert every == {"native"}  # the heads rely on the sizes


def features(net: cs.AdaptiveModel, mask: object) -> Tensor:
    x = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net.get_submodule("backbone")(x, mask=mask)


@pytest.mark.slow
def test_uniform_maps_through_the_engine_are_the_graph_as_it_is() -> None:
    hosted = adaptive_detector()
    lowest = torch.full((2, 48, 64), hosted.plan.max_level)
    assert_same(features(hosted, lowest), features(hosted, "none"), 1e-4)


@pytest.mark.slow
def test_a_mask_for_one_call_and_what_the_call_tells() -> None:
    hosted, images = adaptive_detector(), pictures()
    run(hosted, images, mask="all")
    assert hosted.active_fraction == 1
    run(hosted, images)
    assert 0 < hosted.active_fraction < 1
    assert hosted.levels.shape[0] == 2
    report = hosted.macs(images)
    assert report.low < report.mask < report.high
    assert report.shape[0] == 2


@pytest.mark.slow
def test_it_trains_copies_pickles_and_is_saved_like_any_other(tmp_path: Path) -> None:
    hosted, images = adaptive_detector(), pictures()
    expected = run(hosted, images, mask="none")
    for clone in (copy.deepcopy(hosted), pickle.loads(pickle.dumps(hosted))):
        assert_same_detections(run(clone, images, mask="none"), expected)
    clone = copy.deepcopy(hosted).train()
    targets = [{"boxes": torch.tensor([[5.0, 5, 60, 70]]), "labels": torch.tensor([1])} for _ in images]
    sum(clone(images, targets).values()).backward()
    assert clone.get_submodule("backbone.2.0").weight.grad.abs().sum() > 0
    cs.save(hosted, tmp_path / "net.safetensors")
    loaded = cs.load(tmp_path / "net.safetensors", model=detector_of_subjects())
    assert loaded.plan == hosted.plan
    assert_same_detections(run(loaded, images, mask="none"), expected)


class Untraceable(nn.Module):
    """Its forward depends on values; its backbone is too small to run on any example, or is fine."""

    def __init__(self, backbone: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Sometimes(Untraceable):
    """It uses its backbone for some images only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x) if x.sum() > 0 else -x


@pytest.mark.slow
def test_a_part_that_is_not_called_has_no_macs() -> None:
    net = cs.adaptify(Sometimes(strided(2)).eval(), "none")
    assert net(-torch.ones(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(cs.InvalidInput, match="did not call its backbone"):
        net.macs(-torch.ones(1, 3, 16, 16))
    with pytest.raises(cs.InvalidInput, match="backbone has not run yet") as caught:
        _ = net.active_fraction
    assert "uses that part" in caught.value.next
    net(torch.ones(1, 3, 16, 16))
    assert net.active_fraction == 0


class Unused(Untraceable):
    """It never uses its backbone, or else masks, plan and MACs would be of something that never runs."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if not isinstance(x, list):
            raise TypeError
        return x[0] if x[0].sum() > 0 else -x[0]


@pytest.mark.parametrize(
    ("kind", "backbone", "words"),
    [
        (Untraceable, None, None),
        (Untraceable, nn.Sequential(nn.Conv2d(3, 4, 3)), None),
        (Untraceable, nn.Sequential(nn.ReLU()), None),
        (
            Unused,
            strided(2),
            r"(?s)does not use its backbone.*never called it.*cs.adaptify\(model.backbone\)",
        ),
        slow(Untraceable, strided(2), "does not use its backbone"),
    ],
)
def test_without_a_backbone_that_converts_and_is_used_it_is_refused(
    kind: type[Untraceable], backbone: nn.Module | None, words: str | None
) -> None:
    with pytest.raises(cs.CannotConvert, match=words):
        cs.adaptify(kind(backbone))


class OfMultiples(nn.Module):
    """An encoder and a decoder that take multiples of a number alone."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.decoder = nn.Conv2d(8, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if any(side % self.number for side in x.shape[2:]):
            raise ValueError(f"give multiples of {self.number}")
        y = self.decoder(self.encoder(x))
        return F.interpolate(y, size=[4 * side for side in y.shape[2:]], mode="bilinear")


@pytest.mark.parametrize("number", [32, slow(64), slow(128), 224])
def test_a_network_of_multiples_is_converted_whole_without_an_example(number: int) -> None:
    assert not cs.plan(OfMultiples(number).eval()).part


@pytest.mark.parametrize("number", [slow(160), slow(192)])
def test_a_part_is_never_taken_without_a_word(number: int) -> None:
    model = OfMultiples(number).eval()
    with pytest.warns(cs.CadWarning, match=r"(?s)only its encoder becomes adaptive.*example_input"):
        assert cs.plan(model).part == "encoder"
    assert not cs.plan(model, example_input=torch.rand(1, 3, number, number)).part
