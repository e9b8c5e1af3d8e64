"""Networks with gates in training and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, randomise
from PIL import Image
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import write_picture
from cadsurgery.finetune import Settings, fit
from cadsurgery.finetune.objectives import make_objective
from cadsurgery.finetune.schedule import Draw
from cadsurgery.support.divergence import divergence

QUICK: dict[str, Any] = {
    **{"steps": 3, "batch": 2, "crop": 0, "jitter": 0.0, "flip": False, "workers": 0, "validate_every": 2},
    **{"lr": 0.01, "save_every": 1, "optimizer": "adamw"},
}
DRAW = Draw(3, 2, (0, 1))
CLASSES = 12
DATA = "scene:2,height=48,width=64"


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.two = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(self.one(x)))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), Residual(8), Residual(8))
        self.classifier = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.classifier(self.backbone(x)), x.shape[2:], mode="bilinear")


class Pictures:
    """Random images, with labels or without."""

    name = "random"

    def __init__(self, is_labelled: bool) -> None:
        self.is_labelled = is_labelled

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int, /) -> tuple[tuple[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 33, 45, generator=generator)
        return (image,), torch.randint(0, CLASSES, (33, 45), generator=generator)


def make() -> nn.Module:
    """A network by `module:function`."""
    torch.manual_seed(0)
    return randomise(Segmenter())


def network() -> cs.SampledModel:
    return cs.sample(make())


def batch() -> tuple[tuple[Tensor, ...], Tensor]:
    pairs = [Pictures(True)[place] for place in range(2)]
    return (torch.stack([one[0] for one, _ in pairs]),), torch.stack([labels for _, labels in pairs])


def test_the_loss_is_that_of_the_labels_and_how_open_gates_are() -> None:
    net, (inputs, labels) = network(), batch()
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
    net, (inputs, _) = network(), batch()
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
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words):
        make_objective("sparse", network(), options)


def test_what_has_no_gates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="has no gates"):
        make_objective("sparse", Segmenter(), {})
    with pytest.raises(cs.InvalidInput, match="network with gates"):
        fit(Segmenter(), Pictures(True), Settings(**QUICK, train="gates"), output=tmp_path)
    with pytest.raises(cs.InvalidInput, match="optimised"):
        fit(network().optimize(), Pictures(True), Settings(**QUICK), output=tmp_path)


@pytest.mark.parametrize("is_labelled", [True, False])
@pytest.mark.parametrize("train", ["gates", "all"])
def test_training_moves_what_it_should_and_writes_a_network(
    train: str, is_labelled: bool, tmp_path: Path
) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    outcome = fit(net, Pictures(is_labelled), Settings(**QUICK, train=train), output=tmp_path)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    own = {name for name in before if name.startswith("sampling_gates.")}
    assert own <= moved
    assert (moved == own) == (train == "gates")
    assert all(float(gate.temperature) == pytest.approx(0.99998**3) for gate in net.gates)
    again = cs.load(outcome.network, Segmenter())
    (x,), _ = batch()
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_a_run_that_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = network(), network()
    settings = Settings(**QUICK, train="gates", objective_options={"decay": 0.9})
    fit(whole, Pictures(False), settings, output=tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(row: Any) -> None:
        if row["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        fit(parts, Pictures(False), settings, output=tmp_path / "parts", on_step=stop)
    fit(parts, Pictures(False), settings, output=tmp_path / "parts")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
    )


def test_the_command_line_converts_trains_and_runs(command_line: Run, tmp_path: Path) -> None:
    model = ("--model", "test_sampling_tasks:make")
    told = ("--size", "48x64", "--rounds", "1", "--json", "--output", "net.safetensors")
    made = command_line("convert", *model, "--method", "sampling", "--grid", "5", *told)
    assert made.code == 0, made.err
    assert made.json["is_verified"] and len(made.json["sides"]) == 5
    named = command_line("convert", *model, "--method", "sampling", "--where", "backbone.1", "--rounds", "0")
    assert named.code == 0 and "1 branches, 2 gates" in named.out and "bit for bit" in named.out
    quick = ("--steps", "1", "--batch", "2", "--crop", "0", "--workers", "0", "--device", "cpu")
    training = ("--data", DATA, "--output", "run", "--train", "gates", "--validation-split", "", "--trust")
    trained = command_line("finetune", "net.safetensors", *training, *quick, "--json")
    assert trained.code == 0, trained.err
    write_picture(Image.new("RGB", (64, 48)), tmp_path / "picture.png")
    picture = str(tmp_path / "picture.png")
    ran = command_line("run", "run/net.safetensors", picture, "--trust", "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["images"][0]["density"] <= 1
    for refused, says in (
        (("finetune", "net.safetensors", *training, "--mask", "edges"), "exits or gates"),
        (("convert", *model, "--method", "sampling", "--where", "nothing"), "nothing"),
    ):
        found = command_line(*refused)
        assert found.code == 1 and says in found.err
