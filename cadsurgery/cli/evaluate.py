"""Commands that measure networks: bench against work, eval against labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options, screen
from cadsurgery.tasks.options import Conversion

commands = typer.Typer()


@commands.command()
@options.command
def bench(
    *,
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
    size: options.Size = "",
    batch: Annotated[int, typer.Option(min=1, help="number of images")] = 1,
    conversion: Annotated[dict[str, Any], options.Of(Conversion, ("output_stride", "region"))],
    fill: Annotated[list[str], typer.Option(help="nearest, linear, both, guided; repeatable")] = ["nearest"],  # noqa: B006
    areas: Annotated[dict[str, Any], options.Of(Conversion, ("patch",))],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: options.Device = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="of torch on the CPU; 0 for its own choice")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="timing rounds; each runs every side once")] = 7,
    memory: Annotated[
        bool, typer.Option("--memory", help="also measure peak memory, each side in a process of its own")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON Lines to append each row to")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure time against work: random weights, budgets of the mask against the dense twins, interleaved.

    The law: at most 1.06 times the straight line between the dense twins (1.14 with linear or guided fill in networks
    of dense convolutions). A miss is reported in words; the exit code stays 0.
    """
    from cadsurgery.tasks.bench import bench as measure
    from cadsurgery.tasks.open import DEFAULT_SIZE

    with screen.steps(as_json) as step:
        report = measure(
            model,
            mask,
            options.read_fractions(fractions),
            size=options.read_size(size) or DEFAULT_SIZE,
            batch=batch,
            **conversion,
            **areas,
            fill=["nearest", "linear"] if "both" in fill else fill,
            dtype=dtype,
            device=device,
            threads=threads or None,
            rounds=rounds,
            memory=memory,
            picture=picture,
            output=output,
            step=step,
        )
    screen.show_report(report, as_json)


@commands.command("eval")
@options.command
def eval_command(
    *,
    model: options.Network,
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
    output_stride: options.Strides = [],  # noqa: B006
    weights: options.Weights = "auto",
    conversion: Annotated[
        dict[str, Any], options.Of(Conversion, ("region", "fill", "patch", "anchor", "pool"))
    ],
    limit: Annotated[int, typer.Option(min=0, help="the first so many images; 0 for all")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="images in one call")] = 1,
    rounds: options.Rounds = 3,
    output: options.Report = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw: accuracy against work")] = None,
    device: options.Device = "cpu",
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Evaluate masks and output strides on labelled images: accuracy, MACs and time beside the dense networks.

    A converted file keeps its own region, fill, patch, anchor and pool. Runs under accelerate launch and torchrun.
    """
    from cadsurgery.tasks.segmentation.evaluation import evaluate

    with screen.steps(as_json) as step:
        report = evaluate(
            model,
            data,
            mask,
            output_stride=[options.read_pair(text) for text in output_stride],
            options=conversion,
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
    screen.show_report(report, as_json)
    if report.failed:
        raise typer.Exit(1)
