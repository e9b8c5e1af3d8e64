"""Networks with exits in training, on data, and on the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from networks import Segmenter
from PIL import Image
from torch import Tensor
from training import DATA, DRAW, ONE_STEP_BY_COMMAND, QUICK, Scenes, batch, with_exits

import cadsurgery as cs
from cadsurgery.data.images import normalise, write_picture
from cadsurgery.data.networks import source_of
from cadsurgery.finetune import Settings, fit
from cadsurgery.finetune.objectives import make_objective
from cadsurgery.tasks.evaluation import EvaluationReport

# -- training ------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighed_sum_of_those_of_all_predictions() -> None:
    net, (inputs, labels) = with_exits(), batch()
    classes = torch.linspace(0.5, 1.5, net.plan.classes)
    options = {"weights": [1.0, 0.5, 2.0], "class_weights": classes.tolist()}
    found = make_objective("anytime", net, options)(inputs, labels, DRAW)

    def loss(prediction: Tensor) -> Tensor:
        scores = F.interpolate(prediction, size=labels.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(scores, labels, classes, ignore_index=255)

    losses = [loss(one) for one in net(*inputs)]
    torch.testing.assert_close(found["loss"], losses[0] + 0.5 * losses[1] + 2 * losses[2])
    torch.testing.assert_close(found["exit_2"], losses[1])


def test_without_labels_exits_learn_from_the_last_with_everything_computed() -> None:
    net, (inputs, _) = with_exits(1.0), batch()
    found = make_objective("anytime", net, {})(inputs, None, DRAW)
    assert found["exit_3"] == 0 and found["exit_1"] > 0
    found["loss"].backward()
    assert all(p.grad is not None for p in net.heads.parameters() if p.dim())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1.0]}, "give 3 numbers"),
        ({"class_weights": [1.0]}, "at least 0"),
        ({"divergence": -1.0}, "at least 0"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words):
        make_objective("anytime", with_exits(), options)


def test_networks_without_exits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="has no exits"):
        make_objective("anytime", Segmenter(), {})
    with pytest.raises(cs.InvalidInput, match="needs a network with exits"):
        fit(Segmenter(), Scenes(), Settings(**QUICK, train="exits"), output=tmp_path, device="cpu")
    with pytest.raises(cs.InvalidInput, match="optimised"):
        fit(with_exits().optimize(), Scenes(), Settings(**QUICK), output=tmp_path, device="cpu")


@pytest.mark.parametrize("train", ["all", "exits"])
def test_training_writes_a_network_with_exits(train: str, tmp_path: Path) -> None:
    net = with_exits()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    chosen = Settings(**QUICK, train=train)
    outcome = fit(net, Scenes(), chosen, output=tmp_path, validation=Scenes(2), device="cpu")
    assert {"miou", "miou_exit_1", "miou_exit_2"} <= outcome.after.keys()
    own = net.own_parameters()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    of_heads = {name for name in before if name in own or name.startswith("exit_heads.")}
    widths = [group for group in outcome.groups if group["group"] == "exits"]
    assert widths[0]["tensors"] == len(own)  # none of them frozen, though heads are not confident yet
    assert changed & of_heads and bool(changed - of_heads) == (train == "all")
    again: Any = cs.load(outcome.network, Segmenter())
    image = torch.rand(1, 3, 48, 64)
    assert all(torch.equal(one, other) for one, other in zip(again(image), net(image), strict=True))


# -- on data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[cs.AnytimeModel, EvaluationReport, Path]]:
    folder, net = tmp_path_factory.mktemp("report"), with_exits()
    told = cs.evaluate(
        net,
        "scene:2,height=48,width=64",
        thresholds=[0.2, (0.2, 0.17)],
        rounds=1,
        output=folder / "report.json",
        picture=folder / "curve.png",
    )
    assert isinstance(told, EvaluationReport)
    yield net, told, folder


def test_every_exit_has_a_row_with_accuracy_work_and_time(
    report: tuple[cs.AnytimeModel, EvaluationReport, Path],
) -> None:
    net, told, folder = report
    assert [(row.threshold, row.exit) for row in told.rows] == [
        (threshold, exit) for threshold in (None, 0.2, (0.2, 0.17)) for exit in (1, 2, 3)
    ]
    whole = [row for row in told.rows if row.threshold is None]
    assert whole[-1].macs_of_whole == 1 and all(row.milliseconds for row in told.rows)
    for row, full in zip(told.rows, whole * 3, strict=True):
        assert row.macs <= full.macs and row.miou is not None
    data = cs.open_data(DATA, "test")
    metrics = cs.SegmentationMetrics(len(data.classes))
    for image, labels in (data[0], data[1]):
        with torch.no_grad():
            scores = net(normalise(image[None], source_of(net)), threshold=1.0)[1]
        metrics.update(scores.argmax(1), labels[None])
    assert abs(metrics.compute()["miou"] - (whole[1].miou or 0)) < 1e-3
    assert json.loads((folder / "report.json").read_text())["rows"][0]["exit"] == 1
    assert (folder / "curve.png").stat().st_size > 1000


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="no masks"):
        cs.evaluate(with_exits(), "scene:1", masks=["edges"])
    with pytest.raises(cs.InvalidInput, match="belong to networks with exits"):
        cs.evaluate(Segmenter(), "scene:1", thresholds=[0.5])
    other = cs.anytime(Segmenter(3).eval(), ["backbone.1"])
    with pytest.raises(cs.InvalidInput, match="has 3 classes"):
        cs.evaluate(other, "scene:1,height=48,width=64")


def test_a_deadline_gives_the_best_prediction_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net, image = with_exits(1.0), torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        every = net(image)
        best, number = net.until(image, milliseconds=1e9)
        assert number == 3 and torch.equal(best, every[2])
        first, number = net.until(image, milliseconds=0)
        assert number == 1 and torch.equal(first, every[0])
        # A clock by which the first exit is there at 1 ms and the second at 2, of which the work says 1.5 more.
        ticks = iter((0.0, 0.001, 0.002, 0.003, 0.004))
        monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
        work = [exit.dense for exit in net.macs(image)]
        assert net.until(image, milliseconds=work[1] / work[0] + 1e-6)[1] == 2


# -- on the command line -------------------------------------------------------------------------------


EXITS = "--method anytime --set exits=backbone.1,backbone.2 --set hidden=4 --set threshold=0.2 --set fill=interpolated"
OF_EXITS = "--set train=exits --set validation_split= --trust"


def test_the_commands_convert_train_evaluate_and_run(command_line: Run, tmp_path: Path) -> None:
    model = ["--model", "networks:segmenter"]
    exits = EXITS.split()
    convert = ("--size", "48x64", "--rounds", "1", "-o", "net.safetensors", "--json")
    made = command_line("convert", *model, *exits, *convert)
    assert made.code == 0, made.err
    assert made.json["error"] < 1e-5 and len(made.json["sides"]) == 3
    training = ("--data", DATA, "--output", "run", *OF_EXITS.split())
    trained = command_line("finetune", "net.safetensors", *training, *ONE_STEP_BY_COMMAND, "--json")
    assert trained.code == 0, trained.err
    measured = ("--data", DATA, "--threshold", "0.2,0.19", "--rounds", "0", "--trust", "--json")
    told = command_line("eval", "run/net.safetensors", *measured)
    assert told.code == 0, told.err
    assert [row["threshold"] for row in told.json["rows"]] == [None] * 3 + [[0.2, 0.19]] * 3
    write_picture(Image.new("RGB", (64, 48)), tmp_path / "picture.png")
    picture = str(tmp_path / "picture.png")
    ran = command_line("run", "run/net.safetensors", picture, "--set", "until=1", "--trust", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["images"][0]["exit"] in (1, 2, 3)
    assert command_line("convert", *model, "--method", "later").code == 1
