"""Commands that measure networks: bench (time against work) and eval (accuracy or fidelity)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.tasks.options import Benchmark, Conversion

commands = typer.Typer()
MEASURED = (
    *("size", "batch", "output_stride", "region", "patch", "dtype", "device", "threads", "rounds"),
    *("processor_time", "runtime", "against", "smaller", "calibration"),
)


@commands.command()
@options.task("cadsurgery.tasks.bench:bench")
def bench(
    *,
    networks: Annotated[
        list[str],
        options.ArgumentOrOption(
            "torchvision or timm names, or module:function; or a file of another method (convert --method), which is "
            "measured alone",
            is_repeated=True,
        ),
    ],
    mask: Annotated[str, typer.Option(help="mask that ranks the patches for the budgets")] = DEFAULT_MASK,
    fractions: Annotated[
        str,
        typer.Option(
            parser=options.read_fractions,
            help="budgets: shares of the patches kept high; for a file with gates, of the open positions",
        ),
    ] = "1,0.5,0.34,0.25,0.1,0",
    fill: Annotated[
        list[str],
        typer.Option(
            help="nearest, linear, both or guided; repeatable",
            callback=lambda fills: ["nearest", "linear"] if "both" in fills else fills,
        ),
    ] = ["nearest"],  # noqa: B006
    benchmark: Annotated[
        dict[str, Any], options.OptionsFrom(Benchmark, MEASURED, defaults=("512x1024",), apart=True)
    ],
    picture: Annotated[Path | None, typer.Option(help="PNG to draw")] = None,
    output: Annotated[Path | None, options.output("JSON Lines to append each row to")] = None,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Measure time against work: random weights, budgets of the mask against the dense twins, interleaved.

    A file of another method is measured beside its original network; a file with gates also at shares of open
    positions.

    Time follows work if it is at most 1.06 times the straight line between the dense twins (1.14 with linear or
    guided fill in networks of dense convolutions). A miss is reported in words; the exit code stays 0.
    """


@commands.command("eval")
@options.task("cadsurgery.tasks.evaluation:evaluate")
def eval_command(
    *,
    network: options.Network,
    data: Annotated[
        str,
        typer.Option(
            help='labelled images: "folder:PATH,classes=11,ignore=11", cityscapes:PATH, voc:PATH, sbd:PATH, '
            "pets:PATH, or scene:COUNT (generated); or photos without labels, images:FOLDER"
        ),
    ],
    split: Annotated[str, typer.Option(help="train, val, test, or all for a folder without splits")] = "test",
    masks: Annotated[
        list[str],
        typer.Option(
            "--mask", help=f"repeatable; default: the file's, or {DEFAULT_MASK}; dense high and low are added"
        ),
    ] = [],  # noqa: B006
    output_stride: options.Strides = [],  # noqa: B006
    weights: options.Weights = "auto",
    options: Annotated[
        dict[str, Any],
        options.OptionsFrom(Conversion, ("region", "fill", "patch", "anchor", "pool", "normalisation")),
    ],
    limit: options.Limit = 0,
    batch: Annotated[int, typer.Option(min=1, help="images in one call")] = 1,
    rounds: options.Rounds = 3,
    thresholds: Annotated[
        list[Any],
        typer.Option(
            "--threshold",
            metavar="T[,T...]",
            parser=options.read_threshold,
            help="repeatable, for networks with exits: one number, or one per exit but the last; default: the file's",
        ),
    ] = [],  # noqa: B006
    kind: Annotated[
        str, typer.Option(help="kind of the outputs, for images without labels: auto, classes or values")
    ] = "auto",
    output: options.Report = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw: accuracy against work")] = None,
    device: options.Device = "cpu",
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Evaluate masks and output strides on images: accuracy, MACs and time beside the dense networks.

    Without labels (images:FOLDER) accuracy is fidelity: divergence from, and agreement with, the network's own
    outputs with everything kept high; for maps that are not class scores, the relative error.

    A converted file keeps its own region, fill, patch, anchor and pool. Runs under accelerate launch and torchrun.
    """
