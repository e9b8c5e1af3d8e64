"""The command `finetune`, which trains a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cadsurgery.cli import options
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.tasks.options import Settings

commands = typer.Typer()
SETTINGS = (
    *("steps", "batch", "accumulate", "crop", "lr", "optimizer", "clip", "batch_norm", "freeze", "train"),
    *("ema", "precision", "seed", "save_every", "validate_every", "log", "workers"),
)


@commands.command()
@options.task("cadsurgery.finetune.command:finetune")
def finetune(
    *,
    model: options.Network,
    data: Annotated[
        str, typer.Option(help="training data: folder:PATH, ..., or photos without labels, images:FOLDER")
    ],
    output: options.RunFolder,
    split: Annotated[str, typer.Option(help="split for training")] = "train",
    validation_split: Annotated[str, typer.Option(help="split for validation; empty for none")] = "val",
    mask: Annotated[str, typer.Option(help=f"default: the file's, or {DEFAULT_MASK}")] = "",
    weights: options.Weights = "auto",
    options: options.Converted,
    objective: Annotated[dict[str, Any], options.OptionsFrom(Settings, ("objective",), given=True)],
    objective_option: Annotated[
        list[str], typer.Option(help="NAME=VALUE for the objective, e.g. teacher=self; repeatable")
    ] = [],  # noqa: B006
    settings: Annotated[dict[str, Any], options.OptionsFrom(Settings, SETTINGS, given=True)],
    config: Annotated[
        Path | None, typer.Option(help="JSON file of settings; options on the command line override it")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="continue the run in the folder; otherwise refuse a folder with a run")
    ] = True,
    device: Annotated[str, typer.Option(help="auto or cpu")] = "auto",
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Train a network on mixed resolution, and write it to OUTPUT/net.safetensors.

    Without labels (--data images:FOLDER) the network learns from its own outputs with everything kept high, and
    validation compares with these; of a folder without splits, every eighth image is for validation.

    The defaults are the published settings. An interrupted run continues exactly where it stopped when the command is
    given again. Several processes: torchrun --nproc_per_node N -m cadsurgery.cli finetune ..., with --device cpu
    on the CPU.

    Options of objectives (--objective-option NAME=VALUE), described in docs/reference/objectives.md:

    divergence: teacher (initial or self), temperature, weight, supervision, kind (classes, values or auto).

    any-budget: the same options, and low, high, fractions, extremes, ranking (own, random or a mask).

    blend: statistics (separate or shared), share (balanced or published), weight, network (blend, mixed or fixed),
    distil, supervision.
    """
