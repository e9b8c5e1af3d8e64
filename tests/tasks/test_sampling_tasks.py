"""Networks with gates in training and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, covering
from networks import ResidualSegmenter
from PIL import Image
from training import DATA, ONE_STEP_BY_COMMAND, Scenes, batch, with_gates
from training import QUICK as ONE_STEP

import cadsurgery as cs
from cadsurgery.data.images import write_picture
from cadsurgery.finetune import Settings, fit
from cadsurgery.finetune.groups import make_groups
from cadsurgery.finetune.learning_rates import Draw
from cadsurgery.finetune.objectives import make_objective
from cadsurgery.methods.sampling.gates import Opened
from cadsurgery.support.divergence import divergence
from cadsurgery.tasks.bench import bench
from cadsurgery.tasks.bench_report import MethodBench
from cadsurgery.tasks.evaluation import evaluate
from cadsurgery.tasks.open import example_batch

QUICK: dict[str, Any] = {**ONE_STEP, "steps": 3, "optimizer": "adamw"}
DRAW = Draw(3, 2, (0, 1))


class Unlabelled(Scenes):
    """Images alone count."""

    is_labelled = False


def test_the_loss_is_that_of_the_labels_and_how_open_gates_are() -> None:
    net, (inputs, labels) = with_gates(), batch()
    net.training = True
    found = make_objective("sparse", net, {"weight": 0.3})(inputs, labels, DRAW)
    assert (net.seed, net.step) == (3, 3)
    net.step = 2
    for gate in net.gates:
        gate.temperature.fill_(1.0)
    output = net(*inputs)
    torch.testing.assert_close(found["entropy"], F.cross_entropy(output, labels))
    torch.testing.assert_close(found["loss"], found["entropy"] + 0.3 * net.sparse_loss())
    assert float(found["open"]) == pytest.approx(0.952574, abs=1e-5)


def test_without_labels_it_learns_from_the_dense_network() -> None:
    net, (inputs, _) = with_gates(), batch()
    net.training = True
    found = make_objective("sparse", net, {"weight": 0.0, "decay": 0.5})(inputs, None, DRAW)
    assert all(float(gate.temperature) == 0.5 for gate in net.gates)
    with torch.no_grad():
        dense = net.dense(*inputs)
        net.step = 2
        for gate in net.gates:
            gate.temperature.fill_(1.0)
        torch.testing.assert_close(found["loss"].detach(), divergence(dense, net(*inputs)).mean())
    found["loss"].backward()
    assert all(gate.bias.grad is not None for gate in net.gates)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": -1.0}, "at least 0"),
        ({"divergence": -1.0}, "at least 0"),
        ({"temperature": 0.0}, "above 0"),
        ({"decay": 0.0}, "decay in 0..1"),
        ({"decay": 1.5}, "decay in 0..1"),
        ({"start": 0.0}, "start above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words):
        make_objective("sparse", with_gates(), options)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_of_adamw_moves_no_gate_by_more_than_its_bias(optimizer: str) -> None:
    net = with_gates()
    groups = make_groups(net.own_parameters(), net, Settings(optimizer=optimizer, train="gates"))
    parts = [(group.factor, parameter) for group in groups for parameter in group.parameters.values()]
    assert {parameter for _, parameter in parts} == set(net.own_parameters().values())
    lengths = [parameter.numel() if optimizer == "adamw" else 1 for _, parameter in parts]
    assert [factor for factor, _ in parts] == [1 / length for length in lengths]
    assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize(("train", "data"), covering(["gates", "all"], [Scenes, Unlabelled]))
def test_training_moves_what_it_should_and_writes_a_network(
    train: str, data: type[Scenes], tmp_path: Path
) -> None:
    net = with_gates()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    outcome = fit(net, data(), Settings(**QUICK, train=train), output=tmp_path)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    own = {name for name in before if name.startswith("sampling_gates.")}
    assert own <= moved
    assert (moved == own) == (train == "gates")
    assert all(float(gate.temperature) == pytest.approx(0.99998**3) for gate in net.gates)
    again = cs.load(outcome.network, ResidualSegmenter())
    (x,), _ = batch()
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_a_run_that_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = with_gates(), with_gates()
    settings = Settings(**QUICK, train="gates", objective_options={"start": 0.5, "decay": 0.9})
    fit(whole, Unlabelled(), settings, output=tmp_path / "whole")
    assert all(float(gate.temperature) == pytest.approx(0.5 * 0.9**3) for gate in whole.gates)

    class Stopped(Exception):
        pass

    def stop(row: Any) -> None:
        if row["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        fit(parts, Unlabelled(), settings, output=tmp_path / "parts", on_step=stop)
    fit(parts, Unlabelled(), settings, output=tmp_path / "parts")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
    )


@pytest.mark.slow
def test_the_command_line_converts_trains_and_runs(command_line: Run, tmp_path: Path) -> None:
    model = ("--model", "training:residual_segmenter")
    told = ("--size", "48x64", "--rounds", "1", "--json", "--output", "net.safetensors")
    made = command_line("convert", *model, "--method", "sampling", "--set", "grid=5", *told)
    assert made.code == 0, made.err
    assert made.json["is_verified"] and len(made.json["sides"]) == 5
    named = command_line(
        "convert", *model, "--method", "sampling", "--set", "where=backbone.1", "--rounds", "0"
    )
    assert named.code == 0 and "1 branches, 2 gates" in named.out and "bit for bit" in named.out
    training = (
        "--data",
        DATA,
        "--output",
        "run",
        "--set",
        "train=gates",
        "--set",
        "validation_split=",
        "--trust",
    )
    trained = command_line("finetune", "net.safetensors", *training, *ONE_STEP_BY_COMMAND, "--json")
    assert trained.code == 0, trained.err
    write_picture(Image.new("RGB", (64, 48)), tmp_path / "picture.png")
    picture = str(tmp_path / "picture.png")
    ran = command_line("run", "run/net.safetensors", picture, "--trust", "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["images"][0]["density"] <= 1
    file, quickly = ("run/net.safetensors", "--trust"), ("--rounds", "1", "--json")
    timed = command_line("bench", "--model", *file, "--size", "48x64", "--fractions", "0.5", *quickly)
    assert timed.code == 0 and len(timed.json["rows"]) == 5, timed.err
    judged = command_line("eval", *file, "--data", DATA, *quickly)
    assert judged.code == 0 and [row["setting"] for row in judged.json["rows"]] == ["dense", "its gates"]
    for refused, says in (
        (("bench", "--model", "net.safetensors", "--trust", "--fractions", "2"), "0 to 1"),
        (("bench", *model, "--model", "net.safetensors", "--trust"), "run of its own"),
        (("eval", "net.safetensors", "--data", DATA, "--trust", "--mask", "edges"), "no masks"),
        (("eval", "net.safetensors", "--data", "images:.", "--trust"), "labels"),
        (("finetune", "net.safetensors", *training, "--mask", "edges"), "exits, with gates"),
        (("convert", *model, "--method", "sampling", "--set", "where=nothing"), "nothing"),
    ):
        found = command_line(*refused)
        assert found.code == 1 and says in found.err


def some_closed() -> cs.SampledModel:
    """A network whose gates are half open."""
    net = with_gates()
    torch.manual_seed(1)
    for gate in net.gates:
        gate.weight.data.normal_()
        gate.bias.data.zero_()
    return net


def test_bench_measures_gates_between_all_closed_and_all_open(command_line: Run, tmp_path: Path) -> None:
    net = some_closed()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    told: dict[str, Any] = {"size": (33, 45), "batch": 2, "rounds": 1, "threads": 1}
    report = bench(net, fractions=(0.5,), picture=tmp_path / "bench.png", output=tmp_path / "rows", **told)
    assert isinstance(report, MethodBench)
    dense, own, closed, half, whole = report.rows
    images = torch.cat([example_batch(None, None, (33, 45), seed) for seed in range(2)])
    assert closed.macs < half.macs < whole.macs and closed.macs < own.macs < whole.macs
    assert whole.macs > dense.macs  # by the gates
    assert closed.line == closed.milliseconds and whole.line == whole.milliseconds and dense.line is None
    assert own.macs == net.optimize().macs(images).total
    lines = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [line["side"] for line in lines] == [row.side for row in report.rows]
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert net.score_override is None and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    cs.save(net, tmp_path / "net.safetensors")
    file = str(tmp_path / "net.safetensors")
    with pytest.raises(cs.CadError):  # it was not built by name
        bench(file, **told)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_gates_are_opened_at_the_share_asked_for(density: float) -> None:
    net, (x,) = with_gates(), batch()[0]
    net.grid, net.score_override = 0, Opened(density)
    net.eval()(x)
    for share in net.shares.values():
        assert abs(float((share > 0).float().mean()) - density) <= 1 / share.numel()
    first = {name: share.clone() for name, share in net.shares.items()}
    net(x)
    assert all(torch.equal(first[name], share) for name, share in net.shares.items())
    net.score_override = None
    net(x)
    assert all(bool((share > 0).all()) for share in net.shares.values())


def test_impossible_openings_are_refused() -> None:
    with pytest.raises(cs.InvalidInput, match="of the positions"):
        Opened(1.5)


def test_evaluation_sets_gates_beside_the_dense_network(tmp_path: Path) -> None:
    net, output = some_closed(), tmp_path / "figures.json"
    report = evaluate(net, DATA, rounds=1, output=output, picture=tmp_path / "eval.png")
    assert report.images == 2
    dense, gated = report.rows
    assert dense.density == 1 and 0 < gated.density < 1 and gated.macs < dense.macs
    assert all(row.milliseconds for row in report.rows)
    assert json.loads(output.read_text())["rows"][1]["density"] == gated.density
    assert (tmp_path / "eval.png").stat().st_size > 0
    whole = evaluate(with_gates(), DATA, rounds=0)
    first, opened = whole.rows
    assert first.iou == opened.iou == dense.iou and opened.density == 1 and opened.milliseconds is None
