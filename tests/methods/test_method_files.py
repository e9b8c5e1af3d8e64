"""Files of all methods on the command line: one way to count, to plan, and to refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from torch import nn

import cadsurgery as cs
from cadsurgery.methods.storage import read_plan

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
    shown = command_line("macs", "--model", str(file), "--size", "61x83", "--trust", "--rule", "published")
    assert shown.code == 0 and "MACs on 1x3x61x83" in shown.out and "published" in shown.out
    assert read_plan(file) == net.plan
    planned = command_line("plan", "--model", str(file))
    assert planned.code == 0 and words in planned.out
    assert command_line("plan", "--model", str(file), "--json").code == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("macs", "--trust", "--mask", "edges"), "without masks"),
        (("macs", "--trust", "--output-stride", "8,32"), "converted already"),
        (("macs", "--trust", "--rule", "flops"), "counting rule"),
        (("macs", "--dense"), "leave --dense out"),
        (("macs",), "--trust"),
        (("plan", "--region", "backbone"), "converted already"),
    ],
)
def test_what_other_networks_have_is_refused(
    command: tuple[str, ...], words: str, made: tuple[Any, Path, str], command_line: Run
) -> None:
    refused = command_line(*command, "--model", str(made[1]))
    assert refused.code == 1 and words in refused.err


def test_export_and_push_say_what_to_do_instead(made: tuple[Any, Path, str], command_line: Run) -> None:
    refused = command_line("export", str(made[1]), "--trust")
    assert refused.code == 1 and "cadsurgery run" in refused.err
    refused = command_line("push", str(made[1]), "owner/name", "--license", "mit", "--trust")
    assert refused.code == 1 and "hf upload" in refused.err
