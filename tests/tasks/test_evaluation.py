"""Evaluation: the figures are those of running the network image by image, in one process or several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TESTS, Run, images, printed, random_levels, slow
from networks import street_segmenter
from PIL import Image
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock

import cadsurgery as cs
from cadsurgery.data import SegmentationData
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import Source, source_of
from cadsurgery.network.macs import layer_work
from cadsurgery.tasks import measuring
from cadsurgery.tasks.evaluation import EvaluationReport

DATA = "scene:5,height=48,width=80"
EDGES, GRADED = "edges:threshold=0.15,dilation=3", "edges:threshold=0.95/0.1,dilation=3/9"


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return cs.evaluate(street_segmenter(), DATA, [EDGES, GRADED], output_stride=[(8, 32), (4, 32)], rounds=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of two sizes with labels, the second broken."""
    scenes = {"a": (48, 80), "b": (48, 80), "c": (50, 70)}
    for name in ("images", "labels"):
        (tmp_path / "test" / name).mkdir(parents=True)
    for name, size in scenes.items():
        image, labels = cs.open_data(f"scene:1,height={size[0]},width={size[1]}")[0]
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "test" / "images" / f"{name}.png")
        Image.fromarray(labels.byte().numpy()).save(tmp_path / "test" / "labels" / f"{name}.png")
    (tmp_path / "test" / "images" / "b.png").write_bytes(b"broken")
    return tmp_path


def figures(report: EvaluationReport) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    return [
        {name: value for name, value in row.to_dict().items() if "milliseconds" not in name}
        for row in report.rows
    ]


def test_every_mask_stands_at_every_pair_between_its_dense_networks(report: EvaluationReport) -> None:
    middle = [EDGES, GRADED]
    for pair in ((8, 32), (4, 32)):
        rows = [row for row in report.rows if row.output_stride == pair]
        assert [row.mask for row in rows] == ["all", *middle, "none"]
        assert [row.anchor for row in rows] == [True, False, False, True]
        assert rows[0].active_fraction == rows[0].macs_of_high == rows[0].region_of_high == 1
        assert (
            rows[-1].active_fraction == 0 and rows[-1].macs < rows[1].macs < 1.01 * rows[0].macs
        )  # and its own work
        assert all(
            (row.milliseconds or 0) > 0 and row.milliseconds_median >= row.milliseconds for row in rows
        )
    assert report.images == 5 and report.processes == 1 and report.model == "StreetSegmenter"


@pytest.mark.parametrize("mask", [slow(EDGES), GRADED])
def test_figures_are_those_of_the_network_run_image_by_image(report: EvaluationReport, mask: str) -> None:
    model, data = street_segmenter(), cs.open_data(DATA, "test")
    net = cs.adaptify(model, mask, output_stride=(8, 32))
    metrics, counted, high, active = cs.SegmentationMetrics(6), 0, 0, []
    region, region_high = 0, 0
    inside = {decision.node for decision in net.plan.chosen("adapt", "keep")}
    for image, labels in (data[position] for position in range(len(data))):
        batch = normalise(image[None], source_of(model))
        with torch.no_grad():
            scores = nn.functional.interpolate(net(batch), labels.shape, mode="bilinear", align_corners=False)
        metrics.update(scores.argmax(1), labels[None])
        macs = net.macs(batch)
        counted, high = counted + macs.mask, high + macs.high
        region += macs.of_mask + sum(layer.mask for layer in macs.layers if layer.layer in inside)
        region_high += sum(layer.high for layer in macs.layers if layer.layer in inside)
        active.append(net.active_fraction)
    row = next(row for row in report.rows if row.mask == mask and row.output_stride == (8, 32))
    expected = metrics.compute()
    for name in ("miou", "pixel_accuracy", "boundary_iou", "trimap_iou"):
        assert getattr(row, name) == pytest.approx(
            expected[name], abs=2e-3
        )  # a pixel may round the other way
    assert list(row.iou.values()) == pytest.approx(expected["iou"], abs=5e-3)
    assert row.macs == counted / 5 and row.macs_of_high == counted / high
    assert row.region_of_high == region / region_high
    assert row.active_fraction == pytest.approx(sum(active) / 5)


def test_a_converted_network_brings_its_mask_and_strides_and_is_left_as_it_was() -> None:
    net = cs.adaptify(street_segmenter(), EDGES, output_stride=(8, 16)).train()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    report = cs.evaluate(net, DATA, limit=1, rounds=0)
    assert [(row.mask, row.output_stride) for row in report.rows][1] == (EDGES, (8, 16))
    assert net.training and net.mask.spec() == EDGES
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


@pytest.mark.slow
def test_masks_may_ask_for_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Tensor] = []

    @contextmanager
    def labelled(labels: Tensor) -> Iterator[None]:
        known.append(labels)
        yield
        known.pop()

    def oracle(image: Tensor) -> Tensor:
        (labels,) = known
        return labels[:, ::8, ::8] == 3

    monkeypatch.setattr(measuring, "labelled", labelled)
    report = cs.evaluate(street_segmenter(), DATA, [oracle], output_stride=[(8, 32)], limit=2, rounds=1)
    data = cs.open_data(DATA, "test")
    share = torch.stack([data[0][1], data[1][1]])[:, ::8, ::8].eq(3).double().mean()
    assert report.rows[1].mask == "oracle" and report.rows[1].active_fraction >= share > 0


def linear_on_rows() -> nn.Module:
    """Linear layers on the last axis of a map, as in torchvision's ConvNeXt."""
    strided = [nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)]
    return nn.Sequential(
        *strided, CNBlock(8, 0.5, 0.0), nn.Conv2d(8, 8, 3, 1, 1), CNBlock(8, 0.5, 0.0)
    ).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "segmenter": lambda: street_segmenter().eval(),
    "linear layers on rows": linear_on_rows,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_work_by_elements_gives_the_macs_of_any_mask(name: str) -> None:
    net = cs.adaptify(NETWORKS[name](), "all", verify_laws=False)
    x = images(2, 95, 129)
    layers = layer_work(net, x)
    assert layers is not None
    for split in (0.2, 0.7):
        with torch.no_grad():
            net(x, mask="none")
            levels = random_levels(2, net.lattice.whole_size, net.plan.stage_strides, split=split)
            net(x, mask=levels)
        counted = net.macs(x, mask=levels)
        found = {layer.layer: layer.on(net.lattice) for layer in layers}
        assert {layer.layer: layer.mask for layer in counted.layers} == {n: c for n, c in found.items() if c}


class Lost:
    """Data of the user whose disk is not there."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise OSError("the disk is not mounted")


REFUSALS: list[tuple[Callable[[], Any], Any, dict[str, Any], str]] = [
    (lambda: street_segmenter(classes=4), DATA, {}, r"network has 4 classes and data scene:5.* has 6"),
    *(
        (street_segmenter, DATA, {name: bad}, "at least 1 image")
        for name, bad in (("limit", 0), ("batch", 0), ("rounds", -1))
    ),
    *((street_segmenter, DATA, {"output_stride": bad}, "neither a pair") for bad in ((4, 8, 16), ["8,16"])),
    (lambda: cs.adaptify(street_segmenter(), EDGES), DATA, {"output_stride": [(8, 16)]}, "original network"),
    (street_segmenter, Lost(), {}, "the disk is not mounted"),
    (street_segmenter, [(torch.rand(3, 32, 48), torch.zeros(16, 16).long())], {}, "its labels have 16x16"),
]


@pytest.mark.parametrize(("network", "data", "options", "said"), REFUSALS)
def test_what_cannot_be_evaluated_is_refused(
    network: Callable[[], Any], data: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(cs.CadError, match=said):
        cs.evaluate(network(), data, **{"rounds": 0, **options})


def test_a_pair_of_output_strides_is_a_list_of_one() -> None:
    alone = cs.evaluate(street_segmenter(), DATA, [EDGES], output_stride=(8, 16), limit=1, rounds=0)
    listed = cs.evaluate(street_segmenter(), DATA, [EDGES], output_stride=[(8, 16)], limit=1, rounds=0)
    assert [(row.label, row.macs, row.miou) for row in alone.rows] == [
        (row.label, row.macs, row.miou) for row in listed.rows
    ]


def test_unreadable_images_are_reported_and_the_others_done(folder: Path) -> None:
    report = cs.evaluate(
        street_segmenter(), f"folder:{folder},classes=6", [EDGES], output_stride=[(8, 32)], batch=2, rounds=0
    )
    assert report.images == 2
    (failure,) = report.failed
    assert failure["image"].endswith("b.png") and failure["error"] == "FileError" and failure["next"]


def test_a_network_of_ones_own_says_what_images_it_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `pretrained_cfg`, as a module, converted, optimised, and built by name."""
    (tmp_path / "ownnets.py").write_text("from networks import street_segmenter\n")
    monkeypatch.syspath_prepend(tmp_path)
    net = cs.adaptify(street_segmenter(), EDGES, verify_laws=False)
    for network in (street_segmenter(), net, net.optimize(), cs.build_model("ownnets:street_segmenter")):
        assert source_of(network).mean == (0.5, 0.4, 0.3) and source_of(network).std == (0.2, 0.3, 0.4)
    assert source_of(nn.Conv2d(3, 3, 1)).mean == Source("").mean


EVAL = ("eval", "networks:street_segmenter", "--data", DATA, "--mask", EDGES)


def test_the_command_prints_and_writes(command_line: Run, tmp_path: Path) -> None:
    arguments = [*EVAL, "--mask", "all", "--limit", 2]
    pairs = ["--output-stride", "8,32", "--output-stride", "4,32"]
    done = command_line(
        *arguments, *pairs, "--rounds", 1, "--output", "results.json", "--picture", "plot.png", "--json"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert [row["mask"] for row in found["rows"]] == ["all", EDGES, "none"] * 2
    assert found["random_weights"] is False and found["images"] == 2 and found["versions"]["torch"]
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    told = command_line(*arguments, "--rounds", 0)
    assert told.code == 0 and "8 to 32" in told.out and "pole" in told.out
    assert command_line("eval", "networks:street_segmenter").code == 2
    refused = command_line("eval", "networks:street_segmenter", "--data", "foldr:x", "--json")
    assert refused.code == 1 and json.loads(refused.out)["error"] == "UnknownName"


@pytest.mark.slow
def test_two_processes_find_what_one_finds(command_line: Run, tmp_path: Path) -> None:
    """Evaluation over scenes; one process prints."""
    shutil.copy(TESTS / "networks.py", tmp_path)
    arguments = [*EVAL, "--rounds", 0, "--json"]
    alone = command_line(*arguments)
    together = command_line(*arguments, "--output", "two.json", "--workers", 2)
    assert together.code == 0, together.err
    one, two = json.loads(alone.out), json.loads(together.out)
    assert (
        two["processes"] == 2
        and one["processes"] == 1
        and two == json.loads((tmp_path / "two.json").read_text())
    )
    assert two["rows"] == one["rows"] and two["images"] == one["images"] == 5


def test_the_report_is_json_and_says_when_weights_are_random(report: EvaluationReport) -> None:
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["iou"].keys() == set(report.rows[0].iou)

    assert "random" not in printed(report)
    assert "random weights: unless they were trained since" in printed(replace(report, random=True))
    assert isinstance(cs.open_data(DATA), SegmentationData)
