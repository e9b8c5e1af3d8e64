"""Commands around the conversion of a network: convert, plan, mask, run, macs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cadsurgery.cli import options, screen
from cadsurgery.support.kinds import CONVERTED, check_kind
from cadsurgery.tasks.commands import ConvertOptions, MacsOptions, MaskOptions, PlanOptions, RunOptions

commands = typer.Typer()


def check_converted(file: str) -> str:
    """Refuse a file that is no converted network, also if no images are given yet."""
    check_kind(file, CONVERTED)
    return file


@commands.command()
@options.task("cadsurgery.tasks.convert_model:convert")
def convert(
    *,
    model: options.Model,
    options: ConvertOptions,
    as_json: options.Json = False,
) -> None:
    """Convert a network, verify it, report MACs and measured times, and write it to a file."""


@commands.command()
@options.command
def plan(
    *,
    model: options.Model,
    options: PlanOptions,
    as_json: options.Json = False,
) -> None:
    """Show what a conversion would do, with the reason for every node; or show the plan stored in a converted file."""
    from cadsurgery.tasks.convert_model import make_or_read_plan
    from cadsurgery.tasks.convert_report import render_plan

    with screen.steps("plan") as step:
        step("planning")
        found = make_or_read_plan(model, options)
    screen.show(json.loads(found.to_json()), render_plan(found, all_nodes=options.all_nodes), as_json)


@commands.command("mask")
@options.task("cadsurgery.tasks.mask_report:draw_masks")
def mask_command(
    *,
    image: Annotated[
        str,
        options.ArgumentOrOption(
            "image file, or clip (drive.mp4,every=25); default: a generated street scene",
            is_needed=False,
            metavar="image",
            short=(),
        ),
    ],
    options: MaskOptions,
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
    options: RunOptions,
    as_json: options.Json = False,
) -> None:
    """Run a converted file on images and clips: predictions, active fraction or exit, and the time of each.

    Predictions are PNG files, of rasters TIFF files; manifest.jsonl says what happened to each image. A clip or
    camera gives a clip; Ctrl-C ends it with the current frame.
    """


@commands.command()
@options.command
def macs(
    *,
    model: options.Model,
    options: MacsOptions,
    as_json: options.Json = False,
) -> None:
    """Count multiply-accumulates per layer: with the mask, as given, everything high or low; nothing is run.

    A file of another method is run on the image and counted up to each exit, for each gate, or for sampler and
    network.
    """
    from cadsurgery.support.counting import describe_not_counted
    from cadsurgery.tasks.convert_model import count, count_dense
    from cadsurgery.tasks.convert_report import render_macs

    with screen.steps("macs") as step:
        step("counting")
        report = count_dense(model, options) if options.dense else count(model, options)
    if isinstance(report, dict):
        shape, whole = "x".join(map(str, report["shape"])), report["macs"]["dense"]
        left = describe_not_counted(tuple(report["not_counted"]))
        text = "\n".join(filter(None, (f"MACs on {shape}: {whole:.5e}", left)))
        screen.show(report, text, as_json)
        return
    screen.show(report.to_dict(), render_macs(report), as_json)
