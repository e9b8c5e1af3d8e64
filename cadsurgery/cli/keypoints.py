"""The commands of `cadsurgery keypoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen
from cadsurgery.tasks.options import Conversion, Extraction

commands = typer.Typer(
    name="keypoints",
    help="Keypoints and descriptors by an adaptive network: full resolution around keypoints, and only what they need.",
    no_args_is_help=True,
)
SIZES = ("max_edge", "max_sum", "multiple")
Described = Annotated[dict[str, Any], options.Of(Extraction, ("reach", "align", "raw", "output", *SIZES))]


@commands.command("extract")
@options.command
def extract_command(
    *,
    model: options.Network,
    images: Annotated[list[Path], typer.Argument(help="image files or folders")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the features")] = Path(
        "features"
    ),
    keypoints: Annotated[dict[str, Any], options.Of(Extraction, ("mask", "detector", "count"))],
    form: Annotated[str, typer.Option(help="npz (as D2-Net writes it) or h5 (as hloc reads it)")] = "npz",
    weights: options.Weights = "auto",
    conversion: Annotated[
        dict[str, Any], options.Of(Conversion, ("output_stride", "region", "fill", "anchor", "pool"))
    ],
    description: Described,
    device: options.Device = "cpu",
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Write keypoints, scores and descriptors of every image, one file each.

    What is there already is kept, so an interrupted run goes on. An image that cannot be used is reported, the others
    are done, and the exit code is 1. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.tasks.keypoints import extract

    settings = Extraction(**keypoints, **description)
    with screen.steps(as_json) as step:
        rows, failures = extract(
            *(model, images, output, settings),
            form=form,
            weights=weights,
            options=conversion,
            device=device,
            step=step,
            trust=trust,
        )
    kept, count = sum(row["kept"] for row in rows), sum(row["keypoints"] for row in rows)
    text = (
        f"{count} keypoints of {len(rows)} images in {output} ({len(rows) - kept} new, {kept} there already), "
        f"{len(failures)} failed"
    )
    screen.show_rows(rows, failures, text, as_json)


@commands.command("eval")
@options.command
def matching_command(
    *,
    model: options.Network,
    data: Annotated[
        Path,
        typer.Option(help="folder of sequences with images 1.*, 2.*, ... and H_1_2, ...: HPatches, or one"),
    ],
    mask: Annotated[list[str], typer.Option(help="repeatable")] = [Extraction.mask],  # noqa: B006
    output_stride: options.Strides = [],  # noqa: B006
    keypoints: Annotated[dict[str, Any], options.Of(Extraction, ("detector", "count"))],
    weights: options.Weights = "auto",
    conversion: Annotated[dict[str, Any], options.Of(Conversion, ("region", "fill", "anchor", "pool"))],
    description: Described,
    all_sequences: Annotated[
        bool, typer.Option("--all-sequences", help="also the eight of HPatches that the protocol leaves out")
    ] = False,
    rounds: options.Rounds = 3,
    output: options.Report = None,
    picture: Annotated[Path | None, typer.Option(help="PNG: accuracy against threshold and MACs")] = None,
    matches: Annotated[Path | None, typer.Option(help="PNG: matches of the first pair")] = None,
    device: options.Device = "cpu",
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Match images of known homographies: accuracy at 1 to 15 pixels beside MACs and time, for several masks.

    The protocol of HPatches as D2-Net uses it. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.tasks.keypoints import evaluate_matching

    settings = Extraction(**keypoints, **description)
    with screen.steps(as_json) as step:
        report = evaluate_matching(
            *(model, data, mask, settings),
            output_stride=[options.read_pair(text) for text in output_stride],
            options=conversion,
            weights=weights,
            everything=all_sequences,
            rounds=rounds,
            device=device,
            output=output,
            picture=picture,
            matches=matches,
            step=step,
            trust=trust,
        )
    screen.show_report(report, as_json)
    if report.failed:
        raise typer.Exit(1)
