"""Images without labels: what the network gives itself with everything kept high stands for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, some
from networks import Segmenter, made_once
from PIL import Image
from torch import Tensor, nn
from training import SIZE, adaptive

import cadsurgery as cs
from cadsurgery.data import IGNORED, SegmentationData
from cadsurgery.data.datasets import identity_table
from cadsurgery.data.images import street_scene
from cadsurgery.finetune import Settings, evaluate, fit
from cadsurgery.tasks.measuring import Quality

MASK = "edges:threshold=0.2,dilation=3"
STRIDES: dict[str, Any] = {"output_stride": [(4, 16)], "rounds": 0}
QUICK = Settings(steps=6, batch=2, lr=0.02, workers=0, save_every=3, validate_every=2, batch_norm="frozen")


class Describer(Segmenter):
    """Two maps, descriptors of length 1 and a score: no classes."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        found = self.backbone(x)
        return {"descriptors": nn.functional.normalize(found, dim=1), "score": found.mean(1, keepdim=True)}


def segmenter(kind: type[nn.Module] = Segmenter) -> nn.Module:
    """Its norms fit the photos, so that what it gives varies, with its resolution too."""
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.stack([cs.images.normalise(street_scene(*SIZE, seed), None) for seed in range(4)]))
    for name, weight in model.named_parameters():
        if name.endswith("classifier.1.weight"):
            weight.data.mul_(4)
    return model.eval()


@made_once
def converted(mask: str = MASK, kind: type[nn.Module] = Segmenter) -> cs.AdaptiveModel:
    return cs.adaptify(segmenter(kind), mask, output_stride=(4, 16), verify_laws=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of photos, of two sizes, in two folders."""
    folder = tmp_path / "photos"
    for place, size in enumerate([SIZE, SIZE, (37, 70)]):
        path = folder / ("deeper" if place == 1 else ".") / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (255 * street_scene(*size, place)).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


# -- data ----------------------------------------------------------------------------------------------


def test_a_folder_of_photos_has_no_classes_and_ignores_every_pixel(photos: Path) -> None:
    data = cs.open_data(f"images:{photos}", "test")
    assert len(data) == 3 and data.classes == () and not data.is_labelled
    image, labels = data[1]
    assert image.shape == (3, 37, 70) and labels.shape == (37, 70) and (labels == IGNORED).all()
    assert labels.dtype == torch.int64 and 0 <= image.min() < image.max() <= 1


def test_folders_named_as_splits_are_splits_and_labels_beside_images_are_left_alone(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (tmp_path / split / part).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / part / "a.png")
    names = {split: cs.open_data(f"images:{tmp_path}", split).names for split in ("train", "val", "all")}
    assert names["train"] == (str(tmp_path / "train" / "images" / "a.png"),)
    assert names["all"] == names["train"] + names["val"]
    with pytest.raises(cs.FileError, match="splits train, val"):
        cs.open_data(f"images:{tmp_path}", "test")


# -- fidelity ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fidelity_is_accuracy_where_the_dense_prediction_stands_for_labels(photos: Path) -> None:
    """By the labelled evaluation, of the same images with these labels."""
    report = cs.evaluate(segmenter(), f"images:{photos}", [MASK], **STRIDES)
    data, model = cs.open_data(f"images:{photos}", "test"), segmenter()
    dense = cs.adaptify(model, "all", output_stride=(4, 16), verify_laws=False)
    labels = []
    for place in range(3):
        with torch.no_grad():
            labels.append(dense(cs.images.normalise(data[place][0], None)[None])[0].argmax(0).byte().numpy())
    labelled = SegmentationData(
        "labelled",
        "test",
        tuple("abcdef"),
        data.names,
        lambda at: (data[at][0], labels[at]),
        identity_table(6),
    )
    expected = cs.evaluate(model, labelled, [MASK], **STRIDES)
    assert report.fidelity == "classes" and report.images == 3
    for ours, theirs in zip(report.rows, expected.rows, strict=True):
        for name in ("miou", "pixel_accuracy", "boundary_iou", "trimap_iou"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=2e-3)
        assert (ours.macs, ours.active_fraction) == (theirs.macs, theirs.active_fraction)
    high, mask, low = report.rows
    assert high.pixel_accuracy == high.miou == high.boundary_iou == 1 and high.divergence == 0
    assert 0 < mask.divergence < low.divergence and mask.pixel_accuracy < 1


def test_maps_that_are_no_classes_have_a_relative_error(photos: Path) -> None:
    report = cs.evaluate(segmenter(Describer), f"images:{photos}", [MASK], **STRIDES)
    assert report.fidelity == "values"
    high, mask, low = report.rows
    assert high.relative_error == 0 < mask.relative_error < low.relative_error < 2
    assert mask.relative_error == pytest.approx(mask.divergence**0.5) and mask.miou is None


class Particular(Segmenter):
    """Takes images of even height and width only."""

    def forward(self, x: Tensor) -> Tensor:
        halves = nn.functional.avg_pool2d(x, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
        return super().forward(x) + halves.mean(1, keepdim=True)


def test_an_image_that_the_network_does_not_take_costs_itself(photos: Path) -> None:
    report = cs.evaluate(segmenter(Particular), f"images:{photos}", [MASK], batch=2, **STRIDES)
    assert report.images == 2 and [failure["image"][-5:] for failure in report.failed] == ["2.png"]
    assert "37 x 70" in report.failed[0]["what"] and report.failed[0]["next"]
    for name in ("0.png", "deeper/1.png"):
        (photos / name).unlink()
    with pytest.raises(cs.InvalidInput, match="does not run on an image of 37 x 70"):
        cs.evaluate(segmenter(Particular), f"images:{photos}", [MASK], **STRIDES)


def test_kinds_do_not_mix() -> None:
    one, other = Quality("classes"), Quality("values")
    for metrics in (one, other):
        metrics.update(torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), (4, 4))
    with pytest.raises(cs.InvalidInput, match="kind=values"):
        one.merge(other)


# -- training ------------------------------------------------------------------------------------------


class Alone:
    """Images without anything."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return street_scene(*SIZE, index)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda folder: cs.open_data(f"images:{folder / 'deeper'}", "all"),
    "images": lambda folder: Alone(),
    "a list": lambda folder: [street_scene(*SIZE, seed) for seed in range(3)],
}


@pytest.mark.parametrize(
    ("source", "objective"),
    [*some([(source, "") for source in SOURCES], rows=True), ("images", "any-budget")],
)
def test_a_network_learns_from_itself(tmp_path: Path, photos: Path, source: str, objective: str) -> None:
    net, data = adaptive(), SOURCES[source](photos)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    settings = replace(QUICK, objective=objective)
    outcome = fit(net, data, settings, output=tmp_path / "run", validation=data, device="cpu")
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert "divergence" in log[0] and "entropy" not in log[0] and "miou" in log[0]
    assert {"miou", "pixel_accuracy", "divergence", "active_fraction"} <= outcome.after.keys()
    assert outcome.best is not None and outcome.best >= outcome.after["miou"]
    changed = {
        name for name, value in net.state_dict().items() if not torch.equal(value, before[name].to(value))
    }
    assert "classifier.1.weight" in changed


def test_maps_that_are_no_classes_are_trained_by_their_relative_error(tmp_path: Path) -> None:
    net, settings = converted("none", Describer), replace(QUICK, steps=20, lr=0.01)
    outcome = fit(net, Alone(), settings, output=tmp_path, validation=Alone(), device="cpu")
    assert outcome.after["relative_error"] < outcome.before["relative_error"]
    assert outcome.best is not None and outcome.best <= outcome.after["relative_error"]


@pytest.mark.parametrize(
    ("net", "settings", "words"),
    [
        (adaptive, replace(QUICK, objective="mixed"), "no labels to learn from"),
        (lambda: adaptive("learned:fraction=0.3"), replace(QUICK, objective="blend"), "blend with distil=1"),
        (segmenter, QUICK, r"cs\.adaptify"),
        (adaptive, replace(QUICK, objective_options={"kind": "clases"}), "classes"),
        (adaptive, replace(QUICK, objective_options={"temperature": 0}), "temperature"),
    ],
)
def test_what_cannot_be_learned_without_labels_is_refused(
    tmp_path: Path, net: Callable[[], nn.Module], settings: Settings, words: str
) -> None:
    with pytest.raises(cs.CadError, match=words):
        fit(net(), Alone(), settings, output=tmp_path, device="cpu")


def test_a_dense_network_cannot_be_measured_without_labels() -> None:
    with pytest.raises(cs.InvalidInput, match="without labels"):
        evaluate(segmenter(), Alone())


def test_the_command_trains_on_a_folder_of_photos(
    photos: Path, tmp_path: Path, command_line: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "finetune networks:Segmenter --output-stride 4,16 --device cpu -o run --json"
    few = "--set steps=2 --set crop=32 --set workers=0 --set batch=2"
    done = command_line(*line.split(), *few.split(), "--data", f"images:{photos}")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["data"] == f"images:{photos} (2 images)"
    assert {"pixel_accuracy", "divergence"} <= found["after"].keys()
    assert (tmp_path / "run" / "net.safetensors").is_file()
