"""The command line: options reach the tasks, and what commands print, write and exit with."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import ROOT, Cap, Run
from PIL import Image
from typer.main import get_command

import cadsurgery as cs
from cadsurgery import cli
from cadsurgery.cli import replaced
from cadsurgery.cli.main import make_app
from cadsurgery.cli.replaced import REPLACED
from cadsurgery.finetune.command import make_settings
from cadsurgery.kernels import isa
from cadsurgery.methods import side
from cadsurgery.network.macs import dense_macs
from cadsurgery.support.processor import processor_in_words
from cadsurgery.support.timing import Timing
from cadsurgery.surgery.plan import Plan
from cadsurgery.tasks import bench, commands
from cadsurgery.tasks import task_options as options_of_tasks
from cadsurgery.tasks.evaluation import evaluate
from cadsurgery.tasks.keypoints import extract
from cadsurgery.tasks.recommend import recommend
from cadsurgery.tasks.task_options import Settings

SIZE = (96, 128)
COMMANDS = (
    *("convert", "plan", "mask", "run", "macs", "bench", "eval", "export", "finetune", "list"),
    "recommend",
    "keypoints extract",
)
NETWORKS = '''
"""Networks of a user."""

import torch
from torch import nn


def segmenter():
    """Ten classes at output stride 32."""
    torch.manual_seed(0)
    layers, channels = [], (3, 4, 4, 8, 16, 32)
    for pair in zip(channels, channels[1:]):
        layers += [nn.Conv2d(*pair, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 10, 1))


def of_classes(count):
    return segmenter()
'''


@pytest.fixture
def run(tmp_path: Path, command_line: Run) -> Run:
    """Runs `cadsurgery ARGS` in a folder with a module `usernets`; its code, output and errors."""
    (tmp_path / "usernets.py").write_text(NETWORKS)
    return command_line


@pytest.fixture
def file(run: Run, tmp_path: Path) -> Path:
    """A converted file of the user's segmentation network."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(_converted())
    return path


@cache
def _converted() -> bytes:
    """What `file` holds, converted once; the module `usernets` can be imported."""
    net = cs.adaptify(cs.build_model("usernets:segmenter"), "edges", verify_laws=False)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        cs.save(net, path)
        return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of different size, a corrupt one, and something else."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.effect_noise((128, 96), 60).convert("RGB").save(folder / "first.png")
    Image.effect_noise((129, 65), 60).save(folder / "second.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def options(*given: object, size: tuple[int, int] = SIZE) -> list[object]:
    return [*given, "--size", f"{size[0]}x{size[1]}"]


# -- start and usage -----------------------------------------------------------------------------------


def test_help_starts_without_torch_and_names_the_commands() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cadsurgery.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name.split()[0] in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported and "torch" not in imported


@pytest.mark.smoke
def test_version_tells_versions_processor_instruction_sets_and_where_the_kernels_are_from(
    run: Run, cap_kernels: Cap
) -> None:
    result = run("--version")
    assert result.code == 0 and result.err == ""
    first, libraries, processor, sets, kernels = result.out.splitlines()
    assert first.startswith(f"cadsurgery {cs.__version__}") and f"torch {version('torch')}" in libraries
    assert processor == f"processor: {processor_in_words()}"
    assert sets.startswith(f"instruction sets: {isa.in_words()}")
    assert kernels.removeprefix("compiled kernels: ").partition(" ")[0] in ("in", "compiled", "none:")
    cap_kernels("avx9")
    refused = run("--version")
    assert refused.code == 1 and "avx9" in refused.err and "Next" in refused.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_has_json(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.code == 0 and "--json" in result.out


COMMAND = '''
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any
import typer
from cadsurgery.cli import options, screen
from cadsurgery.support.fields import option

commands = typer.Typer()

@dataclass(frozen=True)
class Greeting:
    words: str = option("good day", "said first; default {default}")
    times: int = option(2, "how often", min=1, name="repeat")
    loud: bool = option(False, "in capitals")
    days: Sequence[str] = option((), "repeatable", name="day")
    most: int | None = option(None, "0 for any number", none=0, short="m")

@commands.command()
@options.command
def greet(
    *,
    name: Annotated[str, typer.Argument(help="of whom")],
    greeting: Greeting,
    given: Annotated[dict[str, Any], options.OptionsFrom(options.Conversion, ("fill", "region"), given=True)],
    as_json: options.Json = False,
) -> None:
    """Say something."""
    screen.show({"name": name, **vars(greeting), "given": given}, name, as_json)
'''


def test_a_new_command_is_one_file_and_has_its_options_from_a_dataclass(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greeting.py").write_text(COMMAND)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert "Say something." in run("--help").out
        shown = " ".join(run("greet", "--help").out.split())
        assert (
            "said first; default good day" in shown
            and "[default: 2; x>=1]" in shown
            and "--no-loud" not in shown
        )
        given = run("greet", "you", "--json").json
        assert given == {
            "name": "you",
            "words": "good day",
            "times": 2,
            "loud": False,
            "days": [],
            "most": None,
            "given": {},
        }
        told = run("greet", "you", "--repeat", 3, "--loud", "--region", "a,b", "--json").json
        assert told["times"] == 3 and told["loud"] is True and told["given"] == {"region": ["a", "b"]}
        more = run("greet", "you", "--day", "one", "--day", "two", "-m", 3, "--json").json
        assert more["days"] == ["one", "two"] and more["most"] == 3
        assert run("greet", "you", "--repeat", 0).code == 2
    finally:
        sys.modules.pop("cadsurgery.cli.greeting", None)


def test_every_option_of_every_command_is_a_field_of_a_dataclass() -> None:
    kinds = [
        kind
        for module in (commands, options_of_tasks)
        for kind in vars(module).values()
        if is_dataclass(kind)
    ]
    told = tuple(field.metadata.get("help", "") for kind in kinds for field in fields(kind))
    for name, command in all_commands():
        for option in (one for one in command.params if one.param_type_name == "option"):
            is_shared = option.name == "as_json" or option.name.endswith("_by_option")
            assert is_shared or option.help.endswith(told), f"{name} {option.opts}"


@cache
def all_commands() -> list[tuple[str, Any]]:
    """Names and objects of all commands."""
    found, groups = list[tuple[str, Any]](), [("", get_command(make_app()))]
    for name, group in groups:
        for own, command in group.commands.items():
            if hasattr(command, "commands"):
                groups.append((f"{name} {own}", command))
            else:
                found.append((f"{name} {own}".strip(), command))
    return found


def test_there_are_few_options() -> None:
    """Without --json, and the options that are another way to write an argument: there were 234."""
    own = [
        f"{name} {option.opts[0]}"
        for name, command in all_commands()
        for option in command.params
        if option.param_type_name == "option" and not option.name.endswith(("as_json", "_by_option"))
    ]
    assert len(own) <= 130, len(own)


def all_settings() -> list[tuple[str, str]]:
    """Commands and names of `--set`."""
    return [
        (name, setting) for name, command in all_commands() for setting in vars(command.callback)["settable"]
    ]


OLD = [
    *((name, option) for name, options in REPLACED.items() for option in options),
    *((name, f"--{setting.replace('_', '-')}") for name, setting in all_settings()),
    *(("convert", f"--{name}") for name in ("exits", "gaps", "where", "noise", "sample-grid", "targets")),
]


@pytest.mark.parametrize(("command", "option"), OLD, ids=" ".join)
def test_an_option_that_there_was_is_refused_with_what_replaces_it(
    run: Run, command: str, option: str
) -> None:
    """What is named exists: its options, and its settings."""
    done = run(*command.split(), "subject", option, "1")
    assert done.code == 2 and f"{option} is no option. Next: " in done.err
    named = done.err.partition("Next: ")[2]
    own = {name for one, found in all_commands() if one == command for p in found.params for name in p.opts}
    assert set(re.findall(r"(?<!\w)--[a-z][\w-]*", named)) <= own - {option}
    for setting in re.findall(r"--set (\w+)", named):
        assert command == "convert" or (command, setting) in all_settings()


@pytest.mark.parametrize("command", replaced.COMMANDS)
def test_a_command_that_there_was_is_refused_with_what_replaces_it(run: Run, command: str) -> None:
    done = run(command, "subject")
    assert done.code == 2 and f"{command} is no command. Next: {replaced.COMMANDS[command]}" in done.err


@pytest.mark.parametrize("name", ["run.toml", "run.json"])
def test_settings_of_a_file_are_toml_or_json_and_are_overridden(tmp_path: Path, name: str) -> None:
    toml = "steps = 3\nscale = [0.5, 2]\n[objective_options]\nlow = 0.2\nteacher = 'self'\n"
    plain = '{"steps": 3, "scale": [0.5, 2], "objective_options": {"low": 0.2, "teacher": "self"}}'
    (tmp_path / name).write_text(toml if name.endswith("toml") else plain)
    given = {"steps": 4, "objective_options": {"low": 0.3}}
    settings = make_settings(tmp_path / name, given)
    assert settings.steps == 4 and settings.scale == (0.5, 2) and settings.crop == Settings().crop
    assert settings.objective_options == {"low": 0.3, "teacher": "self"}
    (tmp_path / name).write_text("crops = 3" if name.endswith("toml") else '{"crops": 3}')
    with pytest.raises(cs.UnknownName, match="crop"):
        make_settings(tmp_path / name, {})


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (evaluate, commands.EvalOptions),
        (bench.bench, commands.BenchOptions),
        (recommend, commands.RecommendOptions),
        (extract, commands.KeypointsOptions),
    ],
)
def test_functions_of_python_have_the_defaults_of_their_commands(function: Any, kind: Any) -> None:
    parameters = inspect.signature(function).parameters
    plain = [field for field in fields(kind) if "part" not in field.metadata]
    assert {field.name for field in plain} <= parameters.keys()
    stated = {field.name: field.default for field in plain if field.default is not MISSING}
    own = {name: parameters[name].default for name in stated}
    needed = {name for name, value in own.items() if value is inspect.Parameter.empty}
    assert needed <= {"output"}
    assert all(stated[name] == value for name, value in own.items() if name not in needed)


@pytest.mark.slow
def test_modules_of_the_current_folder_are_found_as_the_installed_command_starts(
    tmp_path: Path,
) -> None:
    """Python itself looks beside the script that it runs, which is not where the user is."""
    script = tmp_path / "bin" / "start.py"
    script.parent.mkdir()
    script.write_text("from cadsurgery.cli import main\nmain()\n")
    (tmp_path / "usernets.py").write_text(NETWORKS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "plan", "--model", "usernets:segmenter"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["cut"],
        ["plan"],
        ["run", "net.safetensors"],
        ["plan", "--model", "resnet18", "--colour", "red"],
        ["plan", "--model", "resnet18", "--output-stride", "8,16,32"],
        ["mask", "--size", "96xwide"],
        ["bench", "--model", "resnet18", "--rounds", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_how(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Usage" in result.err and result.out == ""


FINETUNE = ["finetune", "resnet18", "--data", "scene:2", "--output", "run", "--set"]
METHOD = ["convert", "usernets:segmenter", "--method"]
OUTPUT = "net.safetensors is converted already; output_stride, patch cannot be changed"
FIXED = ["--set", "output-stride=8,16", "--set", "patch=block"]
REFUSED = [
    (["plan", "--model", "resnt18"], "UnknownName", "resnet18"),
    (["plan", "net.safetensors", "--size", "256"], "InvalidInput", "leave --size out"),
    (
        ["macs", "--model", "net.safetensors", *FIXED],
        "InvalidInput",
        OUTPUT,
    ),
    (["export", "net.safetensors", *FIXED], "InvalidInput", OUTPUT),
    ([*FINETUNE, "cropp=64"], "UnknownName", "did you mean crop"),
    ([*FINETUNE, "crop=wide"], "InvalidInput", "number"),
    ([*FINETUNE, "scale=2,x"], "InvalidInput", "this form"),
    ([*FINETUNE, "batch=0"], "InvalidInput", "above 0"),
    ([*FINETUNE, "objective_options=3"], "InvalidInput", "objective_options.NAME"),
    ([*FINETUNE, "crop.side=3"], "InvalidInput", "crop=3"),
    ([*METHOD, "anytime", "--set", "exit=a"], "UnknownName", "exits"),
    ([*METHOD, "sampling", "--set", "grids=3"], "UnknownName", "grid"),
    ([*METHOD, "adaptive", "--set", "anchors=1"], "UnknownName", "anchor"),
    (["run", "net.safetensors", "images", "--set", "precision=int8"], "InvalidInput", "cadsurgery export"),
    (["run", "net.safetensors", "images", "--set", "precision=int7"], "UnknownName", "float"),
    (
        ["macs", "--trust", "--model", "net.safetensors", "--set", "dense=true"],
        "InvalidInput",
        "leave --set dense out",
    ),
    (["plan", "--model", "usernets:segmenter", "--output-stride", "3,5"], "InvalidInput", "(8, 32)"),
    (["convert", "--model", "net.safetensors"], "FileError", "cadsurgery run net.safetensors"),
    (["mask", "--mask", "edges", "--mask", "gradient"], "InvalidInput", "--compare"),
    (["mask", "--mask", "confidence | budget"], "InvalidInput", "--model"),
    (["mask", "--image", "images/first.png", "--mask", "trimap"], "InvalidInput", "--labels"),
    (["mask", "--size", "0x128"], "InvalidInput", "positive"),
    (["run", "net.safetensors", "missing.png", "absent"], "FileError", "path"),
    (["run", "net.safetensors", "images", "--device", "abacus"], "InvalidInput", "cpu"),
    (["plan", "--model", "usernets:of_classes"], "InvalidInput", "default values"),
    (["convert", "--model", "usernets:segmenter", "--weights", "missing.pth"], "FileError", "path"),
    (["export", "usernets:segmenter", "--output", "no/net.pt2"], "FileError", "--output"),
    (["bench", "--model", "usernets:segmenter", "--fractions", ","], "InvalidInput", "0 to 1"),
    (["bench", "--model", "usernets:segmenter", "--picture", "no/b.png"], "FileError", "--picture"),
]


@pytest.mark.usefixtures("file", "folder")
@pytest.mark.parametrize(("arguments", "error", "hint"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_a_refusal_exits_with_1_and_is_json_or_text(
    run: Run, arguments: list[str], error: str, hint: str
) -> None:
    result = run(*arguments, "--json")
    assert result.code == 1 and result.err == ""
    assert result.json["error"] == error
    assert result.json["what"] and result.json["next"]
    assert hint in result.json["what" if hint.startswith("net.safetensors is") else "next"]
    told = run(*arguments)
    assert told.code == 1 and told.out == ""
    assert error in told.err and "Next:" in told.err and "Traceback" not in told.err


# -- list ----------------------------------------------------------------------------------------------


def test_list_finds_networks_by_pattern_and_says_whether_they_convert(run: Run) -> None:
    rows = run("list", "resnet1*", "--json").json
    names = [row["model"] for row in rows]
    assert {"resnet18", "resnet101", "resnet152"} <= set(names)
    assert all(name.startswith("resnet1") for name in names) and names == sorted(set(names))
    lines = run("list", "resnet1*").out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == names
    assert lines[-1].startswith(f"{len(names)} networks: ")
    row = next(row for row in rows if row["model"] == "resnet18")
    assert row["result"] == "converts" and row["output_stride"] == [8, 32] and row["dense"] == []
    assert "converts, 8 to 32" in next(line for line in lines if line.startswith("resnet18 "))


def test_list_masks_tells_options_and_source(run: Run) -> None:
    masks = {info["name"]: info for info in run("list", "--masks", "--json").json}
    assert {"all", "none", "edges", "random"} <= masks.keys()
    assert masks["edges"]["options"] == {"threshold": [0.35], "dilation": [11]}
    assert masks["edges"].keys() == {"name", "summary", "options", "source", "form"}
    told = run("list", "--masks").out
    assert "dilation=11" in told and "learned" not in masks and told.endswith("confidence, learned\n")


# -- plan and macs -------------------------------------------------------------------------------------


def test_plan_is_the_plan_as_json_on_an_example_of_a_size_or_that_of_a_file(run: Run, file: Path) -> None:
    result = run("plan", "--model", "usernets:segmenter", "--json")
    found = Plan.from_json(result.out)
    assert result.code == 0 and found == cs.plan(cs.build_model("usernets:segmenter"))
    made = run("plan", "usernets:segmenter", "--size", "256x320", "--json").json
    assert made["example_shape"][2:] == [256, 320]
    assert Plan.from_json(run("plan", "--model", file, "--json").out) == cs.load(file, trust=True).plan


def test_macs_takes_mask_and_size(run: Run) -> None:
    given = options("macs", "usernets:segmenter", "--mask", "none")
    told = run(*given, "--json").json
    assert told["shape"] == [1, 3, *SIZE] and told["layers"]
    assert told["macs"]["mask"] == told["macs"]["low"] and told["active_fraction"] == 0


def test_macs_counts_a_network_as_it_is(run: Run) -> None:
    """Everything high and dense are the same in a dilated network; totals go without layers."""
    segmenter = ("--model", "usernets:segmenter", "--size", "96x128")
    dense = run("macs", *segmenter, "--set", "dense=true", "--json").json
    assert dense.keys() == {"shape", "macs", "not_counted"}
    plain = dense["macs"]["dense"]
    net = cs.build_model("usernets:segmenter")
    assert plain == dense_macs(net, torch.zeros(1, 3, 96, 128))
    assert f"{plain:.5e}" in run("macs", *segmenter, "--set", "dense=true").out


# -- mask ----------------------------------------------------------------------------------------------


def test_mask_draws_image_levels_and_lattice_side_by_side(run: Run, tmp_path: Path) -> None:
    result = run("mask", *options("--output", "drawn.png"), "--json")
    assert result.code == 0
    assert result.json.keys() >= {"mask", "active_fraction", "elements", "fine_pixels", "file"}
    assert result.json["fine_pixels"] == 12 * 16 >= result.json["elements"] >= 3 * 4
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height and picture.width > 600
        assert len(set(picture.convert("RGB").resize((64, 32)).getdata())) > 50


@pytest.mark.slow
def test_a_comparison_chooses_masks_to_compare_and_labels_bring_the_oracle(run: Run, folder: Path) -> None:
    def compared(*arguments: object) -> list[str]:
        rows = run("mask", "--compare", *arguments, "--json").json["masks"]
        return [row["mask"].partition(":")[0] for row in rows]

    drawn = compared(*options())
    assert {"detail", "edges", "gradient", "trimap"} <= set(drawn)  # the generated scene has labels
    image = ("--image", folder / "first.png")
    assert compared(*image) == drawn[:-1]
    Image.new("P", (128, 96)).save(folder / "labels.png")
    assert compared(*image, "--labels", folder / "labels.png") == drawn


def test_labels_are_read_as_classes_and_cut_to_size(run: Run, folder: Path) -> None:
    classes = Image.new("L", (128, 96))
    classes.paste(7, (64, 0, 128, 96))
    classes.save(folder / "labels.png")
    labels = ("--labels", folder / "labels.png", "--mask", "trimap:width=3")
    arguments = ("--image", folder / "first.png", *labels)
    found = run("mask", *arguments, "--output-stride", "1,2", "--json").json
    assert found["active_fraction"] == 4 / 128  # the boundary's two columns and one on each side
    assert run("mask", *arguments, *options(size=(48, 64)), "--json").code == 0
    told = run("mask", *arguments[:1], folder / "second.jpg", *arguments[2:], "--json")
    assert told.code == 1 and "96x128" in told.json["what"] and "--size 65x129" in told.json["next"]


# -- bench ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_prints_and_writes_its_figures_and_exits_with_0_whatever_the_law_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(sides: dict[str, Any], rounds: int, **_: Any) -> dict[str, Timing]:
        return {key: Timing(8.0 if "dense" in key else 9.0, 9.0) for key in sides}

    monkeypatch.setattr(side, "interleaved", slower)
    arguments = options("--model", "usernets:segmenter", "--fractions", "0.5,0")
    files = ("--picture", "b.png", "--set", "output=rows.jsonl")
    result = run("bench", *arguments, *files, "--fill", "both", "--json")
    assert result.code == 0 and result.err == ""
    assert [entry["fill"] for entry in result.json["networks"]] == ["nearest", "linear"]
    entry = result.json["networks"][0]
    assert entry["law"]["holds"] is False and entry["law"]["slower_than_high"] == [0.5, 0.0]
    assert (tmp_path / "b.png").is_file() and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
    told = run("bench", *arguments)
    assert told.code == 0 and "MISSED" in told.out and "slower than dense high" in told.out


# -- convert and run -----------------------------------------------------------------------------------


def test_convert_reports_verifies_and_writes_a_file(run: Run, tmp_path: Path) -> None:
    arguments = options(
        "--model", "resnet18", "--weights", "none", "--rounds", 1, "--output", "r.safetensors"
    )
    result = run("convert", *arguments, "--json")
    report = result.json
    assert result.code == 0 and report.keys() >= {"processor", "versions", "notes", "device"}
    assert report["model"] == "torchvision:resnet18" and report["random_weights"] is True
    assert report["output_stride"] == [8, 32] and report["image"] == [1, 3, *SIZE]
    assert report["adapted"][0] == "layer3_0_conv1" and 0 < report["share_of_macs_in_region"] < 1
    assert len(report["checks"]) == 5 and all(check["passed"] for check in report["checks"])
    names = [side["name"] for side in report["sides"]]
    assert names[0] == "original" and "dense high" in names[1] and names[2] == "converted"
    assert names[3] == "converted, net.optimize()" and len(names) == 4
    assert all(side["macs"] > 0 and side["milliseconds"] > 0 for side in report["sides"])
    net = cs.load(tmp_path / "r.safetensors")
    assert net.mask.spec() == report["mask"] and net.source.weights == "random"


@pytest.mark.parametrize("command", ["plan", "macs"])
def test_a_network_is_an_argument_or_the_option_model(run: Run, command: str) -> None:
    name, more = "usernets:segmenter", ("--size", "96x128", "--json")
    as_argument, as_option = run(command, name, *more), run(command, "--model", name, *more)
    assert as_argument.code == 0 and as_argument.json == as_option.json
    both = run(command, name, "--model", name, *more)
    assert both.code == 2 and "two models" in both.err
    assert run(command).code == 2 and "missing argument" in run(command).err


@pytest.mark.slow
def test_a_dear_conversion_says_so_first_and_what_costs_less(run: Run) -> None:
    """The stated costs are those of the commands that are named."""
    words = ("convert", "usernets:segmenter", "--size", "256", "--rounds", 0, "--mask", "all")
    told, dear = run(*words), run(*words, "--json").json
    first = told.out.replace("\n", " ")
    assert told.code == 0 and "times the work of the network as given" in told.err
    assert dear["macs_of_given"] > 2
    assert (
        first.startswith("With this mask, output strides ") and f"{dear['macs_of_given']:.2f} times" in first
    )
    others = dear["other_output_strides"]
    assert others and [one["macs"] for one in others] == sorted(one["macs"] for one in others)
    for one in others:
        assert (
            f"{one['option']} ({one['of_given']:.2f} times)" in first
            and one["of_given"] < dear["macs_of_given"]
        )
    typed = run(*words, *others[0]["option"].split(), "--json").json
    assert typed["macs_of_given"] == others[0]["of_given"]
    cheap = run(*words[:-1], "none")
    assert not cheap.out.startswith("With this mask") and "times the work" not in cheap.err


def test_convert_says_which_networks_a_copy_is_slower_than(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    of_copy = 9.0

    def timed(sides: dict[str, Any], rounds: int, **_: Any) -> dict[str, Timing]:
        return {key: Timing(of_copy if "optimize" in key else 6.0, 9.0) for key in sides}

    monkeypatch.setattr(side, "interleaved", timed)
    arguments = ("convert", "--model", "usernets:segmenter", *options("--rounds", 1))
    told = [note for note in run(*arguments, "--json").json["notes"] if "slower" in note]
    assert told == [
        f"net.optimize() is slower than {other}: 1.50 times as long."
        for other in ("dense high", "the converted network")
    ]
    assert told[0] in run(*arguments).out
    of_copy = 6.0
    assert "slower" not in run(*arguments).out


def test_run_does_the_images_that_are_there_and_reports_those_that_are_not(
    run: Run, file: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    given = ("missing.png", folder / "first.png", "empty")
    result = run("run", file, *given, "--trust", "--json")
    assert [Path(row["image"]).name for row in result.json["images"]] == ["first.png"]
    assert [row["image"] for row in result.json["failed"]] == ["missing.png", "empty"]
    assert result.code == 1 and (tmp_path / "predictions" / "first.png").is_file()
    told = run("run", file, *given, "--trust", "--output", "again")
    assert "1 done, 2 failed" in told.out and "missing.png" in told.err and told.code == 1


def test_run_takes_bfloat16(run: Run, file: Path, folder: Path, tmp_path: Path) -> None:
    pictures = []
    for precision in ("float", "bfloat16"):
        asked = ("--set", f"precision={precision}", "--output", precision)
        assert run("run", file, "--trust", folder / "first.png", *asked).code == 0
        with Image.open(tmp_path / precision / "first.png") as picture:
            pictures.append(torch.tensor(list(picture.getdata())))
    assert (pictures[0] == pictures[1]).float().mean() > 0.95


# -- export --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.smoke
def test_export_writes_a_program_that_gives_what_the_network_gives(run: Run, tmp_path: Path) -> None:
    """By name; figures as JSON."""
    result = run("export", "usernets:segmenter", "--size", "96x128", "--json")
    assert result.code == 0, result.err
    found = result.json
    assert found["file"] == "network.pt2" and found["image"] == [1, 3, 96, 128]
    assert found["bytes"] == (tmp_path / "network.pt2").stat().st_size and found["difference"] < 1e-5
    assert "budget:fraction=0.3" in found["mask"]
    program = torch.export.load(tmp_path / "network.pt2").module()
    assert program(torch.zeros(1, 3, 96, 128)).shape[:2] == (1, 10)
