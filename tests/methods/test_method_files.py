"""Files of all methods on the command line: one way to count, to plan, and to refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, images, rewritten, slow
from decisions import half_open
from networks import Segmenter
from torch import nn
from torch.utils._pytree import tree_leaves
from training import SIZE, batch, residual_segmenter, with_exits

import cadsurgery as cs
from cadsurgery.masks import labelled
from cadsurgery.methods.method_files import read_plan

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


# -- files and copies ----------------------------------------------------------------------------------


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
    copies = [cs.load(file, original.eval()), copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
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
