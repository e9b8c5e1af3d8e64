"""Whatever is compared is a side: one of your own, in this file, is evaluated and timed as ours are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drawn
import pytest
import torch
import torch.nn.functional as F
from conftest import printed, some
from networks import street_segmenter, strided
from PIL import Image
from torch import Tensor, nn
from training import with_exits, with_gates, with_sampler

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import source_of
from cadsurgery.methods.registry import KINDS
from cadsurgery.methods.side import Side
from cadsurgery.network.macs import dense_macs
from cadsurgery.tasks.bench import bench

DATA = "scene:3,height=48,width=80"


def at_scale(net: nn.Module, scale: float) -> Side:
    """A network on images that are made smaller, its scores brought back to their size."""

    def shrink(images: Tensor) -> Tensor:
        return F.interpolate(images, scale_factor=scale, mode="area")

    def call(images: Tensor) -> Tensor:
        return F.interpolate(net(shrink(images)), images.shape[2:], mode="bilinear")

    return Side(f"at scale {scale:g}", call, lambda images: dense_macs(net, shrink(images)))


def texts_of(figure: Any) -> set[str]:
    return {text.get_text() for axis in figure.axes for text in axis.texts}


def miou_of(model: nn.Module) -> float:
    """The figure of a network run image by image."""
    data = cs.open_data(DATA, "test")
    metrics = cs.SegmentationMetrics(len(data.classes))
    for image, labels in (data[place] for place in range(len(data))):
        with torch.no_grad():
            scores = model(normalise(image[None], source_of(model)))
        metrics.update(F.interpolate(scores, labels.shape, mode="bilinear").argmax(1), labels[None])
    return float(metrics.compute()["miou"])


@pytest.mark.slow
@pytest.mark.smoke
def test_a_side_of_ones_own_is_evaluated_and_timed_beside_the_others(tmp_path: Path) -> None:
    model, output, picture = street_segmenter(), tmp_path / "report.json", tmp_path / "curve.png"
    own = [at_scale(model, 1.0), at_scale(model, 0.5)]
    strides: Any = {"output_stride": [(8, 32)], "rounds": 1}
    report = cs.evaluate(model, DATA, ["edges"], sides=own, output=output, picture=picture, **strides)
    assert [row.mask for row in report.rows] == [
        "all",
        report.rows[1].mask,
        "none",
        "at scale 1",
        "at scale 0.5",
    ]
    low, same, half = report.rows[2:]
    assert same.macs == low.macs and same.miou == pytest.approx(miou_of(model), abs=2e-3)
    assert half.macs < 0.3 * same.macs and half.miou is not None
    assert all(0 < row.milliseconds <= row.milliseconds_median for row in report.rows)
    line = next(line for line in printed(report).splitlines() if "at scale 0.5" in line)
    assert f"{100 * half.miou:.2f}" in line and f"{half.macs:.3e}" in line
    rows = json.loads(output.read_text())["rows"]
    assert [row["mask"] for row in rows] == [row.mask for row in report.rows]
    assert rows[-1]["macs"] == half.macs and rows[-1]["milliseconds"] == half.milliseconds
    assert drawn.faults_of(report.figure()) == []
    assert {"at scale 1", "at scale 0.5"} <= texts_of(report.figure())
    with Image.open(picture) as shown:
        assert min(shown.size) > 300


@pytest.mark.parametrize("make", some([with_exits, with_gates, with_sampler], every=3))
def test_sides_stand_beside_those_of_every_method(make: Callable[[], nn.Module]) -> None:
    own = at_scale(street_segmenter(), 0.5)
    report = cs.evaluate(make(), DATA, sides=[own], limit=1, rounds=0)
    name = {"exits": "setting", "gates": "setting", "sampled": "sampler"}
    assert report.rows[-1].get(report.compared.key) == own.name and report.compared.key in name.values()
    assert own.name in printed(report) and own.name in texts_of(report.figure())


@pytest.mark.parametrize("make", some([with_exits, with_gates, lambda: with_sampler("labels")], every=3))
def test_figures_do_not_depend_on_how_many_images_a_call_has(make: Callable[[], nn.Module]) -> None:
    one, two = (cs.evaluate(make(), DATA, batch=batch, rounds=0) for batch in (1, 2))
    for row, other in zip(one.rows, two.rows, strict=True):
        assert row.pixel_accuracy == pytest.approx(other.pixel_accuracy, abs=2e-3)
        assert row.macs == pytest.approx(other.macs, rel=1e-6)
        assert row.get("density", 0) == pytest.approx(other.get("density", 0))


def test_a_side_of_ones_own_is_in_a_bench(tmp_path: Path) -> None:
    model = strided(outputs=4, kernel=3)
    own = [at_scale(model, 0.5)]
    told: Any = {"size": (64, 96), "rounds": 1, "threads": 1, "batch": 2}
    report = bench(model, fractions=[0.5], sides=own, picture=tmp_path / "bench.png", **told)
    (row,) = report.networks[0].sides
    images = torch.zeros(2, 3, 64, 96)
    assert row.macs == own[0].count(images)["macs"] and row.milliseconds > 0
    assert report.to_dict()["networks"][0]["sides"] == [row.to_dict()]
    assert own[0].name in printed(report)
    (axes,) = (axis for axis in report.figure().axes if axis.get_visible())
    assert own[0].name in {text.get_text() for text in axes.get_legend().texts}
    made = bench(with_gates(), sides=own, **told)
    assert made.rows[-1].side == own[0].name and own[0].name in printed(made)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.method)
def test_what_a_method_made_is_evaluated_on_labels(kind: Any, tmp_path: Path) -> None:
    made = {"anytime": with_exits, "sampling": with_gates, "resampling": with_sampler}[kind.method]()
    Image.new("RGB", (64, 48)).save(tmp_path / "one.png")
    with pytest.raises(cs.InvalidInput, match=f"{kind.words} is evaluated on labels"):
        cs.evaluate(made, f"images:{tmp_path}", split="all")
