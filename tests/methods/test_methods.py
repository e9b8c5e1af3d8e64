"""What a method is: one defined here, in one file, is saved, planned and counted as all others are; files of all."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import Run, assert_same, images, pointwise_rule, rewritten, slow
from decisions import half_open
from networks import Chain, Segmenter, randomise, segmenter
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.io import write_png
from torchvision.models.resnet import BasicBlock
from training import SIZE, Scenes, batch, residual_segmenter, with_exits

import cadsurgery as cs
from cadsurgery.data.networks import source_of
from cadsurgery.finetune import Settings, fit
from cadsurgery.masks import labelled
from cadsurgery.methods.anytime import AnytimePlan
from cadsurgery.methods.converted import METHODS, GraphModel, register
from cadsurgery.methods.method_files import read_plan
from cadsurgery.methods.program import StepProgram, call, steps_of
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
        env, arguments = dict[str, Any](), self.bind(args, kwargs)
        for step in self.program.steps:
            env[step.name] = call(self, step, env.__getitem__, arguments)
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
def thinned(tmp_path: Path) -> tuple[Any, Path]:
    """A network of the method above by name, and its file."""
    net, file = (
        thin_out(cs.build_model("networks:segmenter", "none").eval(), 3),
        tmp_path / "net.safetensors",
    )
    cs.save(net, file)
    return net, file


@pytest.mark.smoke
def test_a_method_in_one_file_is_saved_loaded_and_copied(thinned: tuple[Any, Path]) -> None:
    net, file = thinned
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
    thinned: tuple[Any, Path], command_line: Run
) -> None:
    net, file = thinned
    report = net.macs(torch.empty(2, 3, 45, 61, device="meta"))
    assert f"{report}" == f"MACs on 2x3x45x61: {report.total:.4e}, 0.250 of {report.dense:.4e}"
    assert net.work({"x": torch.empty(2, 3, 45, 61)}) is net.work({"x": torch.ones(2, 3, 45, 61)})
    told = command_line("macs", "--model", str(file), "--size", "45x61", "--trust", "--json")
    assert told.code == 0 and told.json["total"] == told.json["dense"] // 4
    planned = command_line("plan", "--model", str(file))
    assert planned.code == 0 and "every 3. element" in planned.out


def test_training_writes_a_file_that_opens_again(thinned: tuple[Any, Path], tmp_path: Path) -> None:
    net, settings = thinned[0], Settings(steps=1, batch=2, crop=0, workers=0)
    trained = fit(net, Scenes(), settings, output=tmp_path, device="cpu").network
    again, x = cs.load(trained, segmenter().eval()), images(2, *SIZE)
    assert again.plan == net.plan and torch.equal(again(x), net(x))
    assert again.source is not None and again.source.weights == "fine-tuned"


def test_a_method_without_sides_is_run_and_neither_evaluated_nor_timed(
    thinned: tuple[Any, Path], command_line: Run, tmp_path: Path
) -> None:
    write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / "picture.png"))
    for command in (
        ("eval", str(thinned[1]), "--data", f"images:{tmp_path}"),
        ("bench", "--model", str(thinned[1])),
    ):
        told = command_line(*command, "--trust")
        assert told.code == 1 and "no sides by which a ThinnedModel is compared" in told.err
    picture, output = str(tmp_path / "picture.png"), tmp_path / "out"
    told = command_line("run", str(thinned[1]), picture, "-o", str(output), "--trust")
    assert told.code == 0 and (output / "picture.png").exists(), told.err


def test_a_method_that_is_not_registered_is_named(thinned: tuple[Any, Path]) -> None:
    del METHODS[ThinnedModel.method]
    try:
        with pytest.raises(
            cs.FileError, match=r"method 'test-thinned'(.*\n)*.*import the module that registers"
        ):
            cs.load(thinned[1])
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
    called = [str(step.target) for step in net.program.chains[0].steps if step.op == "call_module"]
    assert called == ["layer2.0.conv1", "layer2.0.bn1", "layer2.0.relu"]
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


# -- files of all methods on the command line ----------------------------------------------------------


MADE: dict[str, tuple[str, Callable[[nn.Module], Any], str]] = {
    "exits": (
        "networks:segmenter",
        lambda model: cs.anytime(model, ["backbone.1"], threshold=0.2),
        "2 exits",
    ),
    "gates": ("training:residual_segmenter", cs.sample, "2 branches"),
    "sampler": (
        "networks:segmenter",
        lambda model: cs.resample(model, "uniform", size=(24, 32)),
        "24 x 32 pixels",
    ),
}


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, str]:
    """A network by name, its file, and what its plan says."""
    name, convert, words = MADE[request.param]
    net, file = (
        convert(cs.build_model(name, "none").eval()),
        tmp_path / "net.safetensors",
    )
    cs.save(net, file)
    return net, file, words


def test_macs_and_plans_of_files_of_all_methods(made: tuple[Any, Path, str], command_line: Run) -> None:
    net, file, words = made
    told = command_line("macs", "--model", str(file), "--size", "61x83", "--trust", "--json")
    assert told.code == 0, told.err
    image = torch.rand(1, 3, 61, 83)
    assert told.json["shape"] == [1, 3, 61, 83] and told.json.keys() == net.macs(image).to_dict().keys()
    shown = command_line("macs", "--model", str(file), "--size", "61x83", "--trust")
    assert shown.code == 0 and "MACs on 1x3x61x83" in shown.out
    assert read_plan(file) == net.plan
    planned = command_line("plan", "--model", str(file))
    assert planned.code == 0 and words in planned.out
    assert command_line("plan", "--model", str(file), "--json").code == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("macs", "--trust", "--mask", "edges"), "without masks"),
        (("macs", "--set", "dense=true"), "leave --set dense out"),
        (("plan", "--set", "region=backbone"), "converted already"),
        (("export", "--trust"), "cadsurgery run"),
    ],
)
def test_what_other_networks_have_is_refused(
    command: tuple[str, ...], words: str, made: tuple[Any, Path, str], command_line: Run
) -> None:
    file = ("--model", str(made[1])) if command[0] != "export" else (str(made[1]),)
    refused = command_line(command[0], *file, *command[1:])
    assert refused.code == 1 and words in refused.err


def test_the_original_is_left_as_it_is_and_its_state_dict_loads(made: tuple[Any, Path, str]) -> None:
    name, convert, _ = next(row for row in MADE.values() if row[2] == made[2])
    model, other = (cs.build_model(name, "none").eval() for _ in range(2))
    before = copy.deepcopy(model.state_dict())
    net = convert(model)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert model.state_dict().keys() == before.keys() <= net.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    net.load_state_dict(other.state_dict())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in other.state_dict().items())


def with_gates() -> cs.SampledModel:
    where = ["backbone.2", "backbone.1.one.0"]
    net = half_open(cs.sample(residual_segmenter().float(), where, grid=5, temperature=0.1, noise=True))
    net.seed = 3
    return net


def sampled(sampler: object, inside: Callable[[nn.Module], nn.Module] = copy.copy, **options: Any) -> Any:
    torch.manual_seed(0)
    net = cs.resample(inside(Segmenter().eval()), sampler, (32, 40), **options)
    with torch.no_grad():
        for parameter in net.sampler.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return net.eval()


def test_a_file_that_triangulates_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    net, file = sampled("uniform"), tmp_path / "net.safetensors"
    cs.save(net, file)
    rewritten(file, lambda told: told["options"].update(back="triangulation"))
    with pytest.raises(cs.FileError, match=r"(?s)'triangulation'.*is gone.*cs\.resample"):
        cs.load(file, Segmenter().eval())


NETWORKS: dict[str, Callable[[], Any]] = {
    "exits": lambda: with_exits((0.2, 0.3)),
    "gates": with_gates,
    "sampled around edges": lambda: sampled("edges:threshold=0.2", share=0.1),
    "sampled as learned": lambda: sampled("learned", grid=5, smoothness=0.5, targets=(1, 2)),
    "sampled before exits": lambda: sampled("uniform", lambda model: cs.anytime(model, ["backbone.1"])),
}
QUICK = ("exits", "gates", "sampled around edges")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NETWORKS])
@torch.no_grad()
def test_files_and_copies_give_the_network_again_and_share_nothing(name: str, tmp_path: Path) -> None:
    net, file = NETWORKS[name](), tmp_path / "net.safetensors"
    x, labels = images(2, *SIZE), batch()[1]
    original = residual_segmenter().float() if name == "gates" else Segmenter()
    cs.save(net, file)
    with torch.inference_mode():  # what it loads can be trained all the same
        loaded = cs.load(file, original.eval())
    assert not any(value.is_inference() for value in loaded.state_dict().values())
    copies = [loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    with pytest.raises(cs.FileError, match="does not say how to build"):
        cs.load(file)
    with pytest.raises(cs.InvalidInput, match="without masks"):
        cs.load(file, original, mask="edges")
    with pytest.raises(cs.CadError):
        cs.load(file, nn.Conv2d(3, 4, 3, 2, 1))
    fast = net.optimize()
    with pytest.raises(cs.InvalidInput, match="optimised"):
        cs.save(fast, tmp_path / "fast.safetensors")
    with labelled(labels):
        expected, of_fast = tree_leaves(net(x)), tree_leaves(fast(x))
        for parameter in net.parameters():
            parameter.zero_()
        for again in copies:
            assert again.plan == net.plan and again.options == net.options and again.source == net.source
            assert all(torch.equal(*pair) for pair in zip(tree_leaves(again(x)), expected, strict=True))
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert all(torch.equal(*pair) for pair in zip(tree_leaves(again(x)), of_fast, strict=True))


class Two(nn.Module):
    """Takes a map beside the image, which a function pools: torch's `max_pool2d` does not know where it is found."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)
        self.block = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, image: Tensor, more: Tensor) -> Tensor:
        y = self.stem(F.max_pool2d(image, 3, 1, 1)).relu()
        y = y + self.block(y)
        return self.last(y + more)


@pytest.mark.parametrize("method", [cs.sample, partial(cs.anytime, exits=["stem"])], ids=["gates", "exits"])
@torch.no_grad()
def test_a_network_of_several_arguments_comes_back(method: Any, tmp_path: Path) -> None:
    model, call = Two().eval(), (images(2, 65, 90), torch.randn(2, 8, 33, 45))
    net, file = method(model, example_input=(images(1, 64, 64), torch.randn(1, 8, 32, 32))), tmp_path / "net"
    cs.save(net, file)
    for again in (cs.load(file, Two().eval()), pickle.loads(pickle.dumps(net))):
        assert again.plan == net.plan
        assert all(map(torch.equal, tree_leaves(again(*call)), tree_leaves(net(*call))))


@pytest.mark.parametrize("sampler", ["learned", "edges"])
@torch.no_grad()
def test_a_network_in_double_precision_is_sampled_without_an_example(sampler: str) -> None:
    net = cs.resample(Segmenter().double().eval(), sampler, (32, 40))
    assert {value.dtype for value in tree_leaves(net(images(2, *SIZE).double()))} == {torch.float64}
