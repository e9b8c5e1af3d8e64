"""What a method is: one defined here, in one file, is saved, loaded, planned and counted as all others are."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, assert_same, images, pointwise_rule
from decisions import half_open
from networks import Chain, randomise, segmenter
from torch import Tensor, nn
from torchvision.io import write_png
from torchvision.models.resnet import BasicBlock

import cadsurgery as cs
from cadsurgery.data.networks import source_of
from cadsurgery.methods.anytime import AnytimePlan
from cadsurgery.methods.converted import METHODS, GraphModel, register
from cadsurgery.methods.method_files import read_plan
from cadsurgery.methods.program import StepProgram, StepwiseCall, steps_of
from cadsurgery.methods.report import MethodMacs, MethodPlan
from cadsurgery.methods.resampling import ResampledPlan
from cadsurgery.methods.sampling import SamplingPlan
from cadsurgery.network.adaptify import copy_network
from cadsurgery.network.adaptive_part import traceable_part

# -- a method ------------------------------------------------------------------------------------------


def thin_out(model: nn.Module, every: int = 2, *, example_input: Any = None) -> ThinnedModel:
    """The same network, whose result is computed at every so many-th element of each row and column alone."""
    ThinnedModel.refuse_again(model)
    whole = copy_network(model)
    _, facts = traceable_part(whole, example_input)
    *nodes, output = facts.graph.nodes
    program = StepProgram(
        graph=facts.graph,
        signature=inspect.signature(whole.forward),
        steps=tuple(steps_of(nodes, output.all_input_nodes).values()),
    )
    net = ThinnedModel(whole, program, {"every": every})
    arguments = facts.arguments
    dense = sum(net.work(arguments).macs.values())
    net.plan = ThinnedPlan(every=every, macs=dense, example_shape=tuple(facts.example.shape))
    net.source = source_of(model)
    return net


@dataclass(frozen=True, kw_only=True)
class ThinnedPlan(MethodPlan):
    """Every how many elements are kept."""

    every: int
    macs: int

    def check(self) -> bool:
        """True if some are kept."""
        return self.every > 0

    def __str__(self) -> str:
        return f"every {self.every}. element of {self.macs:.3e} MACs"


@dataclass(frozen=True, kw_only=True)
class ThinnedMacs(MethodMacs):
    """All MACs, and those of the last step at the elements that are kept."""

    before: int
    told = ("total", "dense")

    @property
    def total(self) -> int:
        """Those that are kept."""
        return self.before // 4

    @property
    def dense(self) -> int:
        """All."""
        return self.before


@register
class ThinnedModel(GraphModel):
    """Called as the original; elements that are not kept are those beside them."""

    method, converted_by, already = "test-thinned", "thin_out", "this network is thinned already."
    convert, plan_type = staticmethod(thin_out), ThinnedPlan
    option_types: ClassVar[dict[str, Any]] = {"every": int}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The original's map with elements repeated."""
        env: dict[str, Any] = {}
        call = StepwiseCall(self, self.bind(args, kwargs))
        for step in self.program.steps:
            env[step.name] = call.compute(step, env.__getitem__)
            for name in step.frees:
                del env[name]
        (y,) = env.values()
        every = self.options["every"]
        kept = y[:, :, ::every, ::every]
        return F.interpolate(kept, scale_factor=every)[:, :, : y.shape[2], : y.shape[3]]

    def macs(self, *args: Any, **kwargs: Any) -> ThinnedMacs:
        """What is computed."""
        arguments = self.bind(args, kwargs)
        work, (image, *_) = self.work(arguments), arguments.values()
        shape = tuple(image.shape)
        return ThinnedMacs(before=sum(work.macs.values()), shape=shape, not_counted=work.not_counted)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Any, Path]:
    """A network of the method above by name, and its file."""
    net, file = (
        thin_out(cs.build_model("networks:segmenter", "none").eval(), 3),
        tmp_path / "net.safetensors",
    )
    cs.save(net, file)
    return net, file


@pytest.mark.smoke
def test_a_method_in_one_file_is_saved_loaded_and_copied(made: tuple[Any, Path]) -> None:
    net, file = made
    x = images(2, 45, 61)
    with torch.no_grad():
        model = segmenter().eval()
        assert (
            torch.equal(net(x)[:, :, ::3, ::3], model(x)[:, :, ::3, ::3]) and net(x).shape == model(x).shape
        )
        for again in (cs.load(file, model), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert type(again) is ThinnedModel and again.plan == net.plan
            assert torch.equal(again(x), net(x))
    assert read_plan(file) == net.plan
    with pytest.raises(cs.FileError, match="another plan"):
        cs.load(file, Chain().eval())
    with pytest.raises(cs.InvalidInput, match="without masks"):
        cs.load(file, model, mask="edges")
    with pytest.raises(cs.InvalidInput, match="thinned already"):
        thin_out(net)
    with pytest.raises(cs.CannotConvert, match="was made by thin_out"):
        cs.adaptify(net, "edges")
    with pytest.raises(cs.InvalidInput, match="image batch"):
        net(torch.zeros(3, 45, 61))


def test_a_method_in_one_file_is_planned_and_counted_by_the_command_line(
    made: tuple[Any, Path], command_line: Run
) -> None:
    net, file = made
    report = net.macs(torch.empty(2, 3, 45, 61, device="meta"))
    assert f"{report}" == f"MACs on 2x3x45x61: {report.total:.4e}, 0.250 of {report.dense:.4e}"
    assert net.work({"x": torch.empty(2, 3, 45, 61)}) is net.work({"x": torch.ones(2, 3, 45, 61)})
    told = command_line("macs", "--model", str(file), "--size", "45x61", "--trust", "--json")
    assert told.code == 0 and told.json["total"] == told.json["dense"] // 4
    planned = command_line("plan", "--model", str(file))
    assert planned.code == 0 and "every 3. element" in planned.out


def test_a_method_without_sides_is_neither_evaluated_nor_timed(
    made: tuple[Any, Path], command_line: Run, tmp_path: Path
) -> None:
    write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / "picture.png"))
    for command in (
        ("eval", str(made[1]), "--data", f"images:{tmp_path}"),
        ("bench", "--model", str(made[1])),
    ):
        told = command_line(*command, "--trust")
        assert told.code == 1 and "no sides by which a ThinnedModel is compared" in told.err


def test_a_method_that_is_not_registered_is_named(made: tuple[Any, Path]) -> None:
    del METHODS[ThinnedModel.method]
    try:
        with pytest.raises(
            cs.FileError, match=r"method 'test-thinned'(.*\n)*.*import the module that registers"
        ):
            cs.load(made[1])
    finally:
        register(ThinnedModel)


# -- rules of users ------------------------------------------------------------------------------------


class Bend(nn.Module):
    """An operation of a user's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Each value alone."""
        return x / (1 + x.abs())


@pytest.fixture
def bend() -> Iterator[type[nn.Module]]:
    """A class with a rule of a user's own."""
    with pointwise_rule(Bend):
        yield Bend


def test_a_pointwise_rule_of_a_users_own_is_done_at_open_positions(bend: type[nn.Module]) -> None:
    from torchvision.models.resnet import ResNet

    model = randomise(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).double().eval()
    model.layer2[0].relu = bend()
    net, x = half_open(cs.sample(model, "layer2")), images(2, 65, 97, torch.float64)
    before = net.program.chains[0].before
    assert [str(step.target) for step in before] == ["layer2.0.conv1", "layer2.0.bn1", "layer2.0.relu"]
    with torch.no_grad():
        found = net(x)
        assert 0 < sum(net.densities.values()) / len(net.gates) < 1
        assert_same(net.optimize()(x), found, 1e-9)


# -- plans of older files ------------------------------------------------------------------------------

OLDER: dict[type[MethodPlan], str] = {
    AnytimePlan: """{"exits": [{"name": "stage1", "branches": ["add_1"], "channels": 8, "head": "redesigned head",
        "macs": 900, "chosen": 0, "share": 0.0}, {"name": "the end", "branches": [], "channels": 0,
        "head": "the network's own head", "macs": 100, "chosen": 3, "share": 0.5}], "classes": 5,
        "whole": [["gate", "its map is no grid"]], "example_shape": [2, 3, 97, 129]}""",
    SamplingPlan: """{"branches": [{"name": "layer1.0", "source": "maxpool", "gates": [{"conv": "layer1.0.conv1",
        "stride": 1, "follows": ["layer1.0.conv3"], "macs": 7}], "apart": []}], "macs": 70, "gate_macs": 1,
        "example_shape": [2, 3, 97, 129], "part": ""}""",
    ResampledPlan: """{"sampler": "learned", "grid": 8, "size": [24, 32], "mode": "nearest", "back": "inverse",
        "maps": [[5, 24, 32]], "example_shape": [1, 3, 36, 48], "macs": [1, 2, 3]}""",
}


@pytest.mark.parametrize("kind", OLDER, ids=lambda kind: kind.__name__)
def test_plans_of_files_written_before_are_read(kind: type[MethodPlan]) -> None:
    plan = kind.from_json(OLDER[kind])
    assert kind.from_json(plan.to_json()) == plan and plan.example_shape[1] == 3 and str(plan)
    for damaged in (
        OLDER[kind].replace("[2, 3, 97, 129]", "[2, 3]").replace("[1, 3, 36, 48]", "[]"),
        "{}",
        "[]",
    ):
        with pytest.raises((ValueError, TypeError)):
            kind.from_json(damaged)
