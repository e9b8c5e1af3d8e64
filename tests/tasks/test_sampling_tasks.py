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
from training import DATA, Scenes, batch, with_gates
from training import QUICK as ONE_STEP

import cadsurgery as cs
from cadsurgery.finetune import Settings, fit
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
        ({"temperature": 0.0}, "above 0"),
        ({"decay": 1.5}, "decay in 0..1"),
        ({"start": 0.0}, "start above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words):
        make_objective("sparse", with_gates(), options)


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
