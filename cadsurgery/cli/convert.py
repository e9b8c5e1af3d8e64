"""Commands around the conversion of a network, from `list`, which says what converts, to `export`."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen
from cadsurgery.support.kinds import CONVERTED, check_kind
from cadsurgery.tasks.commands import (
    ConvertOptions,
    ExploreOptions,
    ExportOptions,
    FinetuneOptions,
    KeypointsOptions,
    ListOptions,
    MacsOptions,
    MaskOptions,
    PlanOptions,
    RunOptions,
)

commands = typer.Typer()
keypoints = typer.Typer(
    name="keypoints",
    help="Keypoints and descriptors from an adaptive network: full resolution around keypoints, nothing else computed.",
    no_args_is_help=True,
)
_EXAMPLE = "lraspp_mobilenet_v3_large"  # that explore shows by default: a small network for segmentation


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


@commands.command()
@options.command
def explore(
    *,
    model: Annotated[str, options.ArgumentOrOption(f"file or name of a network; default {_EXAMPLE}", False)],
    options: ExploreOptions,
) -> None:
    """Show on a local page what masks do to an image: maps, predictions, cost, and the code. Ctrl-C ends it."""
    # When the process is ended by a signal, it deletes uploaded images as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with screen.steps("explore") as step:
        from cadsurgery.tasks.explore_page import serve

        address = serve(model or _EXAMPLE, options, step=step)
    screen.out.print(f"{address} (this machine only; Ctrl-C ends it)")
    while True:
        time.sleep(3600)


@commands.command()
@options.command
def export(
    *,
    model: options.Network,
    options: ExportOptions,
    as_json: options.Json = False,
) -> None:
    """Write a network for use without this package: a torch.export program or an ONNX file.

    The file contains mask, lattice and network. It is compared with the network on other images before it is written.
    """
    from cadsurgery.tasks.export_files import export_network

    with screen.steps("export") as step:
        exported = export_network(model, options, step)
    shape = "x".join("any" if length is None else str(length) for length in exported["image"])
    shape += f" (multiples of {exported['multiple']})" * (exported["multiple"] > 1)
    text = (
        f"wrote {exported['file']} ({exported['format']}): {exported['bytes'] / 1e6:.1f} MB, images {shape}, mask "
        f"{exported['mask']}; largest difference on {len(exported['compared'])} other batches "
        f"{exported['difference']:.1e}"
    )
    if fidelity := exported["fidelity"]:
        text += f"; error in 8 bits {fidelity['error']:.1%}"
        if fidelity["agreement"] is not None:
            text += f", {fidelity['agreement']:.2%} of the pixels of the same class"
        text += f", on {fidelity['images']} images in {fidelity['taken_in']}"
    screen.show(exported, text, as_json)


@commands.command()
@options.task("cadsurgery.finetune.command:finetune")
def finetune(
    *,
    model: options.Network,
    options: FinetuneOptions,
    as_json: options.Json = False,
) -> None:
    """Train a network on mixed resolution, and write it to OUTPUT/net.safetensors.

    Without labels (--data images:FOLDER) the network learns from its own outputs with everything kept high, and
    validation compares with these; of a folder without splits, every eighth image is for validation.

    The defaults are the published settings. An interrupted run continues exactly where it stopped when the command is
    given again. Several processes: torchrun --nproc_per_node N -m cadsurgery.cli finetune ..., with --device cpu
    on the CPU.

    Settings are --set NAME=VALUE or lines of --config: steps, batch, crop, lr, objective and others, which
    docs/howto/finetune.md describes. Those of an objective are --set objective_options.NAME=VALUE
    (docs/reference/objectives.md).
    """


@commands.command("list")
@options.command
def list_command(
    *,
    pattern: Annotated[
        str,
        typer.Argument(help='shell-style pattern, e.g. "*resnet*"'),
    ] = "*",
    options: ListOptions,
    as_json: options.Json = False,
) -> None:
    """List networks: whether each of them converts, with which output strides, what stays dense and why."""
    if options.masks:
        from cadsurgery.masks import list_masks

        infos = list_masks()
        lines = [
            f"[bold]{i.form}[/bold]  {i.summary}  {_describe(i.options)}  [dim]{i.source}[/dim]"
            for i in infos
        ]
        kept = ", ".join(info.form for info in list_masks(of_recipes=True))
        lines.append(f"[dim]for published recipes, where another one keeps more at less work: {kept}[/dim]")
        screen.show([vars(info) for info in infos], "\n".join(lines), as_json)
        return
    from cadsurgery.data.networks import list_models
    from cadsurgery.tasks.zoo_record import outlook, recorded, summary

    checked = recorded()
    rows = [checked.get(name, {"model": name, "result": "not checked"}) for name in list_models(pattern)]
    if as_json:
        screen.print_json(rows)
        return
    for row in rows:
        screen.out.print(f"{row['model']:40} {outlook(row)}", highlight=False, markup=False, soft_wrap=True)
    screen.out.print(summary(rows), highlight=False)


def _describe(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={'/'.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in options.items()
    )


@keypoints.command("extract")
@options.command
def extract_command(
    *,
    network: options.Network,
    images: Annotated[list[Path], typer.Argument(help="image files or folders")],
    options: Annotated[dict[str, Any], options.OptionsFrom(KeypointsOptions)],
    as_json: options.Json = False,
) -> None:
    """Write keypoints, scores and descriptors of every image, one file each.

    Existing files are kept, so an interrupted run can be continued. An image that cannot be used is reported, the
    others are processed, and the exit code is 1.
    """
    from cadsurgery.tasks.keypoints import extract
    from cadsurgery.tasks.report import FilesReport

    with screen.steps("keypoints extract") as step:
        rows, failures = extract(network, images, **options, step=step)
    before, count = sum(row["kept"] for row in rows), sum(row["keypoints"] for row in rows)
    text = (
        f"{count} keypoints of {len(rows)} images in {options['output']} ({len(rows) - before} new, "
        f"{before} there already), {len(failures)} failed"
    )
    screen.show_report(FilesReport(tuple(rows), text, tuple(failures)), as_json)
