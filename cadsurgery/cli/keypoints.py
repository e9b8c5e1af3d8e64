"""The commands of `cadsurgery keypoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import screen
from cadsurgery.cli.options import (
    Anchor,
    Device,
    Fill,
    Json,
    Pool,
    Region,
    Stride,
    Trust,
    Weights,
    adaptify_options,
    read_pair,
)

app = typer.Typer(
    help="Keypoints and descriptors by an adaptive network: full resolution around keypoints, and only what they need.",
    no_args_is_help=True,
)
Detector = Annotated[
    str, typer.Option(help="sift, own (the network's score map), or module:function of the image batch")
]
Count = Annotated[int, typer.Option(min=1, help="keypoints of an image at most")]
ReachOption = Annotated[
    str, typer.Option(help="receptive: compute only what the keypoints depend on; all: everything")
]
Align = Annotated[
    str,
    typer.Option(help="sample of a point: cell, the one that covers it; corners, as published for D2-Net"),
]
Raw = Annotated[bool, typer.Option("--raw", help="descriptors as the network gives them, not normalised")]
OutputName = Annotated[str, typer.Option(help="which output holds the descriptors, if there are several")]
MaxEdge = Annotated[int, typer.Option(min=0, help="longer side of images at most, in pixels; 0 for any")]
MaxSum = Annotated[int, typer.Option(min=0, help="height plus width at most (2800 as published); 0 for any")]
Multiple = Annotated[int, typer.Option(min=1, help="cut sizes to multiples of it (8 as published)")]
KEYPOINT_MASK = "keypoints:detector=given"


@app.command("extract")
def extract_command(
    model: Annotated[
        str, typer.Argument(help="a converted file, a torchvision or timm name, or module:function")
    ],
    images: Annotated[list[Path], typer.Argument(help="image files or folders")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the features")] = Path(
        "features"
    ),
    mask: Annotated[
        str,
        typer.Option(help='"keypoints:detector=given" has the extracted keypoints; empty: the file\'s own'),
    ] = KEYPOINT_MASK,
    detector: Detector = "sift",
    count: Count = 512,
    form: Annotated[str, typer.Option(help="npz (as D2-Net writes it) or h5 (as hloc reads it)")] = "npz",
    weights: Weights = "auto",
    output_stride: Stride = "",
    region: Region = "auto",
    fill: Fill = "linear",
    anchor: Anchor = "corner",
    pool: Pool = "atrous",
    reach: ReachOption = "receptive",
    align: Align = "cell",
    raw: Raw = False,
    output_name: OutputName = "",
    max_edge: MaxEdge = 0,
    max_sum: MaxSum = 0,
    multiple: Multiple = 1,
    device: Device = "cpu",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write keypoints, scores and descriptors of every image, one file each.

    What is there already is kept, so an interrupted run goes on. An image that cannot be used is reported, the others
    are done, and the exit code is 1. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.tasks.keypoints import Extraction, extract

    settings: dict[str, Any] = {
        **{"detector": detector, "count": count, "mask": mask, "reach": reach, "align": align, "raw": raw},
        **{"output": output_name, "max_edge": max_edge, "max_sum": max_sum, "multiple": multiple},
    }
    options = adaptify_options(output_stride, region, fill, "quadtree", anchor, pool)
    with screen.steps(as_json) as step:
        rows, failures = extract(
            *(model, images, output, Extraction(**settings)),
            form=form,
            weights=weights,
            options=options,
            device=device,
            step=step,
            trust=trust,
        )
    kept, found = sum(row["kept"] for row in rows), sum(row["keypoints"] for row in rows)
    text = (
        f"{found} keypoints of {len(rows)} images in {output} ({len(rows) - kept} new, {kept} there already), "
        f"{len(failures)} failed"
    )
    screen.show({"images": rows, "failed": failures}, text, as_json)
    screen.show_failures(failures, as_json)
    if failures:
        raise typer.Exit(1)


@app.command("eval")
def matching_command(
    model: Annotated[
        str, typer.Argument(help="a converted file, a torchvision or timm name, or module:function")
    ],
    data: Annotated[
        Path,
        typer.Option(help="folder of sequences with images 1.*, 2.*, ... and H_1_2, ...: HPatches, or one"),
    ],
    mask: Annotated[list[str], typer.Option(help="repeatable")] = [KEYPOINT_MASK],  # noqa: B006
    output_stride: Annotated[
        list[str],
        typer.Option("--output-stride", metavar="HIGH,LOW", help="repeatable: every mask at every pair"),
    ] = [],  # noqa: B006
    detector: Detector = "sift",
    count: Count = 512,
    weights: Weights = "auto",
    region: Region = "auto",
    fill: Fill = "linear",
    anchor: Anchor = "corner",
    pool: Pool = "atrous",
    reach: ReachOption = "receptive",
    align: Align = "cell",
    raw: Raw = False,
    output_name: OutputName = "",
    max_edge: MaxEdge = 0,
    max_sum: MaxSum = 0,
    multiple: Multiple = 1,
    all_sequences: Annotated[
        bool, typer.Option("--all-sequences", help="also the eight of HPatches that the protocol leaves out")
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="timing rounds on the first image; 0 to skip")] = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG: accuracy against threshold and MACs")] = None,
    matches: Annotated[Path | None, typer.Option(help="PNG: matches of the first pair")] = None,
    device: Device = "cpu",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Match images of known homographies: accuracy at 1 to 15 pixels beside MACs and time, for several masks.

    The protocol of HPatches as D2-Net uses it. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.tasks.keypoints import Extraction, evaluate_matching

    settings: dict[str, Any] = {
        **{"detector": detector, "count": count, "mask": mask[0], "reach": reach, "align": align, "raw": raw},
        **{"output": output_name, "max_edge": max_edge, "max_sum": max_sum, "multiple": multiple},
    }
    options = adaptify_options("", region, fill, "quadtree", anchor, pool)
    del options["output_stride"]  # of which there can be several
    with screen.steps(as_json) as step:
        report = evaluate_matching(
            *(model, data, mask, Extraction(**settings)),
            output_stride=[read_pair(text) for text in output_stride],
            options=options,
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
    screen.show(report.to_dict(), report.render(), as_json)
    if report.failed:
        raise typer.Exit(1)
