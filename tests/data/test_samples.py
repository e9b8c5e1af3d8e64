"""Data of one's own: one protocol for training and evaluation, and errors that name the sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import some
from networks import Segmenter, made_once, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cadsurgery as cs
from cadsurgery.data import as_data, sample_of
from cadsurgery.data.samples import pictures_of
from cadsurgery.finetune import Settings, fit
from cadsurgery.finetune.objectives import cross_entropy
from cadsurgery.masks.context import labels_of
from cadsurgery.tasks.measuring import MIOU
from cadsurgery.tasks.recommend import recommend
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

SCENES = cs.open_data("scene:10,height=48,width=64")
QUICK = Settings(steps=1, batch=2, workers=0, crop=0)
Change = Callable[[Tensor, Tensor], Any]


class Mine:
    """Anything with a length and items; those from the position `at` on are changed."""

    def __init__(self, change: Change = lambda *pair: pair, at: int = 0, count: int = 4) -> None:
        self.change, self.at, self.count = change, at, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        image, labels = SCENES[index]
        return self.change(image, labels) if index >= self.at else (image, labels)


@pytest.mark.parametrize(("most", "taken"), [(1, 1), (4, 4), (6, 6), (10, 10), (99, 10)])
def test_pictures_are_spread_over_all_of_them_and_as_many_as_asked_for(most: int, taken: int) -> None:
    shown = [*pictures_of(SCENES, most)(None)]
    places = [next(at for at, (image, _) in enumerate(SCENES) if torch.equal(image, one)) for one in shown]
    steps = {after - before for before, after in pairwise(places)}
    assert len(places) == taken and places[0] == 0 and (not steps or max(steps) - min(steps) <= 1)


def network() -> nn.Module:
    return seeded(Segmenter, torch.float32)


@made_once
def adapted() -> cs.AdaptiveModel:
    return cs.adaptify(network(), "edges", verify_laws=False)


def of_fit(data: Any, folder: Path) -> Any:
    return fit(adapted(), data, QUICK, output=folder, device="cpu")


def of_evaluate(data: Any, folder: Path) -> Any:
    return cs.evaluate(adapted(), data, rounds=0)


def of_recommend(data: Any, folder: Path) -> Any:
    return recommend(network(), data, limit=3, options={"output_stride": (4, 16)}, output=folder)


def normalised(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return cs.images.normalise(image, None), labels


def in_bytes(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return 255 * image, labels


TASKS = pytest.mark.parametrize("task", [of_fit, of_evaluate, of_recommend])


@TASKS
@pytest.mark.parametrize(
    ("change", "words"), [(normalised, "looks normalised already"), (in_bytes, r"looks like 0\.\.255")]
)
def test_images_outside_0_to_1_are_refused_with_what_they_look_like(
    task: Any, change: Change, words: str, tmp_path: Path
) -> None:
    with pytest.raises(cs.InvalidInput, match=words) as refusal:
        task(Mine(change, count=10), tmp_path)
    assert "sample " in refusal.value.where
    assert "any_range = True" in refusal.value.next


def test_images_that_are_meant_to_be_outside_0_to_1_are_read_as_they_are() -> None:
    data = Mine(normalised)
    data.any_range = True  # type: ignore[attr-defined]
    expected, _ = normalised(*SCENES[1])
    assert torch.equal(sample_of(data, 1)[0], expected)
    assert torch.equal(as_data(data)[1][0], expected)


# -- one protocol ----------------------------------------------------------------------------------------


def test_data_of_ones_own_are_evaluated_as_the_same_data_opened_by_name() -> None:
    ours, theirs = (cs.evaluate(adapted(), data, rounds=0) for data in (Mine(), SCENES.first(4)))
    assert [row.miou for row in ours.rows] == [row.miou for row in theirs.rows]
    assert ours.rows[0].miou is not None


@pytest.mark.usefixtures("not_compiled")
def test_settings_are_recommended_on_data_of_ones_own(tmp_path: Path) -> None:
    assert of_recommend(Mine(), tmp_path).measure == MIOU


@TASKS
def test_a_loader_is_refused_with_what_to_give(task: Any, tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match=r"loader\.dataset"):
        task(DataLoader(Mine()), tmp_path)  # type: ignore[arg-type]


def by_to_tensor(labels: Tensor) -> Tensor:
    return labels.float() / 255


LABELS_GO_TO: dict[str, Callable[[Tensor], Any]] = {
    "a sample": lambda labels: sample_of([(SCENES[0][0], labels)], 0)[1],
    "data": lambda labels: replace(SCENES, read=lambda place: (SCENES[0][0], labels.numpy()))[0][1],
    "metrics": lambda labels: metrics_of(SCENES[0][1][None], labels[None]),
    "predictions": lambda labels: metrics_of(labels[None], SCENES[0][1][None]),
    "the labels of a mask": lambda labels: provided(labels[None]),
    "boundaries": lambda labels: cs.resampling.boundaries(labels),
    "the loss": lambda labels: cross_entropy(LOGITS, labels[None]),
}
LOGITS = torch.randn(1, 6, 24, 32, generator=torch.Generator().manual_seed(0))


def metrics_of(prediction: Tensor, labels: Tensor) -> Tensor:
    metrics = SegmentationMetrics(6)
    metrics.update(prediction, labels)
    return metrics.counts()["all"]


def provided(labels: Tensor) -> Tensor:
    with cs.masks.labelled(labels):
        return labels_of(labels[:, None], "mask")


@pytest.mark.parametrize("place", LABELS_GO_TO)
def test_labels_that_are_no_whole_numbers_are_refused_and_whole_ones_are_classes(place: str) -> None:
    """Truncated to class 0, everything would agree with everything."""
    labels, take = SCENES[0][1], LABELS_GO_TO[place]
    with pytest.raises(cs.InvalidInput, match=r"no class[\s\S]*ToTensor[\s\S]*PILToTensor"):
        take(by_to_tensor(labels))
    for strange in (torch.nan, torch.inf):
        with pytest.raises(cs.InvalidInput, match=f"{strange}, which is no class"):
            take(torch.full(labels.shape, strange))
    expected = take(labels)
    for dtype in (torch.float32, torch.float64, torch.uint8, torch.int16):
        assert torch.equal(take(labels.to(dtype)), expected)


# -- samples that cannot be used -------------------------------------------------------------------------


def unreadable(image: Tensor, labels: Tensor) -> Any:
    raise OSError("image file is truncated")


def with_nan(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    image = image.clone()
    image[1, 5, 7] = torch.nan
    return image, labels


BAD: dict[str, tuple[Change, str]] = {
    "three parts": (lambda image, labels: (image, labels, "a.png"), "a sample is a tuple of 3"),
    "none": (lambda image, labels: None, "a sample is NoneType None"),
    "labels are none": (lambda image, labels: (image, None), "labels NoneType None"),
    "transparency": (
        lambda image, labels: (torch.cat((image, image[:1])), labels),
        "an image has 4 bands, and the network reads 3 channels",
    ),
    "size of labels": (lambda image, labels: (image, labels[:-1]), "48x64 pixels and its labels have 47x64"),
    "labels by ToTensor": (
        lambda image, labels: (image, labels / 255),
        "labels hold 0.00392157, which is no class",
    ),
    "bytes": (lambda image, labels: ((255 * image).byte(), labels), "a sample is a uint8 tensor"),
    "unreadable": (unreadable, "cannot be read"),
    "nan": (with_nan, "an image holds nan in channel 1, row 5, column 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sample_that_cannot_be_trained_on_is_named(case: str, tmp_path: Path) -> None:
    change, words = BAD[case]
    data = Mine(change, at=2, count=3)
    data.names = ["a.png", "b.png", "c.png"]  # type: ignore[attr-defined]
    with pytest.raises(cs.CadError, match=words) as refusal:
        fit(adapted(), data, Settings(steps=2, batch=3, workers=0, crop=0), output=tmp_path, device="cpu")
    assert re.search(r"sample 2 of the data \(c\.png\)", str(refusal.value))


@pytest.mark.parametrize("case", some(BAD, every=4))
def test_a_sample_that_cannot_be_evaluated_is_reported_and_the_others_count(case: str) -> None:
    report = cs.evaluate(adapted(), Mine(BAD[case][0], at=3), rounds=0)
    assert report.images == 3
    assert [row["image"] for row in report.failed] == ["sample 3"]
