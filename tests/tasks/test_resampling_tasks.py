"""Networks whose input is sampled in training, on data, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, slow
from networks import Segmenter
from torch import nn
from training import DATA, DRAW, QUICK, TARGETS, Scenes, batch, with_sampler

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import source_of
from cadsurgery.finetune import Settings, fit
from cadsurgery.finetune.objectives import make_objective
from cadsurgery.masks import labelled
from cadsurgery.methods.resampling.sample_sides import WHOLE
from cadsurgery.resampling import boundaries, sample, target_locations

# -- training ------------------------------------------------------------------------------------------


def test_locations_are_learned_by_their_mean_squared_distance() -> None:
    net, (inputs, labels) = with_sampler(smoothness=0.5), batch()
    nn.init.normal_(net.sampler.mean_locations)  # type: ignore[arg-type]
    found = make_objective("locations", net, {})(inputs, labels, DRAW)
    wanted = target_locations(boundaries(labels, TARGETS), 8, 0.5).float()
    predicted = net.sampler.predict(inputs[0])  # type: ignore[operator]
    torch.testing.assert_close(found["loss"], (predicted - wanted).square().mean())
    found["loss"].backward()
    assert all(parameter.grad is None for parameter in net.network.parameters())
    assert all(parameter.grad is not None for parameter in net.sampler.parameters())


@pytest.mark.parametrize("sampler", ["learned", "labels"])
def test_the_network_learns_from_the_labels_that_are_sampled(sampler: str) -> None:
    net, (inputs, labels) = with_sampler(sampler), batch()
    found = make_objective("sampled", net, {})(inputs, labels, DRAW)
    with labelled(labels):
        places = net.sampler.eval()(inputs[0])
    scores = net.network(sample(inputs[0], places, 32))
    wanted = sample(labels.unsqueeze(1), places, 32)[:, 0]
    torch.testing.assert_close(found["loss"], F.cross_entropy(scores, wanted, ignore_index=255))
    found["loss"].backward()
    assert all(parameter.grad is None for parameter in net.sampler.parameters())


@pytest.mark.parametrize("objective", ["locations", slow("")])
def test_training_changes_the_one_and_leaves_the_other(objective: str, tmp_path: Path) -> None:
    net = with_sampler()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    outcome = fit(net, Scenes(), Settings(**QUICK, objective=objective), output=tmp_path, device="cpu")
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    of_sampler = {name.startswith("location_sampler.") for name in changed}
    assert changed and of_sampler == {bool(objective)}
    trained = {str(group["group"]) for group in outcome.groups} - {"fixed"}
    assert trained == ({"sampler"} if objective else {"backbone", "classifier"})
    again: Any = cs.load(outcome.network, Segmenter())
    image = torch.rand(1, 3, 48, 64)
    assert torch.equal(again(image), net(image))


# -- on data -------------------------------------------------------------------------------------------


def test_a_sampled_input_is_evaluated_beside_equal_distances_and_the_whole_image(tmp_path: Path) -> None:
    net = with_sampler("labels")
    told = cs.evaluate(net, DATA, rounds=1, output=tmp_path / "report.json", picture=tmp_path / "curve.png")
    assert [row.sampler for row in told.rows] == ["labels", "uniform", WHOLE]
    data = cs.open_data(DATA, "test")
    for row, other in zip(told.rows, (net, with_sampler("uniform"), Segmenter().eval()), strict=True):
        if row.sampler == WHOLE:
            other.load_state_dict(net.network.state_dict())
        metrics = cs.SegmentationMetrics(len(data.classes))
        for image, labels in (data[0], data[1]):
            with torch.no_grad(), labelled(labels[None]):
                metrics.update(other(normalise(image[None], source_of(net))).argmax(1), labels[None])
        assert abs(metrics.compute()["miou"] - (row.miou or 0)) < 1e-3
        assert row.milliseconds and row.macs > 0
    assert told.rows[0].macs == told.rows[1].macs and told.compared.more["targets"] == ("pole", "car")
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["sampler"] == "labels"
    assert (tmp_path / "curve.png").stat().st_size > 1000
    with pytest.raises(cs.InvalidInput, match="no masks and no thresholds"):
        cs.evaluate(net, DATA, masks=["edges"])


# -- on the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["locations", "network"])
def test_the_published_settings_are_settings(name: str) -> None:
    settings = Settings.read(ROOT / "recipes" / "resampling_mobilenetv2" / "config" / f"{name}.json")
    assert (settings.lr, settings.weight_decay, settings.crop) == (0.007, 4e-5, 1024)
