"""The command line: arguments in, library calls, tables or JSON out. Exit codes: 0 done, 1 refused, 2 usage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import keypoints, screen
from cadsurgery.cli.options import (
    Anchor,
    Device,
    Fill,
    ImageOption,
    Json,
    Mask,
    Model,
    Outputs,
    Patch,
    Pool,
    Region,
    Size,
    Stride,
    Trust,
    Weights,
    adaptify_options,
    read_fractions,
    read_names,
    read_pair,
    read_size,
)
from cadsurgery.support.errors import CadError

# torch takes seconds to import: commands import what they need when they run

app = typer.Typer(
    help="Give convolutional networks content-adaptive downsampling: full feature resolution where a mask says it "
    "matters, strided elsewhere, in one pass, with the same weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(keypoints.app, name="keypoints")


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
    outputs: Outputs = "fine",
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
    from cadsurgery.tasks.convert import convert as run

    path = output or Path(f"{model.replace(':', '-')}-{mask.partition(':')[0]}.safetensors")
    with screen.steps(as_json) as step:
        report = run(
            model=model,
            weights=weights,
            mask=mask,
            options=adaptify_options(output_stride, region, fill, patch, anchor, pool, outputs),
            image=image,
            size=read_size(size),
            output=path,
            device=device,
            verify_laws=not no_verify,
            rounds=rounds,
            step=step,
        )
    screen.show(report.to_dict(), report.render(), as_json)


@app.command()
def plan(
    model: Model,
    output_stride: Stride = "",
    region: Region = "auto",
    outputs: Outputs = "fine",
    all_nodes: Annotated[bool, typer.Option("--all", help="list dense nodes before the region too")] = False,
    as_json: Json = False,
) -> None:
    """Show what a conversion would do: a decision and its reason for every node."""
    from cadsurgery.tasks.convert import make_or_read_plan
    from cadsurgery.tasks.report import render_plan

    with screen.steps(as_json) as step:
        step("planning")
        found = make_or_read_plan(model, read_pair(output_stride), read_names(region), outputs)
    screen.show(json.loads(found.to_json()), render_plan(found, all_nodes=all_nodes), as_json)


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
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Draw a mask: image, level map and lattice side by side; or several masks and what they cost."""
    from cadsurgery.tasks.mask_report import draw_masks

    with screen.steps(as_json) as step:
        step("drawing")
        report = draw_masks(
            mask,
            compare=compare,
            image=image,
            labels=labels,
            size=read_size(size),
            model=model,
            output_stride=read_pair(output_stride),
            patch=patch,
            output=output,
            trust=trust,
        )
    screen.show(report.to_dict(), report.render(), as_json)


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
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run a converted file on images: predictions as PNG, active fraction and time of each."""
    from cadsurgery.tasks.convert import predict

    with screen.steps(as_json) as step:
        rows, failures = predict(file, images, output, mask or None, read_size(size), device, step, trust)
    lines = [
        f"{row['image']}: active fraction {row['active_fraction']:.3f}, {row['milliseconds']:.0f} ms -> {row['output']}"
        for row in rows
    ]
    screen.show(
        {"images": rows, "failed": failures},
        "\n".join([*lines, f"{len(rows)} done, {len(failures)} failed"]),
        as_json,
    )
    screen.show_failures(failures, as_json)
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
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Count multiply-accumulates per layer: with the mask, dense high and dense low. Nothing is run."""
    from cadsurgery.tasks.convert import count, count_dense
    from cadsurgery.tasks.report import render_macs

    with screen.steps(as_json) as step:
        step("counting")
        if dense:
            found = count_dense(model, image, read_size(size), rule)
            text = f"MACs on {'x'.join(map(str, found['shape']))} ({rule} rule): {found['macs']['dense']:.5e}"
            screen.show(found, text, as_json)
            return
        options = adaptify_options(output_stride, region, "linear", patch, "corner", "atrous")
        report = count(model, mask, options, image, read_size(size), rule, trust)
    screen.show(report.to_dict(layers=not total), render_macs(report, layers=not total), as_json)


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
    from cadsurgery.tasks.bench import bench as measure
    from cadsurgery.tasks.convert import DEFAULT_SIZE

    with screen.steps(as_json) as step:
        report = measure(
            model,
            mask,
            read_fractions(fractions),
            size=read_size(size) or DEFAULT_SIZE,
            batch=batch,
            output_stride=read_pair(output_stride),
            region=read_names(region),
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
    screen.show(report.to_dict(), report.render(), as_json)


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
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Evaluate masks and output strides on labelled images: accuracy, MACs and time beside the dense networks.

    A converted file keeps its own region, fill, patch, anchor and pool. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.tasks.segmentation.evaluation import evaluate

    options = adaptify_options("", region, fill, patch, anchor, pool)
    del options["output_stride"]  # of which there can be several
    with screen.steps(as_json) as step:
        report = evaluate(
            model,
            data,
            mask,
            output_stride=[read_pair(text) for text in output_stride],
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
            trust=trust,
        )
    screen.show(report.to_dict(), report.render(), as_json)
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
    outputs: Outputs = "fine",
    size: Size = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("network.pt2"),
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a program for torch.export.load that runs without this package, for images of one size.

    Mask, lattice and network are in it. It is compared with the network on another image before it is written.
    """
    from cadsurgery.tasks.convert import export_program

    with screen.steps(as_json) as step:
        options = adaptify_options(output_stride, region, fill, patch, anchor, pool, outputs)
        found = export_program(model, weights, mask, options, read_size(size), output, step, trust)
    shape = "x".join(map(str, found["image"]))
    text = (
        f"wrote {found['file']}: {found['bytes'] / 1e6:.1f} MB, images {shape}, mask {found['mask']}; "
        f"largest difference on another image {found['difference']:.1e}"
    )
    screen.show(found, text, as_json)


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
    outputs: Outputs = "fine",
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
    trust: Trust = False,
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
    from cadsurgery.support.processes import world

    overrides = {
        **{"objective": objective, "steps": steps, "batch": batch, "accumulate": accumulate, "crop": crop},
        **{"lr": lr, "optimizer": optimizer, "clip": clip, "batch_norm": batch_norm, "freeze": freeze},
        **{"ema": ema, "precision": precision, "seed": seed, "save_every": save_every, "log": log},
        **{"validate_every": validate_every, "workers": workers},
    }
    settings = make_settings(config, overrides, objective_option)
    silent = as_json or not world().is_main
    with screen.training(settings.steps, settings.batch * settings.accumulate, silent) as (on_step, step):
        report = run(
            model=model,
            data=data,
            split=split,
            validation_split=validation_split,
            weights=weights,
            mask=mask,
            options=adaptify_options(output_stride, region, fill, patch, anchor, pool, outputs),
            settings=settings,
            output=output,
            resume=resume,
            device=device,
            on_step=on_step,
            step=step,
            cache=cache,
            trust=trust,
        )
    if world().is_main:
        screen.show(report.to_dict(), report.render(), as_json)


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
        screen.show([vars(info) for info in infos], "\n".join(lines), as_json)
        return
    from cadsurgery.data.networks import list_models
    from cadsurgery.tasks.zoo_check import Limits, check_networks, outlook, recorded, summary

    names = list_models(pattern, library)
    if check:
        with screen.progress(len(names), as_json) as advance:
            rows = check_networks(
                names, output, workers=workers, limits=Limits(seconds, memory), on_row=advance
            )
    else:
        known = recorded()
        rows = [known.get(name, {"model": name, "result": "not checked"}) for name in names]
    if as_json:
        screen.print_json(rows)
        return
    for row in rows:
        screen.out.print(f"{row['model']:40} {outlook(row)}", highlight=False, markup=False, soft_wrap=True)
    screen.out.print(summary(rows), highlight=False)


def main() -> None:
    """Entry point: errors a user can cause are printed without a traceback and exit with 1.

    Modules named as `module:function` are also found in the current folder, behind all installed ones.
    """
    if not sys.flags.safe_path:
        sys.path.append(str(Path.cwd()))
    try:
        with screen.warnings_as_lines():
            code = app(standalone_mode=False)
    except CadError as error:
        if "--json" in sys.argv:
            screen.print_json(error.to_dict())
        else:
            screen.err.print(f"[bold red]{type(error).__name__}:[/bold red]", end=" ")
            screen.err.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except typer.Exit as request:
        sys.exit(request.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        screen.err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the argument parser
        if show is None:
            raise
        show()
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _described(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in options.items()
    )
