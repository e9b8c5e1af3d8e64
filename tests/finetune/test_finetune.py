"""Training: what is minimised and moved, exact resumption, files, refusals, the command."""

from __future__ import annotations

import copy
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import ROOT, TESTS, Run, images, slow, some
from networks import Segmenter, build
from safetensors.torch import load_file
from torch import Tensor, nn
from training import SIZE, Scenes, adaptive, flip

import cadsurgery as cs
from cadsurgery.finetune import Draw, Objective, Row, Settings, evaluate, fit, list_objectives
from cadsurgery.finetune.balance import RARE, class_weights
from cadsurgery.finetune.groups import make_groups, stem_of
from cadsurgery.finetune.learning_rates import SampleOrder, learning_rate
from cadsurgery.finetune.objectives import AnyBudget, Divergence, Mixed, cross_entropy, miss, supervised
from cadsurgery.masks import FineMapSpec, MaskProvider
from cadsurgery.support.divergence import divergence

pytest.importorskip("accelerate")
QUICK = Settings(steps=6, batch=2, lr=0.05, workers=0, save_every=3, validate_every=2)


def train(net: nn.Module, output: Path, settings: Settings = QUICK, **options: Any) -> Any:
    """A run on generated scenes, on the CPU."""
    options = {"data": Scenes(), "augment": flip, "device": "cpu", **options}
    return fit(net, options.pop("data"), settings, output=output, **options)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    found = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


class Stop(Exception):
    pass


def stop_after(step: int) -> Callable[[Row], None]:
    def on_step(row: Row) -> None:
        if row["step"] == step:
            raise Stop

    return on_step


# Resumption: a run that was stopped goes on to the same weights, bit for bit.


@pytest.mark.parametrize(
    "changes",
    some(
        [
            {},
            {"optimizer": "adamw", "lr": 0.002, "ema": 0.7, "clip": 0.5},
            {"objective": "any-budget", "accumulate": 2, "precision": "bf16"},
            {"objective": "any-budget", "objective_options": {"teacher": "self"}, "batch_norm": "frozen"},
        ]
    ),
    ids=["mixed", "adamw", "any-budget", "self"],
)
def test_a_run_that_failed_goes_on_as_if_it_had_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = replace(QUICK, **changes)
    whole = adaptive()
    train(whole, tmp_path / "whole", settings)
    parted = adaptive()
    with pytest.raises(Stop):  # after step 4; the checkpoint is of step 3
        train(parted, tmp_path / "parted", settings, on_step=stop_after(4))
    outcome = train(parted, tmp_path / "parted", settings)
    assert outcome.resumed == 3
    assert_equal(tensors(whole), tensors(parted))
    for name in ("net", "checkpoint", "start"):
        file = f"{name}.safetensors"
        assert_equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "parted" / file))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parted")
    assert [row["step"] for row in rows(tmp_path / "whole")] == list("123456")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run_process(folder: Path, *arguments: object, launcher: tuple[str, ...] = ()) -> int:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    script = (str(Path(__file__).with_name("finetune_process.py")), str(folder), *map(str, arguments))
    command = [sys.executable, *launcher, *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


@pytest.mark.slow
def test_a_killed_process_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    assert run_process(tmp_path / "whole", 2) == 0
    assert run_process(tmp_path / "killed", 2, 3) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "net.safetensors").exists()
    assert run_process(tmp_path / "killed", 2) == 0
    for name in ("net", "checkpoint", "start"):
        file = f"{name}.safetensors"
        assert_equal(load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file))
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Also where images have other numbers of labelled pixels."""
    assert run_process(tmp_path / "no-dropout-one", 4) == 0
    two = tmp_path / "no-dropout-two"
    assert run_process(two, 2, launcher=TORCHRUN) == 0
    one, both = rows(tmp_path / "no-dropout-one"), rows(two)
    assert [row["step"] for row in both] == list("123456")
    for name in ("loss", "active_fraction"):
        ours, theirs = ([float(row[name]) for row in found] for found in (one, both))
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = load_file(tmp_path / "no-dropout-one/net.safetensors"), load_file(two / "net.safetensors")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    train(adaptive(), tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for mask, changes, words in (
        ("edges", {"settings": replace(QUICK, steps=7)}, "settings.steps: 6, now 7"),
        ("edges", {"data": Scenes(4)}, "data.samples: 5, now 4"),
        ("edges:threshold=0.3", {}, "network.mask"),
        ("edges", {"augment": None}, "data.augment"),
    ):
        with pytest.raises(cs.InvalidInput, match="holds another run") as refusal:
            train(adaptive(mask), tmp_path, **changes)
        assert words in str(refusal.value)
    with pytest.raises(cs.FileError, match="holds a run already"):
        train(adaptive(), tmp_path, resume=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


# What moves, and what does not.


@pytest.mark.smoke
def test_training_lowers_the_loss_and_leaves_a_network_that_loads(tmp_path: Path) -> None:
    net = adaptive()
    outcome = train(net, tmp_path, replace(QUICK, steps=30))
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert not net.training
    loaded = cs.load(outcome.network, model=Segmenter())
    image = torch.randn(2, 3, 37, 50)
    assert torch.equal(loaded(image), net(image))


def test_accumulated_passes_are_one_larger_batch(tmp_path: Path) -> None:
    plain = replace(QUICK, batch_norm="frozen", steps=3)
    nets = []
    for name, batch, accumulate in (("one", 4, 1), ("two", 2, 2)):
        net = adaptive()
        net.classifier[0].p = 0.0
        train(net, tmp_path / name, replace(plain, batch=batch, accumulate=accumulate))
        nets.append(tensors(net))
    for name, value in nets[0].items():
        torch.testing.assert_close(value, nets[1][name], rtol=1e-4, atol=1e-6)


def test_the_average_of_the_weights_is_what_is_saved(tmp_path: Path) -> None:
    net, seen = adaptive(), []
    outcome = train(
        net,
        tmp_path,
        replace(QUICK, ema=0.5),
        on_step=lambda row: seen.append(net.classifier[1].weight.clone()),
    )
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.5 * expected + 0.5 * weight
    assert not torch.allclose(expected, seen[-1])
    torch.testing.assert_close(load_file(outcome.network)["classifier.1.weight"], expected)
    torch.testing.assert_close(net.classifier[1].weight, expected)


def test_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    net = adaptive()
    before = tensors(net)
    train(net, tmp_path, replace(QUICK, batch_norm="frozen"))
    after = tensors(net)
    statistics = [name for name in before if "running" in name]
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["backbone.3.1.weight"], after["backbone.3.1.weight"])


def test_a_frozen_stem_is_left_as_it_is_and_the_region_is_not(tmp_path: Path) -> None:
    net = adaptive()
    before = tensors(net)
    train(net, tmp_path, replace(QUICK, freeze="stem"))
    same = {name for name, value in tensors(net).items() if torch.equal(value, before[name])}
    stem = {name for name in before if name.startswith(("backbone.0.", "backbone.1."))}
    assert same == stem
    assert set(filter(stem_of(net), before)) == stem
    assert all(parameter.requires_grad for parameter in net.parameters())  # as it was before


class Scored(MaskProvider):
    """A mask with parameters, whose decisions carry no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor, features: Tensor, grid: FineMapSpec) -> Tensor:
        return features.mean(1) > self.bias


class Gated(Objective):
    """An objective of a test, which gives the mask a gradient and has a parameter of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.extra = nn.Parameter(torch.ones(1))

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor, draw: Draw) -> dict[str, Tensor]:
        loss = supervised(self.net(*inputs), labels)
        return {"loss": loss + (self.net.mask.bias - 1).square().sum() + self.extra.square().sum()}


def test_an_objective_of_a_users_own_is_trained_and_resumed_with_its_parameters(tmp_path: Path) -> None:
    nets = []
    for name in ("whole", "parted"):
        nets.append(adaptive(Scored()))
        if name == "parted":
            with pytest.raises(Stop):
                train(nets[-1], tmp_path / name, objective=Gated, on_step=stop_after(4))
        outcome = train(nets[-1], tmp_path / name, objective=Gated)
    assert 0 < nets[0].mask.bias.item() < 1
    assert_equal(tensors(nets[0]), tensors(nets[1]))
    assert load_file(outcome.checkpoint)["weights.extra"].item() < 1
    assert [group["group"] for group in outcome.groups] == ["classifier", "backbone", "mask"]


def test_inputs_in_tuples_reach_the_network_as_they_are(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 6, 1)

        def forward(self, image: Tensor, scale: Tensor) -> Tensor:
            seen.append(scale)
            return self.head(image * scale[:, None, None, None])

    class Pairs(Scenes):
        def __getitem__(self, index: int) -> Any:
            image, labels = self.items[index]
            return (image, torch.tensor(float(index))), labels

    seen: list[Tensor] = []
    train(Two(), tmp_path, data=Pairs(), augment=None)
    assert {float(value) for scales in seen for value in scales} == set(range(5))


# Schedule and samples.


def test_the_learning_rate_falls_as_published() -> None:
    settings = Settings()
    rates = [learning_rate(step, 0.1, settings) for step in range(settings.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[15_000] == pytest.approx(0.01 * 0.5**0.9)
    assert all(later <= sooner for sooner, later in pairwise(rates))
    assert learning_rate(settings.steps - 1, 1e-4, settings) == settings.lr_floor


@pytest.mark.parametrize("samples", [1, 5, 7, 24])
def test_every_epoch_has_every_sample_once_however_it_is_shared_out(samples: int) -> None:
    one = SampleOrder(samples, seed=3, batch=4, accumulate=1, processes=1)
    two = SampleOrder(samples, seed=3, batch=1, accumulate=2, processes=2)
    order = [one.index(position) for step in range(samples) for position in one.positions(step, 0, 0)]
    for epoch in range(4):
        assert sorted(order[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    for step in range(samples):
        shared = [p for part in (0, 1) for process in (0, 1) for p in two.positions(step, part, process)]
        assert tuple(shared) == one.positions(step, 0, 0)
    if samples > 5:
        assert order[:samples] != order[samples : 2 * samples]


# Parameter groups.


class Shared(nn.Module):
    """A weight used by both sides, and one outside all children."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (Segmenter, "classifier."),
        (adaptive, "classifier."),
        (lambda: build("fcn_resnet50", aux_loss=True, num_classes=4), ("classifier.", "aux_classifier.")),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Dropout()), "1."),
        (Shared, "head.bias"),
        (lambda: adaptive(Scored()), "classifier."),
    ],
)
def test_every_parameter_is_in_exactly_one_group(make: Callable[[], nn.Module], head: Any) -> None:
    net = make()
    groups = {group.name: group for group in make_groups(dict(net.named_parameters()), net, Settings())}
    listed = [name for group in groups.values() for name in group.parameters]
    assert sorted(listed) == sorted(dict(net.named_parameters()))
    assert set(groups["classifier"].parameters) == {name for name in listed if name.startswith(head)}
    assert set(groups["mask"].parameters if "mask" in groups else ()) == {n for n in listed if "_mask" in n}
    assert groups["classifier"].factor == 1 and groups["backbone"].factor == 0.1


# Objectives.


def test_ignored_pixels_count_for_nothing() -> None:
    logits = torch.randn(2, 3, 5, 7, requires_grad=True)
    labels = torch.randint(0, 3, (2, 5, 7))
    labels[0, :3] = 255
    kept = (labels != 255).flatten()
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)[kept]
    expected = torch.nn.functional.cross_entropy(rows, labels.flatten()[kept])
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    nothing = cross_entropy(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()


def test_auxiliary_outputs_weigh_half() -> None:
    logits, aux = torch.randn(2, 2, 3, 8, 8).unbind()
    labels = torch.randint(0, 3, (2, 8, 8))
    parts = cross_entropy(logits, labels), cross_entropy(aux, labels)
    torch.testing.assert_close(supervised({"out": logits, "aux": aux}, labels), parts[0] + 0.5 * parts[1])
    torch.testing.assert_close(supervised(logits, labels), parts[0])
    with pytest.raises(cs.InvalidInput, match="class scores"):
        supervised({"boxes": logits}, labels)


def draws(count: int, images: int = 2) -> list[Draw]:
    return [Draw(0, step, tuple(range(step * images, (step + 1) * images))) for step in range(count)]


def test_budgets_are_drawn_from_the_range_and_often_its_ends() -> None:
    objective = AnyBudget(adaptive(), low=0.1, high=0.8, extremes=0.4)
    found = [objective.fraction(draw) for draw in draws(200)]
    assert all(0.1 <= fraction <= 0.8 for fraction in found)
    assert all(40 < 2 * found.count(end) < 120 for end in (0.1, 0.8))
    assert found == [objective.fraction(draw) for draw in draws(200)]
    listed = AnyBudget(adaptive(), fractions=[0.2, 0.5, 0.6])
    assert {listed.fraction(draw) for draw in draws(100)} == {0.2, 0.5, 0.6}


@pytest.mark.parametrize("ranking", ["own", "random", "edges:threshold=0.1", ("random", "own")])
def test_the_share_kept_is_the_budget_whatever_ranks_the_patches(ranking: Any) -> None:
    net = adaptive()
    objective = AnyBudget(net, fractions=[0.25], ranking=ranking)
    batch, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    maps = []
    for draw in draws(2):
        assert objective((batch,), labels, draw)["active_fraction"] == pytest.approx(0.25)
        objective.teacher = None
        with torch.no_grad():
            net(batch, mask=cs.Budget(objective._ranking(draw), 0.25))
        maps.append(net.levels)
    changes = not torch.equal(*maps)
    assert changes == ("random" in ranking)


@pytest.mark.parametrize("teacher", ["initial", "self"])
def test_the_teacher_is_the_dense_high_network(teacher: str) -> None:
    net = adaptive().eval()
    objective = AnyBudget(net, fractions=[1.0], extremes=0.0, teacher=teacher)
    batch, labels = (torch.randn(2, 3, *SIZE),), torch.zeros(2, *SIZE, dtype=torch.long)
    draw = draws(1)[0]
    assert objective(batch, labels, draw)["divergence"] < 1e-6
    with torch.no_grad():
        net.classifier[1].weight.mul_(3)
    assert (objective(batch, labels, draw)["divergence"] < 1e-6) == (teacher == "self")
    net.train()
    objective(batch, labels, draw)["loss"].backward()
    assert net.training and all(p.grad is not None for p in net.parameters())
    assert not any(name.startswith("teacher") for name in objective.own_tensors())


# Refusals.


class Wrong(Scenes):
    """One sample has a label too many, or is otherwise not as it should be."""

    def __init__(self, value: Any, classes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.value, self.classes = value, classes

    def __getitem__(self, index: int) -> Any:
        image, labels = self.items[index]
        if index == 3:
            return self.value(image, labels.clone())
        return image, labels


def with_label(value: int) -> Callable[[Tensor, Tensor], Any]:
    def change(image: Tensor, labels: Tensor) -> Any:
        labels[11, 13] = value
        return image, labels

    return change


@pytest.mark.parametrize(("value", "workers"), [(6, 0), slow(-1, 1)])
def test_a_label_without_an_output_is_refused_with_its_place(
    tmp_path: Path, value: int, workers: int
) -> None:
    settings = replace(QUICK, workers=workers)
    with pytest.raises(cs.InvalidInput, match=f"is {value}, but the network has 6 outputs") as refusal:
        train(adaptive(), tmp_path, settings, data=Wrong(with_label(value)), augment=None)
    assert "sample 3 of the data, row 11, column 13" in str(refusal.value)


class Exploding(Mixed):
    """Not a number from a step on, or a finite loss whose gradient is not."""

    in_the_loss = True

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor, draw: Draw) -> dict[str, Tensor]:
        found = super().forward(inputs, labels, draw)
        if self.in_the_loss:
            return {**found, "loss": found["loss"] * (float("nan") if draw.step >= 4 else 1.0)}
        zero = self.net.classifier[1].bias.sum() * 0
        return {**found, "loss": found["loss"] + zero.abs().sqrt()} if draw.step == 5 else found


class Overflowing(Exploding):
    in_the_loss = False


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Exploding, r"loss is nan at step 5[\s\S]*learning rate[\s\S]*of step 3"),
        (Overflowing, "not finite after step 6"),
    ],
)
def test_what_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, objective: type[Objective], words: str
) -> None:
    with pytest.raises(cs.TrainingStopped, match=words):
        train(adaptive(), tmp_path, objective=objective)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in kept.values() if value.is_floating_point())


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    train(adaptive(), tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(cs.FileError, match="not a readable checkpoint"):
        train(adaptive(), tmp_path)


def pooled() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Conv2d(3, 6, 1))


def any_budget(**options: Any) -> dict[str, Any]:
    return {"objective": "any-budget", "objective_options": options}


@pytest.mark.parametrize(
    ("net", "settings", "options", "words"),
    [
        (lambda: adaptive().optimize(), {}, {}, "optimised network"),
        (Segmenter, {"freeze": "stem"}, {}, "needs an adaptive network"),
        (adaptive, {}, {"device": "cdua"}, "cdua"),
        (lambda: Segmenter().requires_grad_(False), {}, {}, "no parameter is left"),
        (adaptive, {"objective": "mixt"}, {}, "did you mean mixed"),
        (adaptive, any_budget(low=0.7, high=0.2), {}, "low is at most high"),
        (adaptive, any_budget(fractions=[0.2, 1.5]), {}, r"0\.\.1"),
        (adaptive, any_budget(teacher="other"), {}, "teacher"),
        (adaptive, any_budget(ranking="edgse"), {}, "edges"),
        (adaptive, any_budget(class_weights=(1, -1, 1, 1, 1, 1)), {}, "at least 0"),
        (adaptive, any_budget(class_weights=(1, 1, 1)), {}, r"3 class_weights for outputs of \(2, 6,"),
        (adaptive, {}, {"validation": lambda net: {"iou": 1.0}}, "neither 'miou'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten()), {}, {}, "class scores"),
        (adaptive, {}, {"data": Wrong(with_label(0), tuple("abcdefgh"))}, "8 classes, but the network has 6"),
        (pooled, {"batch": 1}, {}, "frozen"),
        pytest.param(
            *(adaptive, {"precision": "fp16"}, {}, "bf16"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can"),
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, net: Any, settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(cs.CadError, match=words):
        train(net(), tmp_path, replace(QUICK, **settings), **options)


@pytest.mark.parametrize(
    ("gone", "log", "environment", "words"),
    [
        ("accelerate", "csv", {}, r"pip install 'cadsurgery\[train\]'"),
        ("torch.utils.tensorboard", "tensorboard", {}, r"pip install 'cadsurgery\[train\]'"),
        # What `accelerate launch --cpu --num_processes 2` does without mpirun.
        ("", "csv", {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}, "torchrun"),
    ],
)
def test_what_training_needs_and_is_not_there_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gone: str,
    log: str,
    environment: dict[str, str],
    words: str,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if gone:
        monkeypatch.setitem(sys.modules, gone, None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cs.CadError, match=words):
        train(adaptive(), tmp_path, replace(QUICK, log=log))


def held(folder: Path, text: str | None) -> Path:
    if text is not None:
        (folder / "settings.json").write_text(text)
    return folder / "settings.json"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _: Settings.from_dict({"stesp": 3}), "did you mean steps"),
        (lambda _: Settings.from_dict({"optimizer": "adam"}), "adamw"),
        (lambda _: Settings.from_dict({"steps": 0}), "above 0"),
        (lambda _: Settings.from_dict({"steps": 2.5}), "an integer"),
        (lambda _: Settings.from_dict({"ema": 1.0}), "1 excluded"),
        (lambda _: Settings.from_dict({"scale": [2.0, 0.5]}), "low <= high"),
        (lambda _: Settings.from_dict({"objective": 3}), "a text"),
        *(
            (lambda to, text=text: Settings.read(held(to, text)), "settings.json")
            for text in ("{", "[1]", None)
        ),
        (lambda _: AnyBudget(Segmenter()), "adaptify"),
        (lambda _: AnyBudget(adaptive("all")), "ranks no patch"),
    ],
)
def test_wrong_settings_and_objectives_are_refused(
    call: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(cs.CadError, match=words):
        call(tmp_path)


def test_objectives_are_listed_and_weights_of_zero_count_for_nothing() -> None:
    assert set(list_objectives()) >= {"mixed", "any-budget"} and Mixed(Segmenter()).constants == ()
    assert AnyBudget(adaptive("all"), ranking="random").rankings == ("random",)
    options = {"ranking": "random", "supervision": 0.0, "fractions": (0.3,)}
    found = [AnyBudget(adaptive(), class_weights=weights, **options) for weights in ((0,) * 6, ())]
    weighted, plain = (one((images(2, *SIZE),), None, draws(1)[0])["loss"].item() for one in found)
    assert weighted == 0 < plain


# Validation, logs.


def test_the_best_network_by_validation_is_kept(tmp_path: Path) -> None:
    scores = iter([0.1, 0.4, 0.6, 0.5, 0.5])  # before; after steps 2, 4, 6; at the end
    kept: dict[int, Tensor] = {}
    net = adaptive()
    outcome = train(
        net,
        tmp_path,
        validation=lambda net: {"miou": next(scores)},
        on_step=lambda row: kept.update({int(row["step"] or 0): net.classifier[1].weight.clone()}),
    )
    assert (outcome.before, outcome.best_step, outcome.best) == ({"miou": 0.1}, 4, 0.6)
    assert [row["miou"] for row in rows(tmp_path)] == ["", "0.4", "", "0.6", "", "0.5"]
    best = load_file(outcome.best_network)["classifier.1.weight"]
    assert torch.equal(best, kept[4])


def test_evaluation_compares_with_the_labels_and_changes_nothing() -> None:
    net = adaptive().train()
    before, data = tensors(net), Scenes(3)
    found = evaluate(net, data)
    assert found.keys() >= {"miou", "active_fraction"} and 0 < found["active_fraction"] < 1
    assert net.training
    assert_equal(tensors(net), before)

    class Perfect(Scenes):
        def __getitem__(self, index: int) -> Any:
            image, _ = self.items[index]
            with torch.no_grad():
                return image, reference(image.unsqueeze(0))[0].argmax(0)

    from cadsurgery.data.images import normalise

    still = copy.deepcopy(net).eval()

    def reference(image: Tensor) -> Tensor:
        return still(normalise(image, None))

    assert evaluate(net, Perfect(3))["miou"] == 1.0
    with pytest.raises(cs.InvalidInput, match="validation data is empty"):
        evaluate(net, Scenes(0))


def test_tensorboard_gets_what_csv_gets(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(adaptive(), tmp_path / "csv")
    train(adaptive(), tmp_path / "board", replace(QUICK, log="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([float(row["loss"]) for row in rows(tmp_path / "csv")])


# The command.


NETWORK = ("finetune", "networks:Segmenter", "--output-stride", "4,16")
STEPS = "--set steps=2 --set batch=2 --set workers=0 --set crop=0 --device cpu"
SHORT = ("--data", "scene:4,height=48,width=64", *STEPS.split())


def test_the_command_trains_a_function_and_then_its_file(command_line: Run, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"lr": 0.01, "steps": 9, "objective": "any-budget"}')
    options = ("--config", "settings.json", "--set", "objective_options.ranking=random")
    options += ("--mask", "edges:threshold=0.2", "--set", "region=backbone")
    done = command_line(*NETWORK, *SHORT, *options, "-o", "run", "--json")
    assert done.code == 0, done.out + done.err
    assert done.json["steps"] == 2 and done.json["model"] == "networks:Segmenter"
    assert done.json["before"].keys() == done.json["after"].keys() >= {"miou", "active_fraction"}
    assert float(rows(tmp_path / "run")[0]["lr"]) == 0.01 and "divergence" in rows(tmp_path / "run")[0]
    again = command_line("finetune", "run/net.safetensors", "--trust", *SHORT, "-o", "more")
    assert again.code == 0, again.out + again.err
    assert "before" in again.out and "classifier" in again.out
    source = cs.load(tmp_path / "more/net.safetensors", trust=True).source
    assert source.weights == "fine-tuned"  # not random, whatever they were at first
    assert command_line("finetune", "networks:Segmenter").code == 2


# Networks by name for another number of classes.


def test_weights_for_another_number_of_classes_are_taken_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "squeezenet1_1"
    torch.manual_seed(1)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *arguments, **options: dict(state)
    )
    net = cs.build_model(name, num_classes=7)
    found = net.state_dict()
    same = {
        key for key in state if found[key].shape == state[key].shape and torch.equal(found[key], state[key])
    }
    assert state.keys() - same == {"classifier.1.weight", "classifier.1.bias"}
    assert found["classifier.1.bias"].shape == (7,)
    assert net.cad_source.kwargs["num_classes"] == 7 and "classifier.1.bias" in net.cad_source.note
    again = cs.build_model(net.cad_source.name, "none", **net.cad_source.kwargs)
    assert again.state_dict()["classifier.1.bias"].shape == (7,)
    assert cs.build_model("timm:test_byobnet", "none", num_classes=5)(torch.zeros(1, 3, 64, 64)).shape == (
        1,
        5,
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_mean_weight_is_one_and_the_power_sets_how_much_rare_classes_count(power: float) -> None:
    shares = torch.tensor([0.7, 0.25, 0.048, 0.002, 0.0], dtype=torch.float64)
    weights = class_weights(shares, power)
    assert float((weights * shares).sum()) == pytest.approx(1)
    ratio = weights[3] / weights[0]
    assert float(ratio) == pytest.approx(((0.7 + RARE) / (0.002 + RARE)) ** power)
    assert float(weights.max() / weights.min()) <= ((1 + RARE) / RARE) ** power + 1e-9


def test_the_divergence_is_weighted_only_if_asked_for() -> None:
    classes = torch.randint(3, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    target = nn.functional.one_hot(classes, 3).movedim(-1, 1).double() * 2 - 1
    output = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    apart = divergence(target, output, "classes")
    plain, _ = miss(output, None, target, kind="classes")
    same, _ = miss(output, None, target, kind="classes", class_weights=(1.0, 1.0, 1.0))
    assert torch.equal(plain, apart.mean()) and torch.equal(plain, same)
    only, _ = miss(output, None, target, kind="classes", class_weights=(0.0, 0.0, 2.0))
    assert float(only) == pytest.approx(2 * float(apart[classes == 2].sum()) / classes.numel())


@pytest.mark.parametrize("supervision", [0.0, 2.0])
def test_both_parts_of_an_objective_count_as_asked_for(supervision: float) -> None:
    objective = Divergence(adaptive("random"), weight=3.0, supervision=supervision)
    labels = torch.randint(4, (2, *SIZE)) if supervision else None
    found = objective((images(2, *SIZE),), labels, Draw(0, 0, (0, 1)))
    expected = 3 * found["divergence"] + supervision * found.get("entropy", 0)
    torch.testing.assert_close(found["loss"], expected)
