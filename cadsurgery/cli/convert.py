"""Commands around the conversion of a network: convert, plan, mask, run, macs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.kinds import CONVERTED, check_kind
from cadsurgery.tasks.options import Conversion

commands = typer.Typer()


def check_converted(file: str) -> str:
    """Refuse a file that is no converted network, also if no images are given yet."""
    check_kind(file, CONVERTED)
    return file


@commands.command()
@options.task("cadsurgery.tasks.convert:convert")
def convert(
    *,
    model: options.Model,
    mask: options.Mask = DEFAULT_MASK,
    weights: options.Weights = "auto",
    options: options.Converted,
    image: options.ImageOption = None,
    size: options.Size = None,
    output: Annotated[Path | None, options.output("file to write")] = None,
    device: options.Device = "cpu",
    verify_laws: Annotated[
        bool,
        typer.Option("--no-verify", callback=lambda no: not no, help="do not check the laws on an example"),
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="timing rounds; 0 to skip timing")] = 3,
    method: Annotated[
        str,
        typer.Option(
            help="adaptive; anytime: exits, no computation where they are confident; sampling: gates, interpolation "
            "where they are closed; or resampling: the image is sampled more densely where it matters"
        ),
    ] = "adaptive",
    exits: options.WithExits,
    gates: options.WithGates,
    sampling: options.Sampled,
    as_json: options.Json = False,
) -> None:
    """Convert a network, verify it, report MACs and measured times, and write it to a file."""


@commands.command()
@options.command
def plan(
    *,
    model: options.Model,
    conversion: Annotated[
        dict[str, Any], options.OptionsFrom(Conversion, ("output_stride", "coarsest", "region", "outputs"))
    ],
    size: Annotated[Any, options.size("size of the example; default: small")] = None,
    all_nodes: Annotated[bool, typer.Option("--all", help="also list dense nodes before the region")] = False,
    as_json: options.Json = False,
) -> None:
    """Show what a conversion would do, with the reason for every node; or show the plan stored in a converted file."""
    from cadsurgery.tasks.convert import make_or_read_plan
    from cadsurgery.tasks.convert_report import describe_plan

    with screen.steps("plan") as step:
        step("planning")
        report = describe_plan(make_or_read_plan(model, **conversion, size=size))
    screen.show(json.loads(report.plan), report.render(all_nodes=all_nodes), as_json)


@commands.command("mask")
@options.task("cadsurgery.tasks.mask_report:draw_masks")
def mask_command(
    *,
    image: Annotated[
        str,
        options.ArgumentOrOption(
            "image file; default: a generated street scene", is_needed=False, metavar="image", short=()
        ),
    ],
    masks: Annotated[
        list[str],
        typer.Option(
            "--mask", help=f"as in other commands; default {DEFAULT_MASK}; repeatable with --compare"
        ),
    ] = [],  # noqa: B006
    compare: Annotated[
        bool, typer.Option("--compare", help="draw several masks side by side; default: a selection")
    ] = False,
    labels: Annotated[
        Path | None, typer.Option(help="PNG with a class per pixel of the image, for trimap")
    ] = None,
    size: options.Size = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="network to take strides, normalisation and MACs from: a name, module:function, or a converted file",
        ),
    ] = "",
    weights: options.Weights = "auto",
    options: Annotated[
        dict[str, Any], options.OptionsFrom(Conversion, ("output_stride", "patch"), defaults=("8,32",))
    ],
    output: Annotated[Path, options.output("PNG to write")] = Path("mask.png"),
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Draw a mask on an image: image, level map and lattice side by side; or several masks with quality and cost."""


@commands.command()
@options.task("cadsurgery.tasks.run:predict")
def run(
    *,
    file: Annotated[str, typer.Argument(callback=check_converted, help="a converted file, or hf:owner/name")],
    images: Annotated[
        list[str],
        typer.Argument(
            help="image files, folders, addresses such as s3://bucket/photos, clips, the number of a camera, or lists "
            "of these: @FILE, or - for standard input; with --ray also Parquet"
        ),
    ],
    output: Annotated[
        str, options.output("folder or address for the predictions; a clip for one source")
    ] = "predictions",
    view: Annotated[
        str,
        typer.Option(
            help="classes, overlay (on the image) or side (beside it); default: classes for images, overlay for clips"
        ),
    ] = "",
    mask: Annotated[str, typer.Option(help="mask, instead of the file's")] = "",
    size: Annotated[Any, options.size("resize images to this size; default: no resizing")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on with the folder: predictions that are there are not made again"),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="processes with one thread each; default: the cores, fewer for few images, and 1 on a GPU",
        ),
    ] = None,
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="share the images by Ray: local, auto (the cluster that runs here) or HOST:PORT",
        ),
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="number of images or frames that run together")] = 1,
    fps: Annotated[float, typer.Option(min=0.01, help="frames per second of a folder of frames")] = 25.0,
    device: options.Device = "cpu",
    precision: Annotated[
        str, typer.Option(help="precision of the optimised copy: float, as the weights, or bfloat16")
    ] = "float",
    until: Annotated[
        float,
        typer.Option(
            metavar="MS",
            min=0,
            help="for a network with exits: time limit in milliseconds for its best prediction",
        ),
    ] = 0,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Run a converted file on images and clips: predictions, active fraction or exit, and the time of each.

    Predictions of images are PNG files, and manifest.jsonl says what happened to each image. A clip or camera gives a
    clip; Ctrl-C ends it with the current frame.
    """


@commands.command()
@options.command
def macs(
    *,
    model: options.Model,
    mask: options.Mask = "",
    conversion: Annotated[
        dict[str, Any], options.OptionsFrom(Conversion, ("output_stride", "region", "patch", "normalisation"))
    ],
    image: options.ImageOption = None,
    size: options.Size = None,
    rule: Annotated[
        str, typer.Option(help="conv: multiply-accumulates; published: the count of the CAD reference code")
    ] = "conv",
    total: Annotated[bool, typer.Option("--total", help="totals only, no layers")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="count the network without converting it")] = False,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Count multiply-accumulates per layer: with the mask, as given, everything high or low; nothing is run.

    A file of another method is run on the image and counted up to each exit, for each gate, or for sampler and
    network.
    """
    from cadsurgery.network.macs import MacReport
    from cadsurgery.support.counting import describe_not_counted
    from cadsurgery.tasks.convert import count, count_dense
    from cadsurgery.tasks.convert_report import render_macs

    with screen.steps("macs") as step:
        step("counting")
        report = (
            count_dense(model, image, size, rule)
            if dense
            else count(model, mask, conversion, image, size, rule, trust)
        )
    if isinstance(report, dict):
        shape, whole = "x".join(map(str, report["shape"])), report["macs"]["dense"]
        left = describe_not_counted(tuple(report["not_counted"]))
        text = "\n".join(filter(None, (f"MACs on {shape} ({rule} rule): {whole:.5e}", left)))
        screen.show(report, text, as_json)
        return
    values = report.to_dict(layers=not total) if isinstance(report, MacReport) else report.to_dict()
    screen.show(values, render_macs(report, layers=not total), as_json)
