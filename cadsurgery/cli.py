"""The command line: arguments in, library calls, tables or JSON out. Exit codes: 0 done, 1 refused, 2 usage."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cadsurgery.errors import CadError

if TYPE_CHECKING:  # torch takes seconds to import; commands import what they need when they run
    pass

app = typer.Typer(
    help="Give convolutional networks content-adaptive downsampling: full feature resolution where a mask says it "
    "matters, strided elsewhere, in one pass, with the same weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# A terminal knows its width; a pipe or file gets lines that need not wrap.
out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(width=None if sys.stderr.isatty() else 140, stderr=True)

Model = Annotated[
    str, typer.Option("--model", "-m", help="torchvision or timm name, module:function, or a converted file")
]
Weights = Annotated[str, typer.Option(help="auto, none, a name of weights, or a file")]
Mask = Annotated[
    str,
    typer.Option(
        help='a name of cadsurgery list --masks, with options: "edges:threshold=0.15,dilation=11", '
        'wrappers: "edges | budget:fraction=0.3", several: "edges + gradient"'
    ),
]
Stride = Annotated[
    str,
    typer.Option("--output-stride", metavar="HIGH,LOW", help="e.g. 8,32; default: the network's own range"),
]
Region = Annotated[str, typer.Option(help="auto, backbone, or names of modules, separated by commas")]
Fill = Annotated[str, typer.Option(help="how points inside a cell are read: linear, nearest or guided")]
Patch = Annotated[str, typer.Option(help="shape of areas kept high: quadtree or block")]
Anchor = Annotated[str, typer.Option(help="corner, or center to reproduce the published code")]
Pool = Annotated[str, typer.Option(help="max-pool stages: atrous, or drop as published")]
ImageOption = Annotated[
    Path | None, typer.Option("--image", help="image file; default: a generated street scene")
]
Size = Annotated[
    str, typer.Option(metavar="HxW", help="size of the image; default 512x1024, or the file's own")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def convert(
    model: Model,
    mask: Mask = "edges",
    weights: Weights = "auto",
    output_stride: Stride = "",
    region: Region = "auto",
    fill: Fill = "linear",
    patch: Patch = "quadtree",
    anchor: Anchor = "corner",
    pool: Pool = "atrous",
    image: ImageOption = None,
    size: Size = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write")] = None,
    device: Device = "cpu",
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="do not check the laws on an example")
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="timing rounds; 0 to skip timing")] = 3,
    as_json: Json = False,
) -> None:
    """Convert a network, verify it, report MACs and measured times, and write it to a file."""
    from cadsurgery.conversion import convert as run

    path = output or Path(f"{model.replace(':', '-')}-{mask.partition(':')[0]}.safetensors")
    with _steps(as_json) as step:
        report = run(
            model=model,
            weights=weights,
            mask=mask,
            options=_options(output_stride, region, fill, patch, anchor, pool),
            image=image,
            size=_size(size),
            output=path,
            device=device,
            verify_laws=not no_verify,
            rounds=rounds,
            step=step,
        )
    _show(report.to_dict(), report.render(), as_json)


@app.command()
def plan(
    model: Model,
    output_stride: Stride = "",
    region: Region = "auto",
    all_nodes: Annotated[bool, typer.Option("--all", help="list dense nodes before the region too")] = False,
    as_json: Json = False,
) -> None:
    """Show what a conversion would do: a decision and its reason for every node."""
    from cadsurgery.conversion import make_or_read_plan
    from cadsurgery.report import render_plan

    with _steps(as_json) as step:
        step("planning")
        found = make_or_read_plan(model, _pair(output_stride), _names(region))
    _show(json.loads(found.to_json()), render_plan(found, all_nodes=all_nodes), as_json)


@app.command("mask")
def mask_command(
    mask: Annotated[
        list[str], typer.Option(help="as of other commands; default edges; repeatable with --compare")
    ] = [],  # noqa: B006
    compare: Annotated[
        bool, typer.Option("--compare", help="several masks side by side; without --mask a telling set")
    ] = False,
    image: ImageOption = None,
    labels: Annotated[
        Path | None, typer.Option(help="PNG of the classes of the image's pixels, for trimap")
    ] = None,
    size: Size = "",
    model: Annotated[
        str, typer.Option("--model", "-m", help="take strides, normalisation and MACs from this network")
    ] = "",
    output_stride: Stride = "8,32",
    patch: Patch = "quadtree",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write")] = Path("mask.png"),
    as_json: Json = False,
) -> None:
    """Draw a mask: image, level map and lattice side by side; or several masks and what they cost."""
    from cadsurgery.mask_report import draw_masks

    with _steps(as_json) as step:
        step("drawing")
        report = draw_masks(
            mask,
            compare=compare,
            image=image,
            labels=labels,
            size=_size(size),
            model=model,
            output_stride=_pair(output_stride),
            patch=patch,
            output=output,
        )
    _show(report.to_dict(), report.render(), as_json)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="a converted file")],
    images: Annotated[list[Path], typer.Argument(help="image files or folders")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the predictions")] = Path(
        "predictions"
    ),
    mask: Annotated[str, typer.Option(help="another mask than the file's")] = "",
    size: Annotated[str, typer.Option(metavar="HxW", help="resize images; default: as they are")] = "",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Run a converted file on images: predictions as PNG, active fraction and time of each."""
    from cadsurgery.conversion import predict

    with _steps(as_json) as step:
        rows, failures = predict(file, images, output, mask or None, _size(size), device, step)
    lines = [
        f"{row['image']}: active fraction {row['active_fraction']:.3f}, {row['milliseconds']:.0f} ms -> {row['output']}"
        for row in rows
    ]
    _show(
        {"images": rows, "failed": failures},
        "\n".join([*lines, f"{len(rows)} done, {len(failures)} failed"]),
        as_json,
    )
    if not as_json and _is_first_process():
        for failure in failures:
            err.print(f"[red]{failure['what']}[/red] {failure.get('why', '')}", highlight=False)
    if failures:
        raise typer.Exit(1)


@app.command()
def macs(
    model: Model,
    mask: Mask = "",
    output_stride: Stride = "",
    region: Region = "auto",
    patch: Patch = "quadtree",
    image: ImageOption = None,
    size: Size = "",
    rule: Annotated[
        str, typer.Option(help="conv: multiply-accumulates; published: as the CAD reference code counts")
    ] = "conv",
    total: Annotated[bool, typer.Option("--total", help="totals only, no layers")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="the network as it is, not converted")] = False,
    as_json: Json = False,
) -> None:
    """Count multiply-accumulates per layer: with the mask, dense high and dense low. Nothing is run."""
    from cadsurgery.conversion import count, count_dense
    from cadsurgery.report import render_macs

    with _steps(as_json) as step:
        step("counting")
        if dense:
            found = count_dense(model, image, _size(size), rule)
            text = f"MACs on {'x'.join(map(str, found['shape']))} ({rule} rule): {found['macs']['dense']:.5e}"
            _show(found, text, as_json)
            return
        options = _options(output_stride, region, "linear", patch, "corner", "atrous")
        report = count(model, mask, options, image, _size(size), rule)
    _show(report.to_dict(layers=not total), render_macs(report, layers=not total), as_json)


@app.command()
def bench(
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="torchvision or timm name, or module:function; repeatable"),
    ],
    mask: Annotated[
        str, typer.Option(help="ranks the patches that each budget keeps; a mask as above")
    ] = "edges",
    fractions: Annotated[str, typer.Option(help="budgets: shares of the patches kept high")] = (
        "1,0.5,0.34,0.25,0.1,0"
    ),
    size: Size = "",
    batch: Annotated[int, typer.Option(min=1, help="number of images")] = 1,
    output_stride: Stride = "",
    region: Region = "auto",
    fill: Annotated[list[str], typer.Option(help="nearest, linear, both, guided; repeatable")] = ["nearest"],  # noqa: B006
    patch: Patch = "quadtree",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="of torch on the CPU; 0 for its own choice")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="timing rounds; each runs every side once")] = 7,
    memory: Annotated[
        bool, typer.Option("--memory", help="also measure peak memory, each side in a process of its own")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON Lines to append each row to")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure time against work: random weights, budgets of the mask against the dense twins, interleaved.

    The law: at most 1.06 times the straight line between the dense twins (1.14 with linear or guided fill in networks
    of dense convolutions). A miss is reported in words; the exit code stays 0.
    """
    from cadsurgery.bench import bench as measure
    from cadsurgery.conversion import DEFAULT_SIZE

    with _steps(as_json) as step:
        report = measure(
            model,
            mask,
            _fractions(fractions),
            size=_size(size) or DEFAULT_SIZE,
            batch=batch,
            output_stride=_pair(output_stride),
            region=_names(region),
            fill=["nearest", "linear"] if "both" in fill else fill,
            patch=patch,
            dtype=dtype,
            device=device,
            threads=threads or None,
            rounds=rounds,
            memory=memory,
            picture=picture,
            output=output,
            step=step,
        )
    _show(report.to_dict(), report.render(), as_json)


@app.command("eval")
def eval_command(
    model: Annotated[
        str, typer.Argument(help="a converted file, a torchvision or timm name, or module:function")
    ],
    data: Annotated[
        str,
        typer.Option(
            help='labelled images: "folder:PATH,classes=11,ignore=11", cityscapes:PATH, voc:PATH, sbd:PATH, '
            "pets:PATH, or scene:COUNT (generated)"
        ),
    ],
    split: Annotated[str, typer.Option(help="train, val, test, or all for a folder without splits")] = "test",
    mask: Annotated[
        list[str],
        typer.Option(help="repeatable; default: the file's, or edges; dense high and low are added"),
    ] = [],  # noqa: B006
    output_stride: Annotated[
        list[str],
        typer.Option("--output-stride", metavar="HIGH,LOW", help="repeatable: every mask at every pair"),
    ] = [],  # noqa: B006
    weights: Weights = "auto",
    region: Region = "auto",
    fill: Fill = "linear",
    patch: Patch = "quadtree",
    anchor: Anchor = "corner",
    pool: Pool = "atrous",
    limit: Annotated[int, typer.Option(min=0, help="the first so many images; 0 for all")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="images in one call")] = 1,
    rounds: Annotated[int, typer.Option(min=0, help="timing rounds on the first image; 0 to skip")] = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw: accuracy against work")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Evaluate masks and output strides on labelled images: accuracy, MACs and time beside the dense networks.

    A converted file keeps its own region, fill, patch, anchor and pool. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.evaluation import evaluate

    options = _options("", region, fill, patch, anchor, pool)
    del options["output_stride"]  # of which there can be several
    with _steps(as_json) as step:
        report = evaluate(
            model,
            data,
            mask,
            output_stride=[_pair(text) for text in output_stride],
            options=options,
            weights=weights,
            split=split,
            limit=limit or None,
            batch=batch,
            rounds=rounds,
            device=device,
            output=output,
            picture=picture,
            step=step,
        )
    _show(report.to_dict(), report.render(), as_json)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="a converted file, a torchvision or timm name, or module:function")
    ],
    mask: Annotated[
        str,
        typer.Option(
            help="one that keeps a fixed share; default: the file's, or edges | budget:fraction=0.3"
        ),
    ] = "",
    weights: Weights = "auto",
    output_stride: Stride = "",
    region: Region = "auto",
    fill: Fill = "linear",
    patch: Patch = "quadtree",
    anchor: Anchor = "corner",
    pool: Pool = "atrous",
    size: Size = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("network.pt2"),
    as_json: Json = False,
) -> None:
    """Write a program for torch.export.load that runs without this package, for images of one size.

    Mask, lattice and network are in it. It is compared with the network on another image before it is written.
    """
    from cadsurgery.conversion import export_program

    with _steps(as_json) as step:
        options = _options(output_stride, region, fill, patch, anchor, pool)
        found = export_program(model, weights, mask, options, _size(size), output, step)
    shape = "x".join(map(str, found["image"]))
    text = (
        f"wrote {found['file']}: {found['bytes'] / 1e6:.1f} MB, images {shape}, mask {found['mask']}; "
        f"largest difference on another image {found['difference']:.1e}"
    )
    _show(found, text, as_json)


@app.command()
def finetune(
    model: Annotated[
        str, typer.Argument(help="a converted file, a torchvision or timm name, or module:function")
    ],
    data: Annotated[str, typer.Option(help="dataset to train on, e.g. folder:PATH")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder of the run; an interrupted run goes on")
    ],
    split: Annotated[str, typer.Option(help="split to train on")] = "train",
    validation_split: Annotated[str, typer.Option(help="split to measure on; empty for none")] = "val",
    mask: Annotated[str, typer.Option(help="default: the file's, or edges")] = "",
    weights: Weights = "auto",
    output_stride: Stride = "",
    region: Region = "auto",
    fill: Fill = "linear",
    patch: Patch = "quadtree",
    anchor: Anchor = "corner",
    pool: Pool = "atrous",
    objective: Annotated[
        str | None,
        typer.Option(
            help="mixed (default), any-budget, or blend for a learned mask; their options are below"
        ),
    ] = None,
    objective_option: Annotated[
        list[str], typer.Option(help="NAME=VALUE for the objective, e.g. teacher=self; repeatable")
    ] = [],  # noqa: B006
    cache: Annotated[
        bool,
        typer.Option(
            "--cache",
            help="run what comes before the region once and train the rest (implies --freeze stem): crops at fixed "
            "places, mirrored too; colours are not jittered",
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="optimiser steps; default 30000")] = None,
    batch: Annotated[int | None, typer.Option(help="images per process and pass; default 8")] = None,
    accumulate: Annotated[int | None, typer.Option(help="passes per step; default 1")] = None,
    crop: Annotated[
        int | None, typer.Option(help="side of the crops; default 768, 0 for whole images")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="of the classifier; default 0.1")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd (default) or adamw")] = None,
    clip: Annotated[float | None, typer.Option(help="largest norm of the gradient; default none")] = None,
    batch_norm: Annotated[str | None, typer.Option(help="train (default) or frozen")] = None,
    freeze: Annotated[
        str | None, typer.Option(help="stem: what comes before the region stays as it is")
    ] = None,
    ema: Annotated[float | None, typer.Option(help="decay of an average of the weights")] = None,
    precision: Annotated[str | None, typer.Option(help="no (default), fp16 or bf16")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything random; default 0")] = None,
    save_every: Annotated[int | None, typer.Option(help="steps between checkpoints; default 500")] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="steps between validations; default 1000")
    ] = None,
    log: Annotated[str | None, typer.Option(help="csv (default) or tensorboard")] = None,
    workers: Annotated[int | None, typer.Option(help="processes that load images; default 4")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file of settings; options given here come first")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="go on with the run in the folder; otherwise refuse one")
    ] = True,
    device: Annotated[str, typer.Option(help="auto or cpu")] = "auto",
    as_json: Json = False,
) -> None:
    """Train a network on mixed resolution, and write it to OUTPUT/net.safetensors.

    The defaults are the published settings. An interrupted run goes on exactly where it was when the command is
    given again. Several processes: accelerate launch --num_processes N -m cadsurgery.cli finetune ..., with --cpu
    on the CPU.

    Options of objectives (--objective-option NAME=VALUE; each is described in the guide):

    any-budget: low, high, fractions, extremes, ranking (own, random or a mask), teacher (initial or self),
    temperature, weight, supervision.

    blend: statistics (separate or shared), share (balanced or published), weight, network (blend, mixed or fixed),
    distil, supervision.
    """
    from cadsurgery.finetune.command import finetune as run
    from cadsurgery.finetune.command import make_settings
    from cadsurgery.launch import world

    overrides = {
        **{"objective": objective, "steps": steps, "batch": batch, "accumulate": accumulate, "crop": crop},
        **{"lr": lr, "optimizer": optimizer, "clip": clip, "batch_norm": batch_norm, "freeze": freeze},
        **{"ema": ema, "precision": precision, "seed": seed, "save_every": save_every, "log": log},
        **{"validate_every": validate_every, "workers": workers},
    }
    settings = make_settings(config, overrides, objective_option)
    silent = as_json or not world().is_main
    with _training(settings.steps, settings.batch * settings.accumulate, silent) as (on_step, step):
        report = run(
            model=model,
            data=data,
            split=split,
            validation_split=validation_split,
            weights=weights,
            mask=mask,
            options=_options(output_stride, region, fill, patch, anchor, pool),
            settings=settings,
            output=output,
            resume=resume,
            device=device,
            on_step=on_step,
            step=step,
            cache=cache,
        )
    if world().is_main:
        _show(report.to_dict(), report.render(), as_json)


keypoints = typer.Typer(
    help="Keypoints and descriptors by an adaptive network: full resolution around keypoints, and only what they need.",
    no_args_is_help=True,
)
app.add_typer(keypoints, name="keypoints")

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


@keypoints.command("extract")
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
    as_json: Json = False,
) -> None:
    """Write keypoints, scores and descriptors of every image, one file each.

    What is there already is kept, so an interrupted run goes on. An image that cannot be used is reported, the others
    are done, and the exit code is 1. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.keypoints import Extraction, extract

    settings: dict[str, Any] = {
        **{"detector": detector, "count": count, "mask": mask, "reach": reach, "align": align, "raw": raw},
        **{"output": output_name, "max_edge": max_edge, "max_sum": max_sum, "multiple": multiple},
    }
    options = _options(output_stride, region, fill, "quadtree", anchor, pool)
    with _steps(as_json) as step:
        rows, failures = extract(
            *(model, images, output, Extraction(**settings)),
            form=form,
            weights=weights,
            options=options,
            device=device,
            step=step,
        )
    kept, found = sum(row["kept"] for row in rows), sum(row["keypoints"] for row in rows)
    text = (
        f"{found} keypoints of {len(rows)} images in {output} ({len(rows) - kept} new, {kept} there already), "
        f"{len(failures)} failed"
    )
    _show({"images": rows, "failed": failures}, text, as_json)
    if not as_json and _is_first_process():
        for failure in failures:
            err.print(f"[red]{failure['what']}[/red] {failure.get('why', '')}", highlight=False)
    if failures:
        raise typer.Exit(1)


@keypoints.command("eval")
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
    as_json: Json = False,
) -> None:
    """Match images of known homographies: accuracy at 1 to 15 pixels beside MACs and time, for several masks.

    The protocol of HPatches as D2-Net uses it. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.keypoints import Extraction, evaluate_matching

    settings: dict[str, Any] = {
        **{"detector": detector, "count": count, "mask": mask[0], "reach": reach, "align": align, "raw": raw},
        **{"output": output_name, "max_edge": max_edge, "max_sum": max_sum, "multiple": multiple},
    }
    options = _options("", region, fill, "quadtree", anchor, pool)
    del options["output_stride"]  # of which there can be several
    with _steps(as_json) as step:
        report = evaluate_matching(
            *(model, data, mask, Extraction(**settings)),
            output_stride=[_pair(text) for text in output_stride],
            options=options,
            weights=weights,
            everything=all_sequences,
            rounds=rounds,
            device=device,
            output=output,
            picture=picture,
            matches=matches,
            step=step,
        )
    _show(report.to_dict(), report.render(), as_json)
    if report.failed:
        raise typer.Exit(1)


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help='shell-style, e.g. "*resnet*"')] = "*",
    library: Annotated[str, typer.Option(help="torchvision or timm; default both")] = "",
    masks: Annotated[bool, typer.Option("--masks", help="list mask providers instead")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="build, convert and verify each network here and now")
    ] = False,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="--check: JSON Lines to append to; an interrupted run goes on"),
    ] = Path("zoo.jsonl"),
    workers: Annotated[int, typer.Option(min=1, help="--check: networks at a time")] = 2,
    memory: Annotated[float, typer.Option(min=0.5, help="--check: GiB for each network")] = 10.0,
    seconds: Annotated[float, typer.Option(min=1, help="--check: seconds for each network")] = 600.0,
    as_json: Json = False,
) -> None:
    """List networks: whether each converts, with which output strides, what stays dense and why."""
    if masks:
        from cadsurgery.masks import list_masks

        infos = list_masks()
        lines = [
            f"[bold]{i.form}[/bold]  {i.summary}  {_described(i.options)}  [dim]{i.source}[/dim]"
            for i in infos
        ]
        _show([vars(info) for info in infos], "\n".join(lines), as_json)
        return
    from cadsurgery.coverage import Limits, check_networks, outlook, recorded, summary
    from cadsurgery.zoo import list_models

    names = list_models(pattern, library)
    if check:
        with _progress(len(names), as_json) as advance:
            rows = check_networks(
                names, output, workers=workers, limits=Limits(seconds, memory), on_row=advance
            )
    else:
        known = recorded()
        rows = [known.get(name, {"model": name, "result": "not checked"}) for name in names]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        out.print(f"{row['model']:40} {outlook(row)}", highlight=False, markup=False, soft_wrap=True)
    out.print(summary(rows), highlight=False)


@contextmanager
def _progress(total: int, silent: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar on the error stream that names what was done last; nothing with --json."""
    if silent:
        yield lambda row: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda row: bar.update(task, advance=1, description=f"{row['model']}: {row['result']}")


@contextmanager
def _training(
    steps: int, images: int, silent: bool
) -> Iterator[tuple[Callable[[dict[str, float | None]], None], Callable[[str], None]]]:
    """A progress bar on the error stream with the last row of the log and images a second; nothing with --json."""
    if silent:
        yield (lambda row: None), (lambda text: None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("starting", total=steps)

        def on_step(row: dict[str, float | None]) -> None:
            told = [
                f"{name} {value:.3g}" for name, value in row.items() if name != "step" and value is not None
            ]
            speed = bar.tasks[0].speed
            told += [f"{speed * images:.1f} images/s"] if speed else []
            bar.update(task, completed=row["step"], description=", ".join(told))

        yield on_step, lambda text: bar.update(task, description=text)


def main() -> None:
    """Entry point: errors a user can cause are printed without a traceback and exit with 1."""
    try:
        code = app(standalone_mode=False)
    except CadError as error:
        if "--json" in sys.argv:
            _print_json(error.to_dict())
        else:
            err.print(f"[bold red]{type(error).__name__}:[/bold red]", end=" ")
            err.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except typer.Exit as request:
        sys.exit(request.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the argument parser
        if show is None:
            raise
        show()
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _options(
    output_stride: str, region: str, fill: str, patch: str, anchor: str, pool: str
) -> dict[str, Any]:
    return {
        "output_stride": _pair(output_stride),
        "region": _names(region),
        "fill": fill,
        "patch": patch,
        "anchor": anchor,
        "pool": pool,
    }


def _pair(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        high, low = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not HIGH,LOW such as 8,32", param_hint="--output-stride"
        ) from None
    return high, low


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1,0.5,0", param_hint="--fractions"
        ) from None


def _size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not HxW such as 512x1024", param_hint="--size") from None
    return height, width


def _names(region: str) -> str | list[str]:
    return region if region in ("auto", "backbone") else [name.strip() for name in region.split(",")]


def _described(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in options.items()
    )


@contextmanager
def _steps(silent: bool) -> Iterator[Callable[[str], None]]:
    """A spinner on the error stream that names the step; nothing with --json or in further processes."""
    if silent or not _is_first_process():
        yield lambda text: None
        return
    with err.status("starting") as status:
        yield status.update


def _is_first_process() -> bool:
    """Of those that a launcher started: the one that prints."""
    from cadsurgery.launch import world

    return world().is_main


def _show(values: Any, renderable: Any, as_json: bool) -> None:
    if not _is_first_process():
        return
    if as_json:
        _print_json(values)
    else:
        out.print(renderable)


def _print_json(values: Any) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
