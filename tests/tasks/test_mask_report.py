"""Masks side by side: the default selection at every pair of strides, and quality beside cost in a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import printed, slow
from networks import Segmenter, segmenter
from torch import Tensor

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import Source
from cadsurgery.network.macs import dense_macs
from cadsurgery.network.model import pictures_for
from cadsurgery.support.progress import silent
from cadsurgery.tasks import mask_report
from cadsurgery.tasks.commands import MaskOptions
from cadsurgery.tasks.mask_report import MaskReport, draw_masks
from cadsurgery.tasks.measuring import Quality
from cadsurgery.tasks.open import example_image

SIZE = (75, 101)


class Depth(Segmenter):
    """One channel without a sign: no classes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class Classes(Segmenter):
    """Returns numbers of classes, which cannot be compared as maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def drawn(
    folder: Path, *masks: str, model: str = "", pair: tuple[int, int] = (8, 16), **more: Any
) -> MaskReport:
    conversion = {"output_stride": pair, **({} if model else {"patch": "quadtree"})}
    given = {"masks": masks, "model": model, "conversion": conversion, "output": folder / "mask.png"}
    options = MaskOptions(**{**given, "compare": True, "size": SIZE, **more})
    return draw_masks("", options, step=silent)


@pytest.mark.parametrize("pair", [(4, 8), slow((8, 16)), slow((8, 32)), (16, 32), slow((4, 32))])
def test_the_default_selection_works_at_every_pair_of_strides(pair: tuple[int, int], tmp_path: Path) -> None:
    report = drawn(tmp_path, pair=pair)
    labels = [row.label for row in report.rows]
    assert {"detail | budget:fraction=0.1", "detail | budget:fraction=0.2", "edges"} <= {*labels}
    assert labels[-1].startswith("trimap") and any(label.startswith("gradient") for label in labels)
    assert any("threshold=0.95/0.1" in label for label in labels) == (pair[1] // pair[0] > 2)
    assert all(0 < row.share_of_elements <= 1 for row in report.rows) and (tmp_path / "mask.png").is_file()
    assert not {"pixel_accuracy", "of_given"} & report.rows[0].values.keys()
    assert "--model" in printed(report) and report.to_dict()["notes"] == list(report.notes)


def test_quality_stands_beside_the_cost_of_the_network_as_given(tmp_path: Path) -> None:
    typed = ("all", "none", "edges|budget:fraction=0.2")
    report = drawn(tmp_path, *typed, model="networks:segmenter")
    whole, given, some = report.rows
    assert tuple(row.label for row in report.rows) == typed
    assert (
        whole.pixel_accuracy == whole.balanced_fidelity == whole.of_high == 1 and whole.relative_error is None
    )
    # The network as given is the one at the low output stride, and its work is that of the module itself.
    assert given.of_given == 1 and whole.of_given > some.of_given > 1
    image = example_image(None, SIZE)
    assert some.macs["given"] == dense_macs(segmenter(), image.unsqueeze(0)) == given.macs["low"]
    assert some.of_given == some.macs["mask"] / some.macs["given"]

    net = cs.adaptify(
        segmenter().eval(), "edges | budget:fraction=0.2", output_stride=(8, 16), verify_laws=False
    )
    batch = normalise(image, pictures_for(net)).unsqueeze(0)
    metrics = Quality()
    with torch.inference_mode():
        metrics.update(net(batch), net(batch, mask="all"), SIZE)
    assert some.pixel_accuracy == metrics.compute()["pixel_accuracy"] < 1

    text = printed(report)
    assert "agreement" in text and "of given" in text and "one image" in text
    assert report.to_dict()["masks"][2]["balanced_fidelity"] == some.balanced_fidelity


def test_maps_that_are_no_classes_have_a_relative_error_and_others_no_quality(tmp_path: Path) -> None:
    report = drawn(tmp_path, "all", "none", model=f"{__name__}:Depth")
    whole, low = report.rows
    assert whole.relative_error == 0 < low.relative_error and whole.pixel_accuracy is None
    assert "relative error" in printed(report)
    report = drawn(tmp_path, "none", model=f"{__name__}:Classes")
    assert report.rows[0].of_given == 1 and report.rows[0].pixel_accuracy is None
    assert any("quality is not compared" in note for note in report.notes)


def test_random_weights_are_said_to_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def random(net: cs.AdaptiveModel) -> Source:
        return replace(pictures_for(net), weights="random")

    monkeypatch.setattr(mask_report, "pictures_for", random)
    assert any(
        "weights are random" in note for note in drawn(tmp_path, "none", model="networks:segmenter").notes
    )
